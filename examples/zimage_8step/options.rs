//! The command line of `zimage_8step`.

mod recipe;
mod refusals;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use decoupled_dmd::{Guidance, Schedule, Shift, Transition};
use serde::de::DeserializeOwned;
use tch::Kind;
use zimage::device::DeviceChoice;
use zimage::distil::run::SIZE;
use zimage::distil::{Decay, Intervals, PictureSize, Preset, Start};
use zimage::model::{Checkpoint, Storage};

/// The model of this repository.
pub const TEACHER: &str = "assets/teacher";

/// The options that only training looks at.
const OF_TRAINING: [&str; 37] = [
    "accumulate",
    "negative_prompt",
    "guidance_rescale",
    "guidance_interval",
    "decay",
    "fake_rank",
    "teacher_lora",
    "classifier",
    "save_every",
    "fresh",
    "skip_nonfinite",
    "schedule",
    "guidance",
    "dm_shift",
    "updates",
    "fake_updates",
    "fake_warmup",
    "batch",
    "student_lr",
    "fake_lr",
    "warmup",
    "ema",
    "rank",
    "alpha",
    "targets",
    "dropout",
    "checkpointing",
    "prompt_file",
    "preview_prompts",
    "features",
    "plan",
    "processes",
    "merge",
    "teacher_guidance",
    "prompts",
    "observe_every",
    "evaluate_every",
];

/// Distils a Z-Image model into a generator of few steps without guidance, or samples from one.
///
/// Without arguments: distils the embedded model of 32x32 emoji on the GPU if there is one, else on
/// the CPU, and writes samples.png, curves.svg, metrics.jsonl, report.json and the student.
///
/// With --checkpoint and --prompt-file: distils a released Z-Image model on the prompts of a file into
/// an adapter that diffusers and ComfyUI load. docs/zimage.md goes through it.
#[derive(Debug, Parser)]
#[command(version, allow_negative_numbers = true)]
pub struct Options {
    /// Teacher: a diffusers folder with transformer/ and scheduler/, for a released model with
    /// text_encoder/, tokenizer/ and vae/ too
    #[arg(long, value_name = "DIR", default_value = TEACHER)]
    pub checkpoint: PathBuf,
    /// Adapter (LoRA) that finetunes the teacher, as a .safetensors file in the names of diffusers, ComfyUI, kohya or
    /// peft: the student is one of the finetuned model, and its own adapter holds both
    #[arg(long, value_name = "FILE")]
    pub teacher_lora: Option<PathBuf>,
    /// How strong that adapter is
    #[arg(long, value_name = "SCALE", default_value_t = 1.0, requires = "teacher_lora")]
    pub teacher_lora_scale: f64,
    /// How the frozen weights are kept that teacher, student and fake score share: full, or int8 in half the memory
    /// of bfloat16, with adapters alone
    #[arg(long, value_parser = by_name::<Storage>, default_value = "full")]
    pub base: Storage,
    /// Captions and pictures of the embedded model; assets/emoji by default
    #[arg(long, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Classifier that judges the samples of the embedded model; assets/classifier by default
    #[arg(long, value_name = "DIR")]
    pub classifier: Option<PathBuf>,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "runs/zimage_8step")]
    pub out: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    pub device: DeviceChoice,
    /// CPU threads of libtorch; all cores by default, one for each of several processes
    #[arg(long)]
    pub threads: Option<i32>,
    /// Updates between two saves of the training's state, from which a run that was stopped goes on;
    /// 0 to save when interrupted and at the end alone
    #[arg(long, default_value_t = 25)]
    pub save_every: u64,
    /// Start anew where OUT holds a run, finished or not
    #[arg(long)]
    pub fresh: bool,
    /// Seed of everything that is drawn, in training and for pictures
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Make pictures of a prompt with the student of an earlier run, and do not train
    #[arg(
        long,
        value_name = "PROMPT",
        help_heading = "Sampling",
        conflicts_with_all = OF_TRAINING
    )]
    pub sample: Option<String>,
    /// Write the student of an earlier run for another program, and do not train: comfyui, into comfyui/ of its
    /// folder, the adapter for models/loras and, of a run with --merge, a whole model for
    /// models/diffusion_models
    #[arg(
        long,
        value_parser = ["comfyui"],
        help_heading = "Sampling",
        conflicts_with_all = OF_TRAINING,
        conflicts_with = "sample"
    )]
    pub export: Option<String>,
    /// Student to sample from, or to export; OUT/student by default
    #[arg(long, value_name = "DIR", help_heading = "Sampling")]
    pub student: Option<PathBuf>,
    /// How many pictures; 8 by default
    #[arg(long, help_heading = "Sampling")]
    pub count: Option<i64>,
    /// Write sample.safetensors too (prompt, noise, pixels), to compare with other programs; for
    /// released checkpoints
    #[arg(long, help_heading = "Sampling")]
    pub tensors: bool,
    /// Numbers to start from; the options below replace single ones. By default embedded, or
    /// zimage-8step for a checkpoint with a text encoder
    #[arg(long, value_parser = by_name::<Preset>, help_heading = "Recipe")]
    pub preset: Option<Preset>,
    /// Steps of the student, in training and in sampling. The rest of the recipe stays: for 4 and 2 steps there are
    /// presets of their own
    #[arg(long, help_heading = "Recipe")]
    pub steps: Option<usize>,
    /// Where engine and regularizer look at the samples: coupled-shared, decoupled-full,
    /// decoupled-constrained or decoupled-hybrid
    #[arg(long, value_parser = by_name::<Schedule>, help_heading = "Recipe")]
    pub schedule: Option<Schedule>,
    /// Guidance scale to bake in, alpha in null + alpha (cond - null)
    #[arg(long, value_parser = parse_guidance, help_heading = "Recipe")]
    pub guidance: Option<Guidance>,
    /// Bring the guided output of the teacher to the norm of the conditional one, as Qwen-Image does
    #[arg(long, help_heading = "Recipe")]
    pub guidance_rescale: bool,
    /// Bake guidance in at times from LOW to HIGH alone, 0 being noise and 1 data
    #[arg(long, value_name = "LOW,HIGH", value_parser = parse_interval, help_heading = "Recipe")]
    pub guidance_interval: Option<(f64, f64)>,
    /// Shift of the noise levels at which distribution matching looks at the samples
    #[arg(long, value_parser = parse_shift, help_heading = "Recipe")]
    pub dm_shift: Option<Shift>,
    /// Transition between steps: ddim or renoise
    #[arg(long, value_parser = by_name::<Transition>, help_heading = "Recipe")]
    pub transition: Option<Transition>,
    /// Updates of the student
    #[arg(long, help_heading = "Recipe")]
    pub updates: Option<u64>,
    /// Updates of the fake score for each update of the student
    #[arg(long, help_heading = "Recipe")]
    pub fake_updates: Option<u64>,
    /// Updates of the fake score before the first of the student
    #[arg(long, help_heading = "Recipe")]
    pub fake_warmup: Option<u64>,
    /// Samples in one update, of all processes together
    #[arg(long, help_heading = "Recipe")]
    pub batch: Option<usize>,
    /// Equal parts that a batch is computed in, one after the other, to save memory: their gradients add up
    #[arg(long, help_heading = "Recipe")]
    pub accumulate: Option<usize>,
    /// Learning rate of the student
    #[arg(long, help_heading = "Recipe")]
    pub student_lr: Option<f64>,
    /// Learning rate of the fake score
    #[arg(long, help_heading = "Recipe")]
    pub fake_lr: Option<f64>,
    /// Updates over which the student's learning rate rises
    #[arg(long, help_heading = "Recipe")]
    pub warmup: Option<u64>,
    /// How that learning rate falls: last-third, linear, cosine or none
    #[arg(long, value_parser = by_name::<Decay>, help_heading = "Recipe")]
    pub decay: Option<Decay>,
    /// Decay of the moving average of the student's weights
    #[arg(long, help_heading = "Recipe")]
    pub ema: Option<f64>,
    /// Rank of the adapters of student and fake score; 0 trains whole copies
    #[arg(long, help_heading = "Recipe")]
    pub rank: Option<i64>,
    /// Alpha of the adapters, whose updates are scaled by alpha / rank; the rank by default
    #[arg(long, help_heading = "Recipe")]
    pub alpha: Option<f64>,
    /// Rank of the fake score's adapter, and its alpha; those of the student by default
    #[arg(long, help_heading = "Recipe")]
    pub fake_rank: Option<i64>,
    /// Linear layers to adapt, by the end of their name, with commas between
    #[arg(long, value_delimiter = ',', help_heading = "Recipe")]
    pub targets: Option<Vec<String>>,
    /// Dropout of the adapters
    #[arg(long, help_heading = "Recipe")]
    pub dropout: Option<f64>,
    /// Updates that may be left out, in all, since a loss or a gradient is infinite or not a number; the next one
    /// stops the run. 0 by default
    #[arg(long, value_name = "COUNT", help_heading = "Recipe")]
    pub skip_nonfinite: Option<u64>,
    /// Compute blocks again in the backward pass, which saves memory: true or false
    #[arg(long, help_heading = "Recipe")]
    pub checkpointing: Option<bool>,

    /// File in UTF-8 with a prompt a line to train on: text, or in a .jsonl file objects with "prompt" and, if
    /// wanted, "negative" or "negative_prompt"; needed
    #[arg(long, value_name = "FILE", help_heading = "Released checkpoints")]
    pub prompt_file: Option<PathBuf>,
    /// What the teacher is guided away from, where a prompt has no "negative" of its own; nothing by default
    #[arg(long, value_name = "PROMPT", help_heading = "Released checkpoints")]
    pub negative_prompt: Option<String>,
    /// Text file with the prompts of previews and samples.png, at most 16, better none that is trained on; the
    /// first four of PROMPT_FILE by default
    #[arg(long, value_name = "FILE", help_heading = "Released checkpoints")]
    pub preview_prompts: Option<PathBuf>,
    /// Where the features of the prompts are kept; OUT/features by default
    #[arg(long, value_name = "DIR", help_heading = "Released checkpoints")]
    pub features: Option<PathBuf>,
    /// Width and height of the pictures in pixels, multiples of 16, as 1024x768, or 1024 for squares; several with
    /// commas between, of which each batch has one. 1024 by default, in sampling the first of the student's training
    #[arg(long, value_delimiter = ',', help_heading = "Released checkpoints")]
    pub size: Option<Vec<PictureSize>>,
    /// Compute in float32 instead of bfloat16
    #[arg(long, help_heading = "Released checkpoints")]
    pub float32: bool,
    /// Print the memory that training would take, by part, and do not train: needs CHECKPOINT's
    /// transformer/config.json alone
    #[arg(long, help_heading = "Released checkpoints")]
    pub plan: bool,
    /// Processes that would share the training, for --plan
    #[arg(long, requires = "plan", help_heading = "Released checkpoints")]
    pub processes: Option<usize>,
    /// Write the student as a whole transformer too, with its adapter merged
    #[arg(long, help_heading = "Released checkpoints")]
    pub merge: bool,

    /// Guidance scale of the teacher that the student is compared with; by default 3 for the embedded
    /// model and 4 for released ones
    #[arg(long, value_parser = parse_guidance, help_heading = "Evaluation")]
    pub teacher_guidance: Option<Guidance>,
    /// Captions of the embedded model on which teacher and student are compared; 256 by default
    #[arg(long, help_heading = "Evaluation")]
    pub prompts: Option<usize>,
    /// Updates between two lines of diagnostics in metrics.jsonl; 0 for none
    #[arg(long, default_value_t = 10, help_heading = "Evaluation")]
    pub observe_every: u64,
    /// Updates between two looks at the student on the way: a picture preview-N.png, scores of the embedded
    /// model, of a released one the student itself in student-N; 0 for none
    #[arg(long, default_value_t = 0, help_heading = "Evaluation")]
    pub evaluate_every: u64,
}

/// A value by the name that it has in configuration files.
fn by_name<T: DeserializeOwned>(name: &str) -> Result<T> {
    Ok(serde_json::from_value(name.into())?)
}

fn parse_guidance(text: &str) -> Result<Guidance> {
    Ok(Guidance::new(text.parse()?)?)
}

fn parse_interval(text: &str) -> Result<(f64, f64)> {
    let (low, high) = text.split_once(',').context("two times with a comma between")?;
    Ok((low.trim().parse()?, high.trim().parse()?))
}

fn parse_shift(text: &str) -> Result<Shift> {
    Ok(Shift::new(text.parse()?)?)
}

impl Options {
    /// Captions and pictures of the embedded model.
    pub fn data(&self) -> &Path {
        self.data.as_deref().unwrap_or(Path::new("assets/emoji"))
    }

    /// The classifier that judges the samples of the embedded model.
    pub fn classifier(&self) -> &Path {
        self.classifier.as_deref().unwrap_or(Path::new("assets/classifier"))
    }

    /// The dtype of a released model.
    pub fn kind(&self) -> Kind {
        if self.float32 { Kind::Float } else { Kind::BFloat16 }
    }

    /// How often things happen in a training.
    pub fn intervals(&self) -> Intervals {
        Intervals {
            save: self.save_every,
            observe: self.observe_every,
            evaluate: self.evaluate_every,
        }
    }

    /// The teacher.
    ///
    /// # Errors
    /// If the folder or an option is not valid.
    pub fn teacher(&self) -> Result<Checkpoint> {
        let checkpoint = Checkpoint::open(&self.checkpoint)?.stored(self.base);
        match &self.teacher_lora {
            Some(path) => checkpoint.with_adapter(path, self.teacher_lora_scale),
            None => Ok(checkpoint),
        }
    }

    /// What becomes of a run that OUT holds already.
    pub fn start(&self) -> Start {
        if self.fresh { Start::Fresh } else { Start::Resume }
    }

    /// The folder of the student to sample from.
    ///
    /// # Errors
    /// If there is none.
    pub fn student_folder(&self) -> Result<PathBuf> {
        let folder = self.student.clone().unwrap_or_else(|| self.out.join("student"));
        ensure!(
            folder.exists(),
            "there is no student in {}: train one first, or name one with --student",
            folder.display()
        );
        Ok(folder)
    }

    /// The sizes of the pictures in training.
    pub fn sizes(&self) -> Vec<PictureSize> {
        self.size.clone().unwrap_or_else(|| vec![SIZE])
    }

    /// How many pictures to make of a prompt.
    ///
    /// # Errors
    /// If there are none.
    pub fn pictures(&self) -> Result<i64> {
        let count = self.count.unwrap_or(8);
        ensure!(count > 0, "--count must be at least 1, found {count}");
        Ok(count)
    }
}
