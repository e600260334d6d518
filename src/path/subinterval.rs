//! The noise-heavy part of a path, with noisy samples in place of data.

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::path::{Coefficients, NoisePath, coefficients_at, wide_time};
use crate::time::{PostShift, Shift};
use crate::value::checked;

/// The part of a path from pure noise to a time `end`, whose data are the samples x_end of the path:
///
/// ```text
/// x_t = a x_end + s eps,    a = a_t / a_end,    s^2 = s_t^2 - (a s_end)^2        t = end times the time here
/// ```
/// Its clock is the crate's: 0 is noise, 1 is x_end. Phased DMD (by a page of notes) distils a student of each
/// phase to noisy samples: that is Distribution Matching as it is, on this path. Then x, real samples and
/// statistics of a term are x_end, and networks are handed the base path's times:
/// [`Denoiser::on_subinterval`](crate::Denoiser::on_subinterval) does so.
///
/// The path has no shift of its own: its times are post-shift times of the base path over `end`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Subinterval<P> {
    path: P,
    end: f64,
    /// a and s of the base path at the end.
    data: f64,
    noise: f64,
}

impl<P: NoisePath> Subinterval<P> {
    /// Up to the post-shift time `end` of `path`. At 1, on a path that ends without noise, it is `path` itself
    /// but for the shift.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `end` is above 0 and at most 1, or the path has
    /// no data there.
    pub fn new(path: P, end: f64) -> Result<Self> {
        let valid = end > 0.0 && end <= 1.0;
        checked("end of the subinterval", "above 0 and at most 1", end, valid)?;
        let (data, noise) = coefficients_at(&path, end)?;
        checked("share of data at the end of the subinterval", "positive", data, data > 0.0)?;
        Ok(Self { path, end, data, noise })
    }

    /// The times of the base path for times of this one.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn base_time(&self, time: &PostShift) -> Result<PostShift> {
        let (low, high) = time.range();
        let times = time.tensor().times(self.end)?;
        Ok(PostShift::within(times, (low * self.end, high * self.end)))
    }

    /// The base path.
    pub fn base(&self) -> &P {
        &self.path
    }

    /// E[x_end] given x_t from E[x0] given x_t, the weights `[B]` of x0, as `data`, and of x_t, as `noise`, in
    /// float64; `None` where the two expectations are one:
    ///
    /// ```text
    /// a_end (s / s_t)^2  of x0        a (s_end / s_t)^2  of x_t
    /// ```
    pub(crate) fn weights_of_end(&self, time: &PostShift) -> Result<Option<Coefficients>> {
        if self.noise <= 0.0 {
            return Ok(None);
        }
        let base = self.path.coefficients(&self.base_time(time)?)?;
        let level = wide_time(&base.noise)?;
        let Coefficients { data, noise } = self.coefficients(time)?;
        let of_sample = noise.f_div(&level)?.f_square()?.times(self.data)?;
        let of_noised = level.f_reciprocal()?.times(self.noise)?.f_square()?.f_mul(&data)?;
        Ok(Some(Coefficients { data: of_sample, noise: of_noised }))
    }
}

impl<P: NoisePath> NoisePath for Subinterval<P> {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        let base = self.path.coefficients(&self.base_time(time)?)?;
        if self.noise <= 0.0 {
            return Ok(base);
        }
        let data = wide_time(&base.data)?.over(self.data)?;
        let kept = data.times(self.noise)?.f_square()?;
        let noise = wide_time(&base.noise)?.f_square()?.f_sub(&kept)?.at_least(0.0)?.f_sqrt()?;
        Ok(Coefficients { data, noise })
    }

    /// Where the whole path starts: a phase begins with the noise that the path begins with.
    fn start(&self, noise: &Tensor) -> Result<Tensor> {
        self.path.start(noise)
    }

    fn shift(&self) -> Shift {
        Shift::NONE
    }

    fn is_straight(&self) -> bool {
        self.noise <= 0.0 && self.path.is_straight()
    }
}
