//! The command line of `zimage_8step`.

use std::path::PathBuf;

use anyhow::{Result, bail, ensure};
use clap::Parser;
use decoupled_dmd::{Guidance, Schedule, Shift, Transition};
use serde::de::DeserializeOwned;
use tch::Device;

use super::distillation::Recipe;

/// Distils a Z-Image model into a generator of few steps without guidance, or samples from one.
///
/// Without arguments: distils the embedded model of 32x32 emoji on the GPU if there is one, else on
/// the CPU, and writes samples.png, curves.svg, metrics.jsonl, report.json and the student.
#[derive(Debug, Parser)]
#[command(version)]
pub struct Options {
    /// Teacher: a diffusers folder with transformer/ and scheduler/
    #[arg(long, value_name = "DIR", default_value = "assets/teacher")]
    pub checkpoint: PathBuf,
    /// Captions and pictures
    #[arg(long, value_name = "DIR", default_value = "assets/emoji")]
    pub data: PathBuf,
    /// Classifier that judges the samples
    #[arg(long, value_name = "DIR", default_value = "assets/classifier")]
    pub classifier: PathBuf,
    /// Where results go
    #[arg(long, value_name = "DIR", default_value = "runs/zimage_8step")]
    pub out: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_parser = parse_device)]
    pub device: DeviceChoice,
    /// CPU threads of libtorch; all cores by default
    #[arg(long)]
    pub threads: Option<i32>,
    /// Updates between two saves of the training's state, from which a run that was stopped goes on;
    /// 0 to save when interrupted and at the end alone
    #[arg(long, default_value_t = 25)]
    pub save_every: u64,
    /// Start anew where OUT holds an unfinished run
    #[arg(long)]
    pub fresh: bool,
    /// Seed of everything drawn in training
    #[arg(long, default_value_t = 0)]
    pub seed: u64,

    /// Make pictures of a caption with the student of an earlier run, and do not train
    #[arg(long, value_name = "CAPTION", help_heading = "Sampling")]
    pub sample: Option<String>,
    /// Student to sample from; OUT/student by default
    #[arg(long, value_name = "DIR", help_heading = "Sampling")]
    pub student: Option<PathBuf>,
    /// How many pictures
    #[arg(long, default_value_t = 8, help_heading = "Sampling")]
    pub count: i64,
    /// Steps of the student, in training and in sampling
    #[arg(long, default_value_t = 8)]
    pub steps: usize,

    /// Where engine and regularizer look at the samples: coupled-shared, decoupled-full,
    /// decoupled-constrained or decoupled-hybrid
    #[arg(long, default_value = "decoupled-hybrid", value_parser = by_name::<Schedule>, help_heading = "Recipe")]
    pub schedule: Schedule,
    /// Guidance scale to bake in, alpha in null + alpha (cond - null)
    #[arg(long, default_value = "3", value_parser = parse_guidance, help_heading = "Recipe")]
    pub guidance: Guidance,
    /// Transition between steps: euler or renoise
    #[arg(long, default_value = "euler", value_parser = by_name::<Transition>, help_heading = "Recipe")]
    pub transition: Transition,
    /// Updates of the student
    #[arg(long, default_value_t = 150, help_heading = "Recipe")]
    pub updates: u64,
    /// Updates of the fake score for each update of the student
    #[arg(long, default_value_t = 5, help_heading = "Recipe")]
    pub fake_updates: u64,
    /// Updates of the fake score before the first of the student
    #[arg(long, default_value_t = 20, help_heading = "Recipe")]
    pub fake_warmup: u64,
    /// Samples in one update
    #[arg(long, default_value_t = 24, help_heading = "Recipe")]
    pub batch: usize,
    /// Learning rate of the student
    #[arg(long, default_value_t = 5e-5, help_heading = "Recipe")]
    pub student_lr: f64,
    /// Learning rate of the fake score
    #[arg(long, default_value_t = 2e-4, help_heading = "Recipe")]
    pub fake_lr: f64,
    /// Updates over which the student's learning rate rises
    #[arg(long, default_value_t = 20, help_heading = "Recipe")]
    pub warmup: u64,
    /// Decay of the moving average of the student's weights
    #[arg(long, default_value_t = 0.95, help_heading = "Recipe")]
    pub ema: f64,

    /// Guidance scale of the teacher that the student is measured against
    #[arg(long, default_value = "3", value_parser = parse_guidance, help_heading = "Evaluation")]
    pub teacher_guidance: Guidance,
    /// Captions on which teacher and student are compared
    #[arg(long, default_value_t = 256, help_heading = "Evaluation")]
    pub prompts: usize,
    /// Updates between two lines of diagnostics in metrics.jsonl
    #[arg(long, default_value_t = 10, help_heading = "Evaluation")]
    pub observe_every: u64,
    /// Updates between two evaluations of the student on the way; 0 for none
    #[arg(long, default_value_t = 0, help_heading = "Evaluation")]
    pub evaluate_every: u64,
}

/// What `--device` says.
#[derive(Clone, Copy, Debug)]
pub enum DeviceChoice {
    Auto,
    Named(Device),
}

impl DeviceChoice {
    /// The device, where there is one.
    ///
    /// # Errors
    /// If a GPU was asked for that libtorch cannot use.
    pub fn resolve(self) -> Result<Device> {
        let best = decoupled_dmd::default_device();
        match self {
            Self::Auto => Ok(best),
            Self::Named(Device::Cuda(index)) => {
                let devices = tch::Cuda::device_count();
                ensure!(
                    (index as i64) < devices,
                    "--device cuda:{index}: libtorch sees {devices} CUDA devices here"
                );
                Ok(Device::Cuda(index))
            }
            Self::Named(device) => Ok(device),
        }
    }
}

/// The choice that a word on the command line names.
///
/// # Errors
/// If it names none.
pub fn parse_device(text: &str) -> Result<DeviceChoice> {
    Ok(match text {
        "auto" => DeviceChoice::Auto,
        "cpu" => DeviceChoice::Named(Device::Cpu),
        "cuda" => DeviceChoice::Named(Device::Cuda(0)),
        _ => match text.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
            Some(index) => DeviceChoice::Named(Device::Cuda(index)),
            None => bail!("expected auto, cpu, cuda or cuda:N"),
        },
    })
}

/// A value by the name that it has in configuration files.
fn by_name<T: DeserializeOwned>(name: &str) -> Result<T> {
    Ok(serde_json::from_value(name.into())?)
}

fn parse_guidance(text: &str) -> Result<Guidance> {
    Ok(Guidance::new(text.parse()?)?)
}

impl Options {
    /// The recipe, with the shift of the teacher's scheduler.
    ///
    /// # Errors
    /// Names the option that is out of range.
    pub fn recipe(&self, shift: Shift) -> Result<Recipe> {
        ensure!(self.batch > 0, "--batch must be at least 1");
        ensure!(self.steps > 0, "--steps must be at least 1");
        for (option, value) in [("student-lr", self.student_lr), ("fake-lr", self.fake_lr)] {
            ensure!(value.is_finite() && value > 0.0, "--{option} must be positive, found {value}");
        }
        ensure!((0.0..1.0).contains(&self.ema), "--ema must be in [0, 1), found {}", self.ema);
        Ok(Recipe {
            schedule: self.schedule,
            guidance: self.guidance,
            steps: self.steps,
            transition: self.transition,
            shift,
            updates: self.updates,
            fake_updates: self.fake_updates,
            fake_warmup: self.fake_warmup,
            batch: self.batch,
            student_learning_rate: self.student_lr,
            fake_learning_rate: self.fake_lr,
            warmup: self.warmup,
            ema: self.ema,
            seed: self.seed,
        })
    }
}
