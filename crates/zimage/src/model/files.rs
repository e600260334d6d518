//! New transformers, and transformers read from and written to `transformer/` of a diffusers folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::ProgressBar;
use tch::{Device, Kind, Tensor};
use tch_training::files::write_json;
use tch_training::safetensors::{Weights, write_tensors};

use crate::model::config::{CLASS_NAME, Config};
use crate::model::pipeline::read_config;
use crate::model::transformer::ZImageTransformer;

/// The starts of layer names in files of adapters: as diffusers writes them, and as others do.
pub const ADAPTER_PREFIXES: [&str; 2] = ["transformer.", "diffusion_model."];

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
        Ok(Weights::open(&folder.join("transformer"), WEIGHTS)?.check(&parameters)?)
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
        Ok(write_tensors(&folder.join(format!("{WEIGHTS}.safetensors")), self.parameters())?)
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
