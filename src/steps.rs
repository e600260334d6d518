//! Steps of a few-step grid, one for each sample of a batch.

use tch::{Device, Kind, Tensor};

use crate::arithmetic::whole_number;
use crate::checks::{check_device, check_strided};
use crate::error::{Error, Result};
use crate::numeric::{batch_size, numbers};
use crate::value::checked;

/// Steps of a few-step grid, one for each sample, `[B]`, counted from 0.
///
/// They carry a bound on the host, as times carry their range, so that no device is waited for where they are
/// checked against a grid. [`Trajectory::draw_steps`](crate::Trajectory::draw_steps) knows the bound; a tensor of
/// one's own is read once, by [`new`](Self::new).
#[derive(Debug)]
pub struct Steps {
    steps: Tensor,
    /// No step lies above it.
    last: i64,
}

impl Steps {
    /// Wraps steps `[B]`. Two numbers are read from their device, which waits for a GPU.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the rank is 1 and B >= 1, [`Error::Kind`] unless they are in int64,
    /// [`Error::OutOfRange`] if one is negative.
    pub fn new(steps: Tensor) -> Result<Self> {
        if steps.dim() != 1 || batch_size(&steps) == 0 {
            return Err(Error::shape("steps", "[B] with B >= 1", &steps.size()));
        }
        check_strided("steps", &steps)?;
        let found = steps.f_kind()?;
        if found != Kind::Int64 {
            return Err(Error::Kind { what: "steps", expected: "Int64", found });
        }
        let [first, last] = numbers([steps.f_min()?, steps.f_max()?])?;
        checked("step", "at least 0", first, first >= 0.0)?;
        Ok(Self { steps, last: last as i64 })
    }

    /// One of `count` steps for each of `batch` samples, spread evenly, in random order.
    pub(crate) fn spread(count: i64, batch: i64, device: Device) -> Result<Self> {
        let options = (Kind::Int64, device);
        // B points at equal distances on a circle of K steps, turned by a random angle: any two steps
        // are taken equally often, up to one, and each sample takes all of them with one probability.
        let offset = Tensor::f_randint(count.saturating_mul(batch), [1], options)?;
        let order = Tensor::f_randperm(batch, options)?;
        let last = count.saturating_sub(1);
        let (count, batch) = (whole_number(count)?, whole_number(batch)?);
        let points = order.f_mul(&count)?.f_add(&offset)?;
        let steps = points.f_div_tensor_mode(&batch, "floor")?.f_remainder_tensor(&count)?;
        Ok(Self { steps, last })
    }

    /// The steps, `[B]` in int64.
    pub fn tensor(&self) -> &Tensor {
        &self.steps
    }

    /// The steps of `length` samples from `start`, such as those of a micro-batch, `[length]`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `length` is positive; [`Error::Torch`] if there are fewer.
    pub fn narrow(&self, start: i64, length: i64) -> Result<Self> {
        checked("number of samples", "at least 1", length as f64, length >= 1)?;
        Ok(Self { steps: self.steps.f_narrow(0, start, length)?, last: self.last })
    }

    /// Refuses anything but one step below `count` for each of `batch` samples, on the device of `like`.
    pub(crate) fn check(&self, count: i64, batch: i64, like: &Tensor) -> Result<()> {
        if self.steps.size() != [batch] {
            return Err(Error::shape("steps", format!("[{batch}]"), &self.steps.size()));
        }
        check_device("steps", &self.steps, like)?;
        checked("step", "below the number of steps", self.last as f64, self.last < count)?;
        Ok(())
    }
}
