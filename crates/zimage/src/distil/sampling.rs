//! How a model is sampled from.

use decoupled_dmd::{Guidance, Transition};
use serde::{Deserialize, Serialize};

/// How a model is run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    pub steps: usize,
    pub guidance: Guidance,
    pub transition: Transition,
}

impl Sampling {
    /// Network evaluations for one image.
    pub fn evaluations(self) -> usize {
        self.steps * if self.guidance.is_neutral() { 1 } else { 2 }
    }
}
