//! The networks and updates of the trainer, with their allocations failing in turn: on a GPU a batch that is too large
//! is to end with advice.

#[path = "../../../../tests/bad_input/out_of_memory/failing.rs"]
#[allow(dead_code, reason = "the library's tests use the rest")]
mod failing;

use anyhow::Result;
use decoupled_dmd::Shift;
use failing::allocations_may_fail;
use tch::{Device, Kind, Tensor};
use tch_training::ema::update_average;
use tch_training::lora::{Dropout, Lora, LoraSettings};
use tch_training::{AdamW, AdamWSettings};
use zimage::autoencoder::Decoder;
use zimage::distil::{Distillation, Preset};
use zimage::failure::is_out_of_memory;
use zimage::model::{BLOCK_LINEARS, Storage};
use zimage::text::TextEncoder;
use zimage::{Role, ZImageTransformer};

use super::common::small_model::{Inputs, fill, inputs, model, settings};
use super::common::small_pipeline::Workplace;
use super::common::{seeded, tiny, wave};

fn fails<T>(name: &str, compute: impl FnMut() -> Result<T>) {
    allocations_may_fail(name, 1, compute);
}

/// A forward pass and a backward pass of an adapter.
fn passes(model: &ZImageTransformer, lora: &Lora, inputs: &Inputs) -> Result<Vec<Tensor>> {
    let role = Role::adapted(lora);
    let kind = model.kind();
    let output =
        model.forward(&inputs.latents.f_to_kind(kind)?, &inputs.t, &inputs.captions, role)?;
    let leaves: Vec<Tensor> = lora.parameters().into_iter().map(|(_, leaf)| leaf).collect();
    Ok(Tensor::f_run_backward(&[output.f_mean(Kind::Float)?], &leaves, false, false)?)
}

#[test]
fn passes_of_the_transformer() -> Result<()> {
    let _guard = seeded(1);
    // The blocks are alike: of all but one kind, some allocations of each.
    for (name, kind, storage, every) in [
        ("float32", Kind::Float, Storage::Full, 1),
        ("bfloat16", Kind::BFloat16, Storage::Full, 7),
        ("int8", Kind::Float, Storage::Int8, 7),
    ] {
        let model = model(kind)?.stored(storage)?;
        let lora = Lora::new(&model.config().linears(), &settings(), Device::Cpu)?;
        fill(&lora)?;
        let inputs = inputs();
        allocations_may_fail(name, every, || passes(&model, &lora, &inputs));
    }
    let whole = model(Kind::Float)?;
    fails("a copy of a model", || whole.duplicate());
    fails("8 bits of a model", || whole.stored(Storage::Int8));
    Ok(())
}

#[test]
fn adapters_averages_and_the_optimizer() -> Result<()> {
    let _guard = seeded(2);
    let layers = vec![("one".to_owned(), [6, 4])];
    let adapter = LoraSettings { rank: 2, alpha: 6.0, ..LoraSettings::on(["one"]) };
    let lora = Lora::new(&layers, &adapter, Device::Cpu)?;
    let x = wave(&[3, 4], 0.7, Kind::Float);
    let add = || -> Result<_> {
        Ok(lora.add_to(
            Tensor::f_zeros([3, 6], (Kind::Float, Device::Cpu))?,
            "one",
            &x,
            Dropout::Off,
        )?)
    };
    fails("a pair", add);
    fails("adapters joined", || {
        Ok(lora.joined(&lora)?.frozen(0.5, Kind::BFloat16, Device::Cpu)?)
    });
    fails("a bound", || Ok(lora.bound()?));
    let copy = lora.duplicate()?;
    fails("a copy", || Ok(lora.duplicate()?));
    fails("an average", || Ok(update_average(&copy.parameters(), &lora.parameters(), 0.9, 100)?));
    let settings = AdamWSettings { max_gradient_norm: Some(0.1), ..AdamWSettings::default() };
    let mut optimizer = AdamW::new(lora.parameters(), settings)?;
    add()?.f_square()?.f_mean(Kind::Float)?.f_backward()?;
    fails("a step of AdamW", || Ok(optimizer.step()?));
    Ok(())
}

#[test]
fn text_and_pictures() -> Result<()> {
    let place = Workplace::new()?;
    let decoder = Decoder::load(&place.model(), Kind::Float, Device::Cpu)?;
    let latents = wave(&[1, 4, 4, 4], 0.2, Kind::Float);
    fails("decoding", || decoder.decode(&latents));
    let encoder = TextEncoder::load(&place.model(), Kind::Float, Device::Cpu)?;
    fails("encoding a text", || encoder.encode(&["A red fox"]));
    Ok(())
}

/// Of the thousands of allocations of an update, some.
#[test]
fn updates_of_a_distillation() -> Result<()> {
    const EVERY: usize = 509;
    let _guard = seeded(3);
    let teacher = tiny::teacher()?;
    let prompts = tiny::prompts(&teacher)?;
    let mut recipe = Preset::Embedded.recipe(Shift::new(3.0)?)?;
    (recipe.steps, recipe.batch, recipe.accumulate) = (2, 2, 2);
    (recipe.fake_updates, recipe.fake_warmup, recipe.updates) = (1, 1, 1000);
    for (name, rank) in [("whole copies", None), ("adapters", Some(2))] {
        recipe.adapter = rank.map(|rank| LoraSettings { rank, ..LoraSettings::on(BLOCK_LINEARS) });
        recipe.checkpointing = rank.is_some();
        // What it is made of: copies of the teacher, or adapters; moments, and an average.
        let new = || Distillation::new(recipe.clone(), &teacher, &prompts, &[0, 1, 2], [3, 16, 16]);
        allocations_may_fail(&format!("networks of {name}"), 7, || new().map(drop));
        let mut distillation = new()?;
        distillation.warm_up()?;
        allocations_may_fail(&format!("an update of {name}"), EVERY, || {
            let record = distillation.step(true);
            assert!(record.as_ref().err().is_none_or(is_out_of_memory), "{record:?}");
            record
        });
    }
    Ok(())
}
