//! Rectified flow, the straight path.

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::widen;
use crate::path::{Coefficients, NoisePath};
use crate::time::PostShift;

/// Rectified flow: a = t, s = 1 - t.
///
/// The crate's clock is the path's own; `sigma = 1 - t` in diffusers, whose timestep is
/// `1000 sigma`. Liu et al., arXiv 2209.03003; in the clock `1 - t` in SD3, arXiv 2403.03206. Used by
/// SD3, FLUX, Wan, Qwen-Image and Z-Image, which predict
/// [`FlowVelocity`](crate::Prediction::FlowVelocity): it has no singular end here.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct RectifiedFlow;

impl NoisePath for RectifiedFlow {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        // A single rounding in the type of the time: float64 would not improve on it.
        let data = widen(time.tensor())?;
        let noise = data.complement()?;
        Ok(Coefficients { data, noise })
    }

    fn is_straight(&self) -> bool {
        true
    }
}
