//! Prediction types of networks, and their conversion to the clean sample.

use tch::Tensor;

use crate::error::Result;
use crate::path::NoisePath;
use crate::path::{Coefficients, coefficients_at};
use crate::time::PostShift;
use crate::value::checked;

/// The least share of data or noise by which a conversion divides.
const LEAST_DIVISOR: f64 = 1e-4;

/// The quantity that a network is trained to output, on a path `x_t = a x0 + s eps`.
///
/// | prediction | target | x0-hat | singular at |
/// |---|---|---|---|
/// | [`Sample`](Self::Sample) | x0 | as it is | |
/// | [`Noise`](Self::Noise) | eps | (x_t - s eps) / a | a = 0, the noise end |
/// | [`FlowVelocity`](Self::FlowVelocity) | eps - x0 | (x_t - s u) / (a + s) | |
/// | [`Velocity`](Self::Velocity) | a eps - s x0 | (a x_t - s v) / (a^2 + s^2) | |
/// | [`Score`](Self::Score) | -eps / s | (x_t + s^2 score) / a | a = 0; its target at s = 0, the clean end |
///
/// Conversions are computed in float32, or in float64 where the sample has it.
///
/// **Singular ends are refused**, with [`Error::OutOfRange`](crate::Error::OutOfRange), where the
/// divisor falls below 1e-4: there float32 rounding of x_t alone would spoil the third digit. The test is on
/// the range from which times are drawn, not on the times, which would have to be read from
/// the device: with [`Noise`](Self::Noise) on rectified flow, [`Uniform::FULL`](crate::Uniform::FULL)
/// fails always, not once in ten thousand steps, and `Uniform::new(0.02, 0.98)` never. Paths that do not
/// reach the end (SDXL's table, EDM) are never refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Prediction {
    /// The clean sample, x0.
    Sample,
    /// The noise, eps (DDPM, SDXL).
    Noise,
    /// eps - x0, the velocity of diffusers' flow models (SD3, FLUX). A network that outputs
    /// x0 - eps, as Z-Image's does, is negated in its closure.
    FlowVelocity,
    /// a eps - s x0, the v-prediction of Salimans & Ho.
    Velocity,
    /// The score, grad log p(x_t) = -eps / s.
    Score,
}

impl Prediction {
    /// All of them.
    pub const ALL: [Self; 5] =
        [Self::Sample, Self::Noise, Self::FlowVelocity, Self::Velocity, Self::Score];

    /// Refuses times at which the [`target`](Self::target) is singular.
    pub(crate) fn check_target(self, path: &dyn NoisePath, time: &PostShift) -> Result<()> {
        if self == Self::Score {
            let (_, s) = coefficients_at(path, time.range().1)?;
            let requirement = "at least 1e-4 to train a score: keep times off the clean end";
            checked("share of noise at the cleanest time", requirement, s, s >= LEAST_DIVISOR)?;
        }
        Ok(())
    }

    /// Refuses times at which the [`sample`](Self::sample) is singular.
    pub(crate) fn check_sample(self, path: &dyn NoisePath, time: &PostShift) -> Result<()> {
        if matches!(self, Self::Noise | Self::Score) {
            let (a, _) = coefficients_at(path, time.range().0)?;
            let requirement =
                "at least 1e-4 for a noise or score prediction: keep times off the noise end";
            checked("share of data at the noisiest time", requirement, a, a >= LEAST_DIVISOR)?;
        }
        Ok(())
    }

    /// Refuses times at which the flow velocity that another prediction implies is singular; evaluated on the
    /// host, at the cleanest.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if the share of noise there is below 1e-4.
    pub fn check_velocity(self, path: &dyn NoisePath, time: &PostShift) -> Result<()> {
        if self != Self::FlowVelocity {
            let (_, s) = coefficients_at(path, time.range().1)?;
            let requirement =
                "at least 1e-4 for the velocity of this prediction: keep times off the clean end";
            checked("share of noise at the cleanest time", requirement, s, s >= LEAST_DIVISOR)?;
        }
        Ok(())
    }

    /// The training target for the pair (x0, eps) at the given coefficients.
    pub(crate) fn target(
        self,
        Coefficients { data: a, noise: s }: &Coefficients,
        x0: &Tensor,
        noise: &Tensor,
    ) -> Result<Tensor> {
        Ok(match self {
            Self::Sample => x0.shallow_clone(),
            Self::Noise => noise.shallow_clone(),
            Self::FlowVelocity => noise.f_sub(x0)?,
            Self::Velocity => noise.f_mul(a)?.f_sub(&x0.f_mul(s)?)?,
            Self::Score => noise.f_div(s)?.f_neg()?,
        })
    }

    /// The clean sample that the output of a network implies.
    pub(crate) fn sample(
        self,
        is_straight: bool,
        at: &Coefficients,
        noised: &Tensor,
        output: &Tensor,
    ) -> Result<Tensor> {
        let Coefficients { data: a, noise: s } = at;
        // `x + factor * output`, then the division in place: one new tensor, not three.
        let quotient = |x: &Tensor, factor: &Tensor, divisor: &Tensor| -> Result<Tensor> {
            Ok(x.f_addcmul(output, factor)?.f_div_(divisor)?)
        };
        Ok(match self {
            Self::Sample => output.shallow_clone(),
            Self::Noise => quotient(noised, &s.f_neg()?, a)?,
            Self::FlowVelocity if is_straight => noised.f_addcmul(output, &s.f_neg()?)?,
            Self::FlowVelocity => quotient(noised, &s.f_neg()?, &a.f_add(s)?)?,
            Self::Velocity => quotient(&noised.f_mul(a)?, &s.f_neg()?, &square_norm(at)?)?,
            Self::Score => quotient(noised, &s.f_square()?, a)?,
        })
    }

    /// The factors A and B of the clean sample `A x_t + B output`, shaped like the coefficients; at a singular
    /// end they are not finite.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn conversion(self, at: &Coefficients) -> Result<(Tensor, Tensor)> {
        let Coefficients { data: a, noise: s } = at;
        Ok(match self {
            Self::Sample => (a.f_zeros_like()?, a.f_ones_like()?),
            Self::Noise => (a.f_reciprocal()?, s.f_neg()?.f_div(a)?),
            Self::FlowVelocity => {
                let sum = a.f_add(s)?;
                (sum.f_reciprocal()?, s.f_neg()?.f_div(&sum)?)
            }
            Self::Velocity => {
                let norm = square_norm(at)?;
                (a.f_div(&norm)?, s.f_neg()?.f_div(&norm)?)
            }
            Self::Score => (a.f_reciprocal()?, s.f_square()?.f_div(a)?),
        })
    }

    /// The factor of a change of the output in the [`sample`](Self::sample), which is affine in the output;
    /// `None` for 1.
    pub(crate) fn slope(self, is_straight: bool, at: &Coefficients) -> Result<Option<Tensor>> {
        let Coefficients { data: a, noise: s } = at;
        Ok(match self {
            Self::Sample => None,
            Self::Noise => Some(s.f_neg()?.f_div(a)?),
            Self::FlowVelocity if is_straight => Some(s.f_neg()?),
            Self::FlowVelocity => Some(s.f_neg()?.f_div(&a.f_add(s)?)?),
            Self::Velocity => Some(s.f_neg()?.f_div(&square_norm(at)?)?),
            Self::Score => Some(s.f_square()?.f_div(a)?),
        })
    }
}

/// a^2 + s^2, which is 1 on some paths.
fn square_norm(Coefficients { data: a, noise: s }: &Coefficients) -> Result<Tensor> {
    Ok(a.f_square()?.f_add(&s.f_square()?)?)
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::path::RectifiedFlow;

    #[test]
    fn the_target_of_every_prediction_leads_back_to_the_sample() -> Result<()> {
        let options = (Kind::Double, Device::Cpu);
        let x0 = Tensor::linspace(-2.0, 2.0, 12, options).view([3, 4]);
        let noise = x0.flip([1]).cos();
        let time = PostShift::new(Tensor::from_slice(&[0.1, 0.5, 0.9]))?;
        let noised = RectifiedFlow.renoise(&x0, &time, &noise)?;
        let coefficients = RectifiedFlow.coefficients(&time)?.like(&x0)?;
        for prediction in Prediction::ALL {
            let target = prediction.target(&coefficients, &x0, &noise)?;
            let sample = prediction.sample(true, &coefficients, &noised, &target)?;
            let error = (sample - &x0).abs().max().double_value(&[]);
            assert!(error < 1e-14, "{prediction:?}: {error}");
        }
        Ok(())
    }
}
