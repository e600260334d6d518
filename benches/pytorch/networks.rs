//! The transformer, the optimizer, and the whole training step of the default run.

use std::path::Path;

use anyhow::{Context, Result};
use decoupled_dmd::Shift;
use tch::{Device, Kind, Tensor};

use super::Work;
use super::zimage::ZImageTransformer;
use super::zimage::data::EmojiData;
use super::zimage::distillation::Distillation;
use super::zimage::lora::Role;
use super::zimage::optimizer::{AdamW, AdamWSettings};
use super::zimage::pipeline::Pipeline;
use super::zimage::prompts::Prompts;
use super::zimage::recipe::{Preset, Recipe};

const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A forward pass over square latents and random captions; with `train`, the gradient of its mean
/// square in all parameters too.
pub fn transformer(folder: &str, batch: i64, size: i64, caption: i64, train: bool) -> Result<Work> {
    let model = ZImageTransformer::load(Path::new(folder), Kind::Float, Device::Cpu)?;
    let config = model.config().clone();
    tch::manual_seed(0);
    let latents = Tensor::f_randn([batch, config.in_channels, size, size], OPTIONS)?;
    let time = Tensor::f_rand([batch], OPTIONS)?;
    let captions: Vec<Tensor> = (0..batch)
        .map(|_| Tensor::f_randn([caption, config.cap_feat_dim], OPTIONS))
        .collect::<Result<_, _>>()?;
    model.set_requires_grad(train)?;
    Ok(Box::new(move || {
        if !train {
            let _guard = tch::no_grad_guard();
            return Ok(vec![model.forward(&latents, &time, &captions, Role::BASE)?]);
        }
        for mut parameter in model.parameters().values().map(Tensor::shallow_clone) {
            parameter.zero_grad();
        }
        let output = model.forward(&latents, &time, &captions, Role::BASE)?;
        output.f_square()?.f_mean(None::<Kind>)?.f_backward()?;
        let name = "layers.0.attention.to_q.weight";
        let gradient = model.parameters().get(name).context(name)?.f_grad()?;
        Ok(vec![output.f_detach()?, gradient])
    }))
}

/// A step of AdamW over so many tensors, half of them matrices of 384 x 256 and half vectors of 256,
/// with clipping of the gradient.
pub fn adamw(tensors: usize) -> Result<Work> {
    tch::manual_seed(0);
    let parameters = (0..tensors)
        .map(|index| {
            let shape = if index % 2 == 0 { vec![384, 256] } else { vec![256] };
            let parameter = Tensor::f_randn(&shape, OPTIONS)?.f_set_requires_grad(true)?;
            let gradient = Tensor::f_randn(&shape, OPTIONS)?;
            // The gradient of this sum.
            parameter.f_mul(&gradient)?.f_sum(None::<Kind>)?.f_backward()?;
            Ok((format!("{index:03}"), parameter))
        })
        .collect::<Result<Vec<_>>>()?;
    let first = parameters.first().context("at least one tensor")?.1.shallow_clone();
    let settings = AdamWSettings { max_gradient_norm: Some(1.0), ..AdamWSettings::default() };
    let mut optimizer = AdamW::new(parameters, settings)?;
    Ok(Box::new(move || {
        let norm = optimizer.step()?;
        Ok(vec![norm, first.f_detach()?])
    }))
}

/// An update of the student with the rollout and the updates of the fake score that go with it; the
/// recipe is the default but for the batch and the student's steps.
pub fn training_step(batch: usize, steps: usize) -> Result<Work> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let Pipeline { transformer, shift } =
        Pipeline::load(&assets.join("teacher"), Kind::Float, Device::Cpu)?;
    let data = EmojiData::load(&assets.join("emoji"))?;
    let captions = data.items.iter().map(|item| item.caption.as_str());
    // They live as long as the process.
    let teacher: &'static _ = Box::leak(Box::new(transformer));
    let prompts = Prompts::encode(teacher, &data.vocabulary, captions)?;
    let prompts: &'static _ = Box::leak(Box::new(prompts));
    let (_, channels, height, width) = data.images.size4()?;
    let recipe = Recipe { batch, steps, ..Preset::Embedded.recipe(Shift::new(shift.get())?)? };
    let size = [channels, height, width];
    let indices = data.indices(false);
    let mut distillation = Distillation::new(recipe, teacher, prompts, &indices, size, None)?;
    Ok(Box::new(move || {
        let _record = distillation.step(false)?;
        Ok(Vec::new())
    }))
}
