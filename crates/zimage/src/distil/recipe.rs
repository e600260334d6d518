//! The numbers of a distillation, and presets of them with their sources.

mod decay;

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use decoupled_dmd::{Guidance, Schedule, Shift, Transition};
use serde::{Deserialize, Serialize};
use tch_training::lora::LoraSettings;
use tch_training::{AdamWSettings, Tape};

pub use decay::Decay;

use crate::model::{Config, Storage, is_caption_side};

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

fn one() -> usize {
    1
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_one(count: &usize) -> bool {
    *count == 1
}

/// The recipe of a distillation.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Recipe {
    pub schedule: Schedule,
    pub guidance: Guidance,
    /// Steps of the student, in training and in sampling.
    pub steps: usize,
    pub transition: Transition,
    /// Of the grid, of tau_CA, and of the times at which the fake score is trained.
    pub shift: Shift,
    /// Of tau_DM.
    pub dm_shift: Shift,
    /// Updates of the student.
    pub updates: u64,
    /// Updates of the fake score for each update of the student, all on the samples of one rollout.
    pub fake_updates: u64,
    /// Updates of the fake score before the first update of the student.
    pub fake_warmup: u64,
    /// Samples in one update of all processes together.
    pub batch: usize,
    /// Equal parts that the batch is computed in, one after the other, which saves memory: their gradients add up.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub accumulate: usize,
    pub student: AdamWSettings,
    pub fake: AdamWSettings,
    /// Updates over which the student's learning rate rises from zero.
    pub warmup: u64,
    /// How that learning rate ends.
    #[serde(default, skip_serializing_if = "Decay::is_default")]
    pub decay: Decay,
    /// Decay of the moving average of the student's weights, which is the result.
    pub ema: f64,
    /// Student and fake score as adapters of the teacher, or else as copies of it.
    pub adapter: Option<LoraSettings>,
    /// The fake score's adapter, where it is not like the student's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fake_adapter: Option<LoraSettings>,
    /// Whether blocks are computed again in the backward pass, which saves memory.
    pub checkpointing: bool,
    /// Updates that may be left out in all since a loss or a gradient is not finite; the next one stops the run.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub skip_nonfinite: u64,
    pub seed: u64,
}

impl Recipe {
    /// Settings that are valid and train little or nothing, or cost what they were to save, a sentence each; for a
    /// teacher kept as `storage` says and so many processes.
    pub fn cautions(&self, storage: Storage, processes: usize) -> Vec<String> {
        let mut cautions = Vec::new();
        if storage != Storage::Full && !self.checkpointing {
            cautions.push(
                "without checkpointing the backward pass keeps what is made of the 8 bits, more than the base takes \
                 in bfloat16 (--plan says how much)"
                    .to_owned(),
            );
        }
        if self.batch == self.accumulate * processes {
            cautions.push(
                "every part of a batch is one sample: x_spread, and with it the alarm of samples that become alike, \
                 needs two in a part"
                    .to_owned(),
            );
        }
        if self.updates <= self.warmup {
            cautions.push(format!(
                "{} updates are not more than the {} of the warm-up: the learning rate never reaches its value, \
                 and the student will hardly move",
                self.updates, self.warmup
            ));
        }
        if self.fake_updates == 0 {
            cautions.push(
                "the fake score is not trained: it stays the teacher, and distribution matching stays zero"
                    .to_owned(),
            );
        }
        if let (Some(student), Some(fake)) = (&self.adapter, &self.fake_adapter)
            && fake.rank < student.rank
        {
            cautions.push(format!(
                "the fake score has rank {} and the student {}: a fake score that cannot follow the student shows \
                 distribution matching the wrong way",
                fake.rank, student.rank
            ));
        }
        if self.guidance.is_neutral() {
            cautions.push(
                "guidance 1 is neutral: CFG Augmentation, the engine, is zero, and the student learns no guidance"
                    .to_owned(),
            );
        }
        cautions
    }

    /// Prints [`Self::cautions`] as warnings on standard error.
    pub(crate) fn print_cautions(&self, storage: Storage, processes: usize) {
        for caution in self.cautions(storage, processes) {
            eprintln!("warning: {caution}");
        }
    }

    /// Samples in one of the parts of the batch, of all processes together.
    ///
    /// # Errors
    /// If the batch cannot be parted equally.
    pub fn part(&self) -> Result<usize> {
        let Self { batch, accumulate, .. } = *self;
        ensure!(
            accumulate > 0 && batch.is_multiple_of(accumulate),
            "a batch of {batch} cannot be computed in {accumulate} equal parts"
        );
        Ok(batch / accumulate)
    }

    /// What the forward passes of one loss are kept on, if they are to be computed again.
    pub(super) fn tape(&self) -> Option<Tape> {
        self.checkpointing.then(Tape::default)
    }

    /// The settings of the fake score's adapter.
    pub fn adapter_of_fake(&self) -> Option<&LoraSettings> {
        self.fake_adapter.as_ref().or(self.adapter.as_ref())
    }

    /// What the learning rate of the student does, for people.
    pub fn described_learning_rate(&self) -> String {
        let Self { warmup, updates, .. } = self;
        let rate = self.student.learning_rate;
        let end = match self.decay {
            Decay::LastThird => {
                format!("stays, and falls linearly to zero over the last third of {updates}")
            }
            Decay::Linear => format!("falls linearly to zero over {updates}"),
            Decay::Cosine => format!("falls to zero as half a cosine over {updates}"),
            Decay::None => format!("stays up to {updates}"),
        };
        format!("The student's learning rate rises to {rate} over {warmup} updates and {end}")
    }

    /// Refuses whole copies of a base in 8 bits, which cannot be trained.
    ///
    /// # Errors
    /// If the recipe has no adapter, and the weights are not whole.
    pub fn check_storage(&self, storage: Storage) -> Result<()> {
        ensure!(
            storage == Storage::Full || self.adapter.is_some(),
            "whole copies of a base in 8 bits cannot be trained: choose adapters of some rank"
        );
        Ok(())
    }

    /// Refuses an adapter that does not fit a model, or of which nothing would be trained.
    ///
    /// # Errors
    /// Says what is wrong with its settings.
    pub fn check_adapter(&self, config: &Config) -> Result<()> {
        for adapter in self.adapter.iter().chain(&self.fake_adapter) {
            ensure!(
                adapter.adapted(&config.linears())?.iter().any(|(name, _)| !is_caption_side(name)),
                "targets name layers of the caption side alone, which is encoded once and stays as it is"
            );
        }
        Ok(())
    }
}

/// A recipe by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Preset {
    /// The small model of this repository; found on it, see docs/status.md.
    Embedded,
    /// The released base model to 8 steps.
    #[serde(rename = "zimage-8step")]
    ZImage8Step,
    /// The released base model to 4 steps.
    #[serde(rename = "zimage-4step")]
    ZImage4Step,
    /// The released base model to 2 steps.
    #[serde(rename = "zimage-2step")]
    ZImage2Step,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 4] =
        [Self::Embedded, Self::ZImage8Step, Self::ZImage4Step, Self::ZImage2Step];

    /// The recipe, for a model whose pipeline has this `shift`: the student is trained on the grid that
    /// it will be run on.
    ///
    /// # Errors
    /// None that depends on the arguments.
    pub fn recipe(self, shift: Shift) -> Result<Recipe> {
        match self {
            Self::Embedded => embedded(shift),
            Self::ZImage8Step => released(shift, 8),
            Self::ZImage4Step => released(shift, 4),
            Self::ZImage2Step => released(shift, 2),
        }
    }

    /// The shift of the models that the preset is for.
    fn shift(self) -> f64 {
        if self == Self::Embedded { 3.0 } else { 6.0 }
    }

    /// The presets side by side, for `--help`.
    ///
    /// # Errors
    /// If a recipe cannot be written as JSON.
    pub fn table() -> Result<String> {
        let columns = Self::ALL
            .into_iter()
            .map(|preset| {
                Ok((serde_json::to_value(preset)?, preset.recipe(Shift::new(preset.shift())?)?))
            })
            .map(|column: Result<_>| {
                let (name, recipe) = column?;
                Ok((name, serde_json::to_value(recipe)?))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut text = String::from("Presets:\n");
        let mut line = |name: &str, cells: Vec<String>| {
            let _ = write!(text, "  {name:<26}");
            for cell in cells {
                let _ = write!(text, "{cell:>20}");
            }
            text.push('\n');
        };
        let plain = |value: &serde_json::Value| value.to_string().replace('"', "");
        line("", columns.iter().map(|(name, _)| plain(name)).collect());
        for path in [
            "schedule",
            "guidance",
            "steps",
            "transition",
            "shift",
            "dm_shift",
            "updates",
            "fake_updates",
            "fake_warmup",
            "batch",
            "student.learning_rate",
            "fake.learning_rate",
            "student.betas",
            "student.weight_decay",
            "student.eps",
            "student.max_gradient_norm",
            "warmup",
            "ema",
            "adapter.rank",
            "adapter.alpha",
            "checkpointing",
        ] {
            let pointer = format!("/{}", path.replace('.', "/"));
            let cell =
                |recipe: &serde_json::Value| recipe.pointer(&pointer).map_or("-".into(), plain);
            line(path, columns.iter().map(|(_, recipe)| cell(recipe)).collect());
        }
        Ok(text)
    }
}

/// The optimizer of each network that is trained beside the small model.
pub fn embedded_optimizer(learning_rate: f64) -> AdamWSettings {
    AdamWSettings {
        learning_rate,
        // No momentum over the moving target of two networks that chase one another, as in
        // Self-Forcing and rCM.
        betas: (0.0, 0.99),
        weight_decay: 0.01,
        max_gradient_norm: Some(1.0),
        ..AdamWSettings::default()
    }
}

fn embedded(shift: Shift) -> Result<Recipe> {
    Ok(Recipe {
        schedule: Schedule::DecoupledHybrid,
        guidance: Guidance::new(4.5)?,
        steps: 8,
        transition: Transition::Ddim,
        shift,
        // With that of the grid, samples become as faint as those of the unguided teacher.
        dm_shift: Shift::new(0.5)?,
        updates: 150,
        fake_updates: 5,
        fake_warmup: 20,
        batch: 24,
        accumulate: 1,
        student: embedded_optimizer(1e-4),
        fake: embedded_optimizer(4e-4),
        warmup: 20,
        decay: Decay::LastThird,
        ema: 0.95,
        adapter: None,
        fake_adapter: None,
        checkpointing: false,
        skip_nonfinite: 0,
        seed: 0,
    })
}

/// The base model as adapters. Nobody has published the numbers of the paper's own runs. Those marked
/// V are of VideoX-Fun's DMD2-style distillation of the same model, which was released as an 8-step
/// adapter; those marked G are guesses, which nothing here could test.
fn released(shift: Shift, steps: usize) -> Result<Recipe> {
    let student = AdamWSettings {
        learning_rate: 1e-4,           // V
        betas: (0.9, 0.999),           // V
        weight_decay: 0.03,            // V
        eps: 1e-10,                    // V
        max_gradient_norm: Some(0.05), // V
    };
    let targets = ["to_q", "to_k", "to_v"].map(|part| format!("attention.{part}"));
    let more = ["w1", "w2", "w3"].map(|part| format!("feed_forward.{part}"));
    Ok(Recipe {
        schedule: Schedule::DecoupledHybrid, // the paper's choice
        guidance: Guidance::new(4.0)?,       // V; the model card says 4 to 6 in this form
        steps,
        transition: Transition::Ddim, // what the stock pipeline does at inference
        shift,
        dm_shift: shift,
        updates: 24_000 / steps as u64, // G: the fewer steps, the farther they are to go
        fake_updates: 5,                // V, DMD2
        fake_warmup: 100,               // G
        batch: 4,                       // G: what 80 GB hold at 1024 pixels
        accumulate: 1,
        student,
        fake: AdamWSettings { learning_rate: 1e-5, ..student }, // V
        warmup: 100,                                            // G
        decay: Decay::LastThird,                                // G
        ema: 0.99,                                              // Self-Forcing
        adapter: Some(LoraSettings {
            rank: 128,    // V
            alpha: 128.0, // V
            targets: [&targets[..], &more].concat(),
            dropout: 0.0,
        }),
        fake_adapter: None,
        checkpointing: true,
        skip_nonfinite: 0,
        seed: 0,
    })
}
