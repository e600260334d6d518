//! A student in the files of ComfyUI.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tch::Tensor;
use tch_training::Parameters;
use tch_training::files::create_folder;
use tch_training::lora::stem;
use tch_training::parameters::parameter;
use tch_training::safetensors::{Weights, read_tensors, write_tensors};

use crate::distil::saved_student::{ADAPTER, SavedRecipe, remove};
use crate::model::{ADAPTER_PREFIX, Config, OTHER_NAMES, WEIGHTS};

/// What ComfyUI writes before the names of a diffusion model in a file of adapters.
const PREFIX: &str = "diffusion_model.";

/// The folder in that of a student.
pub(super) const COMFYUI: &str = "comfyui";
const PARTIAL: &str = "comfyui.partial";

/// Writes what there is of a student's folder for ComfyUI, into the folders `loras/` and `diffusion_models/` of its
/// `comfyui/`: the adapter as one file, and the whole transformer as one file. Returns their paths.
///
/// # Errors
/// If the folder holds neither, the transformer has another patch size than 2, or a file cannot be read or written; an
/// earlier export is still there then.
pub fn export_comfyui(student: &Path) -> Result<Vec<PathBuf>> {
    let partial = student.join(PARTIAL);
    let written = export(student, &partial);
    remove(&partial, |path| fs::remove_dir_all(path))?;
    written
}

/// Writes the files into `partial` first, which becomes `comfyui/` when all are there.
fn export(student: &Path, partial: &Path) -> Result<Vec<PathBuf>> {
    let name = match SavedRecipe::read(student)? {
        Some(saved) => format!("zimage_{}step.safetensors", saved.recipe.steps),
        None => "zimage_student.safetensors".to_owned(),
    };
    let (adapter, transformer) = (student.join(ADAPTER), student.join("transformer"));
    ensure!(
        adapter.exists() || transformer.exists(),
        "{} is no student: it holds neither {ADAPTER} nor transformer/",
        student.display()
    );
    let folder = student.join(COMFYUI);
    remove(partial, |path| fs::remove_dir_all(path))?;
    let mut written = Vec::new();
    let mut write = |part: &str, tensors: &Parameters| -> Result<()> {
        create_folder(&partial.join(part))?;
        write_tensors(&partial.join(part).join(&name), tensors)?;
        written.push(folder.join(part).join(&name));
        Ok(())
    };
    if transformer.exists() {
        let patches = Config::load(&transformer.join("config.json"))?.all_patch_size;
        ensure!(
            patches == [2],
            "{}: ComfyUI draws with models of patch size 2, found {patches:?}",
            transformer.display()
        );
        write("diffusion_models", &fused(Weights::open(&transformer, WEIGHTS)?.all()?)?)?;
    }
    if adapter.exists() {
        let renamed = read_tensors(&adapter)?.into_iter().map(|(name, tensor)| {
            let layer = name.strip_prefix(ADAPTER_PREFIX).unwrap_or(&name);
            (format!("{PREFIX}{layer}"), tensor)
        });
        write("loras", &renamed.collect())?;
    }
    remove(&folder, |path| fs::remove_dir_all(path))?;
    fs::rename(partial, &folder).with_context(|| format!("renaming to {}", folder.display()))?;
    Ok(written)
}

/// The parameters of a transformer by the names of ComfyUI: queries, keys and values, `[D, D]` each, are the rows of
/// one `[3 D, D]`.
fn fused(parameters: Parameters) -> Result<Parameters> {
    let mut fused = Parameters::new();
    for (name, tensor) in &parameters {
        // What ends the name of a layer, `.weight` or `.bias`; tokens have no such end.
        let (layer, end) = name.split_at(name.rfind('.').unwrap_or(name.len()));
        let renamed = OTHER_NAMES.iter().find_map(|(alias, parts)| {
            let (index, stem) =
                (0..).zip(*parts).find_map(|(index, part)| Some((index, stem(layer, part)?)))?;
            Some((stem, *alias, *parts, index))
        });
        let (name, tensor) = match renamed {
            None => (name.clone(), tensor.shallow_clone()),
            Some((stem, alias, [_], _)) => (format!("{stem}{alias}{end}"), tensor.shallow_clone()),
            Some((stem, alias, parts, 0)) => {
                let stacked =
                    parts.iter().map(|part| parameter(&parameters, &format!("{stem}{part}{end}")));
                let stacked = stacked.collect::<Result<Vec<_>, _>>()?;
                (format!("{stem}{alias}{end}"), Tensor::f_cat(&stacked, 0)?)
            }
            // In the stack of the first.
            Some(_) => continue,
        };
        let _ = fused.insert(name, tensor);
    }
    Ok(fused)
}
