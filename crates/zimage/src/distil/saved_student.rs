//! The folder of a student, and the state that its training goes on from.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Device;
use tch_training::files::{create_folder, read_json, write_json};
use tch_training::run::{Lock, StateFolder};

use crate::distil::recipe::Recipe;
use crate::distil::weights::RoleWeights;
use crate::model::{ADAPTER_PREFIXES, INDEX, Pipeline};

/// The name that diffusers' `load_lora_weights` looks for.
pub const ADAPTER: &str = "pytorch_lora_weights.safetensors";

/// What a run writes at its end.
pub const REPORT: &str = "report.json";

/// File of the recipe beside a student.
const RECIPE: &str = "recipe.json";

/// The recipe beside a student, and the side of its pictures in pixels where that was chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedRecipe {
    #[serde(flatten)]
    pub recipe: Recipe,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
}

impl SavedRecipe {
    /// What lies in the folder of a student, if anything does.
    ///
    /// # Errors
    /// If the file is not valid.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(RECIPE);
        if !path.exists() {
            return Ok(None);
        }
        Ok(Some(read_json(&path)?))
    }
}

/// Writes a student: an adapter as a file for `load_lora_weights`, a model as a diffusers folder. With
/// `merged`, an adapter becomes such a folder too. What an earlier student has left in the folder goes.
///
/// # Errors
/// If a file cannot be written.
pub fn save_student(
    folder: &Path,
    teacher: &Pipeline,
    weights: &RoleWeights,
    merged: bool,
    saved: &SavedRecipe,
) -> Result<()> {
    create_folder(folder)?;
    write_json(&folder.join(RECIPE), saved)?;
    let transformer = match weights {
        RoleWeights::Copy(model) => {
            remove(&folder.join(ADAPTER), |path| fs::remove_file(path))?;
            model.duplicate()?
        }
        RoleWeights::Adapter(lora) => {
            lora.save(&folder.join(ADAPTER), ADAPTER_PREFIXES[0])?;
            if !merged {
                for part in ["transformer", "scheduler"] {
                    remove(&folder.join(part), |path| fs::remove_dir_all(path))?;
                }
                remove(&folder.join(INDEX), |path| fs::remove_file(path))?;
                return Ok(());
            }
            // On the way to a file: the device may have no room for a second model.
            teacher.transformer.merged(lora, Device::Cpu)?
        }
    };
    Pipeline { transformer, shift: teacher.shift }.save(folder)
}

fn remove(path: &Path, remove: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
    if path.exists() {
        remove(path).with_context(|| format!("removing {}", path.display()))?;
    }
    Ok(())
}

/// What becomes of a run that a folder holds already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// It goes on from its state, if it is unfinished.
    Resume,
    /// It is forgotten, finished or not.
    Fresh,
}

/// The error of a run that is finished and was not to be started anew.
#[derive(Debug)]
pub struct FinishedRun {
    folder: PathBuf,
}

impl fmt::Display for FinishedRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the run in {} is finished", self.folder.display())
    }
}

impl std::error::Error for FinishedRun {}

/// Where the state of the run in the folder `out` is kept; finds an unfinished run of the same `identity`: the
/// recipe, and whatever else decides the numbers.
///
/// # Errors
/// If the unfinished run there is another one, or one that is still going on; [`FinishedRun`].
pub fn open_states(out: &Path, identity: &Value, start: Start) -> Result<(StateFolder, Lock)> {
    let lock = Lock::take(out)?;
    let (folder, report) = (out.join("state"), out.join(REPORT));
    if start == Start::Fresh {
        let states = StateFolder::open_fresh(&folder, identity)?;
        remove(&report, |path| fs::remove_file(path))?;
        return Ok((states, lock));
    }
    let states = StateFolder::open(&folder, identity)?;
    if !states.is_unfinished() && report.exists() {
        bail!(FinishedRun { folder: out.to_owned() });
    }
    Ok((states, lock))
}
