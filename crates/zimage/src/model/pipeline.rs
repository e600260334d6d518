//! A diffusers folder: the transformer and the shift of its scheduler.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use decoupled_dmd::Shift;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind};
use tch_training::files::{read_json, write_json};

use crate::model::checkpoint::Checkpoint;
use crate::model::transformer::ZImageTransformer;

/// Names the parts of a folder.
pub(crate) const INDEX: &str = "model_index.json";

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
    /// As [`Checkpoint::open`] and [`Checkpoint::load`].
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        Checkpoint::open(folder)?.load(kind, device)
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

/// The shift in `scheduler/` of a folder.
///
/// # Errors
/// If the file cannot be read, or asks for what is not supported.
pub(super) fn read_shift(folder: &Path) -> Result<Shift> {
    let path = folder.join("scheduler/scheduler_config.json");
    let scheduler: Scheduler = read_json(&path)?;
    if scheduler.use_dynamic_shifting {
        bail!("{}: use_dynamic_shifting is not supported, Z-Image does not use it", path.display());
    }
    Shift::new(scheduler.shift).with_context(|| path.display().to_string())
}
