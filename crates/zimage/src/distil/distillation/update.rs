//! The updates of a distillation.

use anyhow::{Context, Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use decoupled_dmd::{Batch, Denoiser, FewStepGrid, Sampler, Steps};
use tch::{Kind, Tensor};
use tch_training::Tape;
use tch_training::ema::update_average;
use tch_training::seed::seed_of;

use super::{Distillation, Record, VARIANCE_DRIFT};
use crate::distil::readings::Readings;
use crate::distil::recipe::Recipe;
use crate::distil::role_trainer::RoleTrainer;
use crate::distil::rollout::{Captions, Rollout};
use crate::distil::stream::Stream;
use crate::distil::terms::{Networks, Terms};

/// Numbers of the batches before the first update.
const WARM_UP: u64 = 500_000_000;

/// What one part adds to the mean over `parts`.
fn share(loss: Tensor, parts: usize) -> Result<Tensor> {
    Ok(if parts > 1 { loss.over(parts as f64)? } else { loss })
}

/// The sum of losses, if there are any.
fn sum(losses: Vec<Tensor>) -> Result<Option<Tensor>> {
    losses.into_iter().map(Ok).reduce(|sum, loss| Ok(sum?.f_add(&loss?)?)).transpose()
}

impl<T: Terms> Distillation<'_, T> {
    /// Trains the fake score alone on one rollout of the student, as often as in an update, as long
    /// as [`Self::is_warm`] says no.
    ///
    /// # Errors
    /// As [`Self::step`].
    pub fn warm_up(&mut self) -> Result<()> {
        let end = self.warmed.saturating_add(self.recipe.fake_updates.max(1));
        let end = end.min(self.recipe.fake_warmup);
        self.begin(Stream::WarmUp(self.warmed));
        let captions = self.draw_captions()?;
        let steps = self.rollout_steps().unwrap_or(self.recipe.steps);
        // Of batches that no update has.
        let rollouts = self.roll_out(&captions, steps, WARM_UP + self.warmed)?;
        let mut readings = Readings::default();
        while self.warmed < end {
            self.train_fake(&rollouts, &mut readings)?;
            self.warmed += 1;
        }
        let (_, fault) = readings.read(self.processes)?;
        self.judge(fault);
        Ok(())
    }

    /// One update of the student and those of the other networks that go with it. With `observe`, the
    /// record holds the diagnostics of the terms besides the losses.
    ///
    /// What the student draws does not depend on which other networks are trained: distillations of one seed
    /// start from the same captions and noise at each update. The device is waited for once, at the end, for all
    /// numbers together.
    ///
    /// # Errors
    /// If libtorch fails. Numbers that are not finite are no error of one process: see
    /// [`Self::check_finite`]. Of several, if one is lost, or they are not in step.
    pub fn step(&mut self, observe: bool) -> Result<Record> {
        self.begin(Stream::Update(self.update));
        self.student.trainer.optimizer.settings.learning_rate =
            self.recipe.student.learning_rate * self.learning_rate_factor();
        let captions = self.draw_captions()?;
        let roll_out = |steps| self.roll_out(&captions, steps, self.update);
        let rollouts = self.rollout_steps().map(roll_out).transpose()?.unwrap_or_default();
        let mut readings = self.train_student(&captions, &rollouts, observe)?;
        if self.fake.is_some() && !rollouts.is_empty() {
            // Loss and norm of the gradient.
            let mut sum = Tensor::f_zeros([2], (Kind::Double, self.teacher.device()))?;
            for _ in 0..self.recipe.fake_updates {
                if let Some((loss, norm)) = self.train_fake(&rollouts, &mut readings)? {
                    let double = |tensor: Tensor| tensor.f_detach()?.f_to_kind(Kind::Double);
                    sum = sum.f_add(&Tensor::f_stack(&[double(loss)?, double(norm)?], 0)?)?;
                }
            }
            let mean = sum.over(self.recipe.fake_updates.max(1) as f64)?;
            readings.push("fake", &mean.f_select(0, 0)?)?;
            if observe {
                readings.push("fake_gradient", &mean.f_select(0, 1)?)?;
            }
        }
        readings.extend(self.train_terms(&captions, &rollouts)?);
        self.update += 1;
        let current = self.student.parameters();
        update_average(&self.average.parameters(), &current, self.recipe.ema, self.update)?;
        let (mut record, fault) = readings.read(self.processes)?;
        let of_samples = record.iter_mut().find(|(name, _)| name == VARIANCE_DRIFT);
        if let (Some((_, value)), Some(of_data)) = (of_samples, self.data_variance) {
            *value = (*value / of_data).ln();
        }
        let of_record = || {
            let (name, value) = record.iter().find(|(_, value)| !value.is_finite())?;
            Some(format!("{name} is {value}"))
        };
        self.judge(fault.or_else(of_record));
        if observe {
            record.extend(self.learning_rates());
        }
        Ok(record)
    }

    /// The learning rates of the roles at the last update, as numbers of a record.
    fn learning_rates(&self) -> Record {
        let rate = |role: &str, trainer: &RoleTrainer| {
            (format!("{role}_learning_rate"), trainer.optimizer.settings.learning_rate)
        };
        let fake = self.fake.iter().map(|fake| rate("fake", &fake.trainer));
        [rate("student", &self.student.trainer)].into_iter().chain(fake).collect()
    }

    /// Linear warm-up, and the decay of the recipe.
    fn learning_rate_factor(&self) -> f64 {
        let Recipe { warmup, updates, decay, .. } = self.recipe;
        let warm = (self.update + 1) as f64 / warmup.max(1) as f64;
        warm.min(decay.left(self.update, updates)).min(1.0)
    }

    /// One update of the student by the mean of the losses of its parts.
    fn train_student(
        &mut self,
        captions: &[Captions],
        rollouts: &[Rollout<'_>],
        observe: bool,
    ) -> Result<Readings> {
        self.student.trainer.optimizer.zero_grad()?;
        let parts = (0..captions.len()).map(|part| {
            let tape = self.recipe.tape();
            let (loss, readings) =
                self.loss_of_student(&captions[part], rollouts.get(part), tape.as_ref(), observe)?;
            let share = share(loss, captions.len())?;
            self.student.trainer.accumulate(&share, tape.as_ref())?;
            Ok(readings)
        });
        let mut readings = Readings::join(parts.collect::<Result<_>>()?)?;
        let norm = self.student.trainer.step(self.processes)?;
        readings.push_norm("student", &norm)?;
        if observe {
            readings.push("student_gradient", &norm)?;
        }
        Ok(readings)
    }

    /// The sum of the student's losses on one part of the batch, and what they show.
    fn loss_of_student(
        &self,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
        tape: Option<&Tape>,
        observe: bool,
    ) -> Result<(Tensor, Readings)> {
        let (base, shift) = (self.teacher, self.recipe.shift);
        let dm = self.fake.as_ref().map(|fake| fake.matching(base, shift));
        let networks = self.student.networks(base, tape, shift, dm.as_ref());
        let (mut losses, mut readings) = (Vec::new(), Readings::default());
        let on_rollout = rollout.map(|rollout| self.loss_on_rollout(&networks, rollout, observe));
        let more = self.terms.more_losses(self.update, &networks, captions, rollout)?;
        for (loss, seen) in on_rollout.transpose()?.into_iter().chain(more) {
            losses.push(loss);
            readings.extend(seen);
        }
        Ok((sum(losses)?.context("the student is trained by no loss")?, readings))
    }

    /// The objective's loss, and what it shows.
    fn loss_on_rollout(
        &self,
        networks: &Networks<'_>,
        rollout: &Rollout<'_>,
        observe: bool,
    ) -> Result<(Tensor, Readings)> {
        let Rollout { trajectory, captions, .. } = rollout;
        let collective = self.processes.collective();
        let mut objective = self.terms.objective(networks.teacher.clone(), networks.dm)?;
        if let Some(collective) = &collective {
            objective = objective.among(collective);
        }
        if observe {
            objective = objective.observed();
        }
        let steps = trajectory.draw_steps()?;
        let sampler = self.sampler(&networks.student, trajectory.steps() as usize)?;
        let simulation = sampler.simulate_on(trajectory, &captions.cond, &steps)?;
        let cond = rollout.cond_at(&steps)?;
        let mut batch = Batch::of(&simulation, &cond)?.with_null(&captions.null);
        if let Some(real) = &captions.real {
            batch = batch.with_real(real)?;
        }
        let evaluation = match self.terms.draw(rollout, &steps)? {
            Some(draw) => objective.evaluate_at(&batch, vec![draw])?,
            None => objective.evaluate(&batch)?,
        };
        let mut readings = Readings::default();
        let mut scalars = evaluation.scalars()?;
        let diagnostics = scalars.split_off(1 + evaluation.terms.len());
        for (name, value) in scalars {
            readings.push(name, &value)?;
        }
        readings.observe(diagnostics)?;
        if let Some(diagnostics) = evaluation.diagnostics.filter(|_| self.data_variance.is_some()) {
            let variance = diagnostics.mean_variance()?;
            readings.observe([(VARIANCE_DRIFT.to_owned(), variance)])?;
        }
        Ok((evaluation.loss, readings))
    }

    /// One update of the fake score, if there is one; its loss and the norm of its gradient.
    fn train_fake(
        &mut self,
        rollouts: &[Rollout<'_>],
        readings: &mut Readings,
    ) -> Result<Option<(Tensor, Tensor)>> {
        let Some(fake) = &mut self.fake else { return Ok(None) };
        let (base, shift) = (self.teacher, self.recipe.shift);
        fake.trainer.optimizer.zero_grad()?;
        let mut losses = Vec::with_capacity(rollouts.len());
        for rollout in rollouts {
            let tape = self.recipe.tape();
            let draw = |steps: &Steps| self.terms.draw(rollout, steps);
            let loss = fake.loss(base, rollout, shift, tape.as_ref(), draw)?;
            let loss = share(loss, rollouts.len())?;
            fake.trainer.accumulate(&loss, tape.as_ref())?;
            losses.push(loss.f_detach()?);
        }
        let norm = fake.trainer.step(self.processes)?;
        readings.push_norm("fake score", &norm)?;
        Ok(sum(losses)?.map(|loss| (loss, norm)))
    }

    /// One update of the networks of the terms.
    fn train_terms(&mut self, captions: &[Captions], rollouts: &[Rollout<'_>]) -> Result<Readings> {
        // Terms that have something to train here take whole batches.
        let Some(captions) = captions.first() else { return Ok(Readings::default()) };
        let (base, shift) = (self.teacher, self.recipe.shift);
        let dm = self.fake.as_ref().map(|fake| fake.matching(base, shift));
        let networks = self.student.networks(base, None, shift, dm.as_ref());
        self.terms.train(self.update, &networks, captions, rollouts.first())
    }

    /// Fresh captions, for each part of the batch.
    fn draw_captions(&self) -> Result<Vec<Captions>> {
        let count = self.processes.part(self.recipe.part()?)?;
        let part = |_| {
            let items = self.buckets.draw(count)?;
            let (cond, null) = self.prompts.conditions(&items)?;
            Ok(Captions { cond, null, real: self.terms.real(&items)?, items })
        };
        (0..self.recipe.accumulate).map(part).collect()
    }

    /// The student's ways from fresh noise over a whole grid of `steps`, of all parts of the batch of this `number`.
    fn roll_out<'c>(
        &self,
        captions: &'c [Captions],
        steps: usize,
        number: u64,
    ) -> Result<Vec<Rollout<'c>>> {
        let most = self.recipe.steps;
        let stride = most / steps.max(1);
        ensure!(steps * stride == most, "a rollout of {steps} steps does not divide {most}");
        let student = self.student.denoiser(self.teacher, self.recipe.shift);
        let roll_out = |(part, captions): (u64, &'c Captions)| {
            let [channels, height, width] =
                self.size(number * self.recipe.accumulate as u64 + part);
            let shape = [captions.items.len() as i64, channels, height, width];
            let noise = Tensor::f_randn(shape, (Kind::Float, self.teacher.device()))?;
            let trajectory = self.sampler(&student, steps)?.trajectory(&noise, &captions.cond)?;
            Ok(Rollout { trajectory, captions, stride: stride as i64 })
        };
        (0..).zip(captions).map(roll_out).collect()
    }

    /// The size of the samples of one part of a batch, which all processes share: none waits for one with more to
    /// do.
    fn size(&self, number: u64) -> [i64; 3] {
        let pick = seed_of(self.recipe.seed, Stream::Size(number)) as usize;
        self.sizes[pick % self.sizes.len()]
    }

    fn sampler<'d>(&self, student: &'d Denoiser<'d>, steps: usize) -> Result<Sampler<'d>> {
        let grid = FewStepGrid::even(steps)?;
        Ok(Sampler::new(student, grid, self.recipe.transition))
    }
}
