//! Mean-variance regularization: every sample keeps the average statistics of the data.

use tch::{Kind, Tensor};

use crate::numeric::{check_like, check_samples, widen};
use crate::value::checked;
use crate::{Error, Probe, Regularizer, Result};

/// Over what the mean and the variance of a sample are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Statistics {
    /// One mean and one variance for each sample (Eq. 7).
    PerSample,
    /// One of each for every channel of a sample `[B, C, ..]`.
    PerChannel,
}

/// The non-parametric regularizer: the KL divergence between two Gaussians, one with the statistics
/// of a generated sample and one with those of the data.
///
/// ```text
/// 0.5 mean [ (v + (m - mu)^2) / var - 1 - ln(v / var) ]
/// ```
/// Eq. 7 of Decoupled DMD (arXiv 2511.22677), with m and v the mean and variance of one sample, or
/// of one channel of it. Zero with zero gradient exactly where they meet the target. It needs no
/// network, stabilises CFG Augmentation, and is blind to structure.
///
/// | parameter | meaning | source |
/// |---|---|---|
/// | `mean`, `variance` | the target: average m and v over real samples | SDXL latents: 0.075 and 0.81 |
/// | [`floor`](Self::floor) | smallest v, so that the gradient of a constant sample stays bounded | 1e-6 |
///
/// # Shapes
/// x `[B, ..]`, for channels `[B, C, ..]` with at least one more axis, to a scalar.
///
/// # Forwards
/// None.
///
/// # Errors
/// [`Error::Shape`] if the samples have no channels or not as many as the target.
///
/// # Example
/// ```
/// use decoupled_dmd::MeanVariance;
/// let sdxl = MeanVariance::per_sample(0.075, 0.81)?;
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct MeanVariance {
    statistics: Statistics,
    /// `[]` or `[C]`, in float64.
    mean: Tensor,
    variance: Tensor,
    floor: f64,
}

impl MeanVariance {
    /// One target for every sample as a whole.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `mean` is finite and `variance` finite and positive.
    pub fn per_sample(mean: f64, variance: f64) -> Result<Self> {
        let target = |value: f64| Tensor::from(value);
        Self::checked(Statistics::PerSample, target(mean), target(variance))
    }

    /// A target for every channel: `[C]` each, on any device.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless both are `[C]` and floating point;
    /// [`Error::OutOfRange`] unless means are finite and variances finite and positive.
    pub fn per_channel(mean: &Tensor, variance: &Tensor) -> Result<Self> {
        check_samples("target mean", mean, 1)?;
        if mean.dim() != 1 {
            return Err(Error::shape("target mean", "[C]", &mean.size()));
        }
        check_like("target variance", variance, mean)?;
        Self::checked(Statistics::PerChannel, mean.f_detach()?, variance.f_detach()?)
    }

    /// The target measured on real samples `[M, ..]`: the averages of m and v over them.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless they are samples with channels where needed.
    pub fn measured(real: &Tensor, statistics: Statistics) -> Result<Self> {
        check_samples("real samples", real, 2)?;
        let (mean, variance) = moments(&real.f_detach()?, statistics)?;
        let over_batch = |t: Tensor| t.f_mean_dim(&[0i64][..], false, Kind::Double);
        Self::checked(statistics, over_batch(mean)?, over_batch(variance)?)
    }

    /// Sets the smallest variance of a sample that the loss tells apart from zero.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless finite and positive.
    pub fn floor(mut self, floor: f64) -> Result<Self> {
        let valid = floor.is_finite() && floor > 0.0;
        self.floor = checked("variance floor", "finite and positive", floor, valid)?;
        Ok(self)
    }

    /// The target mean and variance, `[]` or `[C]`.
    pub fn target(&self) -> (&Tensor, &Tensor) {
        (&self.mean, &self.variance)
    }

    fn checked(statistics: Statistics, mean: Tensor, variance: Tensor) -> Result<Self> {
        let smallest = variance.f_min()?.f_double_value(&[])?;
        let sums = [mean.f_sum(Kind::Double)?, variance.f_sum(Kind::Double)?];
        for (sum, what) in sums.iter().zip(["target mean", "target variance"]) {
            let sum = sum.f_double_value(&[])?;
            checked(what, "finite", sum, sum.is_finite())?;
        }
        checked("target variance", "positive", smallest, smallest > 0.0)?;
        Ok(Self {
            statistics,
            mean: mean.f_to_kind(Kind::Double)?,
            variance: variance.f_to_kind(Kind::Double)?,
            floor: 1e-6,
        })
    }
}

/// Mean and (biased) variance, `[B]` or `[B, C]`.
fn moments(x: &Tensor, statistics: Statistics) -> Result<(Tensor, Tensor)> {
    let first_axis = match statistics {
        Statistics::PerSample => 1,
        Statistics::PerChannel => 2,
    };
    if x.dim() <= first_axis {
        return Err(Error::shape("x", "[B, C, ..] with an axis after the channels", &x.size()));
    }
    let flat = widen(x)?.f_flatten(i64::try_from(first_axis).unwrap_or(1), -1)?;
    let mean = flat.f_mean_dim(&[-1i64][..], false, None::<Kind>)?;
    let variance = flat.f_var_dim(&[-1i64][..], false, false)?;
    Ok((mean, variance))
}

impl Regularizer for MeanVariance {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let (mean, variance) = moments(probe.x(), self.statistics)?;
        let channels = self.mean.size();
        if !channels.is_empty() && mean.size().get(1..) != Some(&channels) {
            let expected = format!("[B, {channels:?}, ..] as the target");
            return Err(Error::shape("x", expected, &probe.x().size()));
        }
        let like_mean = |t: &Tensor| t.f_to_device(mean.device())?.f_to_kind(mean.f_kind()?);
        let (target_mean, target_variance) = (like_mean(&self.mean)?, like_mean(&self.variance)?);
        let variance = variance.f_clamp_min(self.floor)?;
        let ratio = variance.f_div(&target_variance)?;
        let offset = mean.f_sub(&target_mean)?.f_square()?.f_div(&target_variance)?;
        let divergence = ratio.f_add(&offset)?.f_sub_scalar(1.0)?.f_sub(&ratio.f_log()?)?;
        Ok(divergence.f_mean(None::<Kind>)?.f_mul_scalar(0.5)?)
    }
}
