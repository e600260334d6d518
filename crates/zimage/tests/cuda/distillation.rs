//! Updates of a distillation, which wait for the device once each.

use anyhow::Result;
use decoupled_dmd::{
    Denoiser, DistributionMatching, Draw, Group, Objective, Renoising, Shift, Steps, Uniform,
};
use tch::{Device, Kind, Tensor};
use tch_training::lora::LoraSettings;
use zimage::Role;
use zimage::distil::{Distillation, Preset, Recipe, Record, Rollout, Terms};
use zimage::emoji::Vocabulary;
use zimage::model::BLOCK_LINEARS;

use crate::common::workspace;
use crate::device::{compare, drawn, waits};
use crate::teacher;

/// Of one sample.
const SIZE: [i64; 3] = [3, 16, 16];
/// How far numbers and weights may be from the CPU's after four updates. A new adapter is as small as a step of Adam,
/// whose size is that of the learning rate and not of the gradient, so that rounding shows; the two devices choose
/// other kernels of attention.
const FLOAT32: f64 = 1e-3;
const BFLOAT16: f64 = 0.5;
/// A caption longer than the others, and so of a bucket of its own.
const LONG: usize = 12;

fn recipe(fake_updates: u64) -> Recipe {
    let mut recipe = Preset::Embedded.recipe(Shift::new(3.0).unwrap()).unwrap();
    recipe.steps = 4;
    recipe.updates = 4;
    (recipe.fake_updates, recipe.fake_warmup, recipe.warmup) = (fake_updates, 1, 1);
    recipe.batch = 4;
    (recipe.student.learning_rate, recipe.fake.learning_rate) = (1e-3, 1e-3);
    (recipe.ema, recipe.seed) = (0.5, 7);
    recipe
}

fn adapter(dropout: f64) -> Option<LoraSettings> {
    Some(LoraSettings { rank: 2, alpha: 4.0, dropout, ..LoraSettings::on(BLOCK_LINEARS) })
}

/// The numbers of four updates, the last one after the state went through the CPU, and the student.
fn train(device: Device, kind: Kind, recipe: Recipe) -> Result<Vec<Tensor>> {
    let teacher = teacher(device, kind)?;
    let vocabulary = Vocabulary::load(&workspace("assets/emoji"))?;
    let long = "google cat face ".repeat(LONG);
    let captions = ["google cat face", "twitter pizza", long.as_str()];
    let prompts = vocabulary.encode_prompts(&teacher, captions.into_iter())?;
    let mut distillation = Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], SIZE)?;
    distillation.warm_up()?;
    // The rotary tables of all lengths, which go to the device once.
    for item in 0..3 {
        let (cond, _) = prompts.conditions(&[item])?;
        let x = Tensor::zeros([1, 3, 16, 16], (Kind::Float, device));
        let t = Tensor::zeros([1], (Kind::Float, device));
        let _table = teacher.forward_encoded(&x, &t, &cond[0], Role::BASE)?;
    }
    let mut distillation = distillation.with_data_variance(0.3);
    let mut records: Vec<Record> = Vec::new();
    for observe in [false, true, false] {
        records.push(waits(device, "an update", 1, || distillation.step(observe))?);
    }
    let state = distillation.state();
    for (name, tensor) in &state {
        let is_count = tensor.numel() == 1;
        assert!(is_count || tensor.device() == device, "{name} is on {:?}", tensor.device());
    }
    let saved =
        state.into_iter().map(|(name, tensor)| (name, tensor.to_device(Device::Cpu).copy()));
    distillation.load_state(&saved.collect())?;
    records.push(distillation.step(true)?);
    let numbers: Vec<f64> = records.iter().flatten().map(|(_, value)| *value).collect();
    assert!(numbers.iter().all(|number| number.is_finite()), "{records:?}");
    let student = distillation.student_weights().role.parameters();
    let mut results = vec![Tensor::from_slice(&numbers).to_device(device)];
    results.extend(student.into_iter().map(|(_, tensor)| tensor.detach()));
    Ok(drawn(results))
}

#[test]
fn whole_weights() {
    // The number of waits does not grow with the updates of the fake score.
    for fake_updates in [1, 3] {
        compare(&format!("{fake_updates} updates of the fake score"), FLOAT32, |on| {
            train(on, Kind::Float, recipe(fake_updates))
        });
    }
}

#[test]
fn adapters() {
    compare("adapters", FLOAT32, |on| {
        train(on, Kind::Float, Recipe { adapter: adapter(0.0), ..recipe(2) })
    });
    compare("adapters with dropout and checkpointing", FLOAT32, |on| {
        let recipe = recipe(2);
        train(on, Kind::Float, Recipe { adapter: adapter(0.5), checkpointing: true, ..recipe })
    });
}

#[test]
fn adapters_in_bfloat16() {
    compare("adapters in bfloat16 with checkpointing", BFLOAT16, |on| {
        let recipe = recipe(2);
        train(on, Kind::BFloat16, Recipe { adapter: adapter(0.0), checkpointing: true, ..recipe })
    });
}

/// Distribution matching at draws that the terms give.
struct Given;

impl Terms for Given {
    fn objective<'o>(
        &'o self,
        teacher: Denoiser<'o>,
        dm: Option<&'o DistributionMatching<'o>>,
    ) -> Result<Objective<'o>> {
        let group = Group::new(Renoising::new(Uniform::FULL));
        Ok(Objective::new(teacher).with(group.regularizer("dm", 1.0, dm.expect("a fake score"))))
    }

    fn draw(&self, rollout: &Rollout<'_>, steps: &Steps) -> Result<Option<Draw>> {
        let (input, start) = rollout.trajectory.inputs_at(steps)?;
        let u = start.tensor().f_add(&start.tensor().f_rand_like()?.f_mul_scalar(0.2)?)?;
        Ok(Some(Draw { u, noise: input.f_randn_like()? }))
    }
}

#[test]
fn given_draws() {
    const FAKE_UPDATES: usize = 2;
    compare("given draws", FLOAT32, |on| -> Result<Vec<Tensor>> {
        let teacher = teacher(on, Kind::Float)?;
        let vocabulary = Vocabulary::load(&workspace("assets/emoji"))?;
        let prompts = vocabulary.encode_prompts(&teacher, ["google cat face"].into_iter())?;
        let recipe = recipe(FAKE_UPDATES as u64);
        let mut distillation =
            Distillation::with_terms(recipe, &teacher, &prompts, &[0], SIZE, Given)?;
        distillation.warm_up()?;
        let _first = distillation.step(true)?;
        // Each draw is looked at, the student's and those of the fake score.
        let waiting = 1 + 1 + FAKE_UPDATES;
        let record = waits(on, "an update", waiting, || distillation.step(true))?;
        let numbers: Vec<f64> = record.iter().map(|(_, value)| *value).collect();
        let student = distillation.student_weights().role.parameters();
        let mut results = vec![Tensor::from_slice(&numbers).to_device(on)];
        results.extend(student.into_iter().map(|(_, tensor)| tensor.detach()));
        Ok(drawn(results))
    });
}
