//! Composable losses for distilling a many-step diffusion model into a few-step generator.
