//! New transformers, and transformers read from and written to `transformer/` of a diffusers folder.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::{Device, Kind, Tensor};
use tch_training::files::write_json;
use tch_training::lora::LayerNames;
use tch_training::safetensors::{Weights, write_tensors};

use crate::model::checkpoint::read_config;
use crate::model::config::{CLASS_NAME, Config};
use crate::model::quantization::Storage;
use crate::model::transformer::ZImageTransformer;

/// The names in files of adapters: as diffusers writes them, and as ComfyUI, kohya, peft and others do.
pub const ADAPTER_NAMES: LayerNames<'_> = LayerNames {
    prefixes: &[
        ADAPTER_PREFIX,
        "diffusion_model.",
        "base_model.model.",
        "lora_unet__",
        "lora_unet_",
        "lora_transformer_",
        "",
    ],
    aliases: &OTHER_NAMES,
};

/// Last parts of names in other programs, and ours: of the model's first release, which ComfyUI has kept, and behind
/// those what adapters alone have.
pub(crate) const OTHER_NAMES: [(&str, &[&str]); 8] = [
    ("attention.qkv", &["attention.to_q", "attention.to_k", "attention.to_v"]),
    ("attention.out", &["attention.to_out.0"]),
    ("attention.q_norm", &["attention.norm_q"]),
    ("attention.k_norm", &["attention.norm_k"]),
    ("x_embedder", &["all_x_embedder.2-1"]),
    ("final_layer.linear", &["all_final_layer.2-1.linear"]),
    ("final_layer.adaLN_modulation.1", &["all_final_layer.2-1.adaLN_modulation.1"]),
    ("attention.to_out", &["attention.to_out.0"]),
];

/// What diffusers writes before the names.
pub const ADAPTER_PREFIX: &str = "transformer.";

/// Stem of the weight files in a diffusers folder.
pub(crate) const WEIGHTS: &str = "diffusion_pytorch_model";

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
        let config = read_config(folder)?;
        read_weights(folder, config, Storage::Full, (kind, device), &mut |_, _| {})
    }

    /// Writes `transformer/` of a diffusers folder.
    ///
    /// # Errors
    /// If weights are kept in 8 bits, the model has an adapter apart, or a file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        ensure!(
            !self.is_quantized() && self.adapter().is_none(),
            "a model in 8 bits or with an adapter apart is not written: files hold whole weights"
        );
        let folder = folder.join("transformer");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let mut config = serde_json::to_value(self.config())?;
        config["_class_name"] = CLASS_NAME.into();
        write_json(&folder.join("config.json"), &config)?;
        Ok(write_tensors(&folder.join(format!("{WEIGHTS}.safetensors")), self.parameters())?)
    }
}

/// A transformer over the weights in `transformer/` of a folder. `progress` is told after each tensor how many
/// bytes have been read, and of how many.
pub(super) fn read_weights(
    folder: &Path,
    config: Config,
    storage: Storage,
    (kind, device): (Kind, Device),
    progress: &mut dyn FnMut(u64, u64),
) -> Result<ZImageTransformer> {
    let weights = Weights::open(&folder.join("transformer"), WEIGHTS)?;
    let keep = |name, tensor| storage.keep(name, tensor);
    let parameters = weights.load_converted(&config.parameters(), kind, device, progress, keep)?;
    ZImageTransformer::from_kept(config, parameters)
}

/// Compares names and shapes of the weights in `transformer/` of a folder with a config.
pub(super) fn check_weights(folder: &Path, config: &Config) -> Result<()> {
    let weights = Weights::open(&folder.join("transformer"), WEIGHTS)?;
    Ok(weights.check(&config.parameters())?)
}

/// Zero for what modulates and for the output, one for norms, Xavier-uniform for other matrices.
fn initial_value(name: &str, shape: &[i64], device: Device) -> Result<Tensor> {
    let options = (Kind::Float, device);
    if name.ends_with("pad_token") {
        return Ok(Tensor::f_randn(shape, options)?.times(0.02)?);
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
