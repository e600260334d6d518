//! One arm of an experiment: everything that a run depends on but its seed.

use decoupled_dmd::{
    AboveStudent, FlowRule, Renoising, Shift, Tangent, Times, Transition, Uniform,
};
use serde::{Deserialize, Serialize};

/// The times at which a term renoising at the samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RenoisingTimes {
    pub times: Times,
    /// The model's where none is given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shift: Option<Shift>,
}

impl RenoisingTimes {
    /// At all times.
    pub const FULL: Self = Self { times: Times::Uniform(Uniform::FULL), shift: None };
    /// At times above the student's own.
    pub const ABOVE_STUDENT: Self =
        Self { times: Times::AboveStudent(AboveStudent::FULL), shift: None };

    /// How these times are drawn.
    pub fn renoising(self) -> Renoising<'static> {
        let renoising = Renoising::new(self.times);
        match self.shift {
            Some(shift) => renoising.shifted(shift),
            None => renoising,
        }
    }
}

/// What keeps the samples in place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Regularization {
    DistributionMatching(RenoisingTimes),
    /// One mean and variance an image, measured on the training pictures.
    MeanVariance {
        weight: f64,
    },
    /// The same for each channel.
    ChannelMeanVariance {
        weight: f64,
    },
    /// On the pixels of 8x8 pictures, against the real pictures of the batch.
    MaximumMeanDiscrepancy {
        weight: f64,
    },
    /// A critic that starts as a copy of the teacher, against the real pictures of the batch.
    Adversarial {
        weight: f64,
    },
}

/// What trains the student on the real pictures of the captions, noised.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnData {
    /// Consistency along the guided teacher's ODE, at noise levels of all sizes.
    Consistency { form: ConsistencyForm, weight: f64 },
    /// The student is a flow map.
    MeanFlow { rule: FlowRule },
}

/// How neighbours on the teacher's ODE are compared.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsistencyForm {
    /// Over one step of the teacher.
    Discrete {
        step: f64,
    },
    Continuous(Tangent),
}

/// What a run depends on but its seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Name of the result files.
    pub name: String,
    /// Steps of the student in training, taken in turn from update to update, the most first.
    pub steps: Vec<usize>,
    /// How a student walks its grid, in training and in sampling.
    pub transition: Transition,
    /// Where CFG Augmentation renoising; `None` for an arm without it.
    pub engine: Option<RenoisingTimes>,
    pub regularizers: Vec<Regularization>,
    /// Engine and distribution matching at one tau with one noise, normalised by the guided
    /// prediction: DMD2.
    pub coupled: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_data: Option<OnData>,
    /// Updates on data before the first on rollouts, after which data are not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_stage: Option<u64>,
    /// A fake score is trained although no regularizer uses it.
    pub observer: bool,
    /// Guidance scale alpha.
    pub guidance: f64,
    pub updates: u64,
    pub batch: usize,
    /// Updates of the fake score for each of the student, all on the samples of one rollout.
    pub fake_updates: u64,
    /// Updates of the fake score before the first of the student.
    pub fake_warmup: u64,
    pub student_learning_rate: f64,
    /// Also that of a critic.
    pub fake_learning_rate: f64,
    /// Updates over which the student's learning rate rises from zero.
    pub warmup: u64,
    /// Decay of the moving average of the student's weights, which is what is measured.
    pub ema: f64,
    /// Updates between two measurements.
    pub measure_every: u64,
}

impl Arm {
    /// An arm of `steps` steps without terms, with the hyper-parameters that all arms share.
    pub fn new(name: &str, steps: usize) -> Self {
        Self {
            name: name.to_owned(),
            steps: vec![steps],
            transition: Transition::Ddim,
            engine: None,
            regularizers: Vec::new(),
            coupled: false,
            on_data: None,
            first_stage: None,
            observer: false,
            guidance: 3.0,
            updates: 40,
            batch: 16,
            fake_updates: 3,
            fake_warmup: 12,
            student_learning_rate: 1e-4,
            fake_learning_rate: 4e-4,
            warmup: 8,
            ema: 0.9,
            measure_every: 10,
        }
    }

    #[must_use]
    pub fn engine(mut self, renoising: RenoisingTimes) -> Self {
        self.engine = Some(renoising);
        self
    }

    #[must_use]
    pub fn regularizer(mut self, regularizer: Regularization) -> Self {
        self.regularizers.push(regularizer);
        self
    }

    #[must_use]
    pub fn coupled(mut self) -> Self {
        self.coupled = true;
        self
    }

    #[must_use]
    pub fn on_data(mut self, loss: OnData) -> Self {
        self.on_data = Some(loss);
        self
    }

    #[must_use]
    pub fn observer(mut self) -> Self {
        self.observer = true;
        self
    }

    /// Another value of one setting.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Self)) -> Self {
        change(&mut self);
        self
    }

    /// The largest number of steps.
    pub fn most_steps(&self) -> usize {
        self.steps.iter().copied().max().unwrap_or(1)
    }

    /// Whether anything is trained on rollouts.
    pub fn has_objective(&self) -> bool {
        self.engine.is_some() || !self.regularizers.is_empty()
    }

    /// Whether a fake score is trained.
    pub fn has_fake(&self) -> bool {
        let matches = |term: &Regularization| matches!(term, Regularization::DistributionMatching(_));
        self.observer || self.regularizers.iter().any(matches)
    }

    /// Whether a critic is trained.
    pub fn has_critic(&self) -> bool {
        let is_adversarial =
            |term: &Regularization| matches!(term, Regularization::Adversarial { .. });
        self.regularizers.iter().any(is_adversarial)
    }

    /// Forwards of a network on one sample for an update of the student, on average; a forward with its backward
    /// counts as three.
    pub fn forwards(&self) -> f64 {
        let on_data = match self.on_data {
            // The student with its graph, the guided teacher, the neighbours on its ODE.
            Some(OnData::Consistency { form: ConsistencyForm::Discrete { .. }, .. }) => 6.0,
            Some(_) => 7.0,
            None => 0.0,
        };
        let has_dm = self.has_fake() && !self.regularizers.is_empty();
        let terms = match (self.engine, has_dm) {
            (Some(_), true) if self.coupled => 3.0,
            (Some(_), true) => 4.0,
            (Some(_), false) | (None, true) => 2.0,
            (None, false) => 0.0,
        };
        let rollout = self.steps.iter().sum::<usize>() as f64 / self.steps.len() as f64;
        let fake = if self.has_fake() { 3.0 * self.fake_updates as f64 } else { 0.0 };
        let on_rollouts = if self.has_objective() { rollout + 3.0 + terms + fake } else { 0.0 };
        match self.first_stage {
            Some(first) => {
                let share = first as f64 / self.updates as f64;
                share * on_data + (1.0 - share) * on_rollouts
            }
            None => on_data + on_rollouts,
        }
    }

    /// Whether the student is sampled by jumps between the times of its grid.
    pub fn jumps(&self) -> bool {
        matches!(self.on_data, Some(OnData::MeanFlow { .. })) && !self.has_objective()
    }

    /// The same arm for a smoke test.
    #[must_use]
    pub fn quick(self) -> Self {
        self.with(|arm| {
            arm.updates = 2;
            arm.first_stage = arm.first_stage.map(|_| 1);
            arm.batch = 4;
            arm.fake_updates = 1;
            arm.fake_warmup = 1;
            arm.measure_every = 1;
        })
    }
}
