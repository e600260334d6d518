//! Normalisers: the distance from the samples to the teacher's prediction, by which directions are divided.

use tch::{Kind, Tensor};

use crate::arithmetic::{Arithmetic, filled, number};
use crate::collective::Collective;
use crate::error::Result;
use crate::guidance::Guidance;
use crate::numeric::{masked, masked_mean, mean_per_time, sample_distance};
use crate::value::Positive;

/// The scale 1 / n by which a difference of clean predictions becomes a direction,
///
/// ```text
/// n = guard(mean |x - x0|)
/// ```
/// so that directions are comparable across noise levels (`weight_factor` in DMD2's code). Codebases
/// differ in three choices, each of which is an option here:
///
/// | choice | options | default |
/// |---|---|---|
/// | x0, the reference | [`conditional`](Self::conditional): the teacher's x0_cond at the term's own tau; [`guided`](Self::guided): null + alpha (cond - null); [`OFF`](Self::OFF): n = 1 | conditional |
/// | guard | [`floor`](Self::floor): max(mean, floor); [`epsilon`](Self::epsilon): mean + epsilon; [`unguarded`](Self::unguarded) | floor 0.1, CDM's |
/// | mean | over the elements of each sample; [`over_frame`](Self::over_frame): of each frame; [`over_batch`](Self::over_batch): over all elements of the batch | each sample |
///
/// The guided reference, common to the terms of a group, makes coupled CA + DM equal to DMD2.
///
/// # The guard
/// Near the clean end of the path the teacher returns its input almost unchanged: difference and
/// mean both go to zero, and their ratio is rounding noise. A floor bounds that ratio by the size of
/// the noise over the floor; an epsilon far below the data's scale does not, and without a guard 0/0
/// is NaN, which is never replaced. The share of samples whose mean is below the floor or the
/// epsilon is in the [`Diagnostics`](crate::Diagnostics).
///
/// # Recipes
/// | codebase | here |
/// |---|---|
/// | DMD2, Self-Forcing, VideoX-Fun (Wan) | [`dmd2`](Self::dmd2); they replace NaN by zero afterwards |
/// | VideoX-Fun (Z-Image) | `guided(alpha).floor(1e-5)?`; it replaces NaN by zero afterwards |
/// | FastGen, DiffSynth-Studio | [`fastgen`](Self::fastgen) |
/// | FastVideo | [`fastvideo`](Self::fastvideo); it replaces NaN by zero afterwards |
/// | SimpleTuner | `guided(alpha).floor(1e-6)?` |
/// | rCM | `guided(alpha).floor(1e-5)?`; it sums over the elements in place of the mean |
/// | CDM | [`cdm`](Self::cdm), the default |
/// | decoupled loss ported onto DMD2 | [`decoupled_port`](Self::decoupled_port) |
///
/// TDM divides a pseudo-Huber loss in place of the difference, which is no normaliser: write it as a
/// [`Regularizer`](crate::Regularizer).
///
/// ```
/// # use decoupled_dmd::{Guidance, Normalizer};
/// let simple_tuner = Normalizer::guided(Guidance::new(3.0)?).floor(1e-6)?;
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Normalizer {
    reference: Reference,
    guard: Guard,
    scope: Scope,
}

/// The prediction from which the distance is taken.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub(crate) enum Reference {
    Off,
    Conditional,
    Guided(Guidance),
}

#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
enum Guard {
    None,
    Floor(Positive),
    Epsilon(Positive),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
enum Scope {
    Sample,
    Frame,
    Batch,
}

impl Normalizer {
    /// No scaling, n = 1: Algorithm 1 as printed.
    pub const OFF: Self =
        Self { reference: Reference::Off, guard: Guard::None, scope: Scope::Sample };

    /// The distance to x0_cond at the term's own tau, with the default floor.
    #[must_use]
    pub fn conditional() -> Self {
        Self {
            reference: Reference::Conditional,
            guard: Guard::Floor(Positive::CDM),
            scope: Scope::Sample,
        }
    }

    /// The distance to the guided prediction, null + alpha (cond - null), with the default floor.
    /// It needs the null branch, unless the guidance is neutral.
    #[must_use]
    pub fn guided(guidance: Guidance) -> Self {
        Self { reference: Reference::Guided(guidance), ..Self::conditional() }
    }

    /// DMD2: guided, each sample, unguarded.
    #[must_use]
    pub fn dmd2(guidance: Guidance) -> Self {
        Self::guided(guidance).unguarded()
    }

    /// FastGen and DiffSynth-Studio: guided, each sample, epsilon 1e-6.
    #[must_use]
    pub fn fastgen(guidance: Guidance) -> Self {
        Self { guard: Guard::Epsilon(Positive::FASTGEN), ..Self::guided(guidance) }
    }

    /// FastVideo: guided, over the batch, unguarded. The direction of a sample depends on the other samples
    /// of the batch, and one NaN sample makes all directions NaN.
    #[must_use]
    pub fn fastvideo(guidance: Guidance) -> Self {
        Self::guided(guidance).unguarded().over_batch()
    }

    /// CDM (arXiv 2605.06376): conditional, each sample, floor 0.1. This is the default.
    #[must_use]
    pub fn cdm() -> Self {
        Self::conditional()
    }

    /// The decoupled loss as ported onto DMD2: conditional, each sample, epsilon 1e-8.
    #[must_use]
    pub fn decoupled_port() -> Self {
        Self { guard: Guard::Epsilon(Positive::PORT), ..Self::conditional() }
    }

    /// n = max(mean, floor), in units of the data.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless finite and positive, as float32 too.
    pub fn floor(mut self, floor: f64) -> Result<Self> {
        self.guard = Guard::Floor(Positive::new("normaliser floor", floor)?);
        Ok(self)
    }

    /// n = mean + epsilon, in units of the data.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless finite and positive.
    pub fn epsilon(mut self, epsilon: f64) -> Result<Self> {
        self.guard = Guard::Epsilon(Positive::new("normaliser epsilon", epsilon)?);
        Ok(self)
    }

    /// n = mean. A sample on the reference gets a direction of NaN.
    #[must_use]
    pub fn unguarded(mut self) -> Self {
        self.guard = Guard::None;
        self
    }

    /// Takes the mean over all elements of the batch: one n for all samples. A sample that is not
    /// finite then makes the directions of all samples NaN. On several processes the batch is that of all where
    /// the objective knows them ([`Objective::among`](crate::Objective::among)), else the part of each.
    #[must_use]
    pub fn over_batch(mut self) -> Self {
        self.scope = Scope::Batch;
        self
    }

    /// Takes the mean over the elements of each frame, where frames have times of their own ([`PostShift`]), and each
    /// sample elsewhere: directions are then comparable across the frames of a video, which are at different noise
    /// levels. The codes of CausVid and Self-Forcing take the mean over the whole video, and mark it as to be changed
    /// for a causal teacher.
    ///
    /// [`PostShift`]: crate::PostShift
    #[must_use]
    pub fn over_frame(mut self) -> Self {
        self.scope = Scope::Frame;
        self
    }

    /// The reference; with a neutral guidance, the guided prediction is the conditional one.
    pub(crate) fn reference(self) -> Reference {
        match self.reference {
            Reference::Guided(guidance) if guidance.is_neutral() => Reference::Conditional,
            reference => reference,
        }
    }

    /// n and whether the guard acts, `[B]` each or shaped like `times`, from x in float32 or wider; the means are over
    /// the elements at which `mask` is true. A mean over the batch is over the parts of all `processes`.
    pub(crate) fn distance(
        self,
        x: &Tensor,
        reference: &Tensor,
        times: &Tensor,
        mask: Option<&Tensor>,
        processes: Option<&Collective<'_>>,
    ) -> Result<Distance> {
        let elements = || -> Result<Tensor> { Ok(x.f_sub(reference)?.f_abs_()?) };
        let mean = match self.scope {
            Scope::Frame if times.dim() > 1 => mean_per_time(&elements()?, times, mask)?,
            Scope::Sample | Scope::Frame if mask.is_none() => sample_distance(x, reference)?,
            Scope::Sample | Scope::Frame => masked_mean(&elements()?, mask)?,
            Scope::Batch => {
                let distance = elements()?;
                let sum = masked(&distance, mask)?.f_sum(None::<Kind>)?;
                let mean = match (processes, mask) {
                    (Some(processes), _) => mean_among(processes, &sum, mask.unwrap_or(x))?,
                    (None, Some(mask)) => sum.f_div(&mask.f_sum(Kind::Int64)?)?,
                    (None, None) => sum.over(x.numel() as f64)?,
                };
                let batch: Vec<i64> = x.size().into_iter().take(1).collect();
                mean.f_expand(batch, false)?
            }
        };
        Ok(match self.guard {
            Guard::None => Distance { guarded: mean.f_le_tensor(&number(0.0, &mean)?)?, n: mean },
            Guard::Floor(floor) => {
                Distance { guarded: mean.below(floor.get())?, n: mean.at_least(floor.get())? }
            }
            Guard::Epsilon(epsilon) => {
                Distance { guarded: mean.below(epsilon.get())?, n: mean.plus(epsilon.get())? }
            }
        })
    }
}

/// The mean over the processes' elements, from the sum over those of this one.
fn mean_among(processes: &Collective<'_>, sum: &Tensor, counted: &Tensor) -> Result<Tensor> {
    // Counts of elements are exact in float64 alone.
    let count = match counted.f_kind()? {
        Kind::Bool => counted.f_sum(Kind::Double)?,
        _ => filled(&[], counted.numel() as f64, (Kind::Double, sum.device()))?,
    };
    let both = Tensor::f_stack(&[&sum.f_to_kind(Kind::Double)?, &count], 0)?;
    let whole = processes.sum(&both)?;
    Ok(whole.f_get(0)?.f_div(&whole.f_get(1)?)?.f_to_kind(sum.f_kind()?)?)
}

impl Default for Normalizer {
    fn default() -> Self {
        Self::conditional()
    }
}

/// The divisors of one batch.
pub(crate) struct Distance {
    /// After the guard, `[B]` or per frame.
    pub(crate) n: Tensor,
    /// Whether the distance is below the guard, booleans of the same shape.
    pub(crate) guarded: Tensor,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn n(normalizer: Normalizer) -> Result<Vec<f64>> {
        let x = Tensor::from_slice(&[0.0, 2.0, 4.0, 4.0]).view([2, 2]);
        let distance = normalizer.distance(&x, &x.zeros_like(), &x.get(0), None, None)?;
        Ok(Vec::try_from(distance.n).unwrap())
    }

    #[test]
    fn guards_and_scopes_by_hand() -> Result<()> {
        let alpha = Guidance::new(3.0)?;
        assert_eq!(n(Normalizer::dmd2(alpha))?, [1.0, 4.0]);
        assert_eq!(n(Normalizer::conditional().floor(2.0)?)?, [2.0, 4.0]);
        assert_eq!(n(Normalizer::conditional().epsilon(0.5)?)?, [1.5, 4.5]);
        assert_eq!(n(Normalizer::fastvideo(alpha))?, [2.5, 2.5]);
        assert_eq!(Normalizer::cdm(), Normalizer::default());
        assert_eq!(Normalizer::fastgen(alpha), Normalizer::guided(alpha).epsilon(1e-6)?);
        assert_eq!(Normalizer::decoupled_port(), Normalizer::conditional().epsilon(1e-8)?);
        Ok(())
    }

    #[test]
    fn a_mask_takes_elements_out_of_the_mean() -> Result<()> {
        let x = Tensor::from_slice(&[f64::NAN, 2.0, 4.0, 6.0]).view([2, 2]);
        let mask = Tensor::from_slice(&[false, true, true, true]).view([2, 2]);
        let of = |normalizer: Normalizer| -> Result<Vec<f64>> {
            let distance =
                normalizer.distance(&x, &x.zeros_like(), &x.get(0), Some(&mask), None)?;
            Ok(Vec::try_from(distance.n).unwrap())
        };
        assert_eq!(of(Normalizer::conditional())?, [2.0, 5.0]);
        assert_eq!(of(Normalizer::conditional().over_batch())?, [4.0, 4.0]);
        Ok(())
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_config_may_leave_choices_out_but_not_be_wrong() {
        let read = |text| serde_json::from_str::<Normalizer>(text);
        assert_eq!(read("{}").unwrap(), Normalizer::default());
        let guided = read(r#"{"reference": {"guided": 4.0}, "guard": {"epsilon": 1e-6}}"#).unwrap();
        assert_eq!(guided, Normalizer::fastgen(Guidance::new(4.0).unwrap()));
        assert!(read(r#"{"guard": {"epsilon": 0.0}}"#).is_err());
        assert!(read(r#"{"gard": "none"}"#).is_err());
        let text = serde_json::to_string(&Normalizer::OFF).unwrap();
        assert_eq!(read(&text).unwrap(), Normalizer::OFF);
    }
}
