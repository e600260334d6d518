//! A diffusers folder: the transformer and the shift of its scheduler.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use decoupled_dmd::Shift;
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};
use tch_training::files::{read_json, write_json};
use tch_training::run::{Hash, fingerprint};

use crate::model::config::Config;
use crate::model::transformer::ZImageTransformer;
use crate::progress::progress_bar;

/// Names the parts of a folder.
pub const INDEX: &str = "model_index.json";

/// Folders of a checkpoint that a run reads.
const PARTS: [&str; 5] = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"];

/// What is needed to sample in latent space.
#[derive(Debug)]
pub struct Pipeline {
    pub transformer: ZImageTransformer,
    pub shift: Shift,
}

/// `scheduler/scheduler_config.json`, as diffusers writes it.
#[derive(Serialize, Deserialize)]
struct Scheduler {
    #[serde(rename = "_class_name")]
    class_name: String,
    num_train_timesteps: u32,
    shift: f64,
    #[serde(default)]
    use_dynamic_shifting: bool,
}

impl Pipeline {
    /// Reads `transformer/` and `scheduler/` of a folder, the weights in the dtype asked for.
    ///
    /// # Errors
    /// Names what is missing, broken or not supported.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        Self::load_observed(folder, kind, device, &ProgressBar::hidden())
    }

    /// [`Self::load`] that shows on `progress` how many bytes have been read.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_observed(
        folder: &Path,
        kind: Kind,
        device: Device,
        progress: &ProgressBar,
    ) -> Result<Self> {
        let shift = read_shift(folder)?;
        let transformer = ZImageTransformer::load_observed(folder, kind, device, progress)?;
        Ok(Self { transformer, shift })
    }

    /// Writes the folder: `model_index.json`, `scheduler/` and `transformer/`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let scheduler = Scheduler {
            class_name: "FlowMatchEulerDiscreteScheduler".into(),
            num_train_timesteps: 1000,
            shift: self.shift.get(),
            use_dynamic_shifting: false,
        };
        let index = serde_json::json!({
            "_class_name": "ZImagePipeline",
            "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
            "transformer": ["diffusers", "ZImageTransformer2DModel"],
        });
        fs::create_dir_all(folder.join("scheduler"))
            .with_context(|| format!("creating {}", folder.display()))?;
        write_json(&folder.join(INDEX), &index)?;
        write_json(&folder.join("scheduler/scheduler_config.json"), &scheduler)?;
        self.transformer.save(folder)
    }
}

/// The shape of the transformer of a folder.
///
/// # Errors
/// If the file cannot be read, or is of a model that is not supported.
pub fn read_config(folder: &Path) -> Result<Config> {
    Config::load(&folder.join("transformer/config.json"))
}

/// The shift in `scheduler/` of a folder.
///
/// # Errors
/// If the file cannot be read, or asks for what is not supported.
pub fn read_shift(folder: &Path) -> Result<Shift> {
    let path = folder.join("scheduler/scheduler_config.json");
    let scheduler: Scheduler = read_json(&path)?;
    if scheduler.use_dynamic_shifting {
        bail!("{}: use_dynamic_shifting is not supported, Z-Image does not use it", path.display());
    }
    Shift::new(scheduler.shift).with_context(|| path.display().to_string())
}

/// Progress of reading weights, which takes a while for a large model.
///
/// # Errors
/// None that depends on the machine.
pub fn loading_bar() -> Result<ProgressBar> {
    progress_bar(None, "{bytes}/{total_bytes} of weights, {eta} left")
}

/// [`fingerprint`] of those parts of a diffusers folder that there are: what else lies in it, a run of ours
/// for instance, is not the model.
///
/// # Errors
/// If a file cannot be read.
pub fn fingerprint_model(folder: &Path) -> Result<String> {
    let mut hash = Hash::default();
    for part in PARTS {
        let path = folder.join(part);
        if path.exists() {
            hash.add(format!("{part} {}", fingerprint(&path)?).as_bytes());
        }
    }
    Ok(hash.hex())
}
