//! The names that files of adapters give to the linear layers of a model.

use std::collections::BTreeMap;

use tch::Tensor;

use super::{HALVES, LinearLayer};
use crate::error::{Fault, Result};
use crate::parameters::{Parameters, is_finite, no_faults};

/// Ends of the names of A and of B in files: of peft and diffusers, of kohya, of older diffusers, and of peft with
/// the adapter's name between.
const ENDS: [[&str; 4]; 2] = [
    [HALVES[0], ".lora_down.weight", ".lora.down.weight", ".lora_A.default.weight"],
    [HALVES[1], ".lora_up.weight", ".lora.up.weight", ".lora_B.default.weight"],
];
/// The end of the name of a pair's alpha.
const ALPHA: &str = ".alpha";

/// What files of adapters call the linear layers of a model, besides the model's own names for them. Every name may
/// have underscores in place of its dots, as kohya writes them.
#[derive(Clone, Copy, Debug)]
pub struct LayerNames<'a> {
    /// What stands before the names; the first is that of diffusers' settings in the metadata too.
    pub prefixes: &'a [&'a str],
    /// Last parts of a name in files, and those of the layer or layers of the model that it stands for. Of several
    /// layers, the outputs are stacked in this order.
    pub aliases: &'a [(&'a str, &'a [&'a str])],
}

/// What a file holds: A and B by the names of the model, and the alphas by layer.
pub(super) struct Renamed {
    pub(super) parameters: Parameters,
    pub(super) alphas: BTreeMap<String, Tensor>,
}

impl LayerNames<'_> {
    /// The tensors of a file by the names of the model, each given by `prepare` in the dtype and on the device that
    /// are wanted.
    pub(super) fn rename(
        &self,
        tensors: Parameters,
        layers: &[LinearLayer],
        prepare: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Renamed> {
        let spellings = self.spellings(layers);
        let mut renamed = Renamed { parameters: Parameters::new(), alphas: BTreeMap::new() };
        let mut faults = Vec::new();
        for (name, tensor) in tensors {
            let tensor = prepare(&tensor)?;
            if !is_finite(&tensor)? {
                faults.push(Fault::NotFinite { name });
                continue;
            }
            let placed = self.prefixes.iter().find_map(|prefix| {
                let (spelled, part) = split(name.strip_prefix(prefix)?)?;
                Some((spellings.get(spelled)?, part))
            });
            match placed {
                Some((stacked, part)) => {
                    faults.extend(renamed.place(name, &tensor, stacked, part)?);
                }
                None => faults.push(Fault::NoSuchLayer { name }),
            }
        }
        no_faults("the adapter", faults)?;
        Ok(renamed)
    }

    /// Every spelling of a name, and the layers that it stands for.
    fn spellings<'l>(&self, layers: &'l [LinearLayer]) -> BTreeMap<String, Vec<&'l LinearLayer>> {
        let by_name: BTreeMap<&str, &LinearLayer> =
            layers.iter().map(|layer| (layer.0.as_str(), layer)).collect();
        let own = layers.iter().map(|layer| (layer.0.clone(), vec![layer]));
        let stems = |part: &str| -> Vec<&'l str> {
            let stem = |(name, _): &'l LinearLayer| {
                name.strip_suffix(part).filter(|stem| stem.is_empty() || stem.ends_with('.'))
            };
            layers.iter().filter_map(stem).collect()
        };
        let aliases = self.aliases.iter().flat_map(|(alias, parts)| {
            let stems = parts.first().map(|part| stems(part)).unwrap_or_default();
            let stands_for = |stem: &str| -> Option<(String, Vec<&'l LinearLayer>)> {
                let layer = |part: &&str| by_name.get(format!("{stem}{part}").as_str()).copied();
                Some((format!("{stem}{alias}"), parts.iter().map(layer).collect::<Option<_>>()?))
            };
            stems.into_iter().filter_map(stands_for).collect::<Vec<_>>()
        });
        let mut spellings = BTreeMap::new();
        for (name, stacked) in own.chain(aliases) {
            let _ = spellings.entry(name.replace('.', "_")).or_insert_with(|| stacked.clone());
            let _ = spellings.entry(name).or_insert(stacked);
        }
        spellings
    }
}

/// One of the three tensors that a file has of a layer.
#[derive(Clone, Copy)]
enum Part {
    Half(usize),
    Alpha,
}

/// The layer's part of a name, and which of its tensors it is.
fn split(name: &str) -> Option<(&str, Part)> {
    let half = |half: usize| {
        let end = ENDS[half].iter().find_map(|end| name.strip_suffix(end))?;
        Some((end, Part::Half(half)))
    };
    half(0).or_else(|| half(1)).or_else(|| Some((name.strip_suffix(ALPHA)?, Part::Alpha)))
}

impl Renamed {
    /// Puts a tensor of the file where it belongs: that of stacked layers to each of them, of B its own rows.
    fn place(
        &mut self,
        name: String,
        tensor: &Tensor,
        stacked: &[&LinearLayer],
        part: Part,
    ) -> Result<Option<Fault>> {
        let found = tensor.size();
        let rows: i64 = stacked.iter().map(|(_, [rows, _])| rows).sum();
        let mut start = 0;
        for (layer, [own_rows, _]) in stacked {
            let is_twice = match part {
                Part::Alpha if tensor.numel() != 1 => {
                    return Ok(Some(Fault::Shape { name, expected: vec![], found }));
                }
                Part::Alpha => {
                    let alpha = tensor.f_flatten(0, -1)?;
                    self.alphas.insert(layer.clone(), alpha).is_some()
                }
                Part::Half(half) => {
                    let own = match half {
                        _ if stacked.len() == 1 => tensor.shallow_clone(),
                        0 => tensor.copy(),
                        _ if found.first() != Some(&rows) => {
                            let rank = found.last().copied().unwrap_or_default();
                            return Ok(Some(Fault::Shape {
                                name,
                                expected: vec![rows, rank],
                                found,
                            }));
                        }
                        _ => tensor.f_narrow(0, start, *own_rows)?.copy(),
                    };
                    self.parameters.insert(format!("{layer}{}", HALVES[half]), own).is_some()
                }
            };
            if is_twice {
                return Ok(Some(Fault::Twice { name }));
            }
            start += own_rows;
        }
        Ok(None)
    }

    /// Multiplies every B that has an alpha by alpha / rank.
    pub(super) fn fold_alphas(self) -> Result<Parameters> {
        let Self { mut parameters, alphas } = self;
        let mut faults = Vec::new();
        for (layer, alpha) in alphas {
            let name = format!("{layer}{}", HALVES[1]);
            let rank = |up: &Tensor| up.size().last().copied().filter(|rank| *rank > 0);
            match parameters.get_mut(&name).and_then(|up| Some((rank(up)?, up))) {
                Some((rank, up)) => *up = up.f_mul(&alpha)?.f_div_scalar(rank)?,
                None => faults.push(Fault::Alpha { layer, half: name }),
            }
        }
        no_faults("the adapter", faults)?;
        Ok(parameters)
    }

    pub(super) fn has_alphas(&self) -> bool {
        !self.alphas.is_empty()
    }
}
