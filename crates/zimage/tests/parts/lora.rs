//! Low-rank adapters: three roles over one frozen model.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::lora::{Lora, LoraSettings};
use zimage::model::BLOCK_LINEARS;
use zimage::{Config, Role, ZImageTransformer};

use super::common::small_model::{
    config, double, every_linear, fill, inputs, merged_by_hand, model, settings,
};
use super::common::{assert_float64, assert_rounding, max_difference, seeded, value, wave};

#[test]
fn a_new_adapter_is_the_base_bit_for_bit() -> Result<()> {
    let _guard = seeded(1);
    let inputs = inputs();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let model = model(kind)?;
        let lora = Lora::new(&model.config().linears(), &settings(), Device::Cpu)?;
        let base = inputs.run(&model, Role::BASE)?;
        assert_eq!(inputs.run(&model, Role::adapted(&lora))?, base, "{kind:?}");
        fill(&lora)?;
        let moved = max_difference(&inputs.run(&model, Role::adapted(&lora))?, &base);
        assert!(moved > 1e-2, "{kind:?}: a filled adapter moves the output by {moved}");
        assert_eq!(inputs.run(&model, Role::BASE)?, base, "{kind:?}");
    }
    Ok(())
}

#[test]
fn an_adapter_equals_merged_weights() -> Result<()> {
    let _guard = seeded(2);
    let inputs = inputs();
    let model = model(Kind::Float)?;
    for settings in [settings(), every_linear()] {
        let lora = Lora::new(&model.config().linears(), &settings, Device::Cpu)?;
        fill(&lora)?;
        let base = inputs.run(&model, Role::BASE)?;
        let adapted = inputs.run(&model, Role::adapted(&lora))?;
        let merged = inputs.run(&merged_by_hand(&model, &lora)?, Role::BASE)?;
        assert!(max_difference(&adapted, &base) > 1e-2);

        let (model, lora) = (model.cast(Kind::Double)?, double(&lora)?);
        let exact = inputs.run(&model, Role::adapted(&lora))?;
        let what = format!("{} pairs", lora.pairs().len());
        assert_float64(&what, &inputs.run(&merged_by_hand(&model, &lora)?, Role::BASE)?, &exact);
        assert_rounding(&what, &adapted, &merged, &exact);
    }
    Ok(())
}

#[test]
fn bfloat16_base_trains_float32_pairs() -> Result<()> {
    let _guard = seeded(3);
    let inputs = inputs();
    let model = model(Kind::BFloat16)?;
    let lora = Lora::new(&model.config().linears(), &settings(), Device::Cpu)?;
    fill(&lora)?;
    let rough = inputs.run(&model, Role::adapted(&lora))?;
    let exact = inputs.run(&model.cast(Kind::Float)?, Role::adapted(&lora))?;
    let error = value(&((&rough - &exact).norm() / exact.norm()));
    assert!(error < 0.05, "relative error {error}");
    rough.to_kind(Kind::Float).square().sum(Kind::Float).backward();
    for (name, parameter) in lora.parameters() {
        assert_eq!(parameter.kind(), Kind::Float, "{name}");
        assert_eq!(parameter.grad().kind(), Kind::Float, "{name}");
        assert!(value(&parameter.grad().abs().sum(Kind::Float)) > 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn three_roles_share_one_frozen_base() -> Result<()> {
    let _guard = seeded(4);
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let before = model.duplicate()?;
    let address = |model: &ZImageTransformer| -> Vec<usize> {
        model.parameters().values().map(|tensor| tensor.data_ptr() as usize).collect()
    };
    let addresses = address(&model);
    let new = || Lora::new(&model.config().linears(), &settings(), Device::Cpu);
    let (student, fake) = (new()?, new()?);
    fill(&student)?;
    fill(&fake)?;
    let teacher_output = inputs.run(&model, Role::BASE)?;
    assert!(!teacher_output.requires_grad(), "the teacher's call records a graph");
    let student_output = inputs.run(&model, Role::adapted(&student))?;
    let fake_output = inputs.run(&model, Role::adapted(&fake))?;
    assert!(max_difference(&student_output, &fake_output) > 1e-2);

    (student_output - teacher_output).square().mean(Kind::Float).backward();
    for (name, parameter) in student.parameters() {
        assert!(value(&parameter.grad().abs().sum(Kind::Float)) > 0.0, "{name}");
    }
    for (name, parameter) in fake.parameters() {
        assert!(!parameter.grad().defined(), "the fake score's {name} has a gradient");
    }
    for (name, parameter) in model.named_parameters() {
        assert!(!parameter.requires_grad() && !parameter.grad().defined(), "{name}");
        assert_eq!(parameter, before.parameters()[&name], "{name}");
    }
    assert_eq!(address(&model), addresses);
    Ok(())
}

#[test]
fn gradients_equal_central_differences() -> Result<()> {
    let _guard = seeded(5);
    let inputs = inputs();
    let model = model(Kind::Double)?;
    let lora = Lora::new(&model.config().linears(), &every_linear(), Device::Cpu)?;
    fill(&lora)?;
    let lora = double(&lora)?;
    let loss = || -> Result<Tensor> {
        let output = inputs.run(&model, Role::adapted(&lora))?;
        let cotangent = wave(&output.size(), 0.4, Kind::Double);
        Ok((output * cotangent).sum(Kind::Double))
    };
    loss()?.backward();
    let mut checked = 0;
    for (name, parameter) in lora.parameters().into_iter().step_by(5) {
        // Along a direction that involves every entry.
        let direction = wave(&parameter.size(), 0.1, Kind::Double);
        let expected = value(&(parameter.grad() * &direction).sum(Kind::Double));
        let _no_grad = tch::no_grad_guard();
        let step = 1e-6;
        let mut leaf = parameter.shallow_clone();
        leaf += &direction * step;
        let above = value(&loss()?);
        leaf -= &direction * (2.0 * step);
        let found = (above - value(&loss()?)) / (2.0 * step);
        leaf += &direction * step;
        let error = (found - expected).abs() / expected.abs().max(1e-3);
        assert!(error < 1e-5, "{name}: {found} by differences, {expected} by autograd");
        checked += 1;
    }
    assert!(checked >= 10, "{checked} parameters were checked");
    Ok(())
}

#[test]
fn dropout_acts_in_training_alone_and_follows_the_generator() -> Result<()> {
    let _guard = seeded(6);
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let settings = LoraSettings { dropout: 0.5, ..settings() };
    let lora = Lora::new(&model.config().linears(), &settings, Device::Cpu)?;
    fill(&lora)?;
    let still = inputs.run(&model, Role::adapted(&lora))?;
    assert_eq!(inputs.run(&model, Role::adapted(&lora))?, still);
    let dropped = |seed: i64| {
        tch::manual_seed(seed);
        inputs.run(&model, Role::training(&lora))
    };
    let one = dropped(1)?;
    assert!(max_difference(&one, &still) > 1e-3);
    assert_eq!(dropped(1)?, one);
    assert!(max_difference(&dropped(2)?, &one) > 1e-3);
    // The mean over masks is the pass without dropout, to first order in the size of the pairs.
    {
        let _no_grad = tch::no_grad_guard();
        for pair in lora.pairs().values() {
            let _ = pair.up.shallow_clone().f_mul_scalar_(1e-3)?;
        }
    }
    let still = inputs.run(&model, Role::adapted(&lora))?;
    let base = inputs.run(&model, Role::BASE)?;
    let outputs = (0..400).map(dropped).collect::<Result<Vec<_>>>()?;
    let mean = Tensor::stack(&outputs, 0).mean_dim(&[0i64][..], false, Kind::Float);
    let error = value(&((mean - &still).norm() / (&still - base).norm()));
    assert!(error < 0.2, "the mean over masks is off by {error} of the adapter's effect");
    Ok(())
}

#[test]
fn targets_are_names_or_whole_parts_of_them() -> Result<()> {
    let config = config();
    let modules = |targets: &[&str]| -> Result<Vec<String>> {
        let targets = targets.iter().map(|target| (*target).to_owned()).collect();
        let settings = LoraSettings { targets, ..LoraSettings::on(BLOCK_LINEARS) };
        Ok(settings.adapted(&config.linears())?.into_iter().map(|(name, _)| name).collect())
    };
    // Four blocks, three of them modulated.
    assert_eq!(LoraSettings::on(BLOCK_LINEARS).adapted(&config.linears())?.len(), 28);
    assert_eq!(modules(&["layers.1.attention.to_q"])?, ["layers.1.attention.to_q"]);
    assert_eq!(modules(&["to_q"])?.len(), 4);
    assert_eq!(modules(&["to_q", "attention.to_q", "to_q"])?.len(), 4);
    let modulations = modules(&["adaLN_modulation.0"])?;
    assert_eq!(modulations.len(), 3);
    assert!(modulations.iter().all(|name| !name.contains("final")), "{modulations:?}");
    assert_eq!(modules(&["cap_embedder.1"])?, ["cap_embedder.1"]);
    for wrong in ["q", "o_q", "attention", "layers.7.attention.to_q", "cap_embedder.0", ""] {
        let error = modules(&["to_k", wrong]).expect_err(wrong).to_string();
        assert!(error.contains("matches no linear layer"), "{error}");
    }
    assert!(modules(&[]).is_err());
    assert_eq!(
        LoraSettings::on(BLOCK_LINEARS).adapted(&Config::default().linears())?.len(),
        7 * 34
    );
    Ok(())
}

#[test]
fn settings_are_checked() {
    let refused = |settings: LoraSettings, name: &str| {
        let error =
            Lora::new(&config().linears(), &settings, Device::Cpu).expect_err(name).to_string();
        assert!(error.contains(name), "{error}");
    };
    for rank in [i64::MIN, -1, 0, 65_537, i64::MAX] {
        refused(LoraSettings { rank, ..settings() }, "rank");
    }
    for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(LoraSettings { alpha, ..settings() }, "alpha");
    }
    for dropout in [-0.1, 1.0, f64::NAN] {
        refused(LoraSettings { dropout, ..settings() }, "dropout");
    }
}
