//! Powers of uniform times.

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::widen;
use crate::renoising::TimeDistribution;
use crate::time::PreShift;
use crate::value::Positive;

/// `t = u^power` with u uniform: above 1 the times gather at the noise end, below 1 at the clean end.
///
/// The first stage of ADM (ADP, arXiv 2507.18569, by a page of notes) trains its student at the times of
/// `Power::new(3.0)`, in its own clock `(1 - u^3) T`; its critic's times are even.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct Power(Positive);

impl Power {
    /// With the exponent `power`; 1 is [`Uniform::FULL`](crate::Uniform::FULL).
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `power` is finite and positive.
    pub fn new(power: f64) -> Result<Self> {
        Positive::new("power of the times", power).map(Self)
    }
}

impl TimeDistribution for Power {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        Ok(PreShift::within(widen(u)?.power(self.0.get())?, (0.0, 1.0)))
    }
}
