//! The decay of the student's learning rate.

use serde::{Deserialize, Serialize};

/// How the learning rate of the student falls after its warm-up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// It stays, and falls linearly to zero over the last third of the updates, which takes the noise of single
    /// updates out of the result.
    #[default]
    LastThird,
    /// It falls linearly to zero over all updates.
    Linear,
    /// It falls to zero as half a cosine over all updates.
    Cosine,
    /// It stays.
    None,
}

impl Decay {
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// The share of the learning rate that is left at an update, of so many.
    pub(in crate::distil) fn left(self, update: u64, updates: u64) -> f64 {
        let rest = updates.saturating_sub(update) as f64;
        let all = updates.max(1) as f64;
        match self {
            Self::LastThird => (rest / (updates / 3).max(1) as f64).min(1.0),
            Self::Linear => rest / all,
            Self::Cosine => 0.5 - 0.5 * (std::f64::consts::PI * rest / all).cos(),
            Self::None => 1.0,
        }
    }
}
