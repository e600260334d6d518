//! A diffusers folder: the transformer and the shift of its scheduler.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::Shift;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
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

/// The scheduler of diffusers whose grid is ours.
const SCHEDULER: &str = "FlowMatchEulerDiscreteScheduler";
/// Settings of it that would make another grid, or other steps.
const OTHER_GRIDS: [&str; 7] = [
    "use_dynamic_shifting",
    "shift_terminal",
    "invert_sigmas",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "stochastic_sampling",
];

/// `scheduler/scheduler_config.json`, as diffusers writes it.
#[derive(Serialize, Deserialize)]
struct Scheduler {
    #[serde(rename = "_class_name")]
    class_name: String,
    num_train_timesteps: u32,
    shift: f64,
    #[serde(flatten)]
    more: Map<String, Value>,
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
            class_name: SCHEDULER.into(),
            num_train_timesteps: 1000,
            shift: self.shift.get(),
            more: Map::from_iter([("use_dynamic_shifting".to_owned(), false.into())]),
        };
        let index = serde_json::json!({
            "_class_name": "ZImagePipeline",
            "scheduler": ["diffusers", SCHEDULER],
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
    ensure!(
        scheduler.class_name == SCHEDULER,
        "{}: the scheduler is {}, and students are trained for the grid of {SCHEDULER}",
        path.display(),
        scheduler.class_name
    );
    for setting in OTHER_GRIDS {
        let found = scheduler.more.get(setting).unwrap_or(&Value::Null);
        ensure!(
            matches!(found, Value::Null | Value::Bool(false)),
            "{}: {setting} is {found}, which is not supported: the student would be trained for another \
             grid than it is sampled on",
            path.display()
        );
    }
    Shift::new(scheduler.shift).with_context(|| path.display().to_string())
}
