//! The command line of `train_teacher`.

use std::path::PathBuf;

use clap::Parser;
use serde::Serialize;
use tch::Kind;

/// Trains the teacher by flow matching.
// What is serialized decides the numbers of a run.
#[derive(Debug, Parser, Serialize)]
pub struct Options {
    /// Folder for checkpoints, previews and the finished model
    #[arg(long)]
    #[serde(skip)]
    pub out: PathBuf,
    /// Folder with emoji.png, captions.json, vocabulary.txt and vectors.safetensors
    #[arg(long, default_value = "assets/emoji")]
    #[serde(skip)]
    pub data: PathBuf,
    /// Optimizer steps in all
    #[arg(long, default_value_t = 12_000)]
    pub steps: u64,
    /// Start anew where OUT holds an unfinished run
    #[arg(long)]
    #[serde(skip)]
    pub fresh: bool,
    /// Pictures in a step
    #[arg(long, default_value_t = 64)]
    pub batch: i64,
    /// Learning rate between warm-up and decay
    #[arg(long, default_value_t = 1e-3)]
    pub lr: f64,
    /// Steps of linear warm-up
    #[arg(long, default_value_t = 300)]
    pub warmup: u64,
    /// Step at which the linear decay to zero starts; four fifths of the way by default
    #[arg(long)]
    pub decay_from: Option<u64>,
    /// Weight decay
    #[arg(long, default_value_t = 0.01)]
    pub weight_decay: f64,
    /// Decay of the weights' moving average
    #[arg(long, default_value_t = 0.999)]
    pub ema: f64,
    /// Compute in bfloat16; weights, moments and average stay in float32
    #[arg(long)]
    pub bf16: bool,
    /// Threads of libtorch
    #[arg(long, default_value_t = 2)]
    #[serde(skip)]
    pub threads: i32,
    /// Share of pictures shown with the caption of another one, as in captions from the web: what the
    /// model then draws without guidance often has nothing to do with the caption
    #[arg(long, default_value_t = 0.0)]
    pub wrong_captions: f64,
    /// Start from the weights of this model (a diffusers folder) in place of random ones
    #[arg(long)]
    #[serde(skip)]
    pub from: Option<PathBuf>,
    /// Seed of weights, order, noise and dropout
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Steps between two previews; 0 for none
    #[arg(long, default_value_t = 1000)]
    #[serde(skip)]
    pub preview: u64,
    /// Transformer config to use in place of the embedded one (a config.json)
    #[arg(long)]
    #[serde(skip)]
    pub config: Option<PathBuf>,
    /// Run this many steps, print their mean time, and save nothing
    #[arg(long)]
    #[serde(skip)]
    pub measure: Option<u64>,
}

impl Options {
    /// The dtype of forward passes.
    pub fn kind(&self) -> Kind {
        if self.bf16 { Kind::BFloat16 } else { Kind::Float }
    }

    /// Warm-up, constant, linear decay to zero.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let decay_from = self.decay_from.unwrap_or(self.steps / 5 * 4).min(self.steps);
        let warm = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let left = self.steps.saturating_sub(step) as f64;
        let span = (self.steps - decay_from).max(1) as f64;
        self.lr * warm * (left / span).min(1.0)
    }
}
