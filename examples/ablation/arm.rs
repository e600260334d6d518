//! One arm of an experiment: everything that a run depends on but its seed.

use decoupled_dmd::{
    AboveStudent, Augmentation, Divergence, FlowRule, Renoising, Shift, Tangent, Times, Transition,
    Uniform,
};
use serde::{Deserialize, Serialize};

use super::pairs::PairSource;

/// The times to which a term re-noises the samples.
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
    /// The same against a normal distribution with the mean and covariance of the training pictures.
    DiscrepancyToPrior {
        weight: f64,
    },
    /// A critic that starts as a copy of the teacher, against the real pictures of the batch.
    Adversarial {
        weight: f64,
    },
    /// A critic of that kind on the steps of the guided teacher and of the fake score.
    AdversarialDistributionMatching {
        weight: f64,
    },
    /// Distribution matching down another divergence, with the ratio of a critic on real pictures.
    Divergence(Divergence),
    /// SiD with the guided teacher.
    ScoreIdentity {
        alpha: f64,
    },
    /// The classifier's log-likelihood of the picture asked for.
    Reward {
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
    /// One step from the noise of a pair to the guided teacher's sample.
    Regression(RegressionDistance),
    /// A critic tells what the student predicts between noise and sample of a pair from the sample: the critic in
    /// the teacher's space of ADP.
    AdversarialPairs,
}

impl OnData {
    /// Whether pairs of noise and the teacher's sample are needed.
    pub fn has_pairs(self) -> bool {
        matches!(self, Self::Regression(_) | Self::AdversarialPairs)
    }
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

/// How a sample is compared with the teacher's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RegressionDistance {
    Squared,
    /// In the features of the classifier's layers.
    Perceptual,
}

/// What a run depends on but its seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Name of the result files.
    pub name: String,
    /// Steps of the student in training, taken in turn from update to update, the most first.
    pub steps: Vec<usize>,
    /// Numbers of steps that the student is measured at besides the most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub measured_at: Vec<usize>,
    /// How a student walks its grid, in training and in sampling.
    pub transition: Transition,
    /// Where CFG Augmentation looks; `None` for an arm without it.
    pub engine: Option<RenoisingTimes>,
    pub regularizers: Vec<Regularization>,
    /// Engine and distribution matching at one tau with one noise, normalised by the guided
    /// prediction: DMD2.
    pub coupled: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_data: Option<OnData>,
    /// How the pairs of losses that need them are made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pairs: Option<PairSource>,
    /// What both sides of a regression go through before they are compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub augmentation: Option<Augmentation>,
    /// Objective and fake score look at samples inside the segments of the rollout, as in TDM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub in_segments: bool,
    /// Distribution matching off the student's rollout besides, as in CDM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub off_trajectory: bool,
    /// Updates on data before the first on rollouts, after which data are not used any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_stage: Option<u64>,
    /// Parameters of the student that are trained, by parts of their names; all where there are none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trained: Vec<String>,
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
            measured_at: Vec::new(),
            transition: Transition::Ddim,
            engine: None,
            regularizers: Vec::new(),
            coupled: false,
            on_data: None,
            pairs: None,
            augmentation: None,
            in_segments: false,
            off_trajectory: false,
            first_stage: None,
            trained: Vec::new(),
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
        self.pairs = loss.has_pairs().then_some(PairSource::ALL_ARMS);
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
        use Regularization as R;
        let matches = |term: &R| {
            matches!(
                term,
                R::DistributionMatching(_)
                    | R::AdversarialDistributionMatching { .. }
                    | R::Divergence(_)
                    | R::ScoreIdentity { .. }
            )
        };
        self.observer || self.regularizers.iter().any(matches)
    }

    /// Whether a critic is trained.
    pub fn has_critic(&self) -> bool {
        use Regularization as R;
        let matches = |term: &R| {
            matches!(
                term,
                R::Adversarial { .. }
                    | R::AdversarialDistributionMatching { .. }
                    | R::Divergence(_)
            )
        };
        self.on_data == Some(OnData::AdversarialPairs) || self.regularizers.iter().any(matches)
    }

    /// Whether the critic tells the teacher's steps from the fake score's.
    pub fn matches_adversarially(&self) -> bool {
        use Regularization as R;
        let matches = |term: &R| matches!(term, R::AdversarialDistributionMatching { .. });
        self.regularizers.iter().any(matches)
    }

    /// Forwards of a network on one sample for an update of the student, on average; a forward with its backward
    /// counts as three.
    pub fn forwards(&self) -> f64 {
        use Regularization as R;
        let on_data = match self.on_data {
            // The student with its graph, the guided teacher, the neighbours on its ODE.
            Some(OnData::Consistency { form: ConsistencyForm::Discrete { .. }, .. }) => 6.0,
            Some(OnData::Consistency { .. } | OnData::MeanFlow { .. }) => 7.0,
            // The pairs are made before.
            Some(OnData::Regression(_)) => 3.0,
            // The student, the critic's word on it, one more prediction, the critic on that and on the samples.
            Some(OnData::AdversarialPairs) => 3.0 + 2.0 + 1.0 + 6.0,
            None => 0.0,
        };
        // Teacher, fake score and critic; the backward to x counts as much as a forward.
        let term = |term: &R| match term {
            R::DistributionMatching(_) if self.coupled => 1.0,
            R::DistributionMatching(_) => 2.0,
            R::Divergence(_) => 3.0,
            R::Adversarial { .. } => 2.0,
            R::AdversarialDistributionMatching { .. } => 4.0,
            R::ScoreIdentity { .. } => 7.0,
            _ => 0.0,
        };
        let engine = if self.engine.is_some() { 2.0 } else { 0.0 };
        let terms = engine + self.regularizers.iter().map(term).sum::<f64>();
        let rollout = self.steps.iter().sum::<usize>() as f64 / self.steps.len() as f64;
        let fake = if self.has_fake() { 3.0 * self.fake_updates as f64 } else { 0.0 };
        // The critic sees samples of two kinds, or steps of the guided teacher and of the fake score.
        let critic = match (self.matches_adversarially(), self.has_critic()) {
            (true, _) => 9.0,
            (false, true) => 6.0,
            (false, false) => 0.0,
        };
        // A forward on the rollout, the student with its graph, teacher and fake score.
        let off_trajectory = if self.off_trajectory { 6.0 } else { 0.0 };
        let networks = rollout + 3.0 + terms + fake + critic + off_trajectory;
        let on_rollouts = if self.has_objective() { networks } else { 0.0 };
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
            arm.pairs = arm.pairs.map(|_| PairSource::QUICK);
            arm.batch = 4;
            arm.fake_updates = 1;
            arm.fake_warmup = 1;
            arm.measure_every = 1;
        })
    }
}
