//! CFG Augmentation (CA): the part of the DMD gradient that comes from guidance.

use std::cell::Cell;

use tch::Tensor;

use crate::engine::Engine;
use crate::error::Result;
use crate::guidance::Guidance;
use crate::probe::Probe;

/// CFG Augmentation: bakes the teacher's guidance into the student.
///
/// ```text
/// direction = (alpha - 1) (x0_cond - x0_null) / n        at tau_CA
/// ```
/// Eq. 6 and 8 of Decoupled DMD (arXiv 2511.22677), in clean-sample space; n is the probe's
/// [`Normalizer`](crate::Normalizer). Alone it has no fixed point: the variance of the samples
/// grows until they break. Pair it with a regularizer.
///
/// | parameter | meaning | range |
/// |---|---|---|
/// | `guidance` | alpha | at least 1; DMD2 uses 8 for SDXL and 1.75 for SD 1.5 |
///
/// A guidance that is rescaled or acts within an interval gives the direction
/// `(x0_guided - x0_cond) / n`, of which the formula is the plain case.
///
/// # Shapes
/// x `[B, ..]` to a direction `[B, ..]` in float32 or wider.
///
/// # Forwards
/// Teacher: conditional and null at the probe's tau; none at all if the guidance is neutral, where
/// the direction is exactly zero.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, unless the normaliser is
/// [`over_batch`](crate::Normalizer::over_batch).
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) if the batch has no null condition.
///
/// # Example
/// ```
/// use decoupled_dmd::{CfgAugmentation, Guidance};
/// let engine = CfgAugmentation::new(Guidance::new(4.0)?);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CfgAugmentation {
    guidance: Cell<Guidance>,
}

impl CfgAugmentation {
    /// With the guidance scale to bake in.
    #[must_use]
    pub fn new(guidance: Guidance) -> Self {
        Self { guidance: Cell::new(guidance) }
    }

    /// The guidance scale.
    pub fn guidance(&self) -> Guidance {
        self.guidance.get()
    }

    /// Changes the guidance scale from the training loop: lend the term to its group (`&ca`).
    pub fn set_guidance(&self, guidance: Guidance) {
        self.guidance.set(guidance);
    }
}

impl Engine for CfgAugmentation {
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let guidance = self.guidance();
        if guidance.is_neutral() {
            return Ok(probe.noised().f_zeros_like()?);
        }
        let (cond, null) = probe.teacher_outputs()?;
        if guidance.is_plain() {
            return probe.normalize(cond.minus(null)?.times(guidance.w()));
        }
        probe.normalize(cond.guided(null, guidance)?.minus(cond)?)
    }
}
