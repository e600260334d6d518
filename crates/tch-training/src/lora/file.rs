//! Adapters as files, with the names that peft, diffusers and ComfyUI use.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::names::ALPHA;
use super::{HALVES, LayerNames, LinearLayer, Lora};
use crate::error::{Error, Result};
use crate::files::read_json;
use crate::number::times;
use crate::parameters::Parameters;
use crate::safetensors::{Weights, write_tensors};

/// The key of diffusers' adapter settings in a file's metadata.
const METADATA: &str = "lora_adapter_metadata";

/// What peft writes before the names, and the file beside its own in which it leaves the settings.
const PEFT: (&str, &str) = ("base_model.model.", "adapter_config.json");

impl Lora {
    /// Writes the adapter as `{prefix}{layer}.lora_A.weight` and `.lora_B.weight` with the scale folded into B,
    /// which all programs that know the names load alike. diffusers calls a transformer `transformer.`; peft, with
    /// `base_model.model.`, wants its settings in a file beside this.
    ///
    /// # Errors
    /// As [`write_tensors`].
    pub fn save(&self, path: &Path, prefix: &str) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let mut tensors = Parameters::new();
        for (layer, pair) in self.pairs() {
            let halves = [pair.down.shallow_clone(), times(&pair.up, pair.scale)?];
            for (half, tensor) in HALVES.into_iter().zip(halves) {
                tensors.insert(format!("{prefix}{layer}{half}"), tensor);
            }
        }
        write_tensors(path, &tensors)
    }

    /// Reads an adapter for a model with these linear `layers`, in float32 and with a scale of 1: what
    /// [`Self::save`] writes, what diffusers writes, with its settings in the metadata or not, what peft writes, with
    /// its settings in a file beside it ([`Self::settings_file`]), and what other programs write under the `names`.
    /// The scale is alpha / rank of the settings, or where a layer has an alpha of its own, else 1; both at once are
    /// refused.
    ///
    /// # Errors
    /// With an [`Error::In`] around them that names the file: as [`Weights::open_file`] and
    /// [`Self::from_parameters`], [`Error::Tensors`] if numbers are not finite or no floats, or a name is there twice,
    /// [`Error::File`], [`Error::Json`], [`Error::OutOfRange`] and [`Error::NotSupported`] for the settings.
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

    /// The file `adapter_config.json` beside an adapter, where peft leaves alpha and rank, if [`Self::load`] reads it:
    /// for the names of peft. It must be there, unless the layers have alphas of their own.
    ///
    /// # Errors
    /// As [`Weights::open_file`].
    pub fn settings_file(path: &Path) -> Result<Option<PathBuf>> {
        Ok(settings_file(path, &Weights::open_file(path)?))
    }
}

/// By the names in the header alone.
fn settings_file(path: &Path, weights: &Weights) -> Option<PathBuf> {
    let names = || weights.shapes().map(|(name, _)| name);
    let is_of_peft = names().any(|name| name.starts_with(PEFT.0));
    let has_alphas = names().any(|name| name.ends_with(ALPHA));
    let file = path.with_file_name(PEFT.1);
    let is_read = is_of_peft && weights.metadata(METADATA).is_none();
    (is_read && (file.exists() || !has_alphas)).then_some(file)
}

fn read(
    path: &Path,
    layers: &[LinearLayer],
    names: LayerNames<'_>,
    device: Device,
) -> Result<Lora> {
    let weights = Weights::open_file(path)?;
    let file = settings_file(path, &weights);
    let prepare = |tensor: &Tensor| Ok(tensor.f_to_device(device)?.f_to_kind(Kind::Float)?);
    let renamed = names.rename(weights.all()?, layers, prepare)?;
    let has_alphas = !renamed.alphas.is_empty();
    let mut parameters = renamed.fold_alphas()?;
    let settings = match (weights.metadata(METADATA), file) {
        (Some(text), _) => {
            let place = format!("the metadata {METADATA}");
            let settings = serde_json::from_str(text)
                .map_err(|source| Error::Json { place: place.clone(), source })?;
            let prefix = names.prefixes.first().copied().unwrap_or_default();
            Some(Settings { settings, prefix, place })
        }
        (None, Some(file)) => {
            let place = file.display().to_string();
            Some(Settings { settings: read_json(&file)?, prefix: "", place })
        }
        (None, None) => None,
    };
    if let Some(settings) = settings {
        if has_alphas {
            let what = format!("a scale in {} and again in tensors of alpha", settings.place);
            return Err(Error::NotSupported { what, found: "both".to_owned() });
        }
        let (alpha, rank) = settings.alpha_and_rank()?;
        for (name, up) in parameters.iter_mut().filter(|(name, _)| name.ends_with(HALVES[1])) {
            let found = up.size().last().copied().unwrap_or_default();
            if found as f64 != rank {
                let what = format!("another rank of {name} than r {rank} in {}", settings.place);
                return Err(Error::NotSupported { what, found: found.to_string() });
            }
            *up = times(up, alpha / rank)?;
        }
    }
    Lora::from_parameters(layers, &parameters)
}

/// What a program has written about an adapter.
struct Settings<'a> {
    settings: Map<String, Value>,
    /// What stands before their names.
    prefix: &'a str,
    /// Where they are.
    place: String,
}

impl Settings<'_> {
    fn get(&self, name: &str) -> &Value {
        self.settings.get(&format!("{}{name}", self.prefix)).unwrap_or(&Value::Null)
    }

    /// lora_alpha and r.
    fn alpha_and_rank(&self) -> Result<(f64, f64)> {
        for name in [
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "use_dora",
            "fan_in_fan_out",
            "layer_replication",
            "init_lora_weights",
            "peft_type",
        ] {
            let is_off = match self.get(name) {
                Value::Null | Value::Bool(false) => true,
                Value::Object(patterns) => patterns.is_empty(),
                // Other ways to begin, such as "pissa", belong to other weights than the model's.
                Value::Bool(true) => name == "init_lora_weights",
                Value::String(value) => match name {
                    "init_lora_weights" => ["gaussian", "eva", "orthogonal"].contains(&&value[..]),
                    "peft_type" => value == "LORA",
                    _ => false,
                },
                _ => false,
            };
            if !is_off {
                let what = format!("the setting {name} of {}", self.place);
                return Err(Error::NotSupported { what, found: self.get(name).to_string() });
            }
        }
        let number = |what: &'static str| {
            let value = self.get(what).as_f64().filter(|value| *value > 0.0 && value.is_finite());
            value.ok_or_else(|| Error::OutOfRange {
                what,
                requirement: "positive in the settings of the adapter",
                found: self.get(what).to_string(),
            })
        };
        Ok((number("lora_alpha")?, number("r")?))
    }
}
