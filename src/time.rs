//! The clock of the crate, its shift, and how re-noising times are drawn.
//!
//! The clock is the paper's: t in [0, 1], 0 is noise and 1 is data, on every path. "Above the
//! student" therefore means *cleaner* than what the student was given. In the diffusers clock of
//! rectified flow, `sigma = 1 - t`.
//!
//! Resolution-dependent models spend their time differently: a [`Shift`] maps an even, *pre-shift*
//! time to the *post-shift* time that a path and a network see. The two are different types here,
//! since a second shift by mistake fails silently.

use tch::{Device, Kind, Tensor};

use crate::numeric::{check_range, check_samples, compute_kind};
use crate::value::checked;
use crate::{Error, Result};

/// Times before the shift, one per sample, `[B]` in [0, 1]. Few-step grids are even in this clock,
/// and tau is drawn in it.
#[derive(Debug)]
pub struct PreShift(Tensor);

/// Times after the shift, one per sample, `[B]` in [0, 1]: what paths and networks see.
#[derive(Debug)]
pub struct PostShift(Tensor);

macro_rules! time_methods {
    ($type:ty, $what:literal) => {
        impl $type {
            /// Wraps times `[B]`.
            ///
            /// # Errors
            /// [`Error::Shape`] unless the rank is 1 and B >= 1, [`Error::Kind`] unless floating
            /// point, [`Error::OutOfRange`] if one is outside [0, 1] or not a number.
            pub fn new(times: Tensor) -> Result<Self> {
                check_samples($what, &times, 1)?;
                if times.dim() != 1 {
                    return Err(Error::shape($what, "[B]", &times.size()));
                }
                check_range($what, "in [0, 1]", &times, (0.0, 1.0))?;
                Ok(Self(times))
            }

            /// The same time for `batch` samples, of the given type on the given device.
            ///
            /// # Errors
            /// [`Error::OutOfRange`] if `time` is outside [0, 1] or not a number.
            pub fn all(time: f64, batch: i64, options: (Kind, Device)) -> Result<Self> {
                checked($what, "in [0, 1]", time, (0.0..=1.0).contains(&time))?;
                Ok(Self(Tensor::f_full([batch], time, options)?))
            }

            /// The times, `[B]`.
            pub fn tensor(&self) -> &Tensor {
                &self.0
            }

            /// Another handle on the same times.
            pub fn shallow_clone(&self) -> Self {
                Self(self.0.shallow_clone())
            }
        }
    };
}

time_methods!(PreShift, "pre-shift time");
time_methods!(PostShift, "post-shift time");

/// The timestep shift of flow models, a factor k > 0; 1 changes nothing.
///
/// ```text
/// sigma' = k sigma / (1 + (k - 1) sigma)        t' = t / (t + k (1 - t))
/// ```
/// as in diffusers' `FlowMatchEulerDiscreteScheduler`. Z-Image uses 6, Z-Image-Turbo 3.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "f64", into = "f64"))]
pub struct Shift(f64);

impl Shift {
    /// No shift.
    pub const NONE: Self = Self(1.0);

    /// A shift by the factor `k`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `k` is finite and positive.
    pub fn new(k: f64) -> Result<Self> {
        checked("shift", "finite and positive", k, k.is_finite() && k > 0.0).map(Self)
    }

    /// The factor k.
    pub fn get(self) -> f64 {
        self.0
    }

    /// The shifted value of one pre-shift time.
    #[must_use]
    pub fn of(self, time: f64) -> f64 {
        time / (time + self.0 * (1.0 - time))
    }

    /// Shifts pre-shift times.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn apply(self, time: &PreShift) -> Result<PostShift> {
        rational(&time.0, self.0).map(PostShift)
    }

    /// The pre-shift times that [`apply`](Self::apply) maps to `time`.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn invert(self, time: &PostShift) -> Result<PreShift> {
        rational(&time.0, 1.0 / self.0).map(PreShift)
    }
}

impl TryFrom<f64> for Shift {
    type Error = Error;
    fn try_from(k: f64) -> Result<Self> {
        Self::new(k)
    }
}

impl From<Shift> for f64 {
    fn from(shift: Shift) -> f64 {
        shift.get()
    }
}

/// `t / (t + k (1 - t))`; the denominator is positive on [0, 1].
fn rational(t: &Tensor, k: f64) -> Result<Tensor> {
    let denominator = t.f_mul_scalar(1.0 - k)?.f_add_scalar(k)?;
    Ok(t.f_div(&denominator)?)
}

/// Where re-noising times come from: a map from unit-uniform draws to pre-shift times.
///
/// The draw is an argument, so that a caller can fix it; [`Renoising::draw`] supplies it.
pub trait TimeSampler {
    /// Pre-shift times `[B]` for draws `u` `[B]` in [0, 1).
    ///
    /// `student` holds the pre-shift times at which the student was evaluated, where the batch
    /// carries them.
    ///
    /// # Errors
    /// [`Error::Missing`] if the sampler needs the student's times and there are none.
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift>;
}

/// Evenly between two pre-shift times: tau_DM over the full range by default (Algorithm 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Uniform {
    low: f64,
    high: f64,
}

impl Uniform {
    /// All of [0, 1].
    pub const FULL: Self = Self { low: 0.0, high: 1.0 };

    /// Between `low` and `high`; DMD2 clips to (0.02, 0.98).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless 0 <= low <= high <= 1.
    pub fn new(low: f64, high: f64) -> Result<Self> {
        check_bounds(low, high)?;
        Ok(Self { low, high })
    }
}

impl TimeSampler for Uniform {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        Ok(PreShift(u.f_mul_scalar(self.high - self.low)?.f_add_scalar(self.low)?))
    }
}

/// Evenly above the student's own time, `tau ~ U(t + gap, high)`: the constrained schedule of
/// tau_CA (Section 4.2 and Algorithm 1), drawn before the shift.
///
/// Where `t + gap` exceeds `high` the range is empty and tau is `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AboveStudent {
    gap: f64,
    high: f64,
}

impl AboveStudent {
    /// Up to the clean end, with no gap: the paper's U(t, 1).
    pub const FULL: Self = Self { gap: 0.0, high: 1.0 };

    /// At least `gap` above the student and at most `high`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless both are in [0, 1].
    pub fn new(gap: f64, high: f64) -> Result<Self> {
        checked("gap above the student", "in [0, 1]", gap, (0.0..=1.0).contains(&gap))?;
        check_bounds(0.0, high)?;
        Ok(Self { gap, high })
    }
}

impl TimeSampler for AboveStudent {
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift> {
        let missing = Error::Missing { what: "student time", setter: "student_time" };
        let student = student.ok_or(missing)?;
        let low = student.0.f_add_scalar(self.gap)?.f_clamp_max(self.high)?;
        let width = low.f_neg()?.f_add_scalar(self.high)?;
        Ok(PreShift(low.f_add(&u.f_mul(&width)?)?))
    }
}

/// `t = sigmoid(mean + std z)` with z standard normal (SD3). A positive mean favours the clean end.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LogitNormal {
    mean: f64,
    std: f64,
}

impl LogitNormal {
    /// With the mean and standard deviation of the logit of t.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `mean` is finite and `std` finite and positive.
    pub fn new(mean: f64, std: f64) -> Result<Self> {
        checked("mean of the logit", "finite", mean, mean.is_finite())?;
        let valid = std.is_finite() && std > 0.0;
        checked("standard deviation of the logit", "finite and positive", std, valid)?;
        Ok(Self { mean, std })
    }
}

impl TimeSampler for LogitNormal {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        let z = u.f_special_ndtri()?;
        Ok(PreShift(z.f_mul_scalar(self.std)?.f_add_scalar(self.mean)?.f_sigmoid()?))
    }
}

impl<S: TimeSampler + ?Sized> TimeSampler for &S {
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift> {
        (**self).times(u, student)
    }
}

impl<S: TimeSampler + ?Sized> TimeSampler for Box<S> {
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift> {
        (**self).times(u, student)
    }
}

fn check_bounds(low: f64, high: f64) -> Result<()> {
    checked("lower bound of the time", "in [0, 1]", low, (0.0..=1.0).contains(&low))?;
    checked("upper bound of the time", "in [low, 1]", high, (low..=1.0).contains(&high))?;
    Ok(())
}

/// A re-noising schedule: a [`TimeSampler`] and the [`Shift`] applied to what it draws.
pub struct Renoising<'a> {
    sampler: Box<dyn TimeSampler + 'a>,
    shift: Shift,
}

impl<'a> Renoising<'a> {
    /// Times from `sampler`, not shifted.
    pub fn new(sampler: impl TimeSampler + 'a) -> Self {
        Self { sampler: Box::new(sampler), shift: Shift::NONE }
    }

    /// Shifts what the sampler draws: use the shift that the model is run with at inference.
    #[must_use]
    pub fn shifted(mut self, shift: Shift) -> Self {
        self.shift = shift;
        self
    }

    /// Post-shift times for given draws `u` `[B]` in [0, 1).
    ///
    /// # Errors
    /// [`Error::Missing`] if the sampler needs the student's times and there are none.
    pub fn at(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PostShift> {
        self.shift.apply(&self.sampler.times(u, student)?)
    }

    /// Draws B post-shift times for samples `x` `[B, ..]` with libtorch's global generator.
    ///
    /// # Errors
    /// As [`at`](Self::at).
    pub fn draw(&self, x: &Tensor, student: Option<&PreShift>) -> Result<PostShift> {
        self.at(&unit_uniform(x)?, student)
    }
}

/// One draw from [0, 1) for each sample of `x`, on its device, in float32 or wider.
pub(crate) fn unit_uniform(x: &Tensor) -> Result<Tensor> {
    let batch = x.size().first().copied().unwrap_or_default();
    Ok(Tensor::f_rand([batch], (compute_kind(x.f_kind()?), x.device()))?)
}

impl std::fmt::Debug for Renoising<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Renoising").field("shift", &self.shift).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn shift_matches_the_z_image_grid() -> Result<()> {
        // sigma of Z-Image-Turbo's 8 steps, shift 3.
        let sigmas = [1.0, 0.954_545_454, 0.9, 0.833_333_333, 0.75, 0.642_857_143, 0.5, 0.3];
        let shift = Shift::new(3.0)?;
        for (k, sigma) in sigmas.into_iter().enumerate() {
            approx::assert_abs_diff_eq!(1.0 - shift.of(k as f64 / 8.0), sigma, epsilon = 1e-8);
        }
        Ok(())
    }

    #[test]
    fn shift_and_its_inverse_cancel() -> Result<()> {
        let time = PreShift::new(Tensor::linspace(0.0, 1.0, 11, (Kind::Double, Device::Cpu)))?;
        for k in [0.2, 1.0, 3.0, 6.0] {
            let shift = Shift::new(k)?;
            let back = shift.invert(&shift.apply(&time)?)?;
            let error = (back.tensor() - time.tensor()).abs().max().double_value(&[]);
            assert!(error < 1e-14, "shift {k}: {error}");
        }
        Ok(())
    }

    #[test]
    fn above_the_student_is_cleaner_than_the_student() -> Result<()> {
        let student = PreShift::new(Tensor::from_slice(&[0.0, 0.5, 0.875, 0.99]))?;
        let sampler = AboveStudent::new(0.05, 0.98)?;
        let lowest =
            sampler.times(&Tensor::zeros([4], (Kind::Double, Device::Cpu)), Some(&student))?;
        assert_eq!(values(lowest.tensor()), [0.05, 0.55, 0.925, 0.98]);
        let highest =
            sampler.times(&Tensor::ones([4], (Kind::Double, Device::Cpu)), Some(&student))?;
        for value in values(highest.tensor()) {
            approx::assert_abs_diff_eq!(value, 0.98, epsilon = 1e-12);
        }
        assert!(matches!(
            sampler.times(student.tensor(), None),
            Err(Error::Missing { what: "student time", .. })
        ));
        Ok(())
    }

    #[test]
    fn logit_normal_has_the_stated_median_and_quartile() -> Result<()> {
        let sampler = LogitNormal::new(1.0, 2.0)?;
        let times = sampler.times(&Tensor::from_slice(&[0.5, 0.841_344_746_068_542_9]), None)?;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (value, logit) in values(times.tensor()).into_iter().zip([1.0, 3.0]) {
            approx::assert_abs_diff_eq!(value, sigmoid(logit), epsilon = 1e-9);
        }
        Ok(())
    }

    #[test]
    fn bad_times_are_refused() {
        let nan = Tensor::from_slice(&[0.5, f64::NAN]);
        assert!(matches!(PreShift::new(nan), Err(Error::OutOfRange { .. })));
        assert!(matches!(
            PostShift::new(Tensor::from_slice(&[1.5])),
            Err(Error::OutOfRange { .. })
        ));
        assert!(matches!(PostShift::new(Tensor::from_slice(&[1i64])), Err(Error::Kind { .. })));
        let matrix = Tensor::zeros([2, 2], (Kind::Float, Device::Cpu));
        assert!(matches!(PreShift::new(matrix), Err(Error::Shape { .. })));
        assert!(matches!(Uniform::new(0.6, 0.5), Err(Error::OutOfRange { .. })));
        assert!(matches!(Shift::new(0.0), Err(Error::OutOfRange { .. })));
    }
}
