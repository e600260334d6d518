//! Logit-normal re-noising times.

use tch::{Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::compute_kind;
use crate::renoising::{TimeDistribution, Z_MAX, normal_quantile};
use crate::time::PreShift;
use crate::value::checked;

/// The distance of logit-normal times from both ends, for all parameters: float32 still tells them from 0
/// and 1.
const OPEN_END: f64 = 1.0 / 16_777_216.0;

/// `t = sigmoid(mean + std z)` with z standard normal (SD3). A positive mean favours the clean end: where
/// t is the noise level, as in SD3 and LADD, the mean has the other sign.
///
/// z is clamped to 5.5 and t to 2^-24 off 0 and 1, so that no draw gives an end of the path.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "super::config::LogitNormal"))]
pub struct LogitNormal {
    mean: f64,
    std: f64,
}

impl LogitNormal {
    /// MeanFlow's times (arXiv 2505.13447), whose own clock has the mean -0.4.
    pub const MEAN_FLOW: Self = Self { mean: 0.4, std: 1.0 };

    /// With the mean and standard deviation of the logit of t.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `mean` is finite and `std` finite and
    /// positive.
    pub fn new(mean: f64, std: f64) -> Result<Self> {
        checked("mean of the logit", "finite", mean, mean.is_finite())?;
        let valid = std.is_finite() && std > 0.0;
        checked("standard deviation of the logit", "finite and positive", std, valid)?;
        Ok(Self { mean, std })
    }
}

impl TimeDistribution for LogitNormal {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        let z = normal_quantile(&u.f_to_kind(Kind::Double)?)?;
        let logit = z.times(self.std)?.plus(self.mean)?;
        let times = logit.f_sigmoid()?.within(OPEN_END, 1.0 - OPEN_END)?;
        let end = |z: f64| {
            let logit = self.mean + self.std * z;
            (1.0 / (1.0 + (-logit).exp())).clamp(OPEN_END, 1.0 - OPEN_END)
        };
        let times = times.f_to_kind(compute_kind(u.f_kind()?))?;
        Ok(PreShift::within(times, (end(-Z_MAX), end(Z_MAX))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn logit_normal_has_the_stated_median_and_quartile() -> Result<()> {
        let distribution = LogitNormal::new(1.0, 2.0)?;
        let times =
            distribution.times(&Tensor::from_slice(&[0.5, 0.841_344_746_068_542_9]), None)?;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (value, logit) in values(times.tensor()).into_iter().zip([1.0, 3.0]) {
            approx::assert_abs_diff_eq!(value, sigmoid(logit), epsilon = 1e-9);
        }
        Ok(())
    }

    #[test]
    fn the_ends_of_the_draw_stay_off_the_ends_of_the_path() -> Result<()> {
        let u = [0.0, f64::from(f32::EPSILON) / 4.0, 0.5, 1.0 - f64::from(f32::EPSILON) / 2.0, 1.0];
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            let u = Tensor::from_slice(&u).to_kind(kind);
            for (mean, std) in [(0.0, 1.0), (-3.0, 2.0), (40.0, 1.0), (-1e300, 1e3), (0.0, 1e300)] {
                let times = LogitNormal::new(mean, std)?.times(&u, None)?;
                let (low, high) = times.range();
                assert!(low > 0.0 && high < 1.0, "{mean} {std}");
                for t in values(times.tensor()) {
                    assert!(t > 0.0 && t < 1.0, "{mean} {std} {kind:?}: {t}");
                    assert!(t >= low - 1e-7 && t <= high + 1e-7, "{t} in {low} {high}");
                }
            }
        }
        Ok(())
    }
}
