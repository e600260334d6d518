//! Decoupled DMD on a Z-Image model: the teacher stays, a student and a fake score start equal to it.

mod state;

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::{Batch, Denoiser, FewStepGrid, Sampler};
use tch::{Kind, Tensor};
use tch_training::Tape;
use tch_training::ema::update_average;
use tch_training::seed::begin;

use crate::distil::adapter::denoiser;
use crate::distil::fake_score::FakeScore;
use crate::distil::processes::Processes;
use crate::distil::prompts::{Buckets, Prompts};
use crate::distil::readings::Readings;
use crate::distil::recipe::Recipe;
use crate::distil::rollout::{Captions, Rollout};
use crate::distil::stream::Stream;
use crate::distil::student::{Student, StudentWeights};
use crate::distil::terms::{Networks, ScheduledTerms, Terms};
use crate::distil::weights::Network;
use crate::model::ZImageTransformer;

/// The log of the samples' mean variance over that of the data.
const VARIANCE_DRIFT: &str = "variance_drift";

/// What one update of the student has shown: names and values.
pub type Record = Vec<(String, f64)>;

/// A number of a record by name.
pub(super) fn value(record: &Record, name: &str) -> Option<f64> {
    record.iter().find(|(of, _)| of == name).map(|(_, value)| *value)
}

/// A distillation under way.
pub struct Distillation<'a, T = ScheduledTerms> {
    recipe: Recipe,
    teacher: &'a ZImageTransformer,
    prompts: &'a Prompts,
    /// Captions to draw from.
    buckets: Buckets,
    /// Mean variance of a real sample, the reference of the variance drift, where it is known.
    data_variance: Option<f64>,
    /// Size of one sample, `[C, H, W]`.
    size: [i64; 3],
    terms: T,
    processes: Processes<'a>,
    student: Student,
    fake: Option<FakeScore>,
    average: StudentWeights,
    /// Updates of the fake score before the first of the student, so far.
    warmed: u64,
    update: u64,
    /// Of the last update, the role with a gradient whose norm is not finite, and that norm.
    broken: Option<(&'static str, f64)>,
}

impl<'a> Distillation<'a> {
    /// A distillation with the terms of the recipe's schedule; see [`Self::with_terms`].
    ///
    /// # Errors
    /// As [`Self::with_terms`].
    pub fn new(
        recipe: Recipe,
        teacher: &'a ZImageTransformer,
        prompts: &'a Prompts,
        items: &[i64],
        size: [i64; 3],
    ) -> Result<Self> {
        let terms = ScheduledTerms::from(&recipe);
        Self::with_terms(recipe, teacher, prompts, items, size, terms)
    }
}

impl<'a, T: Terms> Distillation<'a, T> {
    /// Student and fake score, both equal to `teacher` to begin with, to be trained by `terms` on the captions
    /// `items` of `prompts` with samples of `size` `[C, H, W]`.
    ///
    /// # Errors
    /// If there are no captions to draw from, the adapter's settings do not fit, or libtorch cannot
    /// allocate the weights.
    pub fn with_terms(
        recipe: Recipe,
        teacher: &'a ZImageTransformer,
        prompts: &'a Prompts,
        items: &[i64],
        size: [i64; 3],
        terms: T,
    ) -> Result<Self> {
        begin(recipe.seed, Stream::Adapters);
        let adapter = recipe.adapter.as_ref();
        let student = Student::new(teacher, adapter, recipe.student, &terms)?;
        let of_fake = recipe.adapter_of_fake();
        let fake = || FakeScore::new(teacher, of_fake, recipe.fake, recipe.steps);
        Ok(Self {
            teacher,
            prompts,
            buckets: prompts.buckets(items)?,
            data_variance: None,
            size,
            fake: terms.has_fake_score().then(fake).transpose()?,
            average: student.duplicate()?,
            student,
            terms,
            processes: Processes::default(),
            warmed: 0,
            update: 0,
            broken: None,
            recipe,
        })
    }

    /// Takes the mean variance of a real sample as the reference of the variance drift in the records, and for
    /// nothing else.
    #[must_use]
    pub fn with_data_variance(mut self, variance: f64) -> Self {
        self.data_variance = Some(variance);
        self
    }

    /// Makes this the part of one process in a training of several: it draws captions and noise of its own, and
    /// takes an equal part of the recipe's batch. All processes need the same weights before the first update:
    /// call [`Self::share`].
    ///
    /// # Errors
    /// If the batch cannot be parted equally, or the terms have networks of their own, which are not averaged.
    pub fn among(mut self, processes: impl Into<Processes<'a>>) -> Result<Self> {
        self.processes = processes.into();
        self.processes.part(self.recipe.batch)?;
        ensure!(
            self.processes.count() == 1 || self.terms.state().is_empty(),
            "terms with networks of their own are trained by one process"
        );
        Ok(self)
    }

    /// The processes that train together.
    pub fn processes(&self) -> Processes<'a> {
        self.processes
    }

    /// The network of the student's moving average. A flow map needs its table of lengths besides: sample with
    /// [`Self::student_weights`] there.
    pub fn student(&self) -> Network<'_> {
        self.average.role.network(self.teacher)
    }

    /// The weights behind [`Self::student`].
    pub fn student_weights(&self) -> &StudentWeights {
        &self.average
    }

    /// The teacher.
    pub fn teacher(&self) -> &ZImageTransformer {
        self.teacher
    }

    /// The terms.
    pub fn terms(&self) -> &T {
        &self.terms
    }

    /// The fake score, where one is trained.
    pub fn fake_score(&self) -> Option<&FakeScore> {
        self.fake.as_ref()
    }

    /// The recipe.
    pub fn recipe(&self) -> &Recipe {
        &self.recipe
    }

    /// Updates of the student so far.
    pub fn updates(&self) -> u64 {
        self.update
    }

    /// Seeds what this process draws.
    fn begin(&self, stream: Stream) {
        begin(self.processes.seed(self.recipe.seed), stream);
    }

    /// Whether the student's next update may come: it takes no rollout, there is no fake score, or the fake score
    /// has had its updates alone.
    pub fn is_warm(&self) -> bool {
        self.rollout_steps().is_none()
            || self.fake.is_none()
            || self.warmed >= self.recipe.fake_warmup
    }

    /// Steps of the student's rollout at the next update.
    fn rollout_steps(&self) -> Option<usize> {
        self.terms.rollout_steps(self.update, self.recipe.steps)
    }

    /// Trains the fake score alone on one rollout of the student, as often as in an update, as long
    /// as [`Self::is_warm`] says no.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn warm_up(&mut self) -> Result<()> {
        let end = (self.warmed + self.recipe.fake_updates.max(1)).min(self.recipe.fake_warmup);
        self.begin(Stream::WarmUp(self.warmed));
        let captions = self.draw_captions()?;
        let rollout =
            self.roll_out(&captions, self.rollout_steps().unwrap_or(self.recipe.steps))?;
        let mut readings = Readings::default();
        while self.warmed < end {
            self.train_fake(&rollout, &mut readings)?;
            self.warmed += 1;
        }
        (_, self.broken) = readings.read(self.processes)?;
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
    /// [`Self::check_gradients`]. Of several, if a gradient is not finite on one, one is lost, or they are not in
    /// step.
    pub fn step(&mut self, observe: bool) -> Result<Record> {
        self.begin(Stream::Update(self.update));
        self.student.trainer.optimizer.settings.learning_rate =
            self.recipe.student.learning_rate * self.learning_rate_factor();
        let captions = self.draw_captions()?;
        let roll_out = |steps| self.roll_out(&captions, steps);
        let rollout = self.rollout_steps().map(roll_out).transpose()?;
        let mut readings = self.train_student(&captions, rollout.as_ref(), observe)?;
        if let Some(rollout) = &rollout {
            if self.fake.is_some() {
                let mut sum = Tensor::f_zeros([], (Kind::Double, self.teacher.device()))?;
                for _ in 0..self.recipe.fake_updates {
                    if let Some(loss) = self.train_fake(rollout, &mut readings)? {
                        sum = sum.f_add(&loss.f_detach()?.f_to_kind(Kind::Double)?)?;
                    }
                }
                let count = self.recipe.fake_updates.max(1) as f64;
                readings.push("fake", &sum.f_div_scalar(count)?)?;
            }
            let (base, shift) = (self.teacher, self.recipe.shift);
            let dm = self.fake.as_ref().map(|fake| fake.matching(base, shift));
            readings.extend(self.terms.train(rollout, dm.as_ref())?);
        }
        self.update += 1;
        let current = self.student.parameters();
        update_average(&self.average.parameters(), &current, self.recipe.ema, self.update)?;
        let (mut record, broken) = readings.read(self.processes)?;
        self.broken = broken;
        let of_samples = record.iter_mut().find(|(name, _)| name == VARIANCE_DRIFT);
        if let (Some((_, value)), Some(of_data)) = (of_samples, self.data_variance) {
            *value = (*value / of_data).ln();
        }
        Ok(record)
    }

    /// Refuses weights that the last update has spoilt. The losses show the damage one update later, after
    /// a spoilt state could have been saved.
    ///
    /// # Errors
    /// If the norm of a gradient was not finite.
    pub fn check_gradients(&self) -> Result<()> {
        match self.broken {
            Some((role, norm)) => {
                bail!("training broke down: the norm of the gradient of the {role} is {norm}")
            }
            None => Ok(()),
        }
    }

    /// Linear warm-up, and the decay of the recipe.
    fn learning_rate_factor(&self) -> f64 {
        let Recipe { warmup, updates, decay, .. } = self.recipe;
        let warm = (self.update + 1) as f64 / warmup.max(1) as f64;
        warm.min(decay.left(self.update, updates)).min(1.0)
    }

    fn train_student(
        &mut self,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
        observe: bool,
    ) -> Result<Readings> {
        let tape = self.tape();
        let (student, flow_map) =
            self.student.training(self.teacher, tape.as_ref(), self.recipe.shift);
        let (base, shift) = (self.teacher, self.recipe.shift);
        let dm = self.fake.as_ref().map(|fake| fake.matching(base, shift));
        let networks =
            Networks { teacher: denoiser(base, shift), student, flow_map, dm: dm.as_ref() };
        let (mut losses, mut readings) = (Vec::new(), Readings::default());
        let on_rollout = rollout.map(|rollout| self.loss_on_rollout(&networks, rollout, observe));
        let more = self.terms.more_losses(self.update, &networks, captions, rollout)?;
        for (loss, seen) in on_rollout.transpose()?.into_iter().chain(more) {
            losses.push(loss);
            readings.extend(seen);
        }
        drop(networks);
        let sum = losses.into_iter().map(Ok).reduce(|sum, loss| Ok(sum?.f_add(&loss?)?));
        let loss: Result<Tensor> = sum.context("the student is trained by no loss")?;
        let norm = self.student.trainer.descend(&loss?, tape.as_ref(), self.processes)?;
        readings.push_norm("student", &norm)?;
        if observe {
            readings.push("student_gradient", &norm)?;
        }
        Ok(readings)
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
        let evaluation = objective.evaluate(&batch)?;
        let mut readings = Readings::default();
        readings.observe(evaluation.scalars()?)?;
        if let Some(diagnostics) = evaluation.diagnostics.filter(|_| self.data_variance.is_some()) {
            let variance = diagnostics.mean_variance()?;
            readings.observe([(VARIANCE_DRIFT.to_owned(), variance)])?;
        }
        Ok((evaluation.loss, readings))
    }

    /// One update of the fake score, if there is one; its loss.
    fn train_fake(
        &mut self,
        rollout: &Rollout<'_>,
        readings: &mut Readings,
    ) -> Result<Option<Tensor>> {
        let tape = self.tape();
        let Some(fake) = &mut self.fake else { return Ok(None) };
        let (base, shift) = (self.teacher, self.recipe.shift);
        let (loss, norm) = fake.train(base, rollout, shift, tape.as_ref(), self.processes)?;
        readings.push_norm("fake score", &norm)?;
        Ok(Some(loss))
    }

    /// Fresh captions.
    fn draw_captions(&self) -> Result<Captions> {
        let items = self.buckets.draw(self.processes.part(self.recipe.batch)?)?;
        let (cond, null) = self.prompts.conditions(&items)?;
        Ok(Captions { cond, null, real: self.terms.real(&items)?, items })
    }

    /// The student's way from fresh noise over a whole grid of `steps`.
    fn roll_out<'c>(&self, captions: &'c Captions, steps: usize) -> Result<Rollout<'c>> {
        let most = self.recipe.steps;
        let stride = most / steps.max(1);
        ensure!(steps * stride == most, "a rollout of {steps} steps does not divide {most}");
        let [channels, height, width] = self.size;
        let shape = [captions.items.len() as i64, channels, height, width];
        let noise = Tensor::f_randn(shape, (Kind::Float, self.teacher.device()))?;
        let student = self.student.denoiser(self.teacher, self.recipe.shift);
        let trajectory = self.sampler(&student, steps)?.trajectory(&noise, &captions.cond)?;
        Ok(Rollout { trajectory, captions, stride: stride as i64 })
    }

    /// What the forward passes of one loss are kept on, if they are to be computed again.
    fn tape(&self) -> Option<Tape> {
        self.recipe.checkpointing.then(Tape::default)
    }

    fn sampler<'d>(&self, student: &'d Denoiser<'d>, steps: usize) -> Result<Sampler<'d>> {
        let grid = FewStepGrid::even(steps)?;
        Ok(Sampler::new(student, grid, self.recipe.transition))
    }
}
