//! The fake score: a denoiser of the student's samples, trained beside it.

use anyhow::Result;
use decoupled_dmd::{
    Batch, Denoiser, DistributionMatching, Draw, Renoising, Shift, Steps, Uniform,
};
use tch::{Kind, Tensor};
use tch_training::lora::LoraSettings;
use tch_training::{AdamWSettings, Tape};

use crate::distil::adapter::fake_denoiser;
use crate::distil::role_trainer::RoleTrainer;
use crate::distil::rollout::Rollout;
use crate::model::ZImageTransformer;

/// A fake score that is told the student's step: its condition is that of [`Rollout::cond_at`].
#[derive(Debug)]
pub struct FakeScore {
    pub trainer: RoleTrainer,
    /// What tells the step, `[K, D]`.
    steps: Tensor,
}

impl FakeScore {
    /// Equal to `teacher` to begin with, for a student of `steps` steps.
    ///
    /// # Errors
    /// As [`RoleTrainer::new`].
    pub fn new(
        teacher: &ZImageTransformer,
        adapter: Option<&LoraSettings>,
        settings: AdamWSettings,
        steps: usize,
    ) -> Result<Self> {
        let options = (Kind::Float, teacher.device());
        let steps = Tensor::f_zeros([steps as i64, teacher.config().dim], options)?;
        let trainer =
            RoleTrainer::new(teacher, adapter, settings, Some(("student_steps", &steps)))?;
        Ok(Self { trainer, steps })
    }

    /// What to ask.
    pub fn denoiser<'a>(&'a self, base: &'a ZImageTransformer, shift: Shift) -> Denoiser<'a> {
        fake_denoiser(self.trainer.weights.network(base), &self.steps, shift)
    }

    /// Distribution matching with this fake score.
    pub fn matching<'a>(
        &'a self,
        base: &'a ZImageTransformer,
        shift: Shift,
    ) -> DistributionMatching<'a> {
        DistributionMatching::new(self.denoiser(base, shift))
    }

    /// The loss on the samples of a rollout, made with `tape` if there is one, at what `draw` gives for their steps,
    /// or at all times with fresh noise where it gives nothing; see [`Terms::draw`](super::Terms::draw).
    ///
    /// # Errors
    /// If `draw` or libtorch fails.
    pub fn loss(
        &self,
        base: &ZImageTransformer,
        rollout: &Rollout<'_>,
        shift: Shift,
        tape: Option<&Tape>,
        draw: impl FnOnce(&Steps) -> Result<Option<Draw>>,
    ) -> Result<Tensor> {
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let network = self.trainer.weights.training(base, tape);
        let dm = DistributionMatching::new(fake_denoiser(network, &self.steps, shift));
        let cond = rollout.cond_at(&steps)?;
        let batch = Batch::new(&x, &cond)?;
        let Some(Draw { u, noise }) = draw(&steps)? else { return Ok(dm.denoising_loss(&batch)?) };
        let time = Renoising::new(Uniform::FULL).at(dm.fake().path(), &u, None)?;
        Ok(dm.denoising_loss_at(&batch, &time, &noise)?)
    }
}
