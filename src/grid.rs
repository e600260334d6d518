//! Few-step grids: the times at which a few-step generator is evaluated.

use tch::{Device, Kind, Tensor};

use crate::error::Result;
use crate::time::Shift;
use crate::value::{MOST_STEPS, checked};

/// Noise levels (1 - t) between which CDM draws the inner times of its random grids.
const INNER_NOISE: (f64, f64) = (0.25, 0.95);

/// The times at which a few-step generator is evaluated, starting at pure noise.
///
/// The network is handed pure noise at the first time, also where the first time is not 0: DMD2's one-step
/// SDXL model has 0.6, n = 399 of a table of 1000. On [`Edm`](crate::Edm) the noise has the size of t = 0,
/// sigma_max, so a grid starts there.
///
/// Pre-shift times 0, 1/K, .., (K-1)/K, then the shift; in diffusers' clock `sigma` goes from 1 to
/// the shifted 1/K, and the last step lands on the clean sample. With shift 3 and K = 8 this is the
/// grid of Z-Image-Turbo; with K = 4 on SDXL's [`VariancePreserving`](crate::VariancePreserving) table, the
/// grid of DMD2.
///
/// The path of the model says the shift ([`NoisePath::shift`](crate::NoisePath::shift)), unless
/// [`shifted`](Self::shifted) overrides it.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "config::FewStepGrid"))]
pub struct FewStepGrid {
    times: Vec<f64>,
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "Option::is_none"))]
    shift: Option<Shift>,
}

impl FewStepGrid {
    /// `steps` even pre-shift times from 0.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `steps` is from 1 to 1e6.
    pub fn even(steps: usize) -> Result<Self> {
        check_steps(steps)?;
        Self::new((0..steps).map(|k| k as f64 / steps as f64).collect())
    }

    /// Given pre-shift times, each above the one before.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless there is one, they rise, and they are in
    /// [0, 1).
    pub fn new(times: Vec<f64>) -> Result<Self> {
        let first = times.first().copied().unwrap_or(f64::NAN);
        checked("first time of the grid", "in [0, 1)", first, (0.0..1.0).contains(&first))?;
        for (previous, &next) in times.iter().zip(times.iter().skip(1)) {
            checked("time of the grid", "above the one before", next, next > *previous)?;
        }
        let last = times.last().copied().unwrap_or(f64::NAN);
        checked("last time of the grid", "below 1", last, last < 1.0)?;
        Ok(Self { times, shift: None })
    }

    /// Given post-shift times, as the network is to see them, and the shift that they contain. FastGen's list
    /// `.999, .937, .833, .624` has noise levels after a shift of 5: pass 1 minus each.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_shifted(times: Vec<f64>, shift: Shift) -> Result<Self> {
        let unshift = |time| {
            checked("time of the grid", "in [0, 1)", time, (0.0..1.0).contains(&time))?;
            Ok(shift.inverse().of(time))
        };
        Ok(Self::new(times.into_iter().map(unshift).collect::<Result<_>>()?)?.shifted(shift))
    }

    /// A random grid, to be drawn again for every update: a student trained on it can be sampled in
    /// any number of steps. The dynamic schedule of CDM (arXiv 2605.06376).
    ///
    /// ```text
    /// K ~ U{1, .., max_steps};    t_1 = 0;    t_2 < .. < t_K ~ U(0.05, 0.75), sorted
    /// ```
    /// CDM has `max_steps` 28. Its noise levels are `1 - t`, drawn before the shift. Drawn from
    /// libtorch's global generator.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `max_steps` is from 1 to 1e6.
    pub fn dynamic(max_steps: usize) -> Result<Self> {
        check_steps(max_steps)?;
        let high = i64::try_from(max_steps).unwrap_or(i64::MAX);
        let inner =
            Tensor::f_randint(high, [1], (Kind::Int64, Device::Cpu))?.f_int64_value(&[0])?;
        // In float64, where no two draws are ever equal.
        let u = Tensor::f_rand([inner], (Kind::Double, Device::Cpu))?;
        Self::dynamic_at(&Vec::<f64>::try_from(u)?)
    }

    /// [`dynamic`](Self::dynamic) for given unit-uniform draws, one for each step after the first.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if a draw is outside [0, 1] or two are equal.
    pub fn dynamic_at(draws: &[f64]) -> Result<Self> {
        let (low, high) = INNER_NOISE;
        let mut times = vec![0.0];
        for &u in draws {
            checked("draw of the grid", "in [0, 1]", u, (0.0..=1.0).contains(&u))?;
            times.push(1.0 - high + u * (high - low));
        }
        times.sort_by(f64::total_cmp);
        Self::new(times)
    }

    /// Overrides the shift of the model.
    #[must_use]
    pub fn shifted(mut self, shift: Shift) -> Self {
        self.shift = Some(shift);
        self
    }

    /// The number of steps, which is the number of network evaluations of one sample.
    pub fn steps(&self) -> usize {
        self.times.len()
    }

    /// The pre-shift times.
    pub fn times(&self) -> &[f64] {
        &self.times
    }

    /// The first and the last of the pre-shift times.
    pub(crate) fn range(&self) -> (f64, f64) {
        let first = self.times.first().copied().unwrap_or_default();
        (first, self.times.last().copied().unwrap_or(first))
    }

    /// The shift of this grid for a model with the shift `model`. No step is taken from the clean end,
    /// where there is no noise left to follow: the last time must stay below 1 as float32.
    pub(crate) fn shift(&self, model: Shift) -> Result<Shift> {
        let shift = self.shift.unwrap_or(model);
        let last = shift.of(self.range().1);
        checked("last time of the shifted grid", "below 1 as float32", last, (last as f32) < 1.0)?;
        Ok(shift)
    }
}

/// The form of a grid in a configuration: `times`, or a number of even `steps`, and a `shift` of its own.
#[cfg(feature = "serde")]
mod config {
    use crate::error::{Error, Result};
    use crate::time::Shift;

    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct FewStepGrid {
        times: Option<Vec<f64>>,
        steps: Option<usize>,
        shift: Option<Shift>,
    }

    impl TryFrom<FewStepGrid> for super::FewStepGrid {
        type Error = Error;
        fn try_from(FewStepGrid { times, steps, shift }: FewStepGrid) -> Result<Self> {
            let grid = match (times, steps) {
                (Some(times), None) => Self::new(times)?,
                (None, Some(steps)) => Self::even(steps)?,
                (times, steps) => {
                    let given = if times.is_some() && steps.is_some() { 2.0 } else { 0.0 };
                    return Err(Error::OutOfRange {
                        what: "number of `times` and `steps` of a grid",
                        requirement: "1: one of the two",
                        value: given,
                    });
                }
            };
            Ok(Self { shift, ..grid })
        }
    }
}

fn check_steps(steps: usize) -> Result<f64> {
    let valid = (1..=MOST_STEPS).contains(&steps);
    checked("number of steps", "from 1 to 1e6", steps as f64, valid)
}
