//! The clock of the crate, and its shift.
//!
//! The clock is the paper's: t in [0, 1], 0 is noise and 1 is data, on every path. "Above the
//! student" therefore means *cleaner* than the student's input. In the diffusers clock of
//! rectified flow, `sigma = 1 - t`.
//!
//! A [`Shift`] maps an even, *pre-shift* time to the *post-shift* time that a path and a network see;
//! models of higher resolution need more of it. The two times are different types here, since a second
//! shift by mistake fails silently.

use tch::{Device, Kind, Tensor};

use crate::arithmetic::{Arithmetic, filled};
use crate::checks::{check_clock, check_floating, check_range, check_size};
use crate::error::{Error, Result};
use crate::numeric::{widen, widen_like};
use crate::value::{checked, is_positive};

/// Times before the shift, one per sample, `[B]` in [0, 1]. Few-step grids are even in this clock,
/// and tau is drawn in it. Frames of a video may have a time each, as [`PostShift`] says.
#[derive(Debug)]
pub struct PreShift {
    times: Tensor,
    range: (f64, f64),
}

/// Times after the shift, one per sample, `[B]` in [0, 1], for paths and networks.
///
/// **Frames.** Each frame of a video may have a time of its own, as in Diffusion Forcing (arXiv 2407.01392), CausVid
/// (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009). Times have the first axes of the samples then, up to the
/// axis of the frames, with 1 for those between: the shape says which axis has frames, as `t[:, None]` does in PyTorch.
///
/// | samples | times | used by |
/// |---|---|---|
/// | `[B, ..]` | `[B]` | one time a sample |
/// | `[B, F, C, H, W]` | `[B, F]` | CausVid, Self-Forcing |
/// | `[B, C, F, H, W]` | `[B, 1, F]` | the layout of diffusers |
///
/// Paths, predictions, [`CfgAugmentation`](crate::CfgAugmentation),
/// [`DistributionMatching`](crate::DistributionMatching) and [`ScoreIdentity`](crate::ScoreIdentity) take times per
/// frame; what looks at a sample as a whole (critics, consistency, flow maps, samplers) refuses them by
/// [`Error::Shape`].
#[derive(Debug)]
pub struct PostShift {
    times: Tensor,
    range: (f64, f64),
}

macro_rules! time_methods {
    ($type:ty, $what:literal) => {
        impl $type {
            /// Wraps times `[B]`, or per frame `[B, F]` or `[B, 1, F]`. Two numbers are read from their device,
            /// which waits for a GPU.
            ///
            /// # Errors
            /// [`Error::Shape`] if they have another shape or are none, [`Error::Kind`] unless floating
            /// point, [`Error::OutOfRange`] if one is outside [0, 1] or not a number.
            pub fn new(times: Tensor) -> Result<Self> {
                check_clock($what, &times)?;
                let range = check_range($what, "in [0, 1]", &times, (0.0, 1.0))?;
                Ok(Self { times, range })
            }

            /// The same time for `batch` samples, `[batch]`, of the given type on the given device.
            ///
            /// # Errors
            /// [`Error::OutOfRange`] if `time` is outside [0, 1] or not a number, or `batch` below 1;
            /// [`Error::Kind`] unless the type is floating point.
            pub fn all(time: f64, batch: i64, options: (Kind, Device)) -> Result<Self> {
                checked("number of samples", "at least 1", batch as f64, batch >= 1)?;
                check_floating($what, options.0)?;
                checked($what, "in [0, 1]", time, (0.0..=1.0).contains(&time))?;
                // As the type rounds it: in bfloat16, 0.999 is 1.
                let time = filled(&[], time, (options.0, Device::Cpu))?.f_double_value(&[])?;
                Ok(Self::within(filled(&[batch], time, options)?, (time, time)))
            }

            /// Times that are known to lie in `range`. The range is on the host, so that checks of the
            /// extremes need not read the times from a device.
            pub(crate) fn within(times: Tensor, range: (f64, f64)) -> Self {
                Self { times, range }
            }

            /// Bounds of the times, the noisiest first. They are on the host: no device is waited for. Times
            /// that were drawn have the bounds of their distribution.
            pub fn range(&self) -> (f64, f64) {
                self.range
            }

            /// The times moved by `by`, toward the data where it is positive, and kept in [0, 1].
            ///
            /// # Errors
            /// [`Error::OutOfRange`] unless `by` is in [-1, 1].
            pub fn moved(&self, by: f64) -> Result<Self> {
                checked("distance in time", "in [-1, 1]", by, (-1.0..=1.0).contains(&by))?;
                let times = widen(&self.times)?.plus(by)?.within(0.0, 1.0)?;
                let moved = |end: f64| (end + by).clamp(0.0, 1.0);
                Ok(Self::within(times, (moved(self.range.0), moved(self.range.1))))
            }

            /// The times, `[B]`, or per frame `[B, F]` or `[B, 1, F]`.
            pub fn tensor(&self) -> &Tensor {
                &self.times
            }

            /// Another handle on the same times.
            pub fn shallow_clone(&self) -> Self {
                Self { times: self.times.shallow_clone(), range: self.range }
            }
        }
    };
}

time_methods!(PreShift, "pre-shift time");
time_methods!(PostShift, "post-shift time");

impl PostShift {
    /// The times on the way from these to `other` after a share of it.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `share` is in [0, 1]; [`Error::Shape`] unless there are as many of both.
    pub fn between(&self, other: &Self, share: f64) -> Result<Self> {
        checked("share of the way", "in [0, 1]", share, (0.0..=1.0).contains(&share))?;
        self.check_count(other)?;
        let times = widen(&self.times)?.toward(&widen_like(&other.times, &self.times)?, share)?;
        let end = |one: f64, two: f64| one + share * (two - one);
        let range = (end(self.range.0, other.range.0), end(self.range.1, other.range.1));
        Ok(Self::within(times, range))
    }

    /// The times, or those of `other` where they are earlier.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are as many of both.
    pub fn at_most(&self, other: &Self) -> Result<Self> {
        self.check_count(other)?;
        let times = widen(&self.times)?.f_minimum(&widen_like(&other.times, &self.times)?)?;
        let range = (self.range.0.min(other.range.0), self.range.1.min(other.range.1));
        Ok(Self::within(times, range))
    }

    /// The times, or those of `other` where they are later.
    ///
    /// # Errors
    /// [`Error::Shape`] unless there are as many of both.
    pub fn at_least(&self, other: &Self) -> Result<Self> {
        self.check_count(other)?;
        let times = widen(&self.times)?.f_maximum(&widen_like(&other.times, &self.times)?)?;
        let range = (self.range.0.max(other.range.0), self.range.1.max(other.range.1));
        Ok(Self::within(times, range))
    }

    fn check_count(&self, other: &Self) -> Result<()> {
        check_size("other times", &other.times, &self.times.size())
    }

    /// Other times in the same range.
    pub(crate) fn with_times(&self, times: Tensor) -> Self {
        Self::within(times, self.range)
    }

    /// The times as a network is handed them with `noised`, not in float64 unless `noised` is: the type would
    /// spread to the samples.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn for_network(&self, noised: &Tensor) -> Result<Tensor> {
        let too_wide = self.times.f_kind()? == Kind::Double && noised.f_kind()? != Kind::Double;
        if too_wide { widen_like(&self.times, noised) } else { Ok(self.times.shallow_clone()) }
    }
}

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
    /// [`Error::OutOfRange`] unless `k` is finite and positive, as float32 too.
    pub fn new(k: f64) -> Result<Self> {
        checked("shift", "finite and positive", k, is_positive(k)).map(Self)
    }

    /// The factor k.
    pub fn get(self) -> f64 {
        self.0
    }

    /// The shift that undoes this one.
    pub(crate) fn inverse(self) -> Self {
        Self(self.0.recip())
    }

    /// The shifted value of one pre-shift time in [0, 1].
    #[must_use]
    pub fn of(self, time: f64) -> f64 {
        time / (time + self.0 * (1.0 - time))
    }

    /// Shifts pre-shift times, once:
    ///
    /// ```
    /// # use decoupled_dmd::{PreShift, Shift};
    /// # let options = (tch::Kind::Double, tch::Device::Cpu);
    /// # let (shift, student) = (Shift::new(3.0)?, PreShift::all(0.75, 1, options)?);
    /// let time = shift.apply(&student)?;
    /// # assert_eq!(time.tensor().double_value(&[0]), 0.5);
    /// # Ok::<(), decoupled_dmd::Error>(())
    /// ```
    /// Shifted times are a [`PostShift`], which a second shift does not take:
    ///
    /// ```compile_fail,E0308
    /// # use decoupled_dmd::{PreShift, Shift};
    /// # let options = (tch::Kind::Double, tch::Device::Cpu);
    /// # let (shift, student) = (Shift::new(3.0)?, PreShift::all(0.75, 1, options)?);
    /// let time = shift.apply(&shift.apply(&student)?)?;
    /// # Ok::<(), decoupled_dmd::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn apply(self, time: &PreShift) -> Result<PostShift> {
        let (low, high) = time.range;
        let range = (self.of(low), self.of(high));
        Ok(PostShift::within(rational(&time.times, self.0)?, range))
    }

    /// The pre-shift times that [`apply`](Self::apply) maps to `time`.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn invert(self, time: &PostShift) -> Result<PreShift> {
        let inverse = self.inverse();
        let (low, high) = time.range;
        let range = (inverse.of(low), inverse.of(high));
        Ok(PreShift::within(rational(&time.times, inverse.0)?, range))
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
    let t = widen(t)?;
    // The sum as written: t plus a number that is not negative never rounds below t, so that no quotient
    // exceeds 1. With `t (1 - k) + k` one can.
    let denominator = t.complement()?.times(k)?.f_add(&t)?;
    Ok(t.f_div(&denominator)?)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn bad_times_are_refused() {
        let nan = Tensor::from_slice(&[0.5, f64::NAN]);
        assert!(matches!(PreShift::new(nan), Err(Error::OutOfRange { .. })));
        assert!(matches!(
            PostShift::new(Tensor::from_slice(&[1.5])),
            Err(Error::OutOfRange { .. })
        ));
        assert!(matches!(PostShift::new(Tensor::from_slice(&[1i64])), Err(Error::Kind { .. })));
        for shape in [&[2i64, 3, 4][..], &[0], &[2, 0], &[]] {
            let zeros = Tensor::zeros(shape, (Kind::Float, Device::Cpu));
            let error = PreShift::new(zeros).unwrap_err();
            assert!(matches!(&error, Error::Shape { what: "pre-shift time", .. }), "{error}");
        }
        assert!(matches!(Shift::new(0.0), Err(Error::OutOfRange { .. })));
    }
}
