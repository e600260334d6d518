//! How data and noise are mixed: `x_t = a(t) x0 + s(t) eps`.

use tch::Tensor;

use crate::numeric::{per_sample, widen};
use crate::{PostShift, Result};

/// A noise path on the crate's clock, t in [0, 1] from noise to data.
pub trait Path {
    /// The coefficients of data and noise at `time`.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients>;

    /// `a x0 + s eps`, in float32 or wider.
    ///
    /// `x0` and `noise` are `[B, ..]`, `time` holds B times.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if the shapes do not fit.
    fn renoise(&self, x0: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        let Coefficients { data, noise: level } = self.coefficients(time)?.like(x0)?;
        Ok(widen(x0)?.f_mul(&data)?.f_add(&widen(noise)?.f_mul(&level)?)?)
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
    /// Reshaped to `[B, 1, ..]`, so that they multiply a tensor of the rank of `like`.
    pub(crate) fn like(&self, like: &Tensor) -> Result<Self> {
        Ok(Self { data: per_sample(&self.data, like)?, noise: per_sample(&self.noise, like)? })
    }
}

/// Rectified flow: a = t, s = 1 - t (SD3, FLUX, Qwen-Image, Z-Image; diffusers' `sigma = 1 - t`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RectifiedFlow;

impl Path for RectifiedFlow {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        let data = widen(time.tensor())?;
        let noise = data.f_neg()?.f_add_scalar(1.0)?;
        Ok(Coefficients { data, noise })
    }
}

impl<P: Path + ?Sized> Path for &P {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        (**self).coefficients(time)
    }
}

impl<P: Path + ?Sized> Path for Box<P> {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        (**self).coefficients(time)
    }
}
