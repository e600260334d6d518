//! What trainings are made of: networks with their optimizers, and the student's rollout.

use anyhow::Result;
use decoupled_dmd::{Batch, Condition, Denoiser, DistributionMatching, Shift, Trajectory};
use tch::{Kind, Tensor};

use super::adapter::fake_denoiser;
use super::checkpoint::prefixed;
use super::lora::LoraSettings;
use super::optimizer::{AdamW, AdamWSettings};
use super::tape::Tape;
use super::trained::Trained;
use super::transformer::ZImageTransformer;

/// Weights that are trained, and their optimizer.
#[derive(Debug)]
pub struct Learner {
    pub weights: Trained,
    pub optimizer: AdamW,
}

impl Learner {
    /// Equal to `teacher` to begin with; `more` parameters are trained beside its own.
    ///
    /// # Errors
    /// If the adapter's settings do not fit the model, or libtorch cannot allocate the weights.
    pub fn new(
        teacher: &ZImageTransformer,
        adapter: Option<&LoraSettings>,
        settings: AdamWSettings,
        more: Option<(&str, &Tensor)>,
    ) -> Result<Self> {
        let weights = Trained::new(teacher, adapter)?;
        let more = more.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let trainable = weights
            .parameters()
            .into_iter()
            .chain(more)
            .map(|(name, tensor)| (name, tensor.set_requires_grad(true)))
            .collect();
        Ok(Self { weights, optimizer: AdamW::new(trainable, settings)? })
    }

    /// Trained parameters and the optimizer's moments; storage is shared.
    pub fn state(&self) -> impl Iterator<Item = (String, Tensor)> {
        prefixed("weights", self.optimizer.parameters())
            .chain(prefixed("adamw", self.optimizer.state()))
    }

    /// Descends along a loss, made with `tape` if there is one; returns the norm of its gradient.
    ///
    /// # Errors
    /// If the loss does not depend on the weights.
    pub fn descend(&mut self, loss: &Tensor, tape: Option<&Tape>) -> Result<Tensor> {
        self.optimizer.zero_grad();
        match tape {
            Some(tape) => tape.backward(loss)?,
            None => loss.f_backward()?,
        }
        self.optimizer.step()
    }
}

/// A fake score that is told the student's step: its condition is that of [`Rollout::cond_at`].
#[derive(Debug)]
pub struct FakeScore {
    pub learner: Learner,
    /// What tells the step, `[K, D]`.
    steps: Tensor,
}

impl FakeScore {
    /// Equal to `teacher` to begin with, for a student of `steps` steps.
    ///
    /// # Errors
    /// As [`Learner::new`].
    pub fn new(
        teacher: &ZImageTransformer,
        adapter: Option<&LoraSettings>,
        settings: AdamWSettings,
        steps: usize,
    ) -> Result<Self> {
        let options = (Kind::Float, teacher.device());
        let steps = Tensor::f_zeros([steps as i64, teacher.config().dim], options)?;
        let learner = Learner::new(teacher, adapter, settings, Some(("student_steps", &steps)))?;
        Ok(Self { learner, steps })
    }

    /// What to ask.
    pub fn denoiser<'a>(&'a self, base: &'a ZImageTransformer, shift: Shift) -> Denoiser<'a> {
        fake_denoiser(self.learner.weights.network(base), &self.steps, shift)
    }

    /// One update on the samples of a rollout; returns loss and gradient norm as scalar tensors.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn train(
        &mut self,
        base: &ZImageTransformer,
        rollout: &Rollout,
        shift: Shift,
        tape: Option<&Tape>,
    ) -> Result<(Tensor, Tensor)> {
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let loss = {
            let network = self.learner.weights.training(base, tape);
            let dm = DistributionMatching::new(fake_denoiser(network, &self.steps, shift));
            dm.denoising_loss(&Batch::new(&x, &rollout.cond_at(&steps))?)?
        };
        let norm = self.learner.descend(&loss, tape)?;
        Ok((loss, norm))
    }
}

/// A rollout of the student and the conditions that it was made for.
#[derive(Debug)]
pub struct Rollout {
    pub trajectory: Trajectory,
    pub cond: Condition,
    pub null: Condition,
}

impl Rollout {
    /// The condition for the fake score too, which wants to know the student's step.
    pub fn cond_at(&self, steps: &Tensor) -> Condition {
        Condition::from(vec![self.cond[0].shallow_clone(), steps.shallow_clone()])
    }
}
