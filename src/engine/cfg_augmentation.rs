//! CFG Augmentation (CA): the part of the DMD gradient that comes from guidance.

use tch::Tensor;

use crate::{Engine, Guidance, Probe, Result};

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
/// # Shapes
/// x `[B, ..]` to a direction `[B, ..]` in float32 or wider.
///
/// # Forwards
/// Teacher: conditional and null at the probe's tau; none at all if the guidance is neutral, where
/// the direction is exactly zero.
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
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct CfgAugmentation {
    guidance: Guidance,
}

impl CfgAugmentation {
    /// With the guidance scale to bake in.
    #[must_use]
    pub fn new(guidance: Guidance) -> Self {
        Self { guidance }
    }

    /// The guidance scale.
    pub fn guidance(&self) -> Guidance {
        self.guidance
    }
}

impl Engine for CfgAugmentation {
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        if self.guidance.is_neutral() {
            return Ok(probe.noised().f_zeros_like()?);
        }
        let (cond, null) = probe.pair()?;
        probe.direction(cond, null, self.guidance.w())
    }
}
