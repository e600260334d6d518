//! Trajectories: whole rollouts, with the input and the prediction of every step, for several losses.

use tch::{Device, Kind, Tensor};

use crate::arithmetic::whole_number;
use crate::checks::{check_device, check_strided};
use crate::error::{Error, Result};
use crate::grid::FewStepGrid;
use crate::numeric::{batch_size, numbers, per_sample};
use crate::time::PreShift;
use crate::value::checked;

/// One rollout of a student over its grid, without a graph;
/// [`Sampler::trajectory`](crate::Sampler::trajectory) returns it.
///
/// [`Sampler::simulate`](crate::Sampler::simulate) spends a rollout on one step of the grid, the same
/// for the whole batch. A trajectory serves all steps, for the update of the student and the updates of the
/// fake score: each sample takes a step of its own (CDM, arXiv 2605.06376). Within a batch all student times
/// then occur, which takes noise out of the gradient.
#[derive(Debug)]
pub struct Trajectory {
    /// The student's inputs, `[K, B, ..]`.
    pub(crate) noised: Tensor,
    /// The student's clean predictions, `[K, B, ..]`.
    pub(crate) samples: Tensor,
    /// The pre-shift times of the steps, `[K]`.
    pub(crate) times: Tensor,
    /// The grid of the rollout.
    pub(crate) grid: FewStepGrid,
}

impl Trajectory {
    /// The number of steps, K.
    pub fn steps(&self) -> i64 {
        batch_size(&self.times)
    }

    /// The number of samples, B.
    pub fn batch_size(&self) -> i64 {
        self.samples.size().get(1).copied().unwrap_or_default()
    }

    /// One step for each sample, `[B]`, spread as evenly over the grid as B allows and in random
    /// order, from libtorch's global generator. Each sample gets every step equally often.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn draw_steps(&self) -> Result<Tensor> {
        spread_steps(self.steps(), self.batch_size(), self.samples.device())
    }

    /// The clean predictions `[B, ..]` of each sample at its step of `steps` `[B]`, without a graph, to train
    /// a fake score on.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless `steps` are B whole numbers, [`Error::Device`]
    /// unless they are where the rollout is, [`Error::OutOfRange`] if the grid has no such step.
    pub fn samples_at(&self, steps: &Tensor) -> Result<Tensor> {
        check_steps(steps, self.steps(), self.batch_size(), &self.samples)?;
        gather(&self.samples, steps)
    }

    /// The student's inputs x_t `[B, ..]` and their pre-shift times, each sample's at its step of
    /// `steps` `[B]`.
    ///
    /// # Errors
    /// As [`samples_at`](Self::samples_at).
    pub fn inputs_at(&self, steps: &Tensor) -> Result<(Tensor, PreShift)> {
        check_steps(steps, self.steps(), self.batch_size(), &self.samples)?;
        let times = PreShift::within(self.times.f_index_select(0, steps)?, self.grid.range());
        Ok((gather(&self.noised, steps)?, times))
    }
}

/// One of `count` steps for each of `batch` samples, spread evenly, in random order, `[B]`.
pub(crate) fn spread_steps(count: i64, batch: i64, device: Device) -> Result<Tensor> {
    let options = (Kind::Int64, device);
    // B points at equal distances on a circle of K steps, turned by a random angle: any two steps
    // are taken equally often, up to one, and each sample takes all of them with one probability.
    let offset = Tensor::f_randint(count.saturating_mul(batch), [1], options)?;
    let order = Tensor::f_randperm(batch, options)?;
    let (count, batch) = (whole_number(count)?, whole_number(batch)?);
    let points = order.f_mul(&count)?.f_add(&offset)?;
    Ok(points.f_div_tensor_mode(&batch, "floor")?.f_remainder_tensor(&count)?)
}

/// Refuses anything but `batch` whole numbers below `count`, on the device of `like`. Reads them.
pub(crate) fn check_steps(steps: &Tensor, count: i64, batch: i64, like: &Tensor) -> Result<()> {
    if steps.size() != [batch] {
        return Err(Error::shape("steps", format!("[{batch}]"), &steps.size()));
    }
    check_strided("steps", steps)?;
    let found = steps.f_kind()?;
    if found != Kind::Int64 {
        return Err(Error::Kind { what: "steps", expected: "Int64", found });
    }
    check_device("steps", steps, like)?;
    for value in numbers([steps.f_min()?, steps.f_max()?])? {
        let valid = (0.0..count as f64).contains(&value);
        checked("step", "below the number of steps", value, valid)?;
    }
    Ok(())
}

/// From `[K, B, ..]` the row at `steps[b]` for each b, `[B, ..]`.
fn gather(values: &Tensor, steps: &Tensor) -> Result<Tensor> {
    let index = per_sample(steps, &values.f_select(0, 0)?)?.f_unsqueeze(0)?;
    let mut shape = values.size();
    if let Some(first) = shape.first_mut() {
        *first = 1;
    }
    Ok(values.f_gather(0, &index.f_expand(&shape, false)?, false)?.f_squeeze_dim(0)?)
}
