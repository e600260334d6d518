//! Decoupled DMD on a Z-Image model: the teacher stays, a student and a fake score start equal to it.

use anyhow::{Context, Result, ensure};
use decoupled_dmd::{Batch, Denoiser, DistributionMatching, FewStepGrid, Sampler, Shifts};
use tch::{Kind, Tensor};
use tch_training::ema::update_average;
use tch_training::parameters::{prefixed, restore};
use tch_training::seed::begin;
use tch_training::{Parameters, Tape};

use crate::distil::adapter::denoiser;
use crate::distil::fake_score::FakeScore;
use crate::distil::prompts::{Buckets, Prompts};
use crate::distil::recipe::Recipe;
use crate::distil::role_trainer::RoleTrainer;
use crate::distil::rollout::Rollout;
use crate::distil::stream::Stream;
use crate::distil::weights::{Network, RoleWeights};
use crate::model::ZImageTransformer;

/// Names of the counts in the state.
const WARMED: &str = "fake_warmup_updates";
const UPDATES: &str = "updates";

/// What one update of the student has shown: names and values.
pub type Record = Vec<(String, f64)>;

/// A distillation under way.
pub struct Distillation<'a> {
    recipe: Recipe,
    teacher: &'a ZImageTransformer,
    prompts: &'a Prompts,
    /// Captions to draw from.
    buckets: Buckets,
    /// Mean variance of a real sample, the reference of the variance drift, where it is known.
    data_variance: Option<f64>,
    /// Size of one sample, `[C, H, W]`.
    size: [i64; 3],
    student: RoleTrainer,
    fake: FakeScore,
    average: RoleWeights,
    /// Updates of the fake score before the first of the student, so far.
    warmed: u64,
    update: u64,
}

impl<'a> Distillation<'a> {
    /// Student and fake score, both equal to `teacher` to begin with, to be trained on the captions
    /// `items` of `prompts` with samples of `size` `[C, H, W]`. `data_variance`, the mean variance of
    /// a real sample, is the reference of the variance drift and used for nothing else.
    ///
    /// # Errors
    /// If there are no captions to draw from, the adapter's settings do not fit, or libtorch cannot
    /// allocate the weights.
    pub fn new(
        recipe: Recipe,
        teacher: &'a ZImageTransformer,
        prompts: &'a Prompts,
        items: &[i64],
        size: [i64; 3],
        data_variance: Option<f64>,
    ) -> Result<Self> {
        // What is random in new adapters.
        begin(recipe.seed, Stream::Adapters);
        let adapter = recipe.adapter.as_ref();
        let student = RoleTrainer::new(teacher, adapter, recipe.student, None)?;
        Ok(Self {
            teacher,
            prompts,
            buckets: prompts.buckets(items)?,
            data_variance,
            size,
            fake: FakeScore::new(teacher, adapter, recipe.fake, recipe.steps)?,
            average: student.weights.duplicate()?,
            student,
            warmed: 0,
            update: 0,
            recipe,
        })
    }

    /// The moving average of the student: what to sample with and to keep.
    pub fn student(&self) -> Network<'_> {
        self.average.network(self.teacher)
    }

    /// The weights behind [`Self::student`].
    pub fn student_weights(&self) -> &RoleWeights {
        &self.average
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Updates of the student so far.
    pub fn updates(&self) -> u64 {
        self.update
    }

    /// Everything that training changes, by name: the trained parameters, moments and step counts of
    /// both roles, the moving average, and how far training is. Storage is shared, but for the counts.
    /// What an update draws depends on the seed and its number alone, so that this is all there is.
    pub fn state(&self) -> Parameters {
        let role = |name, trainer: &RoleTrainer| prefixed(name, trainer.state().collect());
        let count = |count: u64| Tensor::from(count as i64);
        role("student", &self.student)
            .chain(role("fake", &self.fake.trainer))
            .chain(prefixed("average", self.average.parameters().into_iter().collect()))
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
        begin(self.recipe.seed, Stream::WarmUp(self.warmed));
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
        begin(self.recipe.seed, Stream::Update(self.update));
        self.student.optimizer.settings.learning_rate =
            self.recipe.student.learning_rate * self.learning_rate_factor();
        let rollout = self.roll_out()?;
        let mut record = self.train_student(&rollout, observe)?;
        let mut fake_loss = 0.0;
        for _ in 0..self.recipe.fake_updates {
            fake_loss += self.train_fake(&rollout)?;
        }
        record.push(("fake".into(), fake_loss / self.recipe.fake_updates.max(1) as f64));
        self.update += 1;
        let current = self.student.weights.parameters();
        update_average(&self.average.parameters(), &current, self.recipe.ema, self.update)?;
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
        let Recipe { schedule, guidance, shift, dm_shift, .. } = self.recipe;
        let teacher = denoiser(self.teacher, shift);
        let dm = DistributionMatching::new(self.fake.denoiser(self.teacher, shift));
        let shifts = Shifts { regularizer: Some(dm_shift), ..Shifts::default() };
        let mut objective = schedule.objective_with_shifts(teacher, guidance, &dm, shifts);
        if observe {
            objective = objective.observed();
        }

        let steps = trajectory.draw_steps()?;
        let tape = self.tape();
        let made = {
            let network = self.student.weights.training(self.teacher, tape.as_ref());
            let student = denoiser(network, shift);
            self.sampler(&student)?.simulate_on(trajectory, cond, &steps)?
        };
        let cond = rollout.cond_at(&steps);
        let batch = Batch::of(&made, &cond)?.with_null(&rollout.null);
        let evaluation = objective.evaluate(&batch)?;
        let mut record = evaluation.report()?;
        if let Some(diagnostics) = &evaluation.diagnostics {
            if let Some(variance) = self.data_variance {
                let drift = diagnostics.variance_drift(variance)?;
                record.extend(drift.map(|drift| ("variance_drift".to_owned(), drift)));
            }
        }
        let norm = finite(&self.student.descend(&evaluation.loss, tape.as_ref())?)?;
        if observe {
            record.push(("student_gradient".into(), norm));
        }
        Ok(record)
    }

    fn train_fake(&mut self, rollout: &Rollout) -> Result<f64> {
        let tape = self.tape();
        let (loss, norm) =
            self.fake.train(self.teacher, rollout, self.recipe.shift, tape.as_ref())?;
        finite(&norm)?;
        Ok(f64::try_from(&loss)?)
    }

    /// The student's way from fresh noise over its whole grid, for fresh captions.
    fn roll_out(&self) -> Result<Rollout> {
        let (cond, null) = self.prompts.conditions(&self.buckets.draw(self.recipe.batch)?)?;
        let [channels, height, width] = self.size;
        let shape = [self.recipe.batch as i64, channels, height, width];
        let noise = Tensor::f_randn(shape, (Kind::Float, self.teacher.device()))?;
        let student = denoiser(self.student.weights.network(self.teacher), self.recipe.shift);
        let trajectory = self.sampler(&student)?.trajectory(&noise, &cond)?;
        Ok(Rollout { trajectory, cond, null })
    }

    /// What the forward passes of one loss are kept on, if they are to be computed again.
    fn tape(&self) -> Option<Tape> {
        self.recipe.checkpointing.then(Tape::default)
    }

    fn sampler<'d>(&self, student: &'d Denoiser<'d>) -> Result<Sampler<'d>> {
        let grid = FewStepGrid::even(self.recipe.steps)?;
        Ok(Sampler::new(student, grid, self.recipe.transition))
    }
}

/// The norm of a gradient. Losses are finite a step longer than the weights that such a gradient spoils, and
/// the state of those is not to be saved.
fn finite(norm: &Tensor) -> Result<f64> {
    let norm = f64::try_from(norm)?;
    ensure!(norm.is_finite(), "training broke down: the norm of a gradient is {norm}");
    Ok(norm)
}
