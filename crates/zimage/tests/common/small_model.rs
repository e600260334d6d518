//! A small transformer with known parameters, for the tests of adapters and checkpointing.

use anyhow::Result;
use tch::{Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::{Lora, LoraSettings};
use zimage::model::BLOCK_LINEARS;
use zimage::{Config, Role, ZImageTransformer};

use super::narrow::narrow;
use super::wave;

/// Four blocks.
pub fn config() -> Config {
    Config { n_layers: 2, ..narrow() }
}

/// A model whose parameters are waves of a size at which every part matters.
pub fn model(kind: Kind) -> Result<ZImageTransformer> {
    let config = config();
    let parameters = config
        .parameters()
        .into_iter()
        .enumerate()
        .map(|(k, (name, shape))| {
            let values = wave(&shape, 0.9 * k as f64, Kind::Float);
            let tensor = match shape[..] {
                [_, columns] => values / (columns as f64).sqrt(),
                _ if name.ends_with("bias") => values * 0.1,
                _ => values * 0.1 + 1.0,
            };
            (name, tensor.to_kind(kind))
        })
        .collect();
    ZImageTransformer::from_parameters(config, parameters)
}

/// Rank 3 on the seven linear layers of every block, at twice the plain scale.
pub fn settings() -> LoraSettings {
    LoraSettings { rank: 3, alpha: 6.0, ..LoraSettings::on(BLOCK_LINEARS) }
}

/// Fills B, so that the adapter acts.
pub fn fill(lora: &Lora) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for pair in lora.pairs().values() {
        let _ = pair.up.shallow_clone().f_normal_(0.0, 0.1)?;
    }
    Ok(())
}

/// A batch of two.
pub struct Inputs {
    pub latents: Tensor,
    pub t: Tensor,
    pub captions: [Tensor; 2],
}

pub fn inputs() -> Inputs {
    Inputs {
        latents: wave(&[2, 4, 4, 6], 0.3, Kind::Float),
        t: Tensor::from_slice(&[0.25f32, 0.9]),
        captions: [wave(&[5, 8], 0.0, Kind::Float), wave(&[5, 8], 1.0, Kind::Float)],
    }
}

impl Inputs {
    pub fn run(&self, model: &ZImageTransformer, role: Role<'_>) -> Result<Tensor> {
        // In the model's dtype, so that double precision is not lost at the output.
        model.forward(&self.latents.to_kind(model.kind()), &self.t, &self.captions, role)
    }
}

/// All linear layers of the model, those outside the blocks included.
pub fn every_linear() -> LoraSettings {
    let targets = config().linears().into_iter().map(|(name, _)| name).collect();
    LoraSettings { targets, ..settings() }
}

/// The model with `W + scale B A` for weights.
pub fn merged_by_hand(model: &ZImageTransformer, lora: &Lora) -> Result<ZImageTransformer> {
    let _guard = tch::no_grad_guard();
    let mut parameters: Parameters = model.duplicate()?.named_parameters().into_iter().collect();
    for (module, pair) in lora.pairs() {
        let weight = parameters.get_mut(&format!("{module}.weight")).expect("a linear layer");
        *weight += (pair.up.matmul(&pair.down) * pair.scale).to_kind(weight.kind());
    }
    ZImageTransformer::from_parameters(model.config().clone(), parameters)
}

/// The adapter with its tensors in float64 and the scale folded in.
pub fn double(lora: &Lora) -> Result<Lora> {
    let _guard = tch::no_grad_guard();
    let scales: Vec<f64> = lora.pairs().values().flat_map(|pair| [1.0, pair.scale]).collect();
    let parameters = lora
        .parameters()
        .into_iter()
        .zip(scales)
        .map(|((name, tensor), scale)| (name, tensor.to_kind(Kind::Double) * scale))
        .collect();
    Ok(Lora::from_parameters(&config().linears(), &parameters)?)
}
