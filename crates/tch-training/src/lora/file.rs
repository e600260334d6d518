//! Adapters as files, with the names that peft, diffusers and ComfyUI use.

use std::path::Path;

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::{HALVES, LayerNames, LinearLayer, Lora};
use crate::error::{Error, Result};
use crate::parameters::Parameters;
use crate::safetensors::{Weights, write_tensors};

/// The key of diffusers' adapter settings in a file's metadata.
const METADATA: &str = "lora_adapter_metadata";

impl Lora {
    /// Writes the adapter as `{prefix}{layer}.lora_A.weight` and `.lora_B.weight` with the scale folded into B,
    /// which all programs that know the names load alike. diffusers calls a transformer `transformer.`.
    ///
    /// # Errors
    /// As [`write_tensors`].
    pub fn save(&self, path: &Path, prefix: &str) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let mut tensors = Parameters::new();
        for (layer, pair) in self.pairs() {
            let halves = [pair.down.shallow_clone(), pair.up.f_mul_scalar(pair.scale)?];
            for (half, tensor) in HALVES.into_iter().zip(halves) {
                tensors.insert(format!("{prefix}{layer}{half}"), tensor);
            }
        }
        write_tensors(path, &tensors)
    }

    /// Reads an adapter for a model with these linear `layers`, in float32 and with a scale of 1: what
    /// [`Self::save`] writes, what diffusers writes, with its settings in the metadata or not, and what other
    /// programs write under the `names`. The scale is alpha / rank where a layer has an alpha, else 1; a scale in
    /// the metadata besides is refused.
    ///
    /// # Errors
    /// With an [`Error::In`] around them that names the file: as [`Weights::open_file`] and
    /// [`Self::from_parameters`], [`Error::Tensors`] if numbers are not finite or a name is there twice,
    /// [`Error::Json`], [`Error::OutOfRange`] and [`Error::NotSupported`] for the settings.
    pub fn load(
        path: &Path,
        layers: &[LinearLayer],
        names: LayerNames<'_>,
        device: Device,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        read(path, layers, names, device)
            .map_err(|error| error.inside(format!("reading the adapter {}", path.display())))
    }
}

fn read(
    path: &Path,
    layers: &[LinearLayer],
    names: LayerNames<'_>,
    device: Device,
) -> Result<Lora> {
    let weights = Weights::open_file(path)?;
    let prepare = |tensor: &Tensor| Ok(tensor.f_to_device(device)?.f_to_kind(Kind::Float)?);
    let renamed = names.rename(weights.all()?, layers, prepare)?;
    let has_alphas = !renamed.alphas.is_empty();
    let mut parameters = renamed.fold_alphas()?;
    let prefix = names.prefixes.first().copied().unwrap_or_default();
    if let Some(text) = weights.metadata(METADATA) {
        if has_alphas {
            let what =
                format!("a scale in the settings in {METADATA} and again in tensors of alpha");
            return Err(Error::NotSupported { what, found: "both".to_owned() });
        }
        let (alpha, rank) = alpha_and_rank(text, prefix)?;
        for (name, up) in parameters.iter_mut().filter(|(name, _)| name.ends_with(HALVES[1])) {
            let found = up.size().last().copied().unwrap_or_default();
            if found as f64 != rank {
                let what = format!("another rank of {name} than r {rank} in {METADATA}");
                return Err(Error::NotSupported { what, found: found.to_string() });
            }
            *up = up.f_mul_scalar(alpha / rank)?;
        }
    }
    Lora::from_parameters(layers, &parameters)
}

/// lora_alpha and r of the settings that diffusers may have left in a file.
fn alpha_and_rank(text: &str, prefix: &str) -> Result<(f64, f64)> {
    let settings: Map<String, Value> = serde_json::from_str(text)
        .map_err(|source| Error::Json { place: format!("the metadata {METADATA}"), source })?;
    let setting = |name: &str| settings.get(&format!("{prefix}{name}")).unwrap_or(&Value::Null);
    for name in ["rank_pattern", "alpha_pattern", "use_rslora", "use_dora"] {
        let is_off = match setting(name) {
            Value::Null | Value::Bool(false) => true,
            Value::Object(patterns) => patterns.is_empty(),
            _ => false,
        };
        if !is_off {
            let what = format!("the setting {name} of {METADATA}");
            return Err(Error::NotSupported { what, found: setting(name).to_string() });
        }
    }
    let number = |what: &'static str| {
        let value = setting(what).as_f64().filter(|value| *value > 0.0 && value.is_finite());
        value.ok_or_else(|| Error::OutOfRange {
            what,
            requirement: "positive in the metadata of the adapter",
            found: setting(what).to_string(),
        })
    };
    Ok((number("lora_alpha")?, number("r")?))
}
