//! The Z-Image transformer (S3-DiT), its files, and the memory that its training takes.

mod blocks;
mod config;
mod files;
mod grid;
mod layout;
mod memory_plan;
mod pipeline;
mod role;
mod rope;
mod transformer;

pub use blocks::time_features;
pub(crate) use blocks::{Block, Linear, RmsNorm};
pub use config::{Config, is_caption_side};
pub use grid::{Grid, padded};
pub(crate) use layout::Sequence;
pub use layout::{patchify, unpatchify};
pub use memory_plan::{MemoryPlan, Part, TrainingSetup};
pub(crate) use pipeline::INDEX;
pub use pipeline::{Pipeline, fingerprint_model, loading_bar, read_config, read_shift};
pub(crate) use role::OwnedRole;
pub use role::Role;
pub use rope::rotary_factors;
pub use transformer::ZImageTransformer;
