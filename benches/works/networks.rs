//! The transformer, adapters, loading, the optimizer, and the whole training step of the default run.

use std::path::Path;

use anyhow::{Context, Result};
use decoupled_dmd::Shift;
use tch::{Device, Kind, Tensor};
use tch_training::lora::{Lora, LoraSettings};
use tch_training::{AdamW, AdamWSettings};
use zimage::distil::{Distillation, Preset, Recipe};
use zimage::emoji::EmojiData;
use zimage::model::{BLOCK_LINEARS, Pipeline};
use zimage::{Config, Role, ZImageTransformer};

use super::Work;

/// A pass over square latents and random captions of a model in a folder: see [`pass`].
pub fn transformer(
    folder: &str,
    batch: i64,
    size: i64,
    caption: i64,
    train: bool,
    device: Device,
) -> Result<Work> {
    let model = ZImageTransformer::load(Path::new(folder), Kind::Float, device)?;
    model.set_requires_grad(train)?;
    let parameter = model.parameters().get(SAMPLE).context(SAMPLE)?.shallow_clone();
    pass(model, None, parameter, batch, size, caption, train)
}

/// A pass of a random model of `layers` layers of `width` channels, with heads of 64 and patches of 2.
pub fn random_transformer(
    width: i64,
    layers: i64,
    batch: i64,
    size: i64,
    train: bool,
    options: (Kind, Device),
) -> Result<Work> {
    let model = random_model(width, layers, options)?;
    model.set_requires_grad(train)?;
    let parameter = model.parameters().get(SAMPLE).context(SAMPLE)?.shallow_clone();
    pass(model, None, parameter, batch, size, 32, train)
}

/// The gradient of an adapter of a random model as in [`random_transformer`].
pub fn adapter(width: i64, rank: i64, batch: i64, size: i64, device: Device) -> Result<Work> {
    let model = random_model(width, 4, (Kind::Float, device))?;
    let settings = LoraSettings { rank, alpha: rank as f64, ..LoraSettings::on(BLOCK_LINEARS) };
    let lora = Lora::new(&model.config().linears(), &settings, device)?;
    let trained = lora.parameters();
    let first = trained.iter().map(|(_, tensor)| tensor.shallow_clone()).next();
    for (_, tensor) in trained {
        let _ = tensor.f_set_requires_grad(true)?;
    }
    pass(model, Some(lora), first.context("a pair")?, batch, size, 32, true)
}

/// The parameter whose gradient is answered.
const SAMPLE: &str = "layers.0.attention.to_q.weight";

/// A forward pass; with `train`, the gradient of its mean square in all that requires one too.
fn pass(
    model: ZImageTransformer,
    lora: Option<Lora>,
    parameter: Tensor,
    batch: i64,
    size: i64,
    caption: i64,
    train: bool,
) -> Result<Work> {
    let config = model.config().clone();
    let options = (model.kind(), model.device());
    tch::manual_seed(0);
    let latents = Tensor::f_randn([batch, config.in_channels, size, size], options)?;
    let time = Tensor::f_rand([batch], (Kind::Float, model.device()))?;
    let captions: Vec<Tensor> = (0..batch)
        .map(|_| Tensor::f_randn([caption, config.cap_feat_dim], options))
        .collect::<Result<_, _>>()?;
    Ok(Box::new(move || {
        let role = lora.as_ref().map_or(Role::BASE, Role::training);
        if !train {
            let _guard = tch::no_grad_guard();
            return Ok(vec![model.forward(&latents, &time, &captions, role)?]);
        }
        let trained = lora.as_ref().map(Lora::parameters);
        for mut tensor in
            trained.unwrap_or_else(|| model.named_parameters()).into_iter().map(|p| p.1)
        {
            tensor.zero_grad();
        }
        let output = model.forward(&latents, &time, &captions, role)?;
        output.f_square()?.f_mean(None::<Kind>)?.f_backward()?;
        Ok(vec![output.f_detach()?, parameter.f_grad()?])
    }))
}

fn random_model(width: i64, layers: i64, options: (Kind, Device)) -> Result<ZImageTransformer> {
    let config = Config {
        dim: width,
        n_layers: layers,
        n_refiner_layers: 1,
        n_heads: width / 64,
        n_kv_heads: width / 64,
        cap_feat_dim: 256,
        axes_dims: vec![16, 24, 24],
        axes_lens: vec![256, 64, 64],
        ..Config::default()
    };
    tch::manual_seed(0);
    let parameters = config
        .parameters()
        .into_iter()
        .map(|(name, shape)| Ok((name, Tensor::f_randn(&shape, options)?.f_mul_scalar_(0.02)?)))
        .collect::<Result<_>>()?;
    ZImageTransformer::from_parameters(config, parameters)
}

/// Reading the weights of the model in a folder.
pub fn loading(folder: &str, device: Device) -> Work {
    let folder = folder.to_owned();
    Box::new(move || {
        let model = ZImageTransformer::load(Path::new(&folder), Kind::Float, device)?;
        Ok(vec![model.parameters().get(SAMPLE).context(SAMPLE)?.shallow_clone()])
    })
}

/// A step of AdamW over so many tensors, half of them matrices of 384 x 256 and half vectors of 256,
/// with clipping of the gradient.
pub fn adamw(tensors: usize, device: Device) -> Result<Work> {
    let options = (Kind::Float, device);
    tch::manual_seed(0);
    let parameters = (0..tensors)
        .map(|index| {
            let shape = if index % 2 == 0 { vec![384, 256] } else { vec![256] };
            let parameter = Tensor::f_randn(&shape, options)?.f_set_requires_grad(true)?;
            let gradient = Tensor::f_randn(&shape, options)?;
            // The gradient of this sum.
            parameter.f_mul(&gradient)?.f_sum(None::<Kind>)?.f_backward()?;
            Ok((format!("{index:03}"), parameter))
        })
        .collect::<Result<Vec<_>>>()?;
    let first = parameters.first().context("at least one tensor")?.1.f_detach()?;
    let before = first.copy();
    let settings = AdamWSettings { max_gradient_norm: Some(1.0), ..AdamWSettings::default() };
    let mut optimizer = AdamW::new(parameters, settings)?;
    Ok(Box::new(move || {
        let norm = optimizer.step()?;
        Ok(vec![norm, first.f_sub(&before)?])
    }))
}

/// An update of the student with the rollout and the updates of the fake score that go with it; the
/// recipe is the default but for the batch and the student's steps.
pub fn training_step(batch: usize, steps: usize, device: Device) -> Result<Work> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets");
    let Pipeline { transformer, shift } =
        Pipeline::load(&assets.join("teacher"), Kind::Float, device)?;
    let data = EmojiData::load(&assets.join("emoji"))?;
    let captions = data.items.iter().map(|item| item.caption.as_str());
    // They live as long as the process.
    let teacher: &'static _ = Box::leak(Box::new(transformer));
    let prompts = data.vocabulary.encode_prompts(teacher, captions)?;
    let prompts: &'static _ = Box::leak(Box::new(prompts));
    let (_, channels, height, width) = data.images.size4()?;
    let recipe = Recipe { batch, steps, ..Preset::Embedded.recipe(Shift::new(shift.get())?)? };
    let size = [channels, height, width];
    let indices = data.indices(false);
    let mut distillation = Distillation::new(recipe, teacher, prompts, &indices, size)?;
    Ok(Box::new(move || {
        let _record = distillation.step(false)?;
        Ok(Vec::new())
    }))
}
