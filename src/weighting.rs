//! Weightings of time in a denoising loss.

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::path::Coefficients;
use crate::prediction::Prediction;
use crate::value::Positive;

/// The weight of time in a denoising loss, for networks of every prediction type:
///
/// ```text
/// loss = mean W(t) (x0 - x0_hat)^2
/// ```
/// Written in clean samples, a weighting means the same for every prediction type. On a path
/// `x_t = a x0 + s eps`, the plain square of each type is one of them:
///
/// | type | its plain square has W |
/// |---|---|
/// | sample | 1 |
/// | noise | (a / s)^2 |
/// | flow velocity | ((a + s) / s)^2, on rectified flow 1 / s^2 |
/// | velocity | ((a^2 + s^2) / s)^2, on variance-preserving paths 1 / s^2 |
/// | score | (a / s^2)^2 |
///
/// | weighting | W | source |
/// |---|---|---|
/// | [`UNIFORM`](Self::UNIFORM) | W of the network's own type | DMD2, Self-Forcing, CDM; the default |
/// | [`measured_as`](Self::measured_as) | W of a given type | the sample: Algorithm 1 of Decoupled DMD as printed, and FastGen's flow networks; noise: SimpleTuner |
/// | [`min_snr`](Self::min_snr) | min(a^2 / s^2, clip) | Hang et al. 2023, clip 5; TDM |
/// | [`edm`](Self::edm) | (sigma^2 + d^2) / (sigma d)^2, sigma = s / a | Karras et al. 2022, d = 0.5 |
///
/// The loss is computed in the network's own type with the weight converted, so that `min_snr` is
/// finite at both ends of the path for every type but the score. The weight of the others is unbounded at an
/// end where their W is: keep the times off it.
///
/// Choosing the sample in place of the flow velocity takes nearly all weight from the clean side,
/// where CFG Augmentation works.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(transparent))]
pub struct Weighting(Weight);

#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
enum Weight {
    #[default]
    Uniform,
    MeasuredAs(Prediction),
    MinSnr(Positive),
    Edm(Positive),
}

impl Weighting {
    /// The plain square in the network's own prediction type.
    pub const UNIFORM: Self = Self(Weight::Uniform);

    /// The plain square of another prediction type.
    #[must_use]
    pub fn measured_as(prediction: Prediction) -> Self {
        Self(Weight::MeasuredAs(prediction))
    }

    /// W = min(SNR, clip), SNR = (a / s)^2; 5 is the usual clip.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `clip` is finite and positive.
    pub fn min_snr(clip: f64) -> Result<Self> {
        Positive::new("clip of min-SNR", clip).map(|clip| Self(Weight::MinSnr(clip)))
    }

    /// W = (sigma^2 + d^2) / (sigma d)^2 with d = `data_std`, in units of the data; EDM has 0.5.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `data_std` is finite and positive.
    pub fn edm(data_std: f64) -> Result<Self> {
        Positive::new("standard deviation of the data", data_std).map(|std| Self(Weight::Edm(std)))
    }

    /// The factor of the square in the prediction type `own`, shaped like the coefficients; `None` for 1.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn factor(self, own: Prediction, at: &Coefficients) -> Result<Option<Tensor>> {
        let factor = match self.0 {
            Weight::Uniform => return Ok(None),
            Weight::MeasuredAs(other) if other == own => return Ok(None),
            Weight::MeasuredAs(other) => {
                let (own, other) = (Gain::of(own, at)?, Gain::of(other, at)?);
                own.per_noise.f_div(&other.per_noise)?
            }
            Weight::MinSnr(clip) => {
                let Gain { snr, plain, .. } = Gain::of(own, at)?;
                snr.f_minimum(&plain.times(clip.get())?)?
            }
            Weight::Edm(std) => {
                // (sigma^2 + d^2) / (sigma d)^2 = 1 / d^2 + SNR
                let Gain { snr, plain, .. } = Gain::of(own, at)?;
                snr.f_add(&plain.over(std.get() * std.get())?)?
            }
        };
        Ok(Some(factor))
    }
}

/// For a prediction type with `x0 - x0_hat = k (target - output)`: k^2 by itself and in proportion to
/// two shares of the path, each without the quotient of two vanishing numbers.
struct Gain {
    /// k^2
    plain: Tensor,
    /// k^2 (a / s)^2
    snr: Tensor,
    /// k^2 / s^2
    per_noise: Tensor,
}

impl Gain {
    fn of(own: Prediction, Coefficients { data: a, noise: s }: &Coefficients) -> Result<Self> {
        let (a2, s2) = (a.f_square()?, s.f_square()?);
        // k = s / divisor
        let over = |divisor: &Tensor| -> Result<Self> {
            let per_noise = divisor.f_square()?.f_reciprocal()?;
            Ok(Self { plain: per_noise.f_mul(&s2)?, snr: per_noise.f_mul(&a2)?, per_noise })
        };
        Ok(match own {
            Prediction::Sample => Self {
                plain: s2.f_ones_like()?,
                snr: a2.f_div(&s2)?,
                per_noise: s2.f_reciprocal()?,
            },
            Prediction::Noise => Self {
                plain: s2.f_div(&a2)?,
                snr: a2.f_ones_like()?,
                per_noise: a2.f_reciprocal()?,
            },
            Prediction::FlowVelocity => over(&a.f_add(s)?)?,
            Prediction::Velocity => over(&a2.f_add(&s2)?)?,
            Prediction::Score => {
                Self { plain: s2.f_square()?.f_div(&a2)?, per_noise: s2.f_div(&a2)?, snr: s2 }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn at(times: &[f64]) -> Coefficients {
        let data = Tensor::from_slice(times);
        Coefficients { noise: 1.0f64 - &data, data }
    }

    fn factors(weighting: Weighting, own: Prediction, times: &[f64]) -> Result<Vec<f64>> {
        let factor = weighting.factor(own, &at(times))?;
        let factor = factor.unwrap_or_else(|| {
            Tensor::ones([times.len() as i64], (Kind::Double, tch::Device::Cpu))
        });
        Ok(Vec::try_from(factor).unwrap())
    }

    #[test]
    fn every_type_weighs_the_same_error_of_the_sample() -> Result<()> {
        // With W given, factor(own) = W k^2, and k^2 is the factor of a plain sample square.
        let times = [0.1, 0.5, 0.9];
        let clip = Weighting::min_snr(5.0)?;
        let edm = Weighting::edm(0.5)?;
        for own in Prediction::ALL {
            let plain = factors(Weighting::measured_as(Prediction::Sample), own, &times)?;
            for (weighting, w) in [
                (clip, [1.0 / 81.0, 1.0, 5.0]),
                (edm, [1.0 / 81.0 + 4.0, 5.0, 85.0]),
                (Weighting::measured_as(Prediction::FlowVelocity), [1.0 / 0.81, 4.0, 100.0]),
            ] {
                for ((factor, plain), w) in
                    factors(weighting, own, &times)?.iter().zip(&plain).zip(w)
                {
                    approx::assert_relative_eq!(*factor, w * plain, max_relative = 1e-12);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn min_snr_is_finite_at_both_ends() -> Result<()> {
        for own in Prediction::ALL {
            for factor in factors(Weighting::min_snr(5.0)?, own, &[0.0, 1.0])? {
                assert!(factor.is_finite(), "{own:?}: {factor}");
            }
        }
        Ok(())
    }

    #[test]
    fn out_of_range_settings_are_named() {
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            let named = |result, argument| matches!(result, Err(crate::Error::OutOfRange { what, .. }) if what == argument);
            assert!(named(Weighting::min_snr(bad), "clip of min-SNR"));
            assert!(named(Weighting::edm(bad), "standard deviation of the data"));
        }
    }
}
