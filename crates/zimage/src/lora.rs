//! Low-rank adaptation (Hu et al., arXiv 2106.09685): several roles over one frozen model.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use anyhow::{Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::model::Config;
use crate::parameters::Parameters;
use crate::seed::step_seed;

/// Module names in files start with this, as diffusers writes them.
pub const PREFIX: &str = "transformer.";
/// Endings of the two halves of a pair.
pub const HALVES: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];

/// Far beyond any use, and small enough that sizes do not overflow.
const LARGEST_RANK: i64 = 65_536;

/// Shape and extent of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSettings {
    /// Rank r of every pair, from 1 to 65536.
    pub rank: i64,
    /// The update is scaled by `alpha / rank`; positive.
    pub alpha: f64,
    /// Linear layers to adapt, by full name (`layers.3.attention.to_q`) or by the last parts of it
    /// (`attention.to_q`, `to_q`).
    pub targets: Vec<String>,
    /// Share of a pair's inputs that is zeroed in training, in [0, 1).
    pub dropout: f64,
}

impl Default for LoraSettings {
    /// Rank 64 on the seven linear layers of every block.
    fn default() -> Self {
        let targets = ["to_q", "to_k", "to_v", "to_out.0"].map(|part| format!("attention.{part}"));
        let more = ["w1", "w2", "w3"].map(|part| format!("feed_forward.{part}"));
        Self { rank: 64, alpha: 64.0, targets: [&targets[..], &more].concat(), dropout: 0.0 }
    }
}

impl LoraSettings {
    /// Names and shapes `[out, in]` of the layers to adapt, sorted by name.
    ///
    /// # Errors
    /// If a number is out of range, or a target names no linear layer of the model.
    pub fn modules(&self, config: &Config) -> Result<Vec<(String, [i64; 2])>> {
        ensure!(
            (1..=LARGEST_RANK).contains(&self.rank),
            "rank must be from 1 to {LARGEST_RANK}, found {}",
            self.rank
        );
        ensure!(
            self.alpha.is_finite() && self.alpha > 0.0,
            "alpha must be positive, found {}",
            self.alpha
        );
        ensure!(
            (0.0..1.0).contains(&self.dropout),
            "dropout must be in [0, 1), found {}",
            self.dropout
        );
        ensure!(!self.targets.is_empty(), "targets must name at least one linear layer");
        let linears = config.linears();
        let mut found = BTreeSet::new();
        for target in &self.targets {
            let suffix = format!(".{target}");
            let matching: Vec<_> = linears
                .iter()
                .filter(|(name, _)| name == target || name.ends_with(&suffix))
                .cloned()
                .collect();
            ensure!(!matching.is_empty(), "target {target:?} matches no linear layer");
            found.extend(matching);
        }
        Ok(found.into_iter().collect())
    }
}

/// One layer's pair: its weight acts as `W + scale * B A`.
#[derive(Debug)]
pub struct Pair {
    /// A, `[rank, in]`.
    pub down: Tensor,
    /// B, `[out, rank]`.
    pub up: Tensor,
    pub scale: f64,
    /// Position among the pairs, which tells their dropout masks apart.
    index: u64,
}

impl Pair {
    /// `output + scale * x A^T B^T`, computed in the dtype of `x`.
    pub(crate) fn add_to(
        &self,
        mut output: Tensor,
        x: &Tensor,
        dropout: Option<(f64, i64)>,
    ) -> Result<Tensor> {
        // The pair is cast to the stream's dtype and not the stream to the pair's: float32 copies of
        // the activations would be the largest item of the memory of training.
        let kind = x.f_kind()?;
        let none = None::<&Tensor>;
        let down = self.down.f_to_kind(kind)?;
        let mut hidden = match dropout {
            None => x.f_linear(&down, none)?,
            Some((share, seed)) => {
                // The mask depends on the seed alone, so that a forward pass can be repeated.
                tch::manual_seed(step_seed(seed as u64, self.index));
                x.f_dropout(share, true)?.f_linear(&down, none)?
            }
        };
        if self.scale != 1.0 {
            hidden = hidden.f_mul_scalar(self.scale)?;
        }
        // Nothing else holds the output, and its backward pass does not read it.
        Ok(output.f_add_(&hidden.f_linear(&self.up.f_to_kind(kind)?, none)?)?)
    }
}

/// Low-rank pairs for some of the linear layers of a model. A clone shares the tensors.
#[derive(Clone, Debug)]
pub struct Lora {
    pairs: Rc<BTreeMap<String, Pair>>,
    pub(crate) dropout: f64,
}

impl Lora {
    /// A new adapter that leaves the model as it is: A is random, B zero. Both are trainable leaves
    /// in float32, whatever the model's dtype.
    ///
    /// # Errors
    /// As [`LoraSettings::modules`], or if libtorch cannot allocate the pairs.
    pub fn new(config: &Config, settings: &LoraSettings, device: Device) -> Result<Self> {
        let options = (Kind::Float, device);
        let scale = settings.alpha / settings.rank as f64;
        let pairs = settings
            .modules(config)?
            .into_iter()
            .map(|(name, [rows, columns])| {
                // As peft: uniform with the variance that a linear layer's own weights start with.
                let bound = 1.0 / (columns as f64).sqrt();
                let down = Tensor::f_empty([settings.rank, columns], options)?
                    .f_uniform_(-bound, bound)?;
                let up = Tensor::f_zeros([rows, settings.rank], options)?;
                Ok((name, (down, up, scale)))
            })
            .collect::<Result<Vec<_>>>()?;
        Self::from_pairs(pairs, settings.dropout)
    }

    /// An adapter over tensors as [`Self::parameters`] names them, in whatever float dtype they have,
    /// with a scale of 1 and no dropout. They are made trainable leaves that share storage with those
    /// given.
    ///
    /// # Errors
    /// Lists the names that are unknown, pairs of which one half is missing, and shapes that do not fit.
    pub fn from_parameters(config: &Config, parameters: &Parameters) -> Result<Self> {
        let linears: BTreeMap<String, [i64; 2]> = config.linears().into_iter().collect();
        let mut halves: BTreeMap<&str, [Option<&Tensor>; 2]> = BTreeMap::new();
        let mut faults = Vec::new();
        for (name, tensor) in parameters {
            let half = (0..2).find_map(|half| Some((half, name.strip_suffix(HALVES[half])?)));
            let module = half.and_then(|(half, rest)| Some((half, rest.strip_prefix(PREFIX)?)));
            match module.filter(|(_, module)| linears.contains_key(*module)) {
                Some((half, module)) => halves.entry(module).or_default()[half] = Some(tensor),
                None => faults.push(format!("{name} belongs to no linear layer of the model")),
            }
        }
        let mut pairs = Vec::with_capacity(halves.len());
        for (module, halves) in halves {
            let [rows, columns] = linears[module];
            let [Some(down), Some(up)] = halves else {
                let missing = HALVES[usize::from(halves[0].is_some())];
                faults.push(format!("{PREFIX}{module}{missing} is missing"));
                continue;
            };
            let (down_size, up_size) = (down.size(), up.size());
            let fits = matches!(
                (&down_size[..], &up_size[..]),
                ([rank, width], [height, same])
                    if *rank > 0 && rank == same && *width == columns && *height == rows
            );
            if !fits {
                faults.push(format!(
                    "the pair of {module} has shapes {down_size:?} and {up_size:?}, expected \
                     [r, {columns}] and [{rows}, r]"
                ));
                continue;
            }
            pairs.push((module.to_owned(), (down.f_detach()?, up.f_detach()?, 1.0)));
        }
        if !faults.is_empty() {
            bail!("the adapter does not fit the model: {}", faults.join("; "));
        }
        ensure!(!pairs.is_empty(), "the adapter holds no pair");
        Self::from_pairs(pairs, 0.0)
    }

    /// Pairs sorted by module name, as A, B and scale.
    fn from_pairs(pairs: Vec<(String, (Tensor, Tensor, f64))>, dropout: f64) -> Result<Self> {
        let pairs = (0..)
            .zip(pairs)
            .map(|(index, (name, (down, up, scale)))| {
                let down = down.f_set_requires_grad(true)?;
                let up = up.f_set_requires_grad(true)?;
                Ok((name, Pair { down, up, scale, index }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { pairs: Rc::new(pairs), dropout })
    }

    /// The pair of a linear layer, by the layer's name in the model.
    pub fn pair(&self, module: &str) -> Option<&Pair> {
        self.pairs.get(module)
    }

    /// Every pair by the name of its layer.
    pub fn pairs(&self) -> &BTreeMap<String, Pair> {
        &self.pairs
    }

    /// Names and handles of A and B of every pair, sorted by module: the leaves to train. They are named
    /// as in a file, but there the scale is folded into B.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let halves = |(module, pair): (&String, &Pair)| {
            let name = |half: usize| format!("{PREFIX}{module}{}", HALVES[half]);
            [(name(0), pair.down.shallow_clone()), (name(1), pair.up.shallow_clone())]
        };
        self.pairs.iter().flat_map(halves).collect()
    }

    /// A deep copy outside any graph, as a moving average needs it.
    ///
    /// # Errors
    /// If libtorch cannot allocate it.
    pub fn duplicate(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let copy = |tensor: &Tensor| Ok::<_, tch::TchError>(tensor.f_detach()?.copy());
        let pairs = self
            .pairs
            .iter()
            .map(|(name, pair)| {
                Ok((name.clone(), (copy(&pair.down)?, copy(&pair.up)?, pair.scale)))
            })
            .collect::<Result<_>>()?;
        Self::from_pairs(pairs, self.dropout)
    }
}
