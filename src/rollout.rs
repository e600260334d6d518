//! Few-step generation, and its simulation while training.

use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::numeric::{check_samples, compute_kind, noise_like};
use crate::value::checked;
use crate::{Condition, Denoiser, Guidance, PostShift, PreShift, Result, Shift, Trajectory};

/// The times at which a few-step generator is evaluated, starting at pure noise.
///
/// Pre-shift times 0, 1/K, .., (K-1)/K, then the shift; in diffusers' clock `sigma` goes from 1 to
/// the shifted 1/K, and the last step lands on the clean sample. With shift 3 and K = 8 this is the
/// grid of Z-Image-Turbo.
#[derive(Debug, Clone, PartialEq)]
pub struct FewStepGrid {
    times: Vec<f64>,
    shift: Shift,
}

impl FewStepGrid {
    /// `steps` even pre-shift times from 0.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if `steps` is 0.
    pub fn even(steps: usize, shift: Shift) -> Result<Self> {
        checked("number of steps", "at least 1", steps as f64, steps > 0)?;
        Ok(Self { times: (0..steps).map(|k| k as f64 / steps as f64).collect(), shift })
    }

    /// Given pre-shift times, the first of them 0 and each above the one before.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless they rise from 0 and stay below 1.
    pub fn new(times: Vec<f64>, shift: Shift) -> Result<Self> {
        let first = times.first().copied().unwrap_or(f64::NAN);
        checked("first time of the grid", "0, pure noise", first, first.abs() <= 0.0)?;
        for (previous, &next) in times.iter().zip(times.iter().skip(1)) {
            checked("time of the grid", "above the one before", next, next > *previous)?;
        }
        let last = times.last().copied().unwrap_or(f64::NAN);
        checked("last time of the grid", "below 1", last, last < 1.0)?;
        Ok(Self { times, shift })
    }

    /// The number of steps, which is the number of network evaluations of one sample.
    pub fn steps(&self) -> usize {
        self.times.len()
    }

    /// The pre-shift times.
    pub fn times(&self) -> &[f64] {
        &self.times
    }

    /// The shift of the grid.
    pub fn shift(&self) -> Shift {
        self.shift
    }
}

/// How a sampler gets from a clean prediction to the next time. Train and sample with the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Transition {
    /// `a' x0-hat + s' z` with fresh noise z (consistency sampling; DMD2, Self-Forcing).
    Renoise,
    /// `a' x0-hat + s' eps-hat`, DDIM; on rectified flow the Euler step of diffusers' pipelines.
    #[default]
    Euler,
}

/// A denoiser run over a grid: samples from a trained model, and the rollout of a student.
#[derive(Debug)]
pub struct Sampler<'a> {
    denoiser: &'a Denoiser<'a>,
    grid: FewStepGrid,
    transition: Transition,
    guidance: Option<(Guidance, &'a Condition)>,
}

/// One step of a backward simulation.
#[derive(Debug)]
pub struct Simulation {
    /// The student's clean prediction `[B, ..]`, with its gradient: the x of a [`Batch`](crate::Batch).
    pub x: Tensor,
    /// Where on the grid it was made, for [`Batch::student_time`](crate::Batch::student_time).
    pub student_time: PreShift,
}

impl<'a> Sampler<'a> {
    /// Runs `denoiser` over `grid`.
    #[must_use]
    pub fn new(denoiser: &'a Denoiser<'a>, grid: FewStepGrid, transition: Transition) -> Self {
        Self { denoiser, grid, transition, guidance: None }
    }

    /// Adds classifier-free guidance against the condition `null`; two evaluations a step.
    #[must_use]
    pub fn guided(mut self, guidance: Guidance, null: &'a Condition) -> Self {
        self.guidance = (!guidance.is_neutral()).then_some((guidance, null));
        self
    }

    /// The grid.
    pub fn grid(&self) -> &FewStepGrid {
        &self.grid
    }

    /// A step drawn evenly from the grid with libtorch's global generator. On several processes
    /// draw on one and share the number: all must run equally many forwards.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn draw_step(&self) -> Result<usize> {
        let high = i64::try_from(self.grid.steps()).unwrap_or(i64::MAX);
        let step = Tensor::f_randint(high, [1], (Kind::Int64, Device::Cpu))?;
        Ok(usize::try_from(step.f_int64_value(&[0])?).unwrap_or_default())
    }

    /// Clean samples `[B, ..]` from unit noise of that shape, without a graph.
    ///
    /// # Errors
    /// What the network returns.
    pub fn sample(&self, noise: &Tensor, cond: &Condition) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let last = self.grid.steps().saturating_sub(1);
        Ok(self.simulate(noise, cond, last)?.x)
    }

    /// Backward simulation: runs the grid up to `step` without a graph, and that step with one.
    ///
    /// The student meets in training what it meets at inference (DMD2, Section 4.5); the loss is
    /// put on its clean prediction at that step. `noise` is unit noise `[B, ..]`; steps count from 0.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if the grid has no such step;
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) if `noise` is
    /// not a batch of samples; what the network returns.
    pub fn simulate(&self, noise: &Tensor, cond: &Condition, step: usize) -> Result<Simulation> {
        self.simulate_with(noise, cond, step, |_, like| noise_like(like))
    }

    /// [`simulate`](Self::simulate) with the noise of re-noising transitions from `fresh`, which is
    /// given the index of the step that it leads to and a tensor of the wanted shape.
    ///
    /// # Errors
    /// As [`simulate`](Self::simulate), and what `fresh` returns.
    pub fn simulate_with(
        &self,
        noise: &Tensor,
        cond: &Condition,
        step: usize,
        mut fresh: impl FnMut(usize, &Tensor) -> Result<Tensor>,
    ) -> Result<Simulation> {
        check_samples("noise", noise, 2)?;
        let steps = self.grid.steps();
        checked("step", "below the number of steps", step as f64, step < steps)?;
        let mut x = noise.f_detach()?;
        let mut time = self.time(0, noise)?;
        for next in 1..=step {
            let _no_grad = no_grad_guard();
            let x0 = self.predict(&x, &time, cond)?;
            let next_time = self.time(next, noise)?;
            let noise = match self.transition {
                Transition::Renoise => fresh(next, &x)?,
                Transition::Euler => self.implied_noise(&x, &x0, &time)?,
            };
            x = self.denoiser.path().renoise(&x0, &next_time, &noise)?;
            time = next_time;
        }
        let student_time = PreShift::all(
            self.grid.times.get(step).copied().unwrap_or_default(),
            noise.size().first().copied().unwrap_or_default(),
            options(noise)?,
        )?;
        Ok(Simulation { x: self.predict(&x, &time, cond)?, student_time })
    }

    /// The whole rollout from unit noise `[B, ..]`, every step kept, without a graph.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn trajectory(&self, noise: &Tensor, cond: &Condition) -> Result<Trajectory> {
        check_samples("noise", noise, 2)?;
        let _no_grad = no_grad_guard();
        let (mut inputs, mut samples) = (vec![noise.f_detach()?], Vec::new());
        for step in 0..self.grid.steps() {
            let time = self.time(step, noise)?;
            let Some(x) = inputs.last() else { break };
            let x0 = self.predict(x, &time, cond)?;
            if step.saturating_add(1) < self.grid.steps() {
                let fresh = match self.transition {
                    Transition::Renoise => noise_like(x)?,
                    Transition::Euler => self.implied_noise(x, &x0, &time)?,
                };
                let next = self.time(step.saturating_add(1), noise)?;
                let x = self.denoiser.path().renoise(&x0, &next, &fresh)?;
                inputs.push(x);
            }
            samples.push(x0);
        }
        Ok(Trajectory {
            noised: Tensor::f_stack(&inputs, 0)?,
            samples: Tensor::f_stack(&samples, 0)?,
            times: Tensor::f_from_slice(&self.grid.times)?
                .f_to_device(noise.device())?
                .f_to_kind(compute_kind(noise.f_kind()?))?,
        })
    }

    /// The student's predictions on a kept rollout, each sample at its own step of `steps` `[B]`, in
    /// one forward with a graph.
    ///
    /// # Errors
    /// As [`Trajectory::samples_at`]; what the network returns.
    pub fn simulate_on(
        &self,
        trajectory: &Trajectory,
        cond: &Condition,
        steps: &Tensor,
    ) -> Result<Simulation> {
        let (noised, student_time) = trajectory.inputs_at(steps)?;
        let time = self.grid.shift.apply(&student_time)?;
        Ok(Simulation { x: self.predict(&noised, &time, cond)?, student_time })
    }

    fn time(&self, step: usize, like: &Tensor) -> Result<PostShift> {
        let pre_shift = self.grid.times.get(step).copied().unwrap_or_default();
        let batch = like.size().first().copied().unwrap_or_default();
        PostShift::all(self.grid.shift.of(pre_shift), batch, options(like)?)
    }

    fn predict(&self, x: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        let Some((guidance, null)) = self.guidance else {
            return self.denoiser.denoise(x, time, cond);
        };
        let (cond, null) = self.denoiser.denoise_pair(x, time, cond, null)?;
        Ok(null.f_add(&cond.f_sub(&null)?.f_mul_scalar(guidance.get())?)?)
    }

    /// `(x - a x0-hat) / s`; s is positive since the grid stays below 1.
    fn implied_noise(&self, x: &Tensor, x0: &Tensor, time: &PostShift) -> Result<Tensor> {
        let coefficients = self.denoiser.path().coefficients(time)?.like(x)?;
        Ok(x.f_sub(&x0.f_mul(&coefficients.data)?)?.f_div(&coefficients.noise)?)
    }
}

/// The type and device of the times that belong to `x`.
fn options(x: &Tensor) -> Result<(Kind, Device)> {
    Ok((compute_kind(x.f_kind()?), x.device()))
}
