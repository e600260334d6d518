//! Samplers: few-step generation, and its simulation while training.

use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::batch::Condition;
use crate::checks::{check_like, check_per_sample, check_samples};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::grid::FewStepGrid;
use crate::guidance::Guidance;
use crate::numeric::{batch_size, compute_kind, noise_like, per_sample};
use crate::simulation::Simulation;
use crate::steps::Steps;
use crate::time::{PostShift, PreShift, Shift};
use crate::trajectory::Trajectory;
use crate::value::checked;

/// The step from a clean prediction to the next time. Train and sample with the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Transition {
    /// `a' x0-hat + s' z` with fresh noise z (consistency sampling; DMD2, Self-Forcing).
    Renoise,
    /// `a' x0-hat + s' eps-hat`, DDIM; on rectified flow the Euler step of diffusers' pipelines.
    #[default]
    Ddim,
}

/// A denoiser run over a grid: samples from a trained model, and the rollout of a student.
///
/// Its noise has unit variance on every path; [`NoisePath::start`](crate::NoisePath::start) scales it to the
/// start of the path, such as `sigma_max eps` on [`Edm`](crate::Edm).
#[derive(Debug)]
pub struct Sampler<'a> {
    denoiser: Denoiser<'a>,
    grid: FewStepGrid,
    transition: Transition,
    guidance: Option<(Guidance, &'a Condition)>,
}

impl<'a> Sampler<'a> {
    /// Runs `denoiser`, of which it keeps a clone, over `grid`.
    #[must_use]
    pub fn new(denoiser: &Denoiser<'a>, grid: FewStepGrid, transition: Transition) -> Self {
        Self { denoiser: denoiser.clone(), grid, transition, guidance: None }
    }

    /// Adds classifier-free guidance against the condition `null`, such as an encoded empty or negative
    /// prompt; two evaluations for each step at which the guidance acts.
    #[must_use]
    pub fn guided(mut self, guidance: Guidance, null: &'a Condition) -> Self {
        self.guidance = Some((guidance, null));
        self
    }

    /// The grid.
    pub fn grid(&self) -> &FewStepGrid {
        &self.grid
    }

    /// A step drawn evenly from the grid with libtorch's global generator. On several processes
    /// draw on one and share the number: all must run equally many forwards. Noise, times and conditions
    /// should differ between them.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn draw_step(&self) -> Result<usize> {
        let step = Tensor::f_randint(self.steps(), [1], (Kind::Int64, Device::Cpu))?;
        Ok(usize::try_from(step.f_int64_value(&[0])?).unwrap_or_default())
    }

    /// Clean samples `[B, ..]` from unit noise of that shape, without a graph.
    ///
    /// # Errors
    /// As [`simulate`](Self::simulate).
    pub fn sample(&self, noise: &Tensor, cond: &Condition) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let last = self.grid.steps().saturating_sub(1);
        Ok(self.simulate(noise, cond, last)?.x)
    }

    /// Backward simulation: runs the grid up to `step` without a graph, and that step with one.
    ///
    /// The student has the same inputs in training as at inference (DMD2, Section 4.5); the loss is
    /// put on its clean prediction at that step. `noise` is unit noise `[B, ..]`; steps count from 0.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the grid has no such step; [`Error::Shape`] or [`Error::Kind`] if
    /// `noise` is not a batch of samples; as [`Denoiser::denoise`], which refuses the pure noise of a
    /// grid's first time for some predictions.
    pub fn simulate(&self, noise: &Tensor, cond: &Condition, step: usize) -> Result<Simulation> {
        self.simulate_with(noise, cond, step, |_, like| noise_like(like))
    }

    /// [`simulate`](Self::simulate) with the noise of re-noising transitions from `fresh`, which is
    /// given the index of the step that it leads to and a tensor of the wanted shape.
    ///
    /// # Errors
    /// As [`simulate`](Self::simulate); [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] if the
    /// noise from `fresh` is not like the tensor that it was given; errors of `fresh`.
    pub fn simulate_with(
        &self,
        noise: &Tensor,
        cond: &Condition,
        step: usize,
        mut fresh: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Simulation> {
        check_samples("noise", noise, 2)?;
        let student_time =
            PreShift::all(self.grid_time(step)?, batch_size(noise), options(noise)?)?;
        let mut x = self.denoiser.path().start(&noise.f_detach()?)?;
        for (current, next) in (0..step).zip(1..) {
            let _no_grad = no_grad_guard();
            let x0 = self.predict(&x, &self.time(current, noise)?, cond)?;
            x = self.advance(&x, &x0, current, |like| fresh(next, like))?;
        }
        self.evaluate(x, self.time(step, noise)?, student_time, cond)
    }

    /// The student's prediction at its input, with a graph.
    fn evaluate(
        &self,
        input: Tensor,
        time: PostShift,
        student_time: PreShift,
        cond: &Condition,
    ) -> Result<Simulation> {
        Ok(Simulation { x: self.predict(&input, &time, cond)?, input, time, student_time })
    }

    /// The whole rollout from unit noise `[B, ..]`, with every step, without a graph.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn trajectory(&self, noise: &Tensor, cond: &Condition) -> Result<Trajectory> {
        self.trajectory_with(noise, cond, |_, like| noise_like(like))
    }

    /// [`trajectory`](Self::trajectory) with the noise of re-noising transitions from `fresh`, as
    /// [`simulate_with`](Self::simulate_with).
    ///
    /// # Errors
    /// As [`simulate_with`](Self::simulate_with).
    pub fn trajectory_with(
        &self,
        noise: &Tensor,
        cond: &Condition,
        mut fresh: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Trajectory> {
        check_samples("noise", noise, 2)?;
        let _no_grad = no_grad_guard();
        let last = self.grid.steps().saturating_sub(1);
        let mut x = self.denoiser.path().start(noise)?;
        let (mut inputs, mut samples) = (Vec::new(), Vec::new());
        for (step, next) in (0..last).zip(1..) {
            let x0 = self.predict(&x, &self.time(step, noise)?, cond)?;
            let next = self.advance(&x, &x0, step, |like| fresh(next, like))?;
            inputs.push(std::mem::replace(&mut x, next));
            samples.push(x0);
        }
        samples.push(self.predict(&x, &self.time(last, noise)?, cond)?);
        inputs.push(x);
        Ok(Trajectory {
            noised: Tensor::f_stack(&inputs, 0)?,
            samples: Tensor::f_stack(&samples, 0)?,
            times: self.times_like(noise)?,
            grid: self.grid.clone(),
        })
    }

    /// The student's predictions on a given rollout, each sample at its own step of `steps` `[B]`, in
    /// one forward with a graph.
    ///
    /// # Errors
    /// As [`Trajectory::samples_at`]; [`Error::OutOfRange`] if the rollout has another grid; errors of the
    /// network.
    pub fn simulate_on(
        &self,
        trajectory: &Trajectory,
        cond: &Condition,
        steps: &Steps,
    ) -> Result<Simulation> {
        let same = trajectory.grid == self.grid;
        let requirement = "those of a rollout on the sampler's own grid";
        checked("steps of the trajectory", requirement, trajectory.steps() as f64, same)?;
        let (input, student_time) = trajectory.inputs_at(steps)?;
        let time = self.shift()?.apply(&student_time)?;
        self.evaluate(input, time, student_time, cond)
    }

    /// One evaluation, with a graph, at real samples `[B, ..]` that are each noised to a random time of the
    /// grid (FastGen's DMD2, DiffSynth-Studio). It costs one forward and no rollout. It needs data, and the
    /// inputs in training are better than the student's own. `real` is detached. At the first time the input
    /// is pure noise, as in sampling (see [`NoisePath::start`](crate::NoisePath::start)).
    ///
    /// # Errors
    /// As [`simulate_from_real_at`](Self::simulate_from_real_at).
    pub fn simulate_from_real(&self, real: &Tensor, cond: &Condition) -> Result<Simulation> {
        check_samples("real samples", real, 2)?;
        let steps = Steps::spread(self.steps(), batch_size(real), real.device())?;
        self.predict_from_real(real, cond, &steps, &noise_like(real)?)
    }

    /// [`simulate_from_real`](Self::simulate_from_real) at given steps `[B]` and unit noise `[B, ..]`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if the grid has no such step; [`Error::Shape`], [`Error::Kind`] or
    /// [`Error::Device`] unless there is a step and noise for each sample; errors of the network.
    pub fn simulate_from_real_at(
        &self,
        real: &Tensor,
        cond: &Condition,
        steps: &Steps,
        noise: &Tensor,
    ) -> Result<Simulation> {
        check_samples("real samples", real, 2)?;
        check_like("noise", noise, real)?;
        steps.check(self.steps(), batch_size(real), real)?;
        self.predict_from_real(real, cond, steps, noise)
    }

    /// [`simulate_from_real_at`](Self::simulate_from_real_at) for valid steps and noise.
    fn predict_from_real(
        &self,
        real: &Tensor,
        cond: &Condition,
        steps: &Steps,
        noise: &Tensor,
    ) -> Result<Simulation> {
        let times = self.times_like(real)?.f_index_select(0, steps.tensor())?;
        let student_time = PreShift::within(times, self.grid.range());
        let time = self.shift()?.apply(&student_time)?;
        let input = {
            let _no_grad = no_grad_guard();
            let path = self.denoiser.path();
            let noised = path.renoise(real, &time, noise)?;
            let first = per_sample(&steps.tensor().f_logical_not()?, real)?;
            path.start(noise)?.f_where_self(&first, &noised)?
        };
        self.evaluate(input, time, student_time, cond)
    }

    /// One evaluation, with a graph, off the student's rollout: at a point of the line that its prediction
    /// draws through its input, at pre-shift times `[B]` of any place, also noisier than the input's.
    ///
    /// ```text
    /// input = a x0-hat + s eps-hat        of the prediction and the noise that it implies, without a graph
    /// ```
    /// CDM (arXiv 2605.06376) matches distributions there too, by a second objective without CFG Augmentation,
    /// at even times whose noise level is clamped to [0.02, 0.98]; on rectified flow the point is its Euler
    /// step. At the time of the input it is the input.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] unless there is a time for each sample;
    /// [`Error::OutOfRange`] if the input has no noise; errors of the network.
    pub fn simulate_off_trajectory(
        &self,
        from: &Simulation,
        cond: &Condition,
        times: &PreShift,
    ) -> Result<Simulation> {
        check_per_sample("time", times.tensor(), &from.input)?;
        let time = self.shift()?.apply(times)?;
        let input = {
            let _no_grad = no_grad_guard();
            let path = self.denoiser.path();
            let noise = path.implied_noise(&from.input, &from.x, &from.time)?;
            path.renoise(&from.x, &time, &noise)?
        };
        self.evaluate(input, time, times.shallow_clone(), cond)
    }

    /// The shift of the grid, or else the shift of the denoiser's path.
    fn shift(&self) -> Result<Shift> {
        self.grid.shift(self.denoiser.path().shift())
    }

    fn steps(&self) -> i64 {
        i64::try_from(self.grid.steps()).unwrap_or(i64::MAX)
    }

    /// The pre-shift times of the grid, `[K]`, in the type and on the device of the times of `x`.
    fn times_like(&self, x: &Tensor) -> Result<Tensor> {
        let (kind, device) = options(x)?;
        // Not waited for: libtorch copies the times before it returns.
        Ok(Tensor::f_from_slice(self.grid.times())?.f_to_device_(device, kind, true, false)?)
    }

    /// The pre-shift time of a step.
    fn grid_time(&self, step: usize) -> Result<f64> {
        let missing = || Error::OutOfRange {
            what: "step",
            requirement: "below the number of steps",
            value: step as f64,
        };
        self.grid.times().get(step).copied().ok_or_else(missing)
    }

    fn time(&self, step: usize, like: &Tensor) -> Result<PostShift> {
        let time = self.shift()?.of(self.grid_time(step)?);
        PostShift::all(time, batch_size(like), options(like)?)
    }

    fn predict(&self, x: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        let guided = self.guidance.filter(|(guidance, _)| guidance.acts_within(time.range()));
        let Some((guidance, null)) = guided else {
            return self.denoiser.denoise(x, time, cond);
        };
        let (cond, null) = self.denoiser.predict_pair(x, time, cond, null)?;
        cond.guided(&null, guidance)?.into_sample()
    }

    /// The input of the next step, from the input `x` of `step` and its clean prediction `x0`;
    /// `fresh` draws noise like a tensor where the transition needs it.
    fn advance(
        &self,
        x: &Tensor,
        x0: &Tensor,
        step: usize,
        fresh: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let noise = match self.transition {
            Transition::Renoise => {
                let noise = fresh(x)?;
                check_like("fresh noise", &noise, x)?;
                noise
            }
            Transition::Ddim => self.denoiser.path().implied_noise(x, x0, &self.time(step, x)?)?,
        };
        self.denoiser.path().renoise(x0, &self.time(step.saturating_add(1), x)?, &noise)
    }
}

/// The type and device of the times that belong to `x`.
fn options(x: &Tensor) -> Result<(Kind, Device)> {
    Ok((compute_kind(x.f_kind()?), x.device()))
}
