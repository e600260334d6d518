//! What a network predicts, and the way from there to the clean sample and the noise.

use tch::Tensor;

use crate::Result;
use crate::path::Coefficients;

/// The quantity that a network is trained to output, on a path `x_t = a x0 + s eps`.
///
/// | prediction | target | x0-hat | refused or singular where |
/// |---|---|---|---|
/// | [`Sample`](Self::Sample) | x0 | as it is | |
/// | [`Noise`](Self::Noise) | eps | (x_t - s eps) / a | a = 0, the noise end |
/// | [`FlowVelocity`](Self::FlowVelocity) | eps - x0 | (x_t - s u) / (a + s) | |
/// | [`Velocity`](Self::Velocity) | a eps - s x0 | (a x_t - s v) / (a^2 + s^2) | |
/// | [`Score`](Self::Score) | -eps / s | (x_t + s^2 score) / a | a = 0; the target where s = 0 |
///
/// A singular conversion yields infinities or NaN: keep tau off that end with the bounds of the
/// [`TimeSampler`](crate::TimeSampler).
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
        Coefficients { data: a, noise: s }: &Coefficients,
        noised: &Tensor,
        output: &Tensor,
    ) -> Result<Tensor> {
        Ok(match self {
            Self::Sample => output.shallow_clone(),
            Self::Noise => noised.f_sub(&output.f_mul(s)?)?.f_div(a)?,
            Self::FlowVelocity => noised.f_sub(&output.f_mul(s)?)?.f_div(&a.f_add(s)?)?,
            Self::Velocity => {
                let norm = a.f_square()?.f_add(&s.f_square()?)?;
                noised.f_mul(a)?.f_sub(&output.f_mul(s)?)?.f_div(&norm)?
            }
            Self::Score => noised.f_add(&output.f_mul(&s.f_square()?)?)?.f_div(a)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::{Path, PostShift, RectifiedFlow};

    #[test]
    fn the_target_of_every_prediction_leads_back_to_the_sample() -> Result<()> {
        let options = (Kind::Double, Device::Cpu);
        let x0 = Tensor::linspace(-2.0, 2.0, 12, options).view([3, 4]);
        let noise = x0.flip([1]).cos();
        let time = PostShift::new(Tensor::from_slice(&[0.1, 0.5, 0.9]))?;
        let noised = RectifiedFlow.renoise(&x0, &time, &noise)?;
        let coefficients = RectifiedFlow.coefficients(&time)?.like(&x0)?;
        for prediction in [
            Prediction::Sample,
            Prediction::Noise,
            Prediction::FlowVelocity,
            Prediction::Velocity,
            Prediction::Score,
        ] {
            let target = prediction.target(&coefficients, &x0, &noise)?;
            let sample = prediction.sample(&coefficients, &noised, &target)?;
            let error = (sample - &x0).abs().max().double_value(&[]);
            assert!(error < 1e-14, "{prediction:?}: {error}");
        }
        Ok(())
    }
}
