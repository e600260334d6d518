//! TrigFlow, the path on the unit circle.

use std::f64::consts::FRAC_PI_2;

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::checks::check_clock;
use crate::error::Result;
use crate::path::{Coefficients, NoisePath, wide_time};
use crate::time::PostShift;

/// TrigFlow: a = cos(angle), s = sin(angle), with the angle `pi/2 (1 - t)` in [0, pi/2].
///
/// For data of unit standard deviation: divide other data by their own, as sCM does by its `sigma_d`.
/// Lu & Song, arXiv 2410.11081, Section 3; used by sCM. Its network output F has
/// `x0 = cos(angle) x_t - sin(angle) F`: that is [`Velocity`](crate::Prediction::Velocity), which is
/// singular nowhere. sCM's networks are fed the [`angle`](Self::angle).
///
/// rCM draws its times on this path, but its networks are Wan's: wrap them on
/// [`RectifiedFlow`](crate::RectifiedFlow), as in the guide's table of models.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct TrigFlow;

impl TrigFlow {
    /// The angle in radians for times `t` `[B]` in [0, 1] on the crate's clock, or per frame, as a network
    /// closure receives them; in float64, shaped like them.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) unless `t` is `[B]`
    /// or of frames, as [`PostShift`], and floating point.
    pub fn angle(&self, t: &Tensor) -> Result<Tensor> {
        check_clock("t", t)?;
        Ok(wide_time(t)?.complement()?.times(FRAC_PI_2)?)
    }
}

impl NoisePath for TrigFlow {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        // cos(pi/2 (1 - t)) as a sine: exactly zero at the noise end, and precise near it.
        let data = wide_time(time.tensor())?.times(FRAC_PI_2)?.f_sin()?;
        Ok(Coefficients { data, noise: self.angle(time.tensor())?.f_sin()? })
    }
}
