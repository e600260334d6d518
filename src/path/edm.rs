//! The variance-exploding path of EDM, its preconditioning and its training times.

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::checks::{check_clock, check_like, check_samples, check_times};
use crate::error::Result;
use crate::network::IntoOutput;
use crate::numeric::widen;
use crate::path::{Coefficients, NoisePath, factor, wide_time};
use crate::time::PostShift;
use crate::value::{checked, is_finite, is_positive};

/// EDM: a = 1, s = sigma, with
///
/// ```text
/// sigma(t) = (sigma_max^(1/rho) + t (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho
/// ```
/// Karras et al., arXiv 2206.00364, Eq. 5: even times are the sampling grid of EDM. sigma is
/// sigma_max at t = 0 and sigma_min at t = 1, and defaults are 0.002, 80 and 7. Used by EDM's
/// models of CIFAR-10 and ImageNet, and with them by DMD2. Both ends are above zero, so no prediction
/// is singular; generation [starts](NoisePath::start) from `sigma_max eps`.
///
/// EDM's networks are wrapped, so that the result predicts the clean sample:
///
/// ```
/// # use decoupled_dmd::{Condition, Denoiser, Edm, Prediction};
/// # use tch::Tensor;
/// # struct Net; impl Net { fn forward(&self, x: &Tensor, t: &Tensor, _: &Tensor) -> Tensor { x * t.view([-1, 1]) } }
/// # let net = Net;
/// let path = Edm::default();
/// let teacher = Denoiser::new(path, Prediction::Sample, |x, t, cond: &Condition| {
///     path.preconditioning(t, 0.5)?.apply(x, |x, c_noise| net.forward(x, c_noise, &cond[0]))
/// });
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "config::Edm"))]
pub struct Edm {
    sigma_min: f64,
    sigma_max: f64,
    rho: f64,
}

impl Default for Edm {
    /// 0.002, 80 and 7, as in the paper.
    fn default() -> Self {
        Self { sigma_min: 0.002, sigma_max: 80.0, rho: 7.0 }
    }
}

impl Edm {
    /// From `sigma_min` at t = 1 to `sigma_max` at t = 0, in units of the data.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless 0 < `sigma_min` < `sigma_max`, `rho` >= 1,
    /// all finite, and the roots of both sigmas differ in float64.
    pub fn new(sigma_min: f64, sigma_max: f64, rho: f64) -> Result<Self> {
        let valid = is_positive(sigma_min);
        checked("sigma_min", "finite and positive", sigma_min, valid)?;
        let valid = is_positive(sigma_max) && sigma_max > sigma_min;
        checked("sigma_max", "finite and above sigma_min", sigma_max, valid)?;
        checked("rho", "finite and at least 1", rho, is_finite(rho) && rho >= 1.0)?;
        let path = Self { sigma_min, sigma_max, rho };
        let (low, high) = path.roots();
        checked("rho", "small enough to tell the roots of sigma apart", rho, low < high)?;
        Ok(path)
    }

    /// sigma for times `t` `[B]` in [0, 1] on the crate's clock, or per frame, as a network closure receives
    /// them; in float64, shaped like them.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) unless `t` is `[B]` or of
    /// frames, as [`PostShift`], and floating point.
    pub fn sigma(&self, t: &Tensor) -> Result<Tensor> {
        check_clock("t", t)?;
        let (low, high) = self.roots();
        let root = wide_time(t)?.times(low - high)?.plus(high)?;
        Ok(root.power(self.rho)?)
    }

    /// The crate's time at which sigma is `sigma`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `sigma` is in [sigma_min, sigma_max].
    pub fn time_of(&self, sigma: f64) -> Result<f64> {
        let valid = (self.sigma_min..=self.sigma_max).contains(&sigma);
        checked("sigma", "in [sigma_min, sigma_max]", sigma, valid).map(|s| self.time_near(s))
    }

    /// The factors that EDM puts around a network, at times `t` `[B]` as a network closure receives
    /// them. `sigma_data` is the standard deviation of the data, 0.5 in EDM.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `sigma_data` is finite and positive; as
    /// [`sigma`](Self::sigma) for `t`.
    pub fn preconditioning(&self, t: &Tensor, sigma_data: f64) -> Result<Preconditioning> {
        let valid = is_positive(sigma_data);
        checked("sigma_data", "finite and positive", sigma_data, valid)?;
        let sigma = self.sigma(t)?;
        let variance = sigma.f_square()?.plus(sigma_data * sigma_data)?;
        Ok(Preconditioning {
            skip: variance.f_reciprocal()?.times(sigma_data * sigma_data)?,
            output: sigma.times(sigma_data)?.f_mul(&variance.f_rsqrt()?)?,
            input: variance.f_rsqrt()?,
            noise: sigma.f_log()?.times(0.25)?,
        })
    }

    /// The times `[B]` of sigmas `[B]`, which are first clamped to their range.
    pub(crate) fn times_near(&self, sigma: &Tensor) -> Result<Tensor> {
        let (low, high) = self.roots();
        let root = sigma.within(self.sigma_min, self.sigma_max)?;
        let root = root.power(self.rho.recip())?;
        Ok(root.minus(high)?.over(low - high)?.within(0.0, 1.0)?)
    }

    fn roots(&self) -> (f64, f64) {
        (self.sigma_min.powf(self.rho.recip()), self.sigma_max.powf(self.rho.recip()))
    }

    /// The time of one sigma, clamped likewise.
    pub(crate) fn time_near(&self, sigma: f64) -> f64 {
        let (low, high) = self.roots();
        ((high - sigma.powf(self.rho.recip())) / (high - low)).clamp(0.0, 1.0)
    }
}

impl NoisePath for Edm {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        let noise = self.sigma(time.tensor())?;
        Ok(Coefficients { data: noise.f_ones_like()?, noise })
    }
}

/// The form of the path in a configuration; numbers left out are the paper's.
#[cfg(feature = "serde")]
mod config {
    use crate::error::{Error, Result};

    #[derive(serde::Deserialize)]
    #[serde(default, deny_unknown_fields)]
    pub(super) struct Edm {
        sigma_min: f64,
        sigma_max: f64,
        rho: f64,
    }

    impl Default for Edm {
        fn default() -> Self {
            let super::Edm { sigma_min, sigma_max, rho } = super::Edm::default();
            Self { sigma_min, sigma_max, rho }
        }
    }

    impl TryFrom<Edm> for super::Edm {
        type Error = Error;
        fn try_from(Edm { sigma_min, sigma_max, rho }: Edm) -> Result<Self> {
            Self::new(sigma_min, sigma_max, rho)
        }
    }
}

/// EDM's preconditioning `D = c_skip x + c_out F(c_in x, c_noise)` at given times; each factor is
/// in float64 and shaped like them, `[B]` or per frame.
///
/// Karras et al., arXiv 2206.00364, Eq. 7 and Table 1, with v = sigma^2 + sigma_data^2. It makes
/// input and target of F of unit variance at every level.
#[derive(Debug)]
pub struct Preconditioning {
    /// c_skip = sigma_data^2 / v.
    pub skip: Tensor,
    /// c_out = sigma sigma_data / sqrt(v).
    pub output: Tensor,
    /// c_in = 1 / sqrt(v).
    pub input: Tensor,
    /// c_noise = ln(sigma) / 4.
    pub noise: Tensor,
}

impl Preconditioning {
    /// The clean sample `[B, ..]` that `network` implies at the noised sample `x` `[B, ..]`. The network
    /// is called once, with `c_in x` and `c_noise` `[B]`, both in float32 or wider.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `x` has one sample for each time, and the
    /// network's output is like it; errors of the network.
    pub fn apply<O: IntoOutput<Tensor>>(
        &self,
        x: &Tensor,
        network: impl FnOnce(&Tensor, &Tensor) -> O,
    ) -> Result<Tensor> {
        check_samples("x", x, 1)?;
        check_times("times of the preconditioning", &self.noise, x)?;
        let x = widen(x)?;
        let noise = self.noise.f_to_kind(x.f_kind()?)?;
        let output = network(&x.f_mul(&factor(&self.input, &x)?)?, &noise).into_result()?;
        check_like("network output", &output, &x)?;
        let output = output.f_to_kind(x.f_kind()?)?.f_mul(&factor(&self.output, &x)?)?;
        Ok(x.f_mul(&factor(&self.skip, &x)?)?.f_add(&output)?)
    }
}
