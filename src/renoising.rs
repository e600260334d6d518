//! Re-noising: distributions of tau and their shift.

mod log_normal;
mod logit_normal;
mod power;
mod times;
mod uniform;

pub use log_normal::LogNormal;
pub use logit_normal::LogitNormal;
pub use power::Power;
pub use times::Times;
pub use uniform::{AboveStudent, Uniform};

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::checks::{check_clock, check_range, check_samples, check_times};
use crate::error::Result;
use crate::numeric::{batch_size, compute_kind};
use crate::path::NoisePath;
use crate::time::{PostShift, PreShift, Shift};
use crate::value::checked;

/// The bound on standard normal numbers: a float32 draw reaches 5.4. It gives times bounds that are known
/// beforehand, and makes a draw of exactly 0 finite.
pub(crate) const Z_MAX: f64 = 5.5;

/// A distribution of re-noising times: a map from unit-uniform draws to pre-shift times.
///
/// The draw is an argument, so that a caller can fix it; [`Renoising::draw`] supplies it.
///
/// | distribution | tau | used for |
/// |---|---|---|
/// | [`Uniform`] | U(low, high) | tau_DM and the fake score; clipped, any term |
/// | [`AboveStudent`] | U(t + gap, high) | tau_CA |
/// | [`LogitNormal`] | sigmoid of a normal number | the fake score, as SD3 trains |
/// | [`LogNormal`] | normal in ln sigma | the fake score on EDM's path |
/// | [`Power`] | u^p | the student of ADM's first stage |
pub trait TimeDistribution {
    /// Pre-shift times `[B]` for draws `u` `[B]` in [0, 1), which [`Renoising`] has checked; times per frame for
    /// draws per frame ([`PostShift`]).
    ///
    /// `student` holds the pre-shift times `[B]`, or per frame, at which the student was evaluated, where the batch
    /// carries them. Draws and student times may differ in that.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if the distribution needs the student's times and there are
    /// none.
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift>;
}

macro_rules! forward_time_distribution {
    ($type:ty) => {
        impl<S: TimeDistribution + ?Sized> TimeDistribution for $type {
            fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift> {
                (**self).times(u, student)
            }
        }
    };
}

forward_time_distribution!(&S);
forward_time_distribution!(Box<S>);
forward_time_distribution!(std::rc::Rc<S>);

/// Standard normal numbers for unit-uniform draws, at most [`Z_MAX`] from 0.
pub(crate) fn normal_quantile(u: &Tensor) -> Result<Tensor> {
    Ok(u.f_special_ndtri()?.within(-Z_MAX, Z_MAX)?)
}

/// The re-noising of a group: a [`TimeDistribution`] of tau, and the [`Shift`] of its times. The path of the
/// model says the shift, unless [`shifted`](Self::shifted) overrides it. One time is drawn for each sample, unless
/// [`per_frame`](Self::per_frame) asks for one for each frame.
pub struct Renoising<'a> {
    distribution: Box<dyn TimeDistribution + 'a>,
    shift: Option<Shift>,
    /// The axis of the frames, and how many share a draw.
    frames: Option<(usize, usize)>,
}

impl<'a> Renoising<'a> {
    /// Times from `distribution`, shifted by the shift of the model.
    pub fn new(distribution: impl TimeDistribution + 'a) -> Self {
        Self { distribution: Box::new(distribution), shift: None, frames: None }
    }

    /// Overrides the shift of the model; [`Shift::NONE`] shifts nothing.
    #[must_use]
    pub fn shifted(mut self, shift: Shift) -> Self {
        self.shift = Some(shift);
        self
    }

    /// Draws a time for each frame of a video, independently of the others (Diffusion Forcing, arXiv 2407.01392).
    /// `axis` is the axis of the frames in the samples: 1 in `[B, F, C, H, W]`, as in CausVid and Self-Forcing, 2 in
    /// `[B, C, F, H, W]`, as in diffusers. [`PostShift`] says what takes such times.
    ///
    /// ```
    /// # use decoupled_dmd::{RectifiedFlow, Renoising, Uniform};
    /// # use tch::{Device, Kind, Tensor};
    /// let video = Tensor::zeros([2, 16, 5, 8, 8], (Kind::Float, Device::Cpu));
    /// let tau = Renoising::new(Uniform::FULL).per_frame(2)?.draw(&RectifiedFlow, &video, None)?;
    /// assert_eq!(tau.tensor().size(), [2, 1, 5]);
    /// # Ok::<(), decoupled_dmd::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if `axis` is 0, the axis of the samples; [`draw`](Self::draw)
    /// refuses an axis that the samples do not have.
    pub fn per_frame(self, axis: usize) -> Result<Self> {
        self.per_chunk(axis, 1)
    }

    /// Draws a time for each chunk of `frames` frames along `axis`, for generators that make chunk after chunk, as
    /// CausVid's code and that of Self-Forcing, which has 3 latent frames. Where the frames are not a multiple, the
    /// first chunk is the short one: one frame more than a multiple is the first frame that stands alone in both.
    ///
    /// # Errors
    /// As [`per_frame`](Self::per_frame), and if `frames` is 0.
    pub fn per_chunk(mut self, axis: usize, frames: usize) -> Result<Self> {
        checked("axis of the frames", "at least 1", axis as f64, axis >= 1)?;
        checked("frames of a chunk", "at least 1", frames as f64, frames >= 1)?;
        self.frames = Some((axis, frames));
        Ok(self)
    }

    /// Post-shift times on `path` for given draws `u` in [0, 1], `[B]`, or per frame `[B, F]` or `[B, 1, F]`, whatever
    /// [`per_frame`](Self::per_frame) has said. Two of them are read from their device.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) unless `u` has such a shape
    /// and is floating point, [`Error::OutOfRange`](crate::Error::OutOfRange) if a draw is outside [0, 1] or
    /// not a number; [`Error::Missing`](crate::Error::Missing) if the distribution needs the student's times
    /// and there are none, [`Error::Shape`](crate::Error::Shape) or
    /// [`Error::Device`](crate::Error::Device) if they are not as many as the draws or elsewhere.
    pub fn at(
        &self,
        path: &dyn NoisePath,
        u: &Tensor,
        student: Option<&PreShift>,
    ) -> Result<PostShift> {
        check_draws(u)?;
        self.times(path, u, student)
    }

    /// Draws B post-shift times on `path` for samples `x` `[B, ..]`, or one for each of their frames, with libtorch's
    /// global generator.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) unless `x` are
    /// floating-point samples; [`Error::OutOfRange`](crate::Error::OutOfRange) if they have no such axis of frames;
    /// as [`at`](Self::at) for the student's times.
    pub fn draw(
        &self,
        path: &dyn NoisePath,
        x: &Tensor,
        student: Option<&PreShift>,
    ) -> Result<PostShift> {
        check_samples("x", x, 1)?;
        self.times(path, &self.unit_uniform(x)?, student)
    }

    /// Draws from [0, 1) for samples `x`, on their device, in float32 or wider: `[B]`, or per frame, equal within
    /// a chunk.
    pub(crate) fn unit_uniform(&self, x: &Tensor) -> Result<Tensor> {
        let Some((axis, chunk)) = self.frames else { return unit_uniform(x) };
        let mut sizes = x.size();
        let requirement = "an axis of the samples";
        checked("axis of the frames", requirement, axis as f64, axis < sizes.len())?;
        sizes.truncate(axis.saturating_add(1));
        let count = sizes.pop().unwrap_or(1);
        sizes.iter_mut().skip(1).for_each(|between| *between = 1);
        // A chunk longer than the video is the video.
        let chunk = i64::try_from(chunk).unwrap_or(count).min(count);
        let chunks = count.saturating_add(chunk).saturating_sub(1).checked_div(chunk).unwrap_or(1);
        sizes.push(chunks);
        let of_frames = uniform(&sizes, x)?.f_repeat_interleave_self_int(chunk, -1, None)?;
        let surplus = chunks.saturating_mul(chunk).saturating_sub(count);
        Ok(of_frames.f_narrow(-1, surplus, count)?)
    }

    /// [`at`](Self::at) for valid draws, without reading any of them.
    pub(crate) fn times(
        &self,
        path: &dyn NoisePath,
        u: &Tensor,
        student: Option<&PreShift>,
    ) -> Result<PostShift> {
        if let Some(student) = student.map(PreShift::tensor) {
            if student.dim() <= u.dim() {
                check_times("student time", student, u)?;
            } else {
                check_times("draw", u, student)?;
            }
        }
        let shift = self.shift.unwrap_or_else(|| path.shift());
        shift.apply(&self.distribution.times(u, student)?)
    }
}

/// Refuses anything but numbers in [0, 1] for samples or frames. Reads two of them.
pub(crate) fn check_draws(u: &Tensor) -> Result<()> {
    check_clock("draw", u)?;
    check_range("draw", "in [0, 1]", u, (0.0, 1.0)).map(|_| ())
}

/// One draw from [0, 1) for each sample of `x`, on its device, in float32 or wider.
pub(crate) fn unit_uniform(x: &Tensor) -> Result<Tensor> {
    uniform(&[batch_size(x)], x)
}

fn uniform(size: &[i64], x: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_rand(size, (compute_kind(x.f_kind()?), x.device()))?)
}

impl std::fmt::Debug for Renoising<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Renoising")
            .field("shift", &self.shift)
            .field("frames", &self.frames)
            .finish_non_exhaustive()
    }
}

/// The forms of the distributions in a configuration, before their constructors have checked the numbers.
#[cfg(feature = "serde")]
mod config {
    macro_rules! checked_fields {
        ($type:ident { $($field:ident),+ }) => {
            #[derive(serde::Deserialize)]
            #[serde(deny_unknown_fields)]
            pub(super) struct $type { $($field: f64),+ }

            impl TryFrom<$type> for super::$type {
                type Error = crate::error::Error;
                fn try_from(raw: $type) -> crate::error::Result<Self> {
                    Self::new($(raw.$field),+)
                }
            }
        };
    }

    checked_fields!(Uniform { low, high });
    checked_fields!(AboveStudent { gap, high });
    checked_fields!(LogitNormal { mean, std });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::path::RectifiedFlow;

    #[test]
    fn ranges_follow_the_shift() -> Result<()> {
        let u = Tensor::from_slice(&[0.1f32]);
        let time = Renoising::new(Uniform::new(0.25, 0.5)?).shifted(Shift::new(3.0)?).at(
            &RectifiedFlow,
            &u,
            None,
        )?;
        approx::assert_abs_diff_eq!(time.range().0, 0.1, epsilon = 1e-15);
        approx::assert_abs_diff_eq!(time.range().1, 0.25, epsilon = 1e-15);
        Ok(())
    }

    #[test]
    fn the_ends_of_the_draw_are_the_ends_of_the_range() -> Result<()> {
        let u = Tensor::from_slice(&[0.0, 1.0]);
        let student = PreShift::new(Tensor::from_slice(&[0.25, 0.5]))?;
        let edm = crate::Edm::default();
        let distributions: [(&dyn TimeDistribution, f64); 7] = [
            (&Uniform::FULL, 0.0),
            (&Uniform::new(0.1, 0.7)?, 0.0),
            (&AboveStudent::new(0.05, 0.98)?, 0.0),
            (&LogitNormal::new(0.3, 0.8)?, 1e-15),
            (&LogNormal::default(), 1e-12),
            (&Power::new(3.0)?, 0.0),
            (&LogNormal::new(edm, 0.5, 0.3)?, 1e-12),
        ];
        for (index, (distribution, epsilon)) in distributions.into_iter().enumerate() {
            let times = distribution.times(&u, Some(&student))?;
            let (low, high) = times.range();
            let found = Vec::<f64>::try_from(times.tensor()).unwrap();
            for (found, end) in found.iter().zip([low, high]) {
                assert!((found - end).abs() <= epsilon, "{index}: {found} for {end}");
            }
            assert!(low < high, "{index}");
        }
        Ok(())
    }

    #[test]
    fn a_distribution_may_be_lent_or_boxed() -> Result<()> {
        let (u, uniform) = (Tensor::from_slice(&[0.5]), Uniform::new(0.25, 0.5)?);
        let boxed: Box<dyn TimeDistribution> = Box::new(uniform);
        let lent: &dyn TimeDistribution = &uniform;
        for renoising in [Renoising::new(lent), Renoising::new(boxed)] {
            let time = renoising.at(&RectifiedFlow, &u, None)?.tensor().double_value(&[0]);
            assert!((time - 0.375).abs() < 1e-15, "{time}");
        }
        Ok(())
    }

    #[test]
    fn bad_parameters_are_refused() {
        for (low, high) in [(0.6, 0.5), (-0.1, 0.5), (0.5, 1.1), (f64::NAN, 0.5), (0.5, f64::NAN)] {
            assert!(matches!(Uniform::new(low, high), Err(Error::OutOfRange { .. })));
        }
        for (gap, high) in [(-0.1, 1.0), (1.1, 1.0), (f64::NAN, 1.0), (0.0, 1.1)] {
            assert!(matches!(AboveStudent::new(gap, high), Err(Error::OutOfRange { .. })));
        }
        for (mean, std) in [(f64::NAN, 1.0), (f64::INFINITY, 1.0), (0.0, 0.0), (0.0, f64::NAN)] {
            assert!(matches!(LogitNormal::new(mean, std), Err(Error::OutOfRange { .. })));
        }
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_config_cannot_bypass_the_check() -> Result<()> {
        let above = AboveStudent::new(0.05, 0.98)?;
        let text = serde_json::to_string(&above).unwrap();
        assert_eq!(text, r#"{"gap":0.05,"high":0.98}"#);
        assert_eq!(serde_json::from_str::<AboveStudent>(&text).unwrap(), above);
        let uniform = serde_json::from_str::<Uniform>(r#"{"low":0.02,"high":0.98}"#).unwrap();
        assert_eq!(uniform, Uniform::new(0.02, 0.98)?);
        assert!(serde_json::from_str::<Uniform>(r#"{"low":0.9,"high":0.1}"#).is_err());
        assert!(serde_json::from_str::<LogitNormal>(r#"{"mean":0.0,"std":0.0}"#).is_err());
        Ok(())
    }
}
