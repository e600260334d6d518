//! Decoupled DMD on a Z-Image model: the teacher stays, a student and a fake score start equal to it.

mod state;
mod update;

use anyhow::{Result, bail, ensure};
use tch_training::seed::begin;

use crate::distil::fake_score::FakeScore;
use crate::distil::processes::Processes;
use crate::distil::prompts::{Buckets, Prompts};
use crate::distil::recipe::Recipe;
use crate::distil::role_trainer::RoleTrainer;
use crate::distil::stream::Stream;
use crate::distil::student::{Student, StudentWeights};
use crate::distil::terms::{ScheduledTerms, Terms};
use crate::distil::weights::Network;
use crate::model::ZImageTransformer;

pub use state::MadeBy;

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
    /// Sizes `[C, H, W]` of samples, of which one is drawn for each batch.
    sizes: Vec<[i64; 3]>,
    terms: T,
    processes: Processes<'a>,
    student: Student,
    fake: Option<FakeScore>,
    average: StudentWeights,
    /// Updates of the fake score before the first of the student, so far.
    warmed: u64,
    update: u64,
    /// What was not finite in the last update.
    fault: Option<Fault>,
    /// Updates that were left out for that.
    skipped: u64,
}

/// A number of an update that is not finite.
#[derive(Debug)]
struct Fault {
    /// Which, and what it is.
    text: String,
    /// Whether the update was left out for it.
    is_skipped: bool,
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
        recipe.part()?;
        ensure!(
            recipe.accumulate == 1 || terms.state().is_empty(),
            "terms with networks of their own are trained on whole batches"
        );
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
            sizes: vec![size],
            fake: terms.has_fake_score().then(fake).transpose()?,
            average: student.duplicate()?,
            student,
            terms,
            processes: Processes::default(),
            warmed: 0,
            update: 0,
            fault: None,
            skipped: 0,
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

    /// Draws the samples of each batch in one of these sizes `[C, H, W]`, instead of that of [`Self::new`].
    ///
    /// # Errors
    /// If there are none.
    pub fn with_sizes(mut self, sizes: Vec<[i64; 3]>) -> Result<Self> {
        ensure!(!sizes.is_empty(), "there are no sizes to draw from");
        self.sizes = sizes;
        Ok(self)
    }

    /// Makes this the part of one process in a training of several: it draws captions and noise of its own, and
    /// takes an equal part of the recipe's batch. All processes need the same weights before the first update:
    /// call [`Self::share`].
    ///
    /// # Errors
    /// If the batch cannot be parted equally, or the terms have networks of their own, which are not averaged.
    pub fn among(mut self, processes: impl Into<Processes<'a>>) -> Result<Self> {
        self.processes = processes.into();
        self.processes.part(self.recipe.part()?)?;
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

    /// Updates that were left out since a loss or a gradient was not finite.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Why the last update was left out, if it was.
    pub fn skipped_for(&self) -> Option<&str> {
        self.fault.as_ref().filter(|fault| fault.is_skipped).map(|fault| fault.text.as_str())
    }

    /// Refuses to go on after an update with a loss or a gradient that is not finite, unless it was left out. No weight
    /// takes a step along such a gradient in any case; the other steps of the update stay.
    ///
    /// # Errors
    /// Says what was not finite.
    pub fn check_finite(&self) -> Result<()> {
        match (&self.fault, self.skipped) {
            (Some(Fault { text, is_skipped: false }), 0) => bail!("training broke down: {text}"),
            (Some(Fault { text, is_skipped: false }), skipped) => {
                bail!("training broke down: {text}; left out before: {skipped}")
            }
            _ => Ok(()),
        }
    }

    /// Leaves the update out for a number that is not finite, if the recipe allows for one more.
    fn judge(&mut self, fault: Option<String>) {
        let fake = self.fake.as_mut().map(|fake| &mut fake.trainer);
        let trainers = [Some(&mut self.student.trainer), fake].into_iter().flatten();
        let blame = trainers.filter_map(RoleTrainer::take_blame).last();
        let is_skipped = fault.is_some() && self.skipped < self.recipe.skip_nonfinite;
        self.skipped += u64::from(is_skipped);
        self.fault = fault.map(|text| {
            let blame = blame.map_or_else(String::new, |blame| format!(" ({blame})"));
            Fault { text: text + &blame, is_skipped }
        });
    }
}
