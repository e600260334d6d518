//! The folder of a student, and the state that its training goes on from.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tch::{Device, Kind};
use tch_training::files::{create_folder, read_json, write_json};
use tch_training::parameters::is_finite;
use tch_training::run::{Lock, StateFolder};

use crate::distil::export::COMFYUI;
use crate::distil::picture_size::PictureSize;
use crate::distil::recipe::Recipe;
use crate::distil::tensorboard::FOLDER;
use crate::distil::weights::RoleWeights;
use crate::model::{ADAPTER_PREFIX, Checkpoint, INDEX, Pipeline};

/// The name that diffusers' `load_lora_weights` looks for.
pub const ADAPTER: &str = "pytorch_lora_weights.safetensors";

/// What a run writes at its end.
pub const REPORT: &str = "report.json";

/// The share of an update that a merge should keep.
const MUCH: f64 = 0.9;

/// File of the recipe beside a student.
const RECIPE: &str = "recipe.json";

/// How a student was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct SavedRecipe {
    #[serde(flatten)]
    pub recipe: Recipe,
    /// The size of its pictures, where that was chosen: the first of several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<PictureSize>,
    /// [`Checkpoint::fingerprint`](crate::model::Checkpoint::fingerprint) of its teacher, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub teacher: Option<String>,
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

/// Writes a student: an adapter as a file for `load_lora_weights`, with that of the teacher in it if the teacher has
/// one; a model as a diffusers folder. With `merged`, the checkpoint of the base, an adapter becomes such a folder too,
/// with a warning where rounding takes much of it. What an earlier student has left in the folder goes.
///
/// # Errors
/// If a weight is not finite, or a file cannot be written.
pub fn save_student(
    folder: &Path,
    teacher: &Pipeline,
    weights: &RoleWeights,
    merged: Option<&Checkpoint>,
    saved: &SavedRecipe,
) -> Result<()> {
    for (name, weight) in weights.parameters() {
        ensure!(
            is_finite(&weight)?,
            "the student's {name} is not finite: nothing is written to {}. A lower learning rate may help",
            folder.display()
        );
    }
    create_folder(folder)?;
    write_json(&folder.join(RECIPE), saved)?;
    let transformer = match weights {
        RoleWeights::Copy(model) => {
            remove(&folder.join(ADAPTER), |path| fs::remove_file(path))?;
            model.duplicate()?
        }
        RoleWeights::Adapter(lora) => {
            let own = teacher.transformer.adapter();
            let joined = own.map(|own| lora.joined(own)).transpose()?;
            let lora = joined.as_ref().unwrap_or(lora);
            lora.save(&folder.join(ADAPTER), ADAPTER_PREFIX)?;
            let Some(base) = merged else {
                for part in ["transformer", "scheduler", COMFYUI] {
                    remove(&folder.join(part), |path| fs::remove_dir_all(path))?;
                }
                remove(&folder.join(INDEX), |path| fs::remove_file(path))?;
                return Ok(());
            };
            // On the way to a file: the device may have no room for a second model. Read again, as the teacher's
            // weights may be in 8 bits.
            let base = base.plain().load(teacher.transformer.kind(), Device::Cpu)?.transformer;
            let transformer =
                base.merged(&lora.frozen(1.0, Kind::Float, Device::Cpu)?, Device::Cpu)?;
            let (before, after) = (base.parameters(), transformer.parameters());
            let kept = lora.kept_by_merge(before, after)?;
            if kept < MUCH {
                eprintln!(
                    "warning: of the adapter's update the merged transformer keeps {:.0} %, the rest is below a \
                     rounding step of its weights: {ADAPTER} keeps all",
                    100.0 * kept
                );
            }
            transformer
        }
    };
    Pipeline { transformer, shift: teacher.shift }.save(folder)?;
    remove(&folder.join(COMFYUI), |path| fs::remove_dir_all(path))
}

/// Removes what is there by `remove`.
pub(super) fn remove(path: &Path, remove: impl Fn(&Path) -> std::io::Result<()>) -> Result<()> {
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
    /// It is forgotten, finished or not, with all that it has made.
    Fresh,
}

/// The error of a run that is finished and was not to be started anew.
#[derive(Debug)]
pub struct FinishedRun {
    folder: PathBuf,
    updates: u64,
}

impl fmt::Display for FinishedRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { folder, updates } = self;
        write!(f, "the run in {} is finished, after {updates} updates", folder.display())
    }
}

impl std::error::Error for FinishedRun {}

/// What of a report says how far its run went.
#[derive(Deserialize)]
struct Reported {
    recipe: ReportedRecipe,
}

#[derive(Deserialize)]
struct ReportedRecipe {
    updates: u64,
}

/// Where the state of the run in the folder `out` is kept; finds a run of the same `identity`: the recipe, and
/// whatever else decides the numbers, but for the number of updates and of those that may be left out. One that is
/// finished goes on if more updates are asked for.
///
/// # Errors
/// If the run there is another one, or one that is still going on; if it should go on and its state is gone;
/// [`FinishedRun`].
pub fn open_states(
    out: &Path,
    (recipe, beside): (&Recipe, &Value),
    start: Start,
) -> Result<(StateFolder, Lock)> {
    let mut identity = json!({ "recipe": recipe, "beside": beside });
    if let Some(recipe) = identity["recipe"].as_object_mut() {
        recipe.retain(|name, _| !["updates", "skip_nonfinite"].contains(&name.as_str()));
    }
    let lock = Lock::take(out)?;
    let (folder, report) = (out.join("state"), out.join(REPORT));
    if start == Start::Fresh {
        let states = StateFolder::open_fresh(&folder, &identity)?;
        remove_results(out)?;
        return Ok((states, lock));
    }
    let states = StateFolder::open(&folder, &identity)?;
    if report.exists() {
        let Reported { recipe: ReportedRecipe { updates } } = read_json(&report)?;
        ensure!(recipe.updates > updates, FinishedRun { folder: out.to_owned(), updates });
        ensure!(
            states.is_unfinished(),
            "the run in {} cannot go on after its {updates} updates: its state is gone from {}",
            out.display(),
            folder.display()
        );
    }
    Ok((states, lock))
}

/// What is said of the state of a finished run.
pub fn states_stay(out: &Path) -> String {
    let folder = out.join("state");
    format!(
        "The same command with more --updates goes on from {}; without need of that, delete the folder",
        folder.display()
    )
}

/// Removes what an earlier run has made in a folder, so that nothing is taken for the work of the next.
fn remove_results(out: &Path) -> Result<()> {
    let entries = fs::read_dir(out).with_context(|| format!("reading {}", out.display()))?;
    for entry in entries {
        let path = entry.with_context(|| format!("reading {}", out.display()))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
        if is_result(name) {
            if path.is_dir() {
                remove(&path, |path| fs::remove_dir_all(path))?;
            } else {
                remove(&path, |path| fs::remove_file(path))?;
            }
        }
    }
    Ok(())
}

/// Whether a run gives this name to something that it makes: a student, a picture, curves, event files, its report.
fn is_result(name: &str) -> bool {
    let is_numbered =
        |rest: &str| rest.len() >= 6 && rest.bytes().all(|byte| byte.is_ascii_digit());
    let preview = name.strip_prefix("preview-").and_then(|rest| rest.strip_suffix(".png"));
    [REPORT, "student", "samples.png", "curves.svg", FOLDER].contains(&name)
        || name.strip_prefix("student-").is_some_and(is_numbered)
        || preview.is_some_and(is_numbered)
}
