//! A student in the files of ComfyUI.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tch::Tensor;
use tch_training::Parameters;
use tch_training::files::create_folder;
use tch_training::safetensors::{Weights, read_tensors, write_tensors};

use crate::distil::saved_student::{ADAPTER, SavedRecipe};
use crate::model::{ADAPTER_PREFIX, Config, WEIGHTS};

/// What ComfyUI writes before the names of a diffusion model in a file of adapters.
const PREFIX: &str = "diffusion_model.";
/// The linear layers that are one in ComfyUI, `attention.qkv`, in the order of their rows.
const FUSED: [&str; 3] = ["to_q", "to_k", "to_v"];
/// Parts of names, and what ComfyUI calls them: as in the model's first release.
const RENAMED: [(&str, &str); 5] = [
    (".attention.to_out.0.", ".attention.out."),
    (".attention.norm_q.", ".attention.q_norm."),
    (".attention.norm_k.", ".attention.k_norm."),
    ("all_x_embedder.2-1.", "x_embedder."),
    ("all_final_layer.2-1.", "final_layer."),
];

/// Writes what there is of a student's folder for ComfyUI, into the folders `loras/` and `diffusion_models/` of its
/// `comfyui/`: the adapter as one file, and the whole transformer as one file. Returns their paths.
///
/// # Errors
/// If the folder holds neither, the transformer has another patch size than 2, or a file cannot be read or written.
pub fn export_comfyui(student: &Path) -> Result<Vec<PathBuf>> {
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
    let folder = student.join("comfyui");
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    let mut written = Vec::new();
    let mut write = |part: &str, tensors: &Parameters| -> Result<()> {
        create_folder(&folder.join(part))?;
        let path = folder.join(part).join(&name);
        write_tensors(&path, tensors)?;
        written.push(path);
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
    Ok(written)
}

/// The parameters of a transformer by the names of ComfyUI: queries, keys and values, `[D, D]` each, are the rows of
/// one `[3 D, D]`.
fn fused(parameters: Parameters) -> Result<Parameters> {
    let mut fused = Parameters::new();
    for (name, tensor) in &parameters {
        let is_fused = |part: &&str| name.ends_with(&format!(".attention.{part}.weight"));
        match FUSED.iter().position(is_fused) {
            Some(0) => {
                let of = |part: &str| name.replace(FUSED[0], part);
                let parts = FUSED.map(|part| {
                    parameters.get(&of(part)).with_context(|| format!("{} is missing", of(part)))
                });
                let parts = parts.into_iter().collect::<Result<Vec<_>>>()?;
                let _ = fused.insert(of("qkv"), Tensor::f_cat(&parts, 0)?);
            }
            Some(_) => {}
            None => {
                let rename = |name: String, (from, to): &(&str, &str)| name.replace(from, to);
                let _ =
                    fused.insert(RENAMED.iter().fold(name.clone(), rename), tensor.shallow_clone());
            }
        }
    }
    Ok(fused)
}
