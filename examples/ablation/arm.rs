//! One arm of an experiment: everything that a run depends on but its seed.

use anyhow::Result;
use decoupled_dmd::{AboveStudent, Renoising, Shift, Uniform};
use serde::{Deserialize, Serialize};

/// Where a term looks at the samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tau {
    /// U(0, 1), then the model's shift.
    Full,
    /// U(t, 1) with the student's own t, then the shift.
    AboveStudent,
    /// Evenly between two times *as the network sees them*: no shift follows.
    Between(f64, f64),
}

impl Tau {
    /// How these times are drawn.
    ///
    /// # Errors
    /// If the range is not one within [0, 1].
    pub fn renoising(self) -> Result<Renoising<'static>> {
        Ok(match self {
            Self::Full => Renoising::new(Uniform::FULL),
            Self::AboveStudent => Renoising::new(AboveStudent::FULL),
            Self::Between(low, high) => {
                Renoising::new(Uniform::new(low, high)?).shifted(Shift::NONE)
            }
        })
    }
}

/// What keeps the samples in place.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Shield {
    DistributionMatching(Tau),
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

/// What a run depends on but its seed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Arm {
    /// Name of the result files.
    pub name: String,
    /// Steps of the student, in training and in sampling.
    pub steps: usize,
    /// Where CFG Augmentation looks; `None` for an arm without it.
    pub engine: Option<Tau>,
    pub shields: Vec<Shield>,
    /// Engine and distribution matching at one tau with one noise, normalised by the guided
    /// prediction: DMD2.
    pub coupled: bool,
    /// A fake score is trained although no shield uses it.
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
            steps,
            engine: None,
            shields: Vec::new(),
            coupled: false,
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
    pub fn engine(mut self, tau: Tau) -> Self {
        self.engine = Some(tau);
        self
    }

    #[must_use]
    pub fn shield(mut self, shield: Shield) -> Self {
        self.shields.push(shield);
        self
    }

    #[must_use]
    pub fn coupled(mut self) -> Self {
        self.coupled = true;
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

    /// Whether a fake score is trained.
    pub fn has_fake(&self) -> bool {
        let matches = |shield: &Shield| matches!(shield, Shield::DistributionMatching(_));
        self.observer || self.shields.iter().any(matches)
    }

    /// Whether a critic is trained.
    pub fn has_critic(&self) -> bool {
        self.shields.iter().any(|shield| matches!(shield, Shield::Adversarial { .. }))
    }

    /// The same arm for a smoke test.
    #[must_use]
    pub fn quick(self) -> Self {
        self.with(|arm| {
            arm.updates = 2;
            arm.batch = 4;
            arm.fake_updates = 1;
            arm.fake_warmup = 1;
            arm.measure_every = 1;
        })
    }
}
