//! Making, reading and writing models: the transformer part of a diffusers folder.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use tch::{Device, Kind, Tensor};

use super::blocks::Parameters;
use super::config::{CLASS_NAME, Config};
use super::pipeline::{read_config, write_json};
use super::transformer::ZImageTransformer;
use super::weights::{Weights, check_shapes};

/// Stem of the weight files in a diffusers folder.
const WEIGHTS: &str = "diffusion_pytorch_model";

impl ZImageTransformer {
    /// A new model in float32.
    ///
    /// Every modulated block starts as the identity (its gates are the tanh of a zero layer) and the
    /// output starts at zero, which keeps the first steps of training calm.
    ///
    /// # Errors
    /// If the config is not valid.
    pub fn init(config: Config, device: Device) -> Result<Self> {
        config.validate()?;
        let parameters = config
            .parameters()
            .into_iter()
            .map(|(name, shape)| {
                let tensor = initial_value(&name, &shape, device)?;
                Ok((name, tensor))
            })
            .collect::<Result<_>>()?;
        Self::from_parameters(config, parameters)
    }

    /// Reads `transformer/` of a diffusers folder, in the dtype and on the device asked for.
    ///
    /// # Errors
    /// If a file cannot be read, or parameters are missing, unexpected or mis-shaped.
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
        let config = read_config(folder)?;
        let weights = Weights::open(&folder.join("transformer"), WEIGHTS)?;
        let parameters = weights.load(&config.parameters(), kind, device, &mut |done, total| {
            progress.set_length(total);
            progress.set_position(done);
        })?;
        progress.finish_and_clear();
        Self::from_parameters(config, parameters)
    }

    /// Looks for what [`Self::load`] would refuse in `transformer/` of a diffusers folder; reads no weights.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn check(folder: &Path) -> Result<()> {
        let parameters = read_config(folder)?.parameters();
        Weights::open(&folder.join("transformer"), WEIGHTS)?.check(&parameters)
    }

    /// Writes `transformer/` of a diffusers folder.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let folder = folder.join("transformer");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let mut config = serde_json::to_value(self.config())?;
        config["_class_name"] = CLASS_NAME.into();
        write_json(&folder.join("config.json"), &config)?;
        write_tensors(&folder.join(format!("{WEIGHTS}.safetensors")), self.parameters())
    }
}

/// Zero for what modulates and for the output, one for norms, Xavier-uniform for other matrices.
fn initial_value(name: &str, shape: &[i64], device: Device) -> Result<Tensor> {
    let options = (Kind::Float, device);
    if name.ends_with("pad_token") {
        return Ok(Tensor::f_randn(shape, options)?.f_mul_scalar(0.02)?);
    }
    let starts_at_zero = name.contains("adaLN_modulation") || name.contains("all_final_layer");
    Ok(match shape {
        [rows, columns] if !starts_at_zero => {
            let bound = (6.0 / (rows + columns) as f64).sqrt();
            Tensor::f_empty(shape, options)?.f_uniform_(-bound, bound)?
        }
        [_] if name.ends_with(".weight") => Tensor::f_ones(shape, options)?,
        _ => Tensor::f_zeros(shape, options)?,
    })
}

/// All tensors of a safetensors file by name, in the dtypes of the file.
///
/// # Errors
/// If the file cannot be read or is not a safetensors file.
pub fn read_tensors(path: &Path) -> Result<Parameters> {
    Weights::open_file(path)?.all()
}

/// Copies `saved` into tensors of the same names, whose storage others share.
///
/// # Errors
/// Names what is missing, unexpected, or of another shape or dtype; nothing is changed then.
pub fn restore(tensors: &Parameters, saved: &Parameters) -> Result<()> {
    let expected: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t.size())).collect();
    check_shapes(&expected, saved.iter().map(|(name, tensor)| (name.as_str(), tensor.size())))?;
    for (name, tensor) in tensors {
        let (found, expected) = (saved[name].f_kind()?, tensor.f_kind()?);
        ensure!(found == expected, "{name} is {found:?}, expected {expected:?}");
    }
    let _guard = tch::no_grad_guard();
    for (name, tensor) in tensors {
        tensor.shallow_clone().f_copy_(&saved[name])?;
    }
    Ok(())
}

/// `tensors` with `prefix` and a dot before their names.
pub fn prefixed(prefix: &str, tensors: Parameters) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
}

/// Writes named tensors as a safetensors file; a crash leaves the old file or the new one.
///
/// # Errors
/// If the file cannot be written.
pub fn write_tensors(path: &Path, tensors: &Parameters) -> Result<()> {
    let list = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    write_atomically(path, |temporary| Ok(Tensor::write_safetensors(&list, temporary)?))
}

/// Runs `write` on a temporary path and renames the outcome to `path`; it is on the disk then.
///
/// # Errors
/// If the file cannot be written.
pub fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut temporary = PathBuf::from(path).into_os_string();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    let written = write(&temporary).and_then(|()| Ok(File::open(&temporary)?.sync_all()?));
    if written.is_err() {
        // Half a file is of no use, and a full disk is short of its room.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, path)
        .map_err(Into::into)
        .and_then(|()| sync_folder(path.parent().unwrap_or(Path::new(""))))
        .with_context(|| format!("renaming to {}", path.display()))
}

/// Makes the names in a folder last, which syncing a file does not.
///
/// # Errors
/// If the disk fails.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // Elsewhere folders cannot be opened as files.
    if cfg!(unix) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}
