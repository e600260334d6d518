//! Adapters as files that diffusers and ComfyUI load, and merged into a model.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use crate::lora::{HALVES, Lora, PREFIX};
use crate::model::{Config, ZImageTransformer};
use crate::parameters::Parameters;
use crate::weights::{read_tensors, write_tensors};

/// The prefix of module names in files of other programs.
const OTHER_PREFIX: &str = "diffusion_model.";
/// The key of diffusers' adapter settings in a file's metadata.
const METADATA: &str = "lora_adapter_metadata";

impl Lora {
    /// Writes the adapter as `transformer.{module}.lora_A.weight` and `.lora_B.weight` with the scale
    /// folded into B, which every version of diffusers that knows the model loads alike.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, path: &Path) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let mut tensors = Parameters::new();
        for (module, pair) in self.pairs() {
            let halves = [pair.down.shallow_clone(), pair.up.f_mul_scalar(pair.scale)?];
            for (half, tensor) in HALVES.into_iter().zip(halves) {
                tensors.insert(format!("{PREFIX}{module}{half}"), tensor);
            }
        }
        write_tensors(path, &tensors)
    }

    /// Reads an adapter, in float32 and with a scale of 1: what [`Self::save`] writes, what diffusers
    /// writes (with its settings in the metadata or not), or names that start with `diffusion_model.`;
    /// the scale is alpha / rank where there is a `.alpha`.
    ///
    /// # Errors
    /// If the file cannot be read, holds numbers that are not finite or settings that are not
    /// supported, or as [`Self::from_parameters`].
    pub fn load(path: &Path, config: &Config, device: Device) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let load = || {
            let mut parameters = Parameters::new();
            let mut alphas = BTreeMap::new();
            for (name, tensor) in read_tensors(path)? {
                let tensor = tensor.f_to_device(device)?.f_to_kind(Kind::Float)?;
                let finite = tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
                ensure!(finite, "{name} holds numbers that are not finite");
                let rest = name.strip_prefix(OTHER_PREFIX).or_else(|| name.strip_prefix(PREFIX));
                match rest.and_then(|rest| rest.strip_suffix(".alpha")) {
                    Some(module) => {
                        ensure!(tensor.numel() == 1, "{name} must hold one number");
                        alphas.insert(format!("{PREFIX}{module}"), tensor.f_flatten(0, -1)?);
                    }
                    // A name without prefix is left as it is, and refused below.
                    None => {
                        let name =
                            rest.map_or_else(|| name.clone(), |rest| format!("{PREFIX}{rest}"));
                        ensure!(
                            parameters.insert(name.clone(), tensor).is_none(),
                            "{name} is there twice"
                        );
                    }
                }
            }
            fold_alphas(&mut parameters, alphas)?;
            if let Some(scale) = metadata_scale(path)? {
                for (_, up) in parameters.iter_mut().filter(|(name, _)| name.ends_with(HALVES[1])) {
                    *up = up.f_mul_scalar(scale)?;
                }
            }
            Self::from_parameters(config, &parameters)
        };
        load().with_context(|| format!("reading the adapter {}", path.display()))
    }

    /// `model` with `W + scale B A` for the weights that have a pair, computed in float32 where the model
    /// is, and in the model's dtype on `device`. The other tensors are shared with `model`.
    ///
    /// # Errors
    /// If the adapter was made for a model of another shape.
    pub fn merge(&self, model: &ZImageTransformer, device: Device) -> Result<ZImageTransformer> {
        let _guard = tch::no_grad_guard();
        let mut parameters: Parameters = model.named_parameters().into_iter().collect();
        for (module, pair) in self.pairs() {
            let weight = parameters
                .get_mut(&format!("{module}.weight"))
                .with_context(|| format!("the model has no linear layer {module}"))?;
            let update = pair.up.f_matmul(&pair.down)?.f_mul_scalar(pair.scale)?;
            ensure!(
                update.size() == weight.size(),
                "the pair of {module} is for a weight of {:?}, found {:?}",
                update.size(),
                weight.size()
            );
            // Not in place: the model keeps its weights.
            let merged = weight.f_to_kind(update.f_kind()?)?.f_add(&update)?;
            *weight = merged.f_to_kind(weight.f_kind()?)?.f_to_device(device)?;
        }
        ZImageTransformer::from_parameters(model.config().clone(), parameters)
    }
}

/// Multiplies every B that has an alpha by alpha / rank.
fn fold_alphas(parameters: &mut Parameters, alphas: BTreeMap<String, Tensor>) -> Result<()> {
    for (module, alpha) in alphas {
        let up = parameters
            .get_mut(&format!("{module}{}", HALVES[1]))
            .with_context(|| format!("{module} has an alpha but no {}", HALVES[1]))?;
        let rank = up.size().last().copied().unwrap_or_default();
        ensure!(rank > 0, "{module}{} has no rank: {:?}", HALVES[1], up.size());
        *up = up.f_mul(&alpha)?.f_div_scalar(rank)?;
    }
    Ok(())
}

/// lora_alpha / r of the settings that diffusers may have left in a file, or none.
fn metadata_scale(path: &Path) -> Result<Option<f64>> {
    let mut file = File::open(path)?;
    let mut length = [0; 8];
    file.read_exact(&mut length)?;
    let mut header = Vec::new();
    // The tensors have been read from this file, so the header has a sane length.
    file.take(u64::from_le_bytes(length)).read_to_end(&mut header)?;
    let header: Value = serde_json::from_slice(&header)?;
    let Some(text) = header["__metadata__"][METADATA].as_str() else {
        return Ok(None);
    };
    let settings: Map<String, Value> =
        serde_json::from_str(text).with_context(|| format!("parsing the metadata {METADATA}"))?;
    let setting = |name: &str| settings.get(&format!("{PREFIX}{name}")).unwrap_or(&Value::Null);
    for name in ["rank_pattern", "alpha_pattern", "use_rslora", "use_dora"] {
        let is_off = match setting(name) {
            Value::Null | Value::Bool(false) => true,
            Value::Object(patterns) => patterns.is_empty(),
            _ => false,
        };
        ensure!(is_off, "the setting {name} of {METADATA} is not supported: {}", setting(name));
    }
    let number = |name: &str| {
        let value = setting(name).as_f64().filter(|value| *value > 0.0 && value.is_finite());
        value.with_context(|| {
            format!("{METADATA} must give a positive {name}, found {}", setting(name))
        })
    };
    Ok(Some(number("lora_alpha")? / number("r")?))
}
