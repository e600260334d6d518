//! Trajectories: whole rollouts, with the input and the prediction of every step, for several losses.

use tch::Tensor;

use crate::error::Result;
use crate::grid::FewStepGrid;
use crate::numeric::{batch_size, per_sample};
use crate::steps::Steps;
use crate::time::PreShift;

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
    /// Processes draw each their own: all run equally many forwards whatever the steps.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn draw_steps(&self) -> Result<Steps> {
        Steps::spread(self.steps(), self.batch_size(), self.samples.device())
    }

    /// The clean predictions `[B, ..]` of each sample at its step of `steps` `[B]`, without a graph, to train
    /// a fake score on.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) unless there is a step for each sample,
    /// [`Error::Device`](crate::Error::Device) unless they are where the rollout is,
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if the grid has no such step.
    pub fn samples_at(&self, steps: &Steps) -> Result<Tensor> {
        steps.check(self.steps(), self.batch_size(), &self.samples)?;
        gather(&self.samples, steps.tensor())
    }

    /// The student's inputs x_t `[B, ..]` and their pre-shift times, each sample's at its step of
    /// `steps` `[B]`.
    ///
    /// # Errors
    /// As [`samples_at`](Self::samples_at).
    pub fn inputs_at(&self, steps: &Steps) -> Result<(Tensor, PreShift)> {
        steps.check(self.steps(), self.batch_size(), &self.samples)?;
        let times = self.times.f_index_select(0, steps.tensor())?;
        let times = PreShift::within(times, self.grid.range());
        Ok((gather(&self.noised, steps.tensor())?, times))
    }
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
