//! Adapters as files, with the names that peft, diffusers and ComfyUI use.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tch::{Device, Kind, Tensor};

use super::{HALVES, LinearLayer, Lora};
use crate::error::{Error, Fault, Result};
use crate::parameters::{Parameters, is_finite, no_faults};
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
    /// [`Self::save`] writes, or what diffusers writes, with its settings in the metadata or not. The scale is
    /// alpha / rank where there is a `{prefix}{layer}.alpha`; a scale in the metadata besides is refused.
    ///
    /// Names start with one of the `prefixes`; the first is that of the settings in the metadata too.
    ///
    /// # Errors
    /// With an [`Error::In`] around them that names the file: as [`Weights::open_file`] and
    /// [`Self::from_parameters`], [`Error::Tensors`] if numbers are not finite or a name is there twice,
    /// [`Error::Json`], [`Error::OutOfRange`] and [`Error::NotSupported`] for the settings.
    pub fn load(
        path: &Path,
        layers: &[LinearLayer],
        prefixes: &[&str],
        device: Device,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        read(path, layers, prefixes, device)
            .map_err(|error| error.inside(format!("reading the adapter {}", path.display())))
    }
}

fn read(path: &Path, layers: &[LinearLayer], prefixes: &[&str], device: Device) -> Result<Lora> {
    let weights = Weights::open_file(path)?;
    let mut parameters = Parameters::new();
    let mut alphas = BTreeMap::new();
    let mut faults = Vec::new();
    for (name, tensor) in weights.all()? {
        let tensor = tensor.f_to_device(device)?.f_to_kind(Kind::Float)?;
        if !is_finite(&tensor)? {
            faults.push(Fault::NotFinite { name });
            continue;
        }
        let Some(rest) = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix)) else {
            faults.push(Fault::NoSuchLayer { name });
            continue;
        };
        match rest.strip_suffix(".alpha") {
            Some(_) if tensor.numel() != 1 => {
                faults.push(Fault::Shape { expected: vec![], found: tensor.size(), name });
            }
            Some(layer) => drop(alphas.insert(layer.to_owned(), tensor.f_flatten(0, -1)?)),
            None => {
                if parameters.insert(rest.to_owned(), tensor).is_some() {
                    faults.push(Fault::Twice { name });
                }
            }
        }
    }
    no_faults("the adapter", faults)?;
    let has_alphas = !alphas.is_empty();
    fold_alphas(&mut parameters, alphas)?;
    let prefix = prefixes.first().copied().unwrap_or_default();
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

/// Multiplies every B that has an alpha by alpha / rank.
fn fold_alphas(parameters: &mut Parameters, alphas: BTreeMap<String, Tensor>) -> Result<()> {
    let mut faults = Vec::new();
    for (layer, alpha) in alphas {
        let name = format!("{layer}{}", HALVES[1]);
        let rank = |up: &Tensor| up.size().last().copied().filter(|rank| *rank > 0);
        match parameters.get_mut(&name).and_then(|up| Some((rank(up)?, up))) {
            Some((rank, up)) => *up = up.f_mul(&alpha)?.f_div_scalar(rank)?,
            None => faults.push(Fault::Alpha { layer, half: name }),
        }
    }
    no_faults("the adapter", faults)
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
