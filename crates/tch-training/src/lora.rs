//! Low-rank adaptation (Hu et al., arXiv 2106.09685): trained pairs beside the frozen linear layers of a model.
//!
//! A model calls [`Lora::add_to`] behind each of its linear layers, by the layer's name. Any number of adapters
//! can share one model, which none of them changes.
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use tch_training::lora::{Dropout, Lora, LoraSettings};
//!
//! # fn main() -> tch_training::Result<()> {
//! let options = (Kind::Float, Device::Cpu);
//! let weight = Tensor::f_ones([2, 3], options)?; // of the layer "blocks.0.out", frozen
//! let layers = vec![("blocks.0.out".to_owned(), [2, 3])];
//! let settings = LoraSettings { rank: 1, alpha: 1.0, ..LoraSettings::on(["out"]) };
//! let lora = Lora::new(&layers, &settings, Device::Cpu)?;
//!
//! let x = Tensor::f_ones([4, 3], options)?;
//! let plain = x.f_linear(&weight, None::<&Tensor>)?;
//! let adapted = lora.add_to(plain.copy(), "blocks.0.out", &x, Dropout::Off)?;
//! assert_eq!(adapted, plain); // B starts at zero
//! adapted.f_sum(Kind::Float)?.f_backward()?;
//! assert!(lora.parameters().iter().all(|(_, leaf)| leaf.grad().defined()));
//! # Ok(())
//! # }
//! ```

mod file;
mod joining;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

pub use names::LayerNames;

use crate::error::{Error, Fault, Result};
use crate::number::times;
use crate::parameters::{Parameters, no_faults};

/// Endings of the names of A and B.
const HALVES: [&str; 2] = [".lora_A.weight", ".lora_B.weight"];

/// Far beyond any use, and small enough that sizes do not overflow.
const LARGEST_RANK: i64 = 65_536;

/// Name and shape `[out, in]` of a linear layer.
pub type LinearLayer = (String, [i64; 2]);

/// What stands before the last parts of a layer's name, up to the dot: `layers.3.` where `attention.to_q` ends
/// `layers.3.attention.to_q`, and nothing where the parts are the whole name; `None` where the name ends otherwise.
pub fn stem<'n>(name: &'n str, parts: &str) -> Option<&'n str> {
    name.strip_suffix(parts).filter(|stem| stem.is_empty() || stem.ends_with('.'))
}

/// Shape and extent of an adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
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

impl LoraSettings {
    /// Rank and alpha 64 without dropout on some layers.
    pub fn on<S: Into<String>>(targets: impl IntoIterator<Item = S>) -> Self {
        let targets = targets.into_iter().map(Into::into).collect();
        Self { rank: 64, alpha: 64.0, targets, dropout: 0.0 }
    }

    /// Those of a model's linear layers that are to be adapted, sorted by name.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for a number or an empty list of targets, [`Error::NoSuchTarget`] if a target
    /// names no layer.
    pub fn adapted(&self, layers: &[LinearLayer]) -> Result<Vec<LinearLayer>> {
        let check = |what, requirement, found: String, fits: bool| {
            if fits { Ok(()) } else { Err(Error::OutOfRange { what, requirement, found }) }
        };
        let Self { rank, alpha, dropout, .. } = *self;
        let is_rank = (1..=LARGEST_RANK).contains(&rank);
        check("rank", "from 1 to 65536", rank.to_string(), is_rank)?;
        check("alpha", "positive", alpha.to_string(), alpha.is_finite() && alpha > 0.0)?;
        check("dropout", "in [0, 1)", dropout.to_string(), (0.0..1.0).contains(&dropout))?;
        let is_named = !self.targets.is_empty();
        check("targets", "at least one linear layer", "none".to_owned(), is_named)?;
        let mut found = BTreeSet::new();
        for target in &self.targets {
            let matching: Vec<_> =
                layers.iter().filter(|(name, _)| stem(name, target).is_some()).cloned().collect();
            if matching.is_empty() {
                return Err(Error::NoSuchTarget { target: target.clone() });
            }
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
    /// What the product is multiplied by.
    pub scale: f64,
}

impl Pair {
    /// `scale * B A`, `[out, in]`.
    fn update(&self) -> Result<Tensor> {
        Ok(times(&self.up.f_matmul(&self.down)?, self.scale)?)
    }
}

/// Whether a pass is one of training, in which a share of the inputs of each pair is zeroed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dropout {
    /// As [`LoraSettings::dropout`] says; the masks are drawn from libtorch's global generator.
    On,
    /// Nothing is zeroed.
    Off,
}

/// Low-rank pairs for some of the linear layers of a model. A clone shares the tensors.
#[derive(Clone, Debug)]
pub struct Lora {
    pairs: Rc<BTreeMap<String, Pair>>,
    dropout: f64,
}

impl Lora {
    /// A new adapter that leaves the model as it is: A is random, drawn from libtorch's global generator, B
    /// zero. Both are trainable leaves in float32, whatever the model's dtype.
    ///
    /// # Errors
    /// As [`LoraSettings::adapted`], [`Error::Torch`] if the pairs cannot be allocated.
    pub fn new(layers: &[LinearLayer], settings: &LoraSettings, device: Device) -> Result<Self> {
        let options = (Kind::Float, device);
        let scale = settings.alpha / settings.rank as f64;
        let pairs = settings
            .adapted(layers)?
            .into_iter()
            .map(|(name, [rows, columns])| {
                // As peft: uniform with the variance that a linear layer's own weights start with.
                let bound = 1.0 / (columns as f64).sqrt();
                let down = Tensor::f_empty([settings.rank, columns], options)?
                    .f_uniform_(-bound, bound)?;
                let up = Tensor::f_zeros([rows, settings.rank], options)?;
                Ok((name, Pair { down, up, scale }))
            })
            .collect::<Result<Vec<_>>>()?;
        Self::from_pairs(pairs, settings.dropout)
    }

    /// An adapter over tensors as [`Self::parameters`] names them, in whatever float dtype they have,
    /// with a scale of 1 and no dropout. They are made trainable leaves that share storage with those
    /// given.
    ///
    /// # Errors
    /// [`Error::Tensors`] with the names that belong to no layer, pairs of which one half is missing, and
    /// shapes that do not fit; [`Error::EmptyAdapter`] if there is none.
    pub fn from_parameters(layers: &[LinearLayer], parameters: &Parameters) -> Result<Self> {
        let layers: BTreeMap<&str, [i64; 2]> =
            layers.iter().map(|(name, shape)| (name.as_str(), *shape)).collect();
        let mut halves: BTreeMap<&str, [Option<&Tensor>; 2]> = BTreeMap::new();
        let mut faults = Vec::new();
        for (name, tensor) in parameters {
            let half = (0..2).find_map(|half| Some((half, name.strip_suffix(HALVES[half])?)));
            match half.filter(|(_, layer)| layers.contains_key(layer)) {
                Some((half, layer)) => halves.entry(layer).or_default()[half] = Some(tensor),
                None => faults.push(Fault::NoSuchLayer { name: name.clone() }),
            }
        }
        let mut pairs = Vec::with_capacity(halves.len());
        for (layer, halves) in halves {
            let [outputs, inputs] = layers[layer];
            let [Some(down), Some(up)] = halves else {
                let missing = HALVES[usize::from(halves[0].is_some())];
                faults.push(Fault::Missing { name: format!("{layer}{missing}") });
                continue;
            };
            let fits = matches!(
                (&down.size()[..], &up.size()[..]),
                ([rank, width], [height, same])
                    if *rank > 0 && rank == same && *width == inputs && *height == outputs
            );
            if !fits {
                let (down, up) = (down.size(), up.size());
                faults.push(Fault::Pair { layer: layer.to_owned(), down, up, inputs, outputs });
                continue;
            }
            let pair = Pair { down: down.f_detach()?, up: up.f_detach()?, scale: 1.0 };
            pairs.push((layer.to_owned(), pair));
        }
        no_faults("the adapter", faults)?;
        if pairs.is_empty() {
            return Err(Error::EmptyAdapter);
        }
        Self::from_pairs(pairs, 0.0)
    }

    /// Pairs sorted by layer, which are made leaves.
    fn from_pairs(pairs: Vec<(String, Pair)>, dropout: f64) -> Result<Self> {
        let leaf = |tensor: Tensor| tensor.f_set_requires_grad(true);
        let pairs = pairs
            .into_iter()
            .map(|(name, Pair { down, up, scale })| {
                Ok((name, Pair { down: leaf(down)?, up: leaf(up)?, scale }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { pairs: Rc::new(pairs), dropout })
    }

    /// The pair of a linear layer, by the layer's name in the model.
    pub fn pair(&self, layer: &str) -> Option<&Pair> {
        self.pairs.get(layer)
    }

    /// Every pair by the name of its layer.
    pub fn pairs(&self) -> &BTreeMap<String, Pair> {
        &self.pairs
    }

    /// Whether a pass with [`Dropout::On`] draws random numbers.
    pub fn has_dropout(&self) -> bool {
        self.dropout > 0.0
    }

    /// Names and handles of A and B of every pair, `{layer}.lora_A.weight` and `{layer}.lora_B.weight`, sorted
    /// by layer: the leaves to train.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let halves = |(layer, pair): (&String, &Pair)| {
            let name = |half: usize| format!("{layer}{}", HALVES[half]);
            [(name(0), pair.down.shallow_clone()), (name(1), pair.up.shallow_clone())]
        };
        self.pairs.iter().flat_map(halves).collect()
    }

    /// `output + scale * x A^T B^T` of the pair of `layer`, computed in the dtype of `x`; `output` itself where
    /// the layer has no pair.
    ///
    /// # Shapes
    /// x `[.., in]`, output `[.., out]`. The sum is taken in place: nothing else may read `output` in a
    /// backward pass.
    ///
    /// # Errors
    /// [`Error::Torch`] if the shapes do not fit.
    pub fn add_to(
        &self,
        mut output: Tensor,
        layer: &str,
        x: &Tensor,
        dropout: Dropout,
    ) -> Result<Tensor> {
        let Some(pair) = self.pair(layer) else { return Ok(output) };
        // The pair is cast to the stream's dtype and not the stream to the pair's: float32 copies of
        // the activations would be the largest item of the memory of training.
        let kind = x.f_kind()?;
        let none = None::<&Tensor>;
        let down = pair.down.f_to_kind(kind)?;
        let mut hidden = if dropout == Dropout::On && self.has_dropout() {
            x.f_dropout(self.dropout, true)?.f_linear(&down, none)?
        } else {
            x.f_linear(&down, none)?
        };
        if pair.scale != 1.0 {
            hidden = times(&hidden, pair.scale)?;
        }
        Ok(output.f_add_(&hidden.f_linear(&pair.up.f_to_kind(kind)?, none)?)?)
    }

    /// A copy outside any graph that is not trained, in a dtype and on a device of its own, its update `strength` times
    /// as large.
    ///
    /// # Errors
    /// [`Error::Torch`] if it cannot be allocated.
    pub fn frozen(&self, strength: f64, kind: Kind, device: Device) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let pairs = self
            .pairs()
            .iter()
            .map(|(name, Pair { down, up, scale })| {
                let up = times(up, scale * strength)?.f_to_kind(kind)?.f_to_device(device)?;
                let down = down.f_detach()?.f_to_kind(kind)?.f_to_device(device)?;
                Ok((name.clone(), Pair { down, up, scale: 1.0 }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { pairs: Rc::new(pairs), dropout: 0.0 })
    }

    /// What no element of an update exceeds: the largest over the pairs of `scale * sum_r max |A_r| max |B_r|` with the
    /// rows of A and the columns of B. It may be infinite or NaN where tensors are not finite.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn bound(&self) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let largest = |tensor: &Tensor, over: i64| {
            tensor.f_to_kind(Kind::Double)?.f_abs()?.f_amax([over].as_slice(), false)
        };
        let bounds = self.pairs().values().map(|Pair { down, up, scale }| {
            let sum = largest(down, 1)?.f_mul(&largest(up, 0)?)?.f_sum(Kind::Double)?;
            Ok(scale.abs() * f64::try_from(&sum)?)
        });
        // NaN is kept, which `f64::max` drops.
        let larger =
            |bound: f64, next: f64| if bound.is_nan() || bound > next { bound } else { next };
        Ok(bounds.collect::<Result<Vec<_>>>()?.into_iter().fold(0.0, larger))
    }

    /// A deep copy outside any graph, as a moving average needs it.
    ///
    /// # Errors
    /// [`Error::Torch`] if it cannot be allocated.
    pub fn duplicate(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let copy = Tensor::f_detach_copy;
        let pairs = self
            .pairs
            .iter()
            .map(|(name, pair)| {
                let (down, up) = (copy(&pair.down)?, copy(&pair.up)?);
                Ok((name.clone(), Pair { down, up, scale: pair.scale }))
            })
            .collect::<Result<_>>()?;
        Self::from_pairs(pairs, self.dropout)
    }
}
