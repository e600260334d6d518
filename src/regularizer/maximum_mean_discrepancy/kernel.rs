//! Kernels of squared distances, and their bandwidths.

use tch::{Device, Kind, Tensor};

use crate::arithmetic::{Arithmetic, filled};
use crate::error::{Error, Result};
use crate::numeric::batch_size;
use crate::value::{checked, is_positive};

/// Keeps kernels finite when all points coincide; far below any distance between data.
const SMALLEST: f64 = 1e-20;
/// The median is taken over the pairs of at most this many points, so that its memory is bounded.
const MEDIAN_POINTS: i64 = 1024;

/// A kernel k(d) of the distance d between two feature vectors.
///
/// A mixture is the *mean* over its scales, so that k(0) = 1 and the biased estimate lies in [0, 2]
/// however many there are. The implementations of DAN and WAE *sum* over scales: multiply their
/// weights by the number of scales.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Kernel {
    /// `mean over s of exp(-d^2 / (s b))`: radial basis functions. Local: far beyond the bandwidth
    /// its gradient vanishes.
    Gaussian {
        /// b, the unit of squared distance.
        bandwidth: Bandwidth,
        /// The multiples s of it, positive.
        scales: Vec<f64>,
    },
    /// `mean over s of s b / (s b + d^2)`: heavy tails, which still pull from far away.
    InverseMultiquadric {
        /// b, the unit of squared distance.
        bandwidth: Bandwidth,
        /// The multiples s of it, positive.
        scales: Vec<f64>,
    },
    /// `-d`: the discrepancy is the energy distance `2 E|x - y| - E|x - x'| - E|y - y'|`, in the
    /// units of the features. Nothing to tune. At d = 0 the gradient is taken as 0.
    Energy,
}

/// The unit of squared distance in a kernel. Measured ones are recomputed on every call from x and
/// the real samples pooled, and carry no gradient: x cannot lower the loss by changing the unit.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Bandwidth {
    /// The median of d^2 over pairs of different points (Gretton et al. 2012); robust against
    /// outliers. Of more than 1024 points, evenly spaced ones are taken.
    Median,
    /// The mean of d^2 over all pairs of different points, as in DAN (Long et al. 2015).
    Mean,
    /// A given one, in squared units of the features.
    Fixed(f64),
}

impl Kernel {
    /// Five radial basis functions around the median distance, with the scales 1/4, 1/2, 1, 2, 4 of DAN's
    /// code (factor 2, five kernels).
    #[must_use]
    pub fn gaussian() -> Self {
        let scales = vec![0.25, 0.5, 1.0, 2.0, 4.0];
        Self::Gaussian { bandwidth: Bandwidth::Median, scales }
    }

    /// Seven inverse multiquadrics around the mean distance, with the scales 0.1 to 10 of WAE's code
    /// (Tolstikhin et al. 2018); its unit `2 dim sigma^2` is the mean of d^2 under its
    /// prior.
    #[must_use]
    pub fn inverse_multiquadric() -> Self {
        let scales = vec![0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0];
        Self::InverseMultiquadric { bandwidth: Bandwidth::Mean, scales }
    }

    pub(super) fn check(&self) -> Result<()> {
        let (Self::Gaussian { bandwidth, scales }
        | Self::InverseMultiquadric { bandwidth, scales }) = self
        else {
            return Ok(());
        };
        let unit = if let Bandwidth::Fixed(b) = *bandwidth {
            checked("kernel bandwidth", "finite and positive", b, is_positive(b))?
        } else {
            1.0
        };
        if scales.is_empty() {
            let (what, requirement) = ("number of kernel scales", "at least 1");
            return Err(Error::OutOfRange { what, requirement, value: 0.0 });
        }
        for &scale in scales {
            let valid = is_positive(scale) && is_positive(scale * unit);
            checked("kernel scale", "finite and positive, times the bandwidth too", scale, valid)?;
        }
        Ok(())
    }

    /// k(0).
    pub(super) fn at_zero(&self) -> f64 {
        match self {
            Self::Gaussian { .. } | Self::InverseMultiquadric { .. } => 1.0,
            Self::Energy => 0.0,
        }
    }

    /// The bandwidth for features x `[m, D]` and y `[n, D]`, a scalar; 1 where there is none.
    pub(super) fn measure(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let bandwidth = match self {
            Self::Gaussian { bandwidth, .. } | Self::InverseMultiquadric { bandwidth, .. } => {
                *bandwidth
            }
            Self::Energy => Bandwidth::Fixed(1.0),
        };
        let options: (Kind, Device) = (x.f_kind()?, x.device());
        let squared = match bandwidth {
            Bandwidth::Fixed(b) => filled(&[], b, options)?,
            Bandwidth::Median => {
                let points = Tensor::f_cat(&[x, y], 0)?;
                let count = batch_size(&points);
                let step = count.saturating_sub(1).checked_div(MEDIAN_POINTS).unwrap_or(0);
                let points = points.f_slice(0, None, None, step.saturating_add(1))?;
                points.f_pdist(2.0)?.f_median()?.f_square()?
            }
            // The mean over pairs is twice the variance, summed over features.
            Bandwidth::Mean => Tensor::f_cat(&[x, y], 0)?
                .f_var_dim(&[0i64][..], true, false)?
                .f_sum(None::<Kind>)?
                .times(2.0)?,
        };
        Ok(squared.at_least(SMALLEST)?)
    }

    /// k and its derivative in d^2, at squared distances.
    pub(super) fn evaluate(&self, squared: &Tensor, unit: &Tensor) -> Result<(Tensor, Tensor)> {
        match self {
            Self::Gaussian { scales, .. } => mixture(squared, unit, scales, |width| {
                let mut exponent = squared.f_mul(&width.f_reciprocal()?.f_neg()?)?;
                let value = exponent.f_exp_()?;
                let fall = value.f_div(width)?;
                Ok((value, fall))
            }),
            Self::InverseMultiquadric { scales, .. } => mixture(squared, unit, scales, |width| {
                let value = squared.f_add(width)?.f_reciprocal_()?.f_mul_(width)?;
                let fall = value.f_square()?.f_div_(width)?;
                Ok((value, fall))
            }),
            Self::Energy => {
                let distance = squared.f_sqrt()?;
                // Where d = 0 the slope multiplies a zero difference.
                let slope = distance.at_least(SMALLEST)?.f_reciprocal()?.times(-0.5)?;
                Ok((distance.f_neg()?, slope))
            }
        }
    }
}

/// The mean over scales of a kernel and of its derivative. `part` gives the value and the fall, the negative
/// of the derivative, at one width.
fn mixture(
    squared: &Tensor,
    unit: &Tensor,
    scales: &[f64],
    part: impl Fn(&Tensor) -> Result<(Tensor, Tensor)>,
) -> Result<(Tensor, Tensor)> {
    let (mut value, mut slope) = (squared.f_zeros_like()?, squared.f_zeros_like()?);
    for &scale in scales {
        let (own, fall) = part(&unit.times(scale)?)?;
        (value, slope) = (value.f_add_(&own)?, slope.f_sub_(&fall)?);
    }
    let share = 1.0 / scales.len() as f64;
    Ok((value.times_(share)?, slope.times_(share)?))
}
