//! Gradient checkpointing: the gradients of the plain backward pass, with less memory.

use anyhow::Result;
use decoupled_dmd::{Condition, PostShift, Shift};
use tch::{Device, Kind, Tensor};
use tch_training::Tape;
use tch_training::lora::{Lora, LoraSettings};
use zimage::distil::{Network, denoiser};
use zimage::{Role, ZImageTransformer};

use super::common::small_model::{Inputs, double, every_linear, fill, inputs, model, settings};
use super::common::{FLOAT64, float32_bound, max_difference, seeded, value, wave, worse};

/// A scalar that depends on every entry.
fn loss_of(output: &Tensor) -> Tensor {
    let cotangent = wave(&output.size(), 0.4, output.kind());
    (output * cotangent).sum(None::<Kind>) + output.square().mean(None::<Kind>)
}

type Named = Vec<(String, Tensor)>;

/// The gradients of the leaves, which then are forgotten. A leaf without one gives an empty tensor.
fn take_gradients(leaves: &Named) -> Named {
    let take = |(name, leaf): &(String, Tensor)| {
        let gradient = leaf.grad();
        let none = || Tensor::zeros([0], (Kind::Float, Device::Cpu));
        let kept = if gradient.defined() { gradient.copy() } else { none() };
        // This zeroes the gradient in place.
        leaf.shallow_clone().zero_grad();
        (name.clone(), kept)
    };
    leaves.iter().map(take).collect()
}

/// The largest difference, relative to the largest entry of the same gradient. `missing` names may have
/// no gradient, the same in both.
fn compare(plain: &Named, found: &Named, missing: &[&str]) -> f64 {
    assert_eq!(plain.len(), found.len());
    let mut worst: f64 = 0.0;
    for ((name, plain), (_, found)) in plain.iter().zip(found) {
        assert_eq!(plain.size(), found.size(), "{name}");
        if missing.iter().any(|part| name.contains(part)) {
            assert_eq!(plain.numel(), 0, "{name} has a gradient");
            continue;
        }
        let size = value(&plain.abs().max());
        assert!(size > 0.0, "{name} has no gradient");
        worst = worse(worst, max_difference(plain, found) / size);
    }
    worst
}

fn plain_copy(gradients: &Named) -> Named {
    gradients.iter().map(|(name, gradient)| (name.clone(), gradient.shallow_clone())).collect()
}

/// Asserts that gradients differ by rounding alone; `exact` are the plain ones in float64.
fn assert_same(what: &str, plain: &Named, found: &Named, exact: &Named) {
    let is_double = plain.iter().all(|(_, gradient)| gradient.kind() == Kind::Double);
    let error = compare(plain, found, &[]);
    let bound = if is_double { FLOAT64 } else { float32_bound(compare(exact, plain, &[])) };
    println!("{what}, float64 {is_double}: {error:.1e} of {bound:.1e}");
    assert!(error <= bound, "{what}: {error:e} > {bound:e}");
}

/// Gradients of one loss without a tape and with one; the generator starts alike.
fn both(
    leaves: &Named,
    role: Role<'_>,
    loss: impl Fn(Role<'_>) -> Result<Tensor>,
) -> Result<(Named, Named)> {
    tch::manual_seed(1);
    let plain_loss = loss(role)?;
    plain_loss.backward();
    let plain = take_gradients(leaves);
    tch::manual_seed(1);
    let tape = Tape::default();
    let checkpointed = loss(role.checkpointed(&tape))?;
    assert_eq!(value(&checkpointed), value(&plain_loss));
    tape.backward(&checkpointed)?;
    Ok((plain, take_gradients(leaves)))
}

fn adapter(model: &ZImageTransformer, settings: &LoraSettings) -> Result<Lora> {
    let lora = Lora::new(&model.config().linears(), settings, Device::Cpu)?;
    fill(&lora)?;
    Ok(lora)
}

#[test]
fn gradients_of_an_adapter_are_those_of_the_plain_pass_bit_for_bit() -> Result<()> {
    let _guard = seeded(1);
    let inputs = inputs();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let model = model(kind)?;
        let lora = adapter(&model, &settings())?;
        let leaves = lora.parameters();
        let loss = |role: Role<'_>| Ok(loss_of(&inputs.run(&model, role)?));
        let (plain, found) = both(&leaves, Role::adapted(&lora), loss)?;
        assert_eq!(compare(&plain, &found, &[]), 0.0, "{kind:?}");
    }
    Ok(())
}

/// Unequal sizes and captions, whose batch needs a mask.
#[test]
fn gradients_of_unequal_items_are_those_of_the_plain_pass_bit_for_bit() -> Result<()> {
    let _guard = seeded(8);
    let model = model(Kind::Float)?;
    let lora = adapter(&model, &settings())?;
    let latents = [[4, 1, 4, 6], [4, 1, 8, 12]].map(|size| wave(&size, 0.3, Kind::Float));
    let captions = [[5, 8], [33, 8]].map(|size| wave(&size, 0.7, Kind::Float));
    let t = Tensor::from_slice(&[0.25f32, 0.9]);
    let loss = |role: Role<'_>| {
        let outputs = model.forward_items(&latents, &t, &captions, role)?;
        Ok(loss_of(&outputs[0]) + loss_of(&outputs[1]))
    };
    let (plain, found) = both(&lora.parameters(), Role::adapted(&lora), loss)?;
    assert_eq!(compare(&plain, &found, &[]), 0.0);
    Ok(())
}

/// The directional derivative with fixed masks, against central differences.
#[test]
fn dropout_is_replayed() -> Result<()> {
    let _guard = seeded(2);
    let inputs = inputs();
    // In float64, so that differences of the float32 pairs are seen.
    let model = model(Kind::Double)?;
    let lora = adapter(&model, &LoraSettings { dropout: 0.3, ..settings() })?;
    let leaves = lora.parameters();
    let loss = |seed: i64, tape: &Tape| -> Result<Tensor> {
        tch::manual_seed(seed);
        let role = Role::training(&lora).checkpointed(tape);
        // Two passes, with masks of their own.
        let (one, two) = (inputs.run(&model, role)?, inputs.run(&model, role)?);
        assert!(max_difference(&one, &two) > 1e-3);
        Ok(loss_of(&(one - two * 0.5)))
    };
    let tape = Tape::default();
    tape.backward(&loss(3, &tape)?)?;
    let gradients = take_gradients(&leaves);
    let _no_grad = tch::no_grad_guard();
    let value_at = |seed: i64, step: f64| -> Result<f64> {
        let moved = |sign: f64| {
            for (_, leaf) in &leaves {
                let mut leaf = leaf.shallow_clone();
                leaf += wave(&leaf.size(), 0.1, Kind::Float) * (sign * step);
            }
        };
        moved(1.0);
        let value = value(&loss(seed, &Tape::default())?);
        moved(-1.0);
        Ok(value)
    };
    let expected: f64 = gradients
        .iter()
        .filter(|(_, gradient)| gradient.numel() > 0)
        .map(|(_, gradient)| {
            value(&(gradient * wave(&gradient.size(), 0.1, Kind::Float)).sum(Kind::Double))
        })
        .sum();
    let step = 1e-4;
    let found = (value_at(3, step)? - value_at(3, -step)?) / (2.0 * step);
    println!("with dropout: {found} by differences, {expected} by the tape");
    assert!((found - expected).abs() < 1e-3 * expected.abs(), "{found} and {expected}");
    assert!((value_at(3, 0.0)? - value_at(4, 0.0)?).abs() > 1e-2, "the masks must matter");
    Ok(())
}

/// Every linear layer has a pair: also those that make the time embedding, the tokens and the output.
#[test]
fn gradients_pass_through_what_lies_between_the_blocks() -> Result<()> {
    let _guard = seeded(3);
    let inputs = inputs();
    // Of scale 1, so that the gradients are the same numbers where the scale is folded in.
    let settings = LoraSettings { alpha: 3.0, ..every_linear() };
    assert_eq!(settings.rank, 3);
    let rough = adapter(&model(Kind::Float)?, &settings)?;
    let mut exact = None;
    for (kind, lora) in [(Kind::Double, double(&rough)?), (Kind::Float, rough)] {
        let model = model(kind)?;
        let leaves = lora.parameters();
        let loss = |role: Role<'_>| Ok(loss_of(&inputs.run(&model, role)?));
        let (plain, found) = both(&leaves, Role::adapted(&lora), loss)?;
        assert_same("every linear layer", &plain, &found, exact.get_or_insert(plain_copy(&plain)));
    }
    Ok(())
}

#[test]
fn gradients_of_all_parameters_are_those_of_the_plain_pass() -> Result<()> {
    let _guard = seeded(4);
    let inputs = inputs();
    let mut exact = None;
    for kind in [Kind::Double, Kind::Float] {
        let model = model(kind)?;
        model.set_requires_grad(true)?;
        let mut leaves = model.named_parameters();
        let latents = inputs.latents.to_kind(kind).copy().set_requires_grad(true);
        leaves.push(("latents".into(), latents.shallow_clone()));
        let loss = |role: Role<'_>| {
            Ok(loss_of(&model.forward(&latents, &inputs.t, &inputs.captions, role)?))
        };
        let (plain, found) = both(&leaves, Role::BASE, loss)?;
        assert_same("all parameters", &plain, &found, exact.get_or_insert(plain_copy(&plain)));
    }
    Ok(())
}

/// The float32 master of a bfloat16 pass, with an encoded caption that carries a gradient of its own.
#[test]
fn gradients_reach_a_master_and_the_captions() -> Result<()> {
    let _guard = seeded(5);
    let inputs = inputs();
    let master = model(Kind::Float)?;
    master.set_requires_grad(true)?;
    let mut leaves = master.named_parameters();
    let captions = wave(&[2, 32, 24], 0.2, Kind::BFloat16).set_requires_grad(true);
    leaves.push(("captions".into(), captions.shallow_clone()));
    let loss = |role: Role<'_>| {
        let rough = master.cast(Kind::BFloat16)?;
        let latents = inputs.latents.to_kind(Kind::BFloat16);
        let output = rough.forward_encoded(&latents, &inputs.t, &captions, role)?;
        Ok(loss_of(&output.to_kind(Kind::Float)))
    };
    let (plain, found) = both(&leaves, Role::BASE, loss)?;
    let missing = ["cap_embedder", "context_refiner", "cap_pad_token"];
    let error = compare(&plain, &found, &missing);
    println!("bfloat16 pass: {error:.1e}");
    // Sums over blocks are rounded to bfloat16 in another order.
    assert!(error < 2e-2, "{error}");
    for ((name, plain), (_, found)) in plain.iter().zip(&found) {
        if name.starts_with("layers.") || name == "captions" {
            assert_eq!(plain, found, "{name}");
        }
    }
    Ok(())
}

/// Two calls, the second on the output of the first, through the library's denoiser.
#[test]
fn two_calls_of_a_denoiser_share_a_loss() -> Result<()> {
    let _guard = seeded(6);
    let Inputs { latents, t, captions } = inputs();
    let model = model(Kind::Double)?;
    let new = || double(&adapter(&model, &settings())?);
    let (student, fake) = (new()?, new()?);
    let condition = Condition::from(model.encode_captions(&captions, Role::BASE)?);
    let time = PostShift::new(t.flip([0]))?;
    let more = PostShift::new(Tensor::from_slice(&[0.8f32, 0.4]))?;
    let x = latents.to_kind(Kind::Double).set_requires_grad(true);
    let mut leaves = student.parameters();
    leaves.extend(fake.parameters());
    leaves.push(("x".into(), x.shallow_clone()));
    let run = |student: Role<'_>, fake: Role<'_>| -> Result<Tensor> {
        let (student, fake) = (
            denoiser(Network { model: &model, role: student }, Shift::NONE),
            denoiser(Network { model: &model, role: fake }, Shift::NONE),
        );
        let sample = student.denoise(&x, &time, &condition)?;
        let seen = fake.denoise(&(&sample * 0.7), &more, &condition)?;
        let again = student.denoise(&(&sample + 0.1), &more, &condition)?;
        Ok(loss_of(&sample) + loss_of(&seen) + loss_of(&again))
    };
    let plain_loss = run(Role::adapted(&student), Role::adapted(&fake))?;
    plain_loss.backward();
    let plain = take_gradients(&leaves);
    let tape = Tape::default();
    let loss =
        run(Role::adapted(&student).checkpointed(&tape), Role::adapted(&fake).checkpointed(&tape))?;
    assert_eq!(value(&loss), value(&plain_loss));
    tape.backward(&loss)?;
    // No pair of the caption side takes part.
    let error = compare(&plain, &take_gradients(&leaves), &["context_refiner"]);
    println!("three calls: {error:.1e}");
    assert!(error <= FLOAT64, "{error}");
    Ok(())
}

#[test]
fn nothing_is_kept_where_gradients_are_off() -> Result<()> {
    let _guard = seeded(7);
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let lora = adapter(&model, &settings())?;
    let tape = Tape::default();
    let role = Role::adapted(&lora).checkpointed(&tape);
    let plain = inputs.run(&model, Role::adapted(&lora))?;
    {
        let _no_grad = tch::no_grad_guard();
        let output = inputs.run(&model, role)?;
        assert_eq!(output, plain.detach());
        assert!(!output.requires_grad());
    }
    assert!(tape.is_empty());
    let loss = loss_of(&inputs.run(&model, role)?);
    assert!(!tape.is_empty());
    {
        let _no_grad = tch::no_grad_guard();
        let error = tape.backward(&loss).expect_err("gradients are off").to_string();
        assert!(error.contains("switched off"), "{error}");
    }
    let error = tape.backward(&inputs.latents.sum(Kind::Float)).expect_err("no graph").to_string();
    assert!(error.contains("requires a gradient"), "{error}");
    assert!(tape.is_empty());
    Ok(())
}
