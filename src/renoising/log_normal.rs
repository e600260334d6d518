//! Re-noising times of EDM.

use tch::{Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::compute_kind;
use crate::path::Edm;
use crate::renoising::{TimeDistribution, Z_MAX, normal_quantile};
use crate::time::PreShift;
use crate::value::checked;

/// The times at which EDM trains: ln sigma ~ N(mean, std^2), brought into the range of the path.
///
/// Karras et al., arXiv 2206.00364, Table 1, with mean -1.2 and std 1.2, the default here. The times
/// belong to an [`Edm`] path and need no shift.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "config::LogNormal"))]
pub struct LogNormal {
    path: Edm,
    mean: f64,
    std: f64,
}

impl Default for LogNormal {
    fn default() -> Self {
        Self { path: Edm::default(), mean: -1.2, std: 1.2 }
    }
}

impl LogNormal {
    /// With the mean and standard deviation of ln sigma on `path`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `mean` is finite and `std` finite and
    /// positive.
    pub fn new(path: Edm, mean: f64, std: f64) -> Result<Self> {
        checked("mean of ln sigma", "finite", mean, mean.is_finite())?;
        let valid = std.is_finite() && std > 0.0;
        checked("standard deviation of ln sigma", "finite and positive", std, valid)?;
        Ok(Self { path, mean, std })
    }
}

/// The form of the distribution in a configuration; numbers left out are EDM's.
#[cfg(feature = "serde")]
mod config {
    use crate::error::{Error, Result};
    use crate::path::Edm;

    #[derive(serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    pub(super) struct LogNormal {
        path: Edm,
        mean: f64,
        std: f64,
    }

    impl Default for LogNormal {
        fn default() -> Self {
            let super::LogNormal { path, mean, std } = super::LogNormal::default();
            Self { path, mean, std }
        }
    }

    impl TryFrom<LogNormal> for super::LogNormal {
        type Error = Error;
        fn try_from(LogNormal { path, mean, std }: LogNormal) -> Result<Self> {
            Self::new(path, mean, std)
        }
    }
}

impl TimeDistribution for LogNormal {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        let Self { path, mean, std } = self;
        // A larger draw is a cleaner time, as in the other distributions.
        let z = normal_quantile(&u.f_to_kind(Kind::Double)?)?.f_neg()?;
        let sigma = z.times(*std)?.plus(*mean)?.f_exp()?;
        let times = path.times_near(&sigma)?;
        let end = |z: f64| path.time_near((mean + std * z).exp());
        let times = times.f_to_kind(compute_kind(u.f_kind()?))?;
        Ok(PreShift::within(times, (end(Z_MAX), end(-Z_MAX))))
    }
}
