//! The names that files of adapters give to the linear layers of a model.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use super::{HALVES, LinearLayer, stem};
use crate::error::{Fault, Result};
use crate::number::number;
use crate::parameters::{Parameters, is_finite, no_faults};

/// Ends of the names of A and of B in files: of peft and diffusers, of kohya, of older diffusers, and of peft with
/// the adapter's name between.
const ENDS: [[&str; 4]; 2] = [
    [HALVES[0], ".lora_down.weight", ".lora.down.weight", ".lora_A.default.weight"],
    [HALVES[1], ".lora_up.weight", ".lora.up.weight", ".lora_B.default.weight"],
];
/// The end of the name of a pair's alpha.
pub(super) const ALPHA: &str = ".alpha";

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
            let found = tensor.f_kind()?;
            // An alpha may be a whole number.
            if !tensor.is_floating_point() && !name.ends_with(ALPHA) {
                faults.push(Fault::Kind { name, expected: Kind::Float, found });
                continue;
            }
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
        let by_name = &by_name;
        let aliases = self.aliases.iter().flat_map(|(alias, parts)| {
            let first = parts.first().copied().unwrap_or_default();
            layers.iter().filter_map(move |(name, _)| {
                let stem = stem(name, first)?;
                let layer = |part: &&str| by_name.get(format!("{stem}{part}").as_str()).copied();
                let stacked: Vec<&LinearLayer> = parts.iter().map(layer).collect::<Option<_>>()?;
                (!stacked.is_empty()).then(|| (format!("{stem}{alias}"), stacked))
            })
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
        let expected = match part {
            Part::Alpha if tensor.numel() != 1 => Some(vec![]),
            // Of a layer alone, the pair is checked as a whole.
            Part::Half(1) if stacked.len() > 1 && found.first() != Some(&rows) => {
                Some(vec![rows, found.last().copied().unwrap_or_default()])
            }
            _ => None,
        };
        if let Some(expected) = expected {
            return Ok(Some(Fault::Shape { name, expected, found }));
        }
        let mut start = 0;
        for (layer, [own_rows, _]) in stacked {
            let before = match part {
                Part::Alpha => self.alphas.insert(layer.clone(), tensor.f_flatten(0, -1)?),
                Part::Half(half) => {
                    let own = match half {
                        _ if stacked.len() == 1 => tensor.shallow_clone(),
                        0 => tensor.f_detach_copy()?,
                        _ => tensor.f_narrow(0, start, *own_rows)?.f_detach_copy()?,
                    };
                    self.parameters.insert(format!("{layer}{}", HALVES[half]), own)
                }
            };
            if before.is_some() {
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
                Some((rank, up)) => {
                    *up = up.f_mul(&alpha)?.f_div(&number(rank as f64, up.f_kind()?)?)?
                }
                None => faults.push(Fault::Alpha { layer, half: name }),
            }
        }
        no_faults("the adapter", faults)?;
        Ok(parameters)
    }
}
