//! The folder of a student, and the state that its training goes on from.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use decoupled_dmd::Shift;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::Device;
use tch_training::files::{create_folder, read_json, write_json};
use tch_training::run::{Lock, StateFolder};

use crate::distil::recipe::{Preset, Recipe};
use crate::distil::weights::RoleWeights;
use crate::model::{ADAPTER_PREFIXES, INDEX, Pipeline};
use crate::options::Options;

/// The name that diffusers' `load_lora_weights` looks for.
pub const ADAPTER: &str = "pytorch_lora_weights.safetensors";

/// What a run writes at its end.
pub const REPORT: &str = "report.json";

/// How a student was saved, beside it.
const RECIPE: &str = "recipe.json";

/// What lies beside a student: its recipe, and the side of its pictures in pixels where that was chosen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedRecipe {
    #[serde(flatten)]
    pub recipe: Recipe,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<i64>,
}

impl SavedRecipe {
    /// What lies in the folder of a student, with what the command line says otherwise; `default` where
    /// there is nothing.
    ///
    /// # Errors
    /// If the file or an option is not valid.
    pub fn load(folder: &Path, options: &Options, default: Preset, shift: Shift) -> Result<Self> {
        let path = folder.join(RECIPE);
        let mut saved = if path.exists() {
            ensure!(options.preset.is_none(), "--preset: {} says how it was made", path.display());
            read_json(&path)?
        } else {
            Self { recipe: options.recipe(default, shift)?, size: None }
        };
        let Recipe { steps, transition, .. } = &mut saved.recipe;
        *steps = options.steps.unwrap_or(*steps);
        *transition = options.transition.unwrap_or(*transition);
        ensure!(*steps > 0, "--steps must be at least 1");
        saved.size = options.size.or(saved.size);
        Ok(saved)
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

/// The folder of the student to sample from.
///
/// # Errors
/// If there is none.
pub fn student_folder(options: &Options) -> Result<PathBuf> {
    let folder = options.student.clone().unwrap_or_else(|| options.out.join("student"));
    ensure!(
        folder.exists(),
        "there is no student in {}: run without --sample first, or name one with --student",
        folder.display()
    );
    Ok(folder)
}

/// Where the state of the run is kept; finds an unfinished run of the same `identity`: the recipe, and
/// whatever else decides the numbers.
///
/// # Errors
/// If the unfinished run there is another one, or one that is still going on, or if a finished one is there
/// that was not to be written over.
pub fn open_states(options: &Options, identity: &Value) -> Result<(StateFolder, Lock)> {
    let lock = Lock::take(&options.out)?;
    let folder = options.out.join("state");
    let states = if options.fresh {
        StateFolder::open_fresh(&folder, identity)?
    } else {
        StateFolder::open(&folder, identity)?
    };
    let report = options.out.join(REPORT);
    if options.fresh {
        remove(&report, |path| fs::remove_file(path))?;
    }
    ensure!(
        states.is_unfinished() || !report.exists(),
        "the run in {} is finished: sample from it with --sample, name another --out, or write over it with \
         --fresh",
        options.out.display()
    );
    Ok((states, lock))
}
