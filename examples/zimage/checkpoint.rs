//! Making, reading and writing models: the transformer part of a diffusers folder.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tch::{Device, Kind, Tensor};

use super::blocks::Parameters;
use super::config::Config;
use super::transformer::{ZImageTransformer, check_parameters};

const WEIGHTS: &str = "diffusion_pytorch_model.safetensors";

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
        let folder = folder.join("transformer");
        let path = folder.join("config.json");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let config: Config =
            serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))?;
        config.validate().with_context(|| format!("checking {}", path.display()))?;

        let path = folder.join(WEIGHTS);
        let parameters = read_tensors(&path)?;
        // Before the cast, which could be long.
        check_parameters(&config, &parameters).with_context(|| path.display().to_string())?;
        let parameters = parameters
            .into_iter()
            .map(|(name, tensor)| Ok((name, tensor.f_to_device(device)?.f_to_kind(kind)?)))
            .collect::<Result<_>>()?;
        Self::from_parameters(config, parameters)
    }

    /// Writes `transformer/` of a diffusers folder.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let folder = folder.join("transformer");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let mut config = serde_json::to_value(self.config())?;
        config["_class_name"] = "ZImageTransformer2DModel".into();
        write_atomically(&folder.join("config.json"), |path| {
            Ok(fs::write(path, serde_json::to_string_pretty(&config)? + "\n")?)
        })?;
        write_tensors(&folder.join(WEIGHTS), self.parameters())
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

/// All tensors of a safetensors file by name.
///
/// # Errors
/// If the file cannot be read or is not a safetensors file.
pub fn read_tensors(path: &Path) -> Result<Parameters> {
    let tensors =
        Tensor::read_safetensors(path).with_context(|| format!("reading {}", path.display()))?;
    Ok(tensors.into_iter().collect())
}

/// Copies `saved` into tensors of the same names, whose storage others share.
///
/// # Errors
/// Names what is missing, unexpected, or of another shape or dtype; nothing is changed then.
pub fn restore(tensors: &Parameters, saved: &Parameters) -> Result<()> {
    let mut faults = Vec::new();
    for (name, tensor) in tensors {
        let described = |tensor: &Tensor| format!("{:?} {:?}", tensor.kind(), tensor.size());
        match saved.get(name) {
            None => faults.push(format!("{name} is missing")),
            Some(saved) if described(saved) != described(tensor) => faults.push(format!(
                "{name} is {}, expected {}",
                described(saved),
                described(tensor)
            )),
            Some(_) => {}
        }
    }
    let unexpected = saved.keys().filter(|name| !tensors.contains_key(*name));
    faults.extend(unexpected.map(|name| format!("{name} is unexpected")));
    ensure!(faults.is_empty(), "saved tensors do not fit: {}", faults.join("; "));
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

/// Runs `write` on a temporary path and renames the outcome to `path`.
pub fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut temporary = PathBuf::from(path).into_os_string();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    write(&temporary).with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, path).with_context(|| format!("renaming to {}", path.display()))
}
