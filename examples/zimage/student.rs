//! What a run leaves behind for others: the student, and the state to go on from.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::options::Options;
use super::pipeline::Pipeline;
use super::trained::Trained;
use super::training_state::StateFolder;

/// The name that diffusers' `load_lora_weights` looks for.
pub const ADAPTER: &str = "pytorch_lora_weights.safetensors";

/// Writes a student: an adapter as a file for `load_lora_weights`, a model as a diffusers folder. With
/// `merged`, an adapter becomes such a folder too.
///
/// # Errors
/// If a file cannot be written.
pub fn save_student(
    folder: &Path,
    teacher: &Pipeline,
    weights: &Trained,
    merged: bool,
) -> Result<()> {
    create_folder(folder)?;
    let transformer = match weights {
        Trained::Copy(model) => model.duplicate()?,
        Trained::Adapter(lora) => {
            lora.save(&folder.join(ADAPTER))?;
            if !merged {
                return Ok(());
            }
            lora.merge(&teacher.transformer)?
        }
    };
    Pipeline { transformer, shift: teacher.shift }.save(folder)
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
/// If the unfinished run there is another one.
pub fn open_states(options: &Options, identity: &Value) -> Result<StateFolder> {
    StateFolder::open(&options.out.join("state"), identity, options.fresh)
}

/// Creates a folder, and those that it lies in.
///
/// # Errors
/// If it cannot be created.
pub fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))
}
