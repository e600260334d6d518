//! How data and noise are mixed: `x_t = a(t) x0 + s(t) eps`.

mod edm;
mod rectified_flow;
mod trig_flow;
mod variance_preserving;

pub use edm::{Edm, Preconditioning};
pub use rectified_flow::RectifiedFlow;
pub use trig_flow::TrigFlow;
pub use variance_preserving::VariancePreserving;

use tch::{Device, Kind, Tensor};

use crate::numeric::{
    check_like, check_per_sample, check_samples, compute_kind, per_sample, widen, widen_like,
};
use crate::value::checked;
use crate::{PostShift, Result};

/// A noise path on the crate's clock, t in [0, 1] from noise to data.
///
/// | path | a | s | a, s at t = 0 | at t = 1 |
/// |---|---|---|---|---|
/// | [`RectifiedFlow`] | t | 1 - t | 0, 1 | 1, 0 |
/// | [`VariancePreserving::linear`] | sqrt(abar) | sqrt(1 - abar) | 0.0066, 1.0000 | 1, 0 |
/// | [`VariancePreserving::scaled_linear`] as SDXL | sqrt(abar_n) | sqrt(1 - abar_n) | 0.0683, 0.9977 | 0.9996, 0.0292 |
/// | [`Edm`] | 1 | sigma | 1, 80 | 1, 0.002 |
/// | [`TrigFlow`] | cos(angle) | sin(angle) | 0, 1 | 1, 0 |
///
/// On a path of one's own, a must not fall and s must not rise with t: then a larger t is cleaner, as
/// [`AboveStudent`](crate::AboveStudent) takes it, and the ends of a range of times bound what lies
/// between.
pub trait Path {
    /// The coefficients of data and noise at `time`, on its device, in float32 or wider.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients>;

    /// Whether a + s = 1 at every time, as on the straight path: a velocity then leads to the clean
    /// sample without a division.
    fn is_straight(&self) -> bool {
        false
    }

    /// `a x0 + s eps`, in float32, or in float64 where `x0` is.
    ///
    /// `x0` and `noise` are `[B, ..]`, `time` holds B times.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
    /// [`Error::Device`](crate::Error::Device) unless `x0` are floating-point samples, and `noise` and
    /// `time` fit them.
    fn renoise(&self, x0: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        check_samples("x0", x0, 1)?;
        check_like("noise", noise, x0)?;
        check_per_sample("time", time.tensor(), x0)?;
        let Coefficients { data, noise: level } = self.coefficients(time)?.like(x0)?;
        Ok(widen(x0)?.f_mul(&data)?.f_addcmul_(&widen(noise)?, &level)?)
    }

    /// What generation starts from at t = 0: `s(0) eps`, for unit noise `[B, ..]`, in float32 or
    /// wider. [`VariancePreserving`] starts from `eps` itself, see there. FastGen starts at t = 0.001
    /// instead, on rectified flow from `0.999 eps`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) unless `noise` are
    /// floating-point samples.
    fn start(&self, noise: &Tensor) -> Result<Tensor> {
        check_samples("noise", noise, 1)?;
        let options = (compute_kind(noise.f_kind()?), noise.device());
        let level = self.coefficients(&PostShift::all(0.0, 1, options)?)?.like(noise)?.noise;
        Ok(widen(noise)?.f_mul(&level)?)
    }
}

/// The coefficients of a path at given times.
#[derive(Debug)]
pub struct Coefficients {
    /// a: the share of data, `[B]`.
    pub data: Tensor,
    /// s: the share of noise, `[B]`.
    pub noise: Tensor,
}

impl Coefficients {
    /// Reshaped to `[B, 1, ..]`, so that they multiply a tensor of the rank of `like`, and in the
    /// type that is computed in for it: paths may answer in float64, samples stay in float32.
    pub(crate) fn like(&self, like: &Tensor) -> Result<Self> {
        Ok(Self { data: factor(&self.data, like)?, noise: factor(&self.noise, like)? })
    }
}

/// One number per sample as a factor of `like`.
fn factor(values: &Tensor, like: &Tensor) -> Result<Tensor> {
    let values = widen_like(values, like)?;
    if values.size() == [1] {
        // One number for all samples.
        return Ok(values.f_view(vec![1; like.dim()].as_slice())?);
    }
    per_sample(&values, like)
}

/// Times in float64, in which paths compute coefficients: near an end these are small differences
/// of large numbers, or powers of them.
fn wide_time(time: &Tensor) -> Result<Tensor> {
    Ok(time.f_to_kind(Kind::Double)?)
}

/// a and s at one time, on the host: no device is waited for.
pub(crate) fn coefficients_at(path: &dyn Path, time: f64) -> Result<(f64, f64)> {
    let Coefficients { data, noise } =
        path.coefficients(&PostShift::all(time, 1, (Kind::Double, Device::Cpu))?)?;
    Ok((data.f_double_value(&[0])?, noise.f_double_value(&[0])?))
}

/// Refuses two paths that mix data and noise differently, seen at a few times on the host.
pub(crate) fn check_same_path(fake: &dyn Path, teacher: &dyn Path) -> Result<()> {
    for time in [0.25, 0.5, 0.75] {
        let (found, expected) = (coefficients_at(fake, time)?, coefficients_at(teacher, time)?);
        for (what, found, expected) in [
            ("share of data on the path of the fake score", found.0, expected.0),
            ("share of noise on the path of the fake score", found.1, expected.1),
        ] {
            let valid = (found - expected).abs() <= 1e-6 * expected.abs();
            checked(what, "that of the teacher's path at each time", found, valid)?;
        }
    }
    Ok(())
}

macro_rules! forward_path {
    ($type:ty) => {
        impl<P: Path + ?Sized> Path for $type {
            fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
                (**self).coefficients(time)
            }
            fn is_straight(&self) -> bool {
                (**self).is_straight()
            }
            fn renoise(&self, x0: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
                (**self).renoise(x0, time, noise)
            }
            fn start(&self, noise: &Tensor) -> Result<Tensor> {
                (**self).start(noise)
            }
        }
    };
}

forward_path!(&P);
forward_path!(Box<P>);
forward_path!(std::rc::Rc<P>);
