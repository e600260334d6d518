//! Decoupled DMD on a Z-Image model: the teacher stays, a student and a fake score start as copies.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, FewStepGrid, Guidance, Sampler, Schedule,
    Shift, Simulation, Trajectory, Transition,
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::adapter::{denoiser, fake_denoiser};
use super::blocks::Parameters;
use super::checkpoint::{prefixed, restore};
use super::ema::Ema;
use super::flow_matching::step_seed;
use super::lora;
use super::optimizer::{AdamW, AdamWSettings};
use super::prompts::{Buckets, Prompts, is_caption_side};
use super::transformer::ZImageTransformer;

/// The recipe of a distillation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recipe {
    pub schedule: Schedule,
    pub guidance: Guidance,
    /// Steps of the student, in training and in sampling.
    pub steps: usize,
    pub transition: Transition,
    pub shift: Shift,
    /// Updates of the student.
    pub updates: u64,
    /// Updates of the fake score for each update of the student, all on the samples of one rollout.
    pub fake_updates: u64,
    /// Updates of the fake score before the first update of the student.
    pub fake_warmup: u64,
    pub batch: usize,
    pub student_learning_rate: f64,
    pub fake_learning_rate: f64,
    /// Updates over which the student's learning rate rises from zero.
    pub warmup: u64,
    /// Decay of the moving average of the student's weights, which is the result.
    pub ema: f64,
    pub seed: u64,
}

/// One trainable copy of the teacher.
struct Role {
    model: ZImageTransformer,
    optimizer: AdamW,
}

impl Role {
    /// A copy of `teacher`; `more` parameters are trained beside its own.
    fn new(
        teacher: &ZImageTransformer,
        learning_rate: f64,
        more: impl IntoIterator<Item = (String, Tensor)>,
    ) -> Result<Self> {
        let model = teacher.duplicate()?;
        let trainable: Vec<_> = model
            .named_parameters()
            .into_iter()
            .filter(|(name, _)| !is_caption_side(name))
            .chain(more)
            .map(|(name, tensor)| (name, tensor.set_requires_grad(true)))
            .collect();
        let settings = AdamWSettings {
            learning_rate,
            // No momentum over the moving target of two networks that chase one another, as in
            // Self-Forcing and rCM.
            betas: (0.0, 0.99),
            weight_decay: 0.01,
            max_gradient_norm: Some(1.0),
            ..AdamWSettings::default()
        };
        Ok(Self { model, optimizer: AdamW::new(trainable, settings)? })
    }

    /// Trained parameters and the optimizer's moments; storage is shared.
    fn state(&self) -> impl Iterator<Item = (String, Tensor)> {
        prefixed("weights", self.optimizer.parameters())
            .chain(prefixed("adamw", self.optimizer.state()))
    }

    /// Descends along a loss; returns the norm of its gradient.
    fn descend(&mut self, loss: &Tensor) -> Result<Tensor> {
        self.optimizer.zero_grad();
        loss.f_backward()?;
        self.optimizer.step()
    }
}

/// Names of the counts in the state.
const WARMED: &str = "fake_warmup_updates";
const UPDATES: &str = "updates";

/// What one update of the student has shown: names and values.
pub type Record = Vec<(String, f64)>;

/// A rollout of the student and the conditions that it was made for.
struct Rollout {
    trajectory: Trajectory,
    cond: Condition,
    null: Condition,
}

impl Rollout {
    /// The condition for the fake score too, which wants to know the student's step.
    fn cond_at(&self, steps: &Tensor) -> Condition {
        Condition::from(vec![self.cond[0].shallow_clone(), steps.shallow_clone()])
    }
}

/// A distillation under way.
pub struct Distillation<'a> {
    recipe: Recipe,
    teacher: &'a ZImageTransformer,
    prompts: &'a Prompts,
    /// Captions to draw from.
    buckets: Buckets,
    /// Mean variance of a real picture: the reference of the variance drift.
    data_variance: f64,
    /// Size of one sample, `[C, H, W]`.
    size: [i64; 3],
    student: Role,
    fake: Role,
    /// What tells the fake score the student's step, `[K, D]`.
    fake_steps: Tensor,
    average: Ema,
    /// Updates of the fake score before the first of the student, so far.
    warmed: u64,
    update: u64,
}

impl<'a> Distillation<'a> {
    /// Student and fake score as copies of `teacher`, to be trained on the captions `items` of
    /// `prompts`. `images` `[N, C, H, W]` are used for the reference of the variance drift alone.
    ///
    /// # Errors
    /// If there are no captions to draw from, or libtorch cannot allocate the copies.
    pub fn new(
        recipe: Recipe,
        teacher: &'a ZImageTransformer,
        prompts: &'a Prompts,
        items: &[i64],
        images: &Tensor,
    ) -> Result<Self> {
        let (_, channels, height, width) = images.size4()?;
        let student = Role::new(teacher, recipe.student_learning_rate, None)?;
        let dim = teacher.config().dim;
        let options = (Kind::Float, teacher.device());
        let fake_steps = Tensor::f_zeros([recipe.steps as i64, dim], options)?;
        let more = ("student_steps".to_owned(), fake_steps.shallow_clone());
        Ok(Self {
            teacher,
            prompts,
            buckets: prompts.buckets(items)?,
            data_variance: mean_variance(images)?,
            size: [channels, height, width],
            fake: Role::new(teacher, recipe.fake_learning_rate, Some(more))?,
            fake_steps,
            average: Ema::new(&student.model, recipe.ema)?,
            student,
            warmed: 0,
            update: 0,
            recipe,
        })
    }

    /// The moving average of the student: what to sample with and to keep.
    pub fn student(&self) -> &ZImageTransformer {
        &self.average.model
    }

    /// Updates of the student so far.
    pub fn updates(&self) -> u64 {
        self.update
    }

    /// Everything that training changes, by name: the trained parameters, moments and step counts of
    /// both roles, the moving average, and how far training is. Storage is shared, but for the counts.
    /// What an update draws depends on the seed and its number alone, so that this is all there is.
    pub fn state(&self) -> Parameters {
        let role = |name, role: &Role| prefixed(name, role.state().collect());
        let trained = self.student.optimizer.parameters();
        let average = self.average.model.named_parameters();
        let average = average.into_iter().filter(|(name, _)| trained.contains_key(name)).collect();
        let count = |count: u64| Tensor::from(count as i64);
        role("student", &self.student)
            .chain(role("fake", &self.fake))
            .chain(prefixed("average", average))
            .chain([
                (WARMED.to_owned(), count(self.warmed)),
                (UPDATES.to_owned(), count(self.update)),
            ])
            .collect()
    }

    /// Restores what [`Self::state`] gave.
    ///
    /// # Errors
    /// Names what is missing, unexpected, or of another shape or dtype; nothing is changed then.
    pub fn load_state(&mut self, state: &Parameters) -> Result<()> {
        let count = |name| -> Result<u64> {
            let value = state.get(name).with_context(|| format!("{name} is missing"))?;
            let value = i64::try_from(value).with_context(|| format!("reading {name}"))?;
            u64::try_from(value).with_context(|| format!("{name} is {value}"))
        };
        let (warmed, update) = (count(WARMED)?, count(UPDATES)?);
        restore(&self.state(), state)?;
        (self.warmed, self.update) = (warmed, update);
        Ok(())
    }

    /// Whether the fake score is ready for the first update of the student.
    pub fn is_warm(&self) -> bool {
        self.warmed >= self.recipe.fake_warmup
    }

    /// Trains the fake score alone on one rollout of the student, as often as in an update, as long
    /// as [`Self::is_warm`] says no.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn warm_up(&mut self) -> Result<()> {
        let end = (self.warmed + self.recipe.fake_updates.max(1)).min(self.recipe.fake_warmup);
        tch::manual_seed(step_seed(self.recipe.seed, 1_000_000_000 + self.warmed));
        let rollout = self.roll_out()?;
        while self.warmed < end {
            self.train_fake(&rollout)?;
            self.warmed += 1;
        }
        Ok(())
    }

    /// One update of the student and those of the fake score that go with it. With `observe`, the
    /// record holds the diagnostics of the terms besides the losses.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn step(&mut self, observe: bool) -> Result<Record> {
        tch::manual_seed(step_seed(self.recipe.seed, self.update));
        self.student.optimizer.settings.learning_rate =
            self.recipe.student_learning_rate * self.learning_rate_factor();
        let rollout = self.roll_out()?;
        let mut record = self.train_student(&rollout, observe)?;
        let mut fake_loss = 0.0;
        for _ in 0..self.recipe.fake_updates {
            fake_loss += self.train_fake(&rollout)?;
        }
        record.push(("fake".into(), fake_loss / self.recipe.fake_updates.max(1) as f64));
        self.update += 1;
        self.average.update(&self.student.model, self.update)?;
        Ok(record)
    }

    /// Linear warm-up, constant, and in the last third linear decay, which takes the noise of single
    /// updates out of the result.
    fn learning_rate_factor(&self) -> f64 {
        let Recipe { warmup, updates, .. } = self.recipe;
        let warm = (self.update + 1) as f64 / warmup.max(1) as f64;
        let left = updates.saturating_sub(self.update) as f64 / (updates / 3).max(1) as f64;
        warm.min(left).min(1.0)
    }

    fn train_student(&mut self, rollout: &Rollout, observe: bool) -> Result<Record> {
        let Rollout { trajectory, cond, .. } = rollout;
        let teacher = denoiser(self.teacher, lora::Role::BASE);
        let fake = fake_denoiser(&self.fake.model, lora::Role::BASE, &self.fake_steps);
        let dm = DistributionMatching::new(fake, self.recipe.shift);
        let mut objective =
            self.recipe.schedule.objective(teacher, self.recipe.guidance, &dm, self.recipe.shift);
        if observe {
            objective = objective.observed();
        }

        let steps = trajectory.draw_steps()?;
        let Simulation { x, student_time } = {
            let student = denoiser(&self.student.model, lora::Role::BASE);
            self.sampler(&student)?.simulate_on(trajectory, cond, &steps)?
        };
        let cond = rollout.cond_at(&steps);
        let batch = Batch::new(&x, &cond)?.null(&rollout.null).student_time(&student_time)?;
        let evaluation = objective.evaluate(&batch)?;
        let mut record = vec![("loss".to_owned(), f64::try_from(&evaluation.loss)?)];
        for (name, value) in &evaluation.terms {
            record.push((name.clone(), f64::try_from(value)?));
        }
        if let Some(diagnostics) = &evaluation.diagnostics {
            record.extend(diagnostics.report()?);
            let drift = diagnostics.variance_drift(self.data_variance)?;
            record.extend(drift.map(|drift| ("variance_drift".to_owned(), drift)));
        }
        let norm = self.student.descend(&evaluation.loss)?;
        if observe {
            record.push(("student_gradient".into(), f64::try_from(&norm)?));
        }
        Ok(record)
    }

    fn train_fake(&mut self, rollout: &Rollout) -> Result<f64> {
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let loss = {
            let fake = fake_denoiser(&self.fake.model, lora::Role::BASE, &self.fake_steps);
            let dm = DistributionMatching::new(fake, self.recipe.shift);
            dm.denoising_loss(&Batch::new(&x, &rollout.cond_at(&steps))?)?
        };
        let _norm = self.fake.descend(&loss)?;
        Ok(f64::try_from(&loss)?)
    }

    /// The student's way from fresh noise over its whole grid, for fresh captions.
    fn roll_out(&self) -> Result<Rollout> {
        let (cond, null) = self.prompts.conditions(&self.buckets.draw(self.recipe.batch)?)?;
        let [channels, height, width] = self.size;
        let shape = [self.recipe.batch as i64, channels, height, width];
        let noise = Tensor::f_randn(shape, (Kind::Float, self.teacher.device()))?;
        let student = denoiser(&self.student.model, lora::Role::BASE);
        let trajectory = self.sampler(&student)?.trajectory(&noise, &cond)?;
        Ok(Rollout { trajectory, cond, null })
    }

    fn sampler<'d>(&self, student: &'d Denoiser<'d>) -> Result<Sampler<'d>> {
        let grid = FewStepGrid::even(self.recipe.steps, self.recipe.shift)?;
        Ok(Sampler::new(student, grid, self.recipe.transition))
    }
}

/// Mean over the images of the variance of one image.
fn mean_variance(images: &Tensor) -> Result<f64> {
    let variance = images.f_flatten(1, -1)?.f_var_dim(&[1i64][..], false, false)?;
    Ok(f64::try_from(variance.f_mean(Kind::Double)?)?)
}
