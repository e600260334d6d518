//! The frozen base of all roles: finetuned by an adapter of its own, and in 8 bits.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::lora::{Lora, LoraSettings};
use tch_training::safetensors::write_tensors;
use tch_training::{Parameters, Tape};
use tempfile::tempdir;
use zimage::distil::RoleWeights;
use zimage::emoji::EmojiData;
use zimage::model::{ADAPTER_NAMES, BLOCK_LINEARS, Pipeline, Storage};
use zimage::{Role, ZImageTransformer};

use super::common::small_model::{
    double, every_linear, fill, inputs, merged_by_hand, model, settings,
};
use super::common::{assert_rounding, max_difference, relative, seeded, workspace};

/// An adapter on every layer, whose B is not zero.
fn adapter(settings: &LoraSettings) -> Result<Lora> {
    let lora = Lora::new(&model(Kind::Float)?.config().linears(), settings, Device::Cpu)?;
    fill(&lora)?;
    Ok(lora)
}

#[test]
fn a_finetuned_base_is_the_model_with_the_adapter_in_its_weights() -> Result<()> {
    let _guard = seeded(1);
    let (base, inputs) = (model(Kind::Float)?, inputs());
    let own = adapter(&every_linear())?;
    let finetuned = base.with_adapter(&own)?;
    let exact = {
        let double_base = base.cast(Kind::Double)?;
        inputs.run(&merged_by_hand(&double_base, &double(&own)?)?, Role::BASE)?
    };
    let merged = inputs.run(&merged_by_hand(&base, &own)?, Role::BASE)?;
    let found = inputs.run(&finetuned, Role::BASE)?;
    assert_rounding("apart", &merged, &found, &exact);
    assert!(max_difference(&found, &inputs.run(&base, Role::BASE)?) > 0.1);
    // A copy to train has it in its weights.
    let copy = finetuned.duplicate()?;
    assert!(copy.adapter().is_none());
    assert_rounding("copy", &merged, &inputs.run(&copy, Role::BASE)?, &exact);
    // Half the strength is half the update.
    let half = base.with_adapter(&own.frozen(0.5, Kind::Float, Device::Cpu)?)?;
    let pair = |of: &ZImageTransformer| {
        of.adapter().expect("an adapter").pairs()["layers.0.attention.to_q"].up.shallow_clone()
    };
    assert_eq!(max_difference(&(pair(&half) * 2.0), &pair(&finetuned)), 0.0);
    let error = finetuned.with_adapter(&own).expect_err("a second adapter").to_string();
    assert!(error.contains("has an adapter already"), "{error}");
    Ok(())
}

/// A student over a finetuned base is saved as one adapter of the base alone.
#[test]
fn the_joined_adapter_of_a_student_does_what_both_do() -> Result<()> {
    let _guard = seeded(2);
    let (base, inputs) = (model(Kind::Float)?, inputs());
    let (own, student) = (adapter(&every_linear())?, adapter(&settings())?);
    let finetuned = base.with_adapter(&own)?;
    let (over, joined) = (Role::adapted(&student), student.joined(&own)?);
    let found = inputs.run(&finetuned, over)?;
    let exact = inputs.run(&base.cast(Kind::Double)?, Role::adapted(&double(&joined)?))?;
    let alone = inputs.run(&base, Role::adapted(&joined))?;
    assert_rounding("joined", &alone, &found, &exact);
    let merged = finetuned.merged(&student, Device::Cpu)?;
    assert_rounding("merged", &alone, &inputs.run(&merged, Role::BASE)?, &exact);

    // Gradients reach the student alone, with checkpointing too, and are the same.
    let gradients = |tape: Option<&Tape>| -> Result<Vec<Tensor>> {
        let role = tape.map_or(over, |tape| over.checkpointed(tape));
        let loss = inputs.run(&finetuned, role)?.f_square()?.f_sum(Kind::Float)?;
        match tape {
            Some(tape) => tape.backward(&loss)?,
            None => loss.f_backward()?,
        }
        let of = |(_, leaf): (String, Tensor)| {
            let gradient = leaf.grad().copy();
            let _ = leaf.grad().zero_();
            gradient
        };
        Ok(student.parameters().into_iter().map(of).collect())
    };
    let plain = gradients(None)?;
    for (one, two) in plain.iter().zip(gradients(Some(&Tape::default()))?) {
        assert_eq!(max_difference(one, &two), 0.0);
    }
    assert!(plain.iter().all(|gradient| gradient.abs().max().double_value(&[]) > 0.0));
    let frozen = finetuned.adapter().expect("an adapter").parameters();
    assert!(frozen.iter().all(|(_, leaf)| !leaf.requires_grad() && !leaf.grad().defined()));
    Ok(())
}

/// The same adapter as diffusers, ComfyUI and kohya write it, with queries, keys and values stacked or not.
#[test]
fn adapters_of_other_programs_are_read() -> Result<()> {
    let _guard = seeded(3);
    let folder = tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let model = model(Kind::Float)?;
    let layers = model.config().linears();
    let lora = adapter(&every_linear())?;
    let parts = |layer: &str| -> [Tensor; 2] {
        let pair = &lora.pairs()[layer];
        [pair.down.detach(), pair.up.detach() * pair.scale]
    };
    let plain: Vec<String> = lora.pairs().keys().cloned().collect();
    // As ComfyUI names them.
    let renamed = |layer: &str| {
        let layer = layer.replace("all_x_embedder.2-1", "x_embedder");
        let layer = layer.replace("all_final_layer.2-1", "final_layer");
        layer.replace("to_out.0", "out")
    };
    let mut files = Vec::new();
    for prefix in ["transformer.", "diffusion_model.", "base_model.model.", ""] {
        let mut tensors = Parameters::new();
        for layer in &plain {
            let [down, up] = parts(layer);
            drop(tensors.insert(format!("{prefix}{layer}.lora_A.weight"), down));
            drop(tensors.insert(format!("{prefix}{layer}.lora_B.weight"), up));
        }
        files.push(tensors);
    }
    // Of peft, beside its file; the others have no such settings.
    std::fs::write(path.with_file_name("adapter_config.json"), r#"{ "r": 3, "lora_alpha": 3 }"#)?;
    let mut kohya = Parameters::new();
    let mut comfy = Parameters::new();
    for layer in &plain {
        let [down, up] = parts(layer);
        let name = format!("lora_unet_{}", layer.replace('.', "_"));
        // Of an alpha of 1.5 at rank 3 half is left.
        drop(kohya.insert(format!("{name}.alpha"), Tensor::from(1.5f32)));
        drop(kohya.insert(format!("{name}.lora_down.weight"), down.shallow_clone()));
        drop(kohya.insert(format!("{name}.lora_up.weight"), &up * 2.0));
        if ["to_q", "to_k", "to_v"].iter().any(|part| layer.ends_with(part)) {
            continue;
        }
        let name = format!("diffusion_model.{}", renamed(layer));
        drop(comfy.insert(format!("{name}.lora_A.weight"), down));
        drop(comfy.insert(format!("{name}.lora_B.weight"), up));
    }
    // Three pairs of rank 3 stacked are one of rank 9 that is zero outside its blocks.
    for layer in plain.iter().filter(|layer| layer.ends_with("to_q")) {
        let stem = layer.trim_end_matches("to_q");
        let stacked = ["to_q", "to_k", "to_v"].map(|part| parts(&format!("{stem}{part}")));
        let downs = stacked.each_ref().map(|[down, _]| down.shallow_clone());
        let ups = stacked.each_ref().map(|[_, up]| up.shallow_clone());
        drop(
            comfy.insert(
                format!("diffusion_model.{stem}qkv.lora_A.weight"),
                Tensor::f_cat(&downs, 0)?,
            ),
        );
        drop(comfy.insert(
            format!("diffusion_model.{stem}qkv.lora_B.weight"),
            Tensor::f_block_diag(&ups)?,
        ));
    }
    files.extend([kohya, comfy]);
    let inputs = inputs();
    let expected = inputs.run(&model, Role::adapted(&lora))?;
    for tensors in files {
        write_tensors(&path, &tensors)?;
        let loaded = Lora::load(&path, &layers, ADAPTER_NAMES, Device::Cpu)?;
        assert_eq!(loaded.pairs().len(), plain.len());
        let found = inputs.run(&model, Role::adapted(&loaded))?;
        let name = tensors.keys().next().expect("a name");
        assert!(relative(name, &found, &expected) < 1e-5, "{name}");
    }
    Ok(())
}

#[test]
fn weights_in_8_bits_are_within_half_a_scale() -> Result<()> {
    let _guard = seeded(4);
    for kind in [Kind::Float, Kind::BFloat16] {
        let whole = model(kind)?;
        let quantized = whole.stored(Storage::Int8)?;
        assert!(quantized.is_quantized() && !whole.is_quantized());
        let mut count = 0;
        for (name, weight) in whole.parameters() {
            let numbers = &quantized.parameters()[name];
            let is_block =
                BLOCK_LINEARS.iter().any(|part| name.ends_with(&format!("{part}.weight")));
            assert_eq!(numbers.kind() == Kind::Int8, is_block, "{name}");
            if !is_block {
                assert_eq!(numbers, weight);
                continue;
            }
            count += 1;
            let double = |tensor: &Tensor| tensor.to_kind(Kind::Double);
            let scale = double(&quantized.parameters()[&format!("{name}_scale")]);
            let error = (double(numbers) * &scale - double(weight)).abs() / &scale;
            assert!(error.max().double_value(&[]) <= 0.5 + 1e-6, "{name}: {error:?}");
            let largest = numbers.abs().amax([-1i64].as_slice(), false);
            assert!(largest.min().double_value(&[]) >= 126.0, "{name}: of 127 few are used");
        }
        assert_eq!(count, 4 * BLOCK_LINEARS.len());
    }
    Ok(())
}

/// Quantized once, a model computes as its rounded weights do, with gradients for what is on top, and is not
/// copied, merged or written.
#[test]
fn a_model_in_8_bits_is_the_model_of_its_rounded_weights() -> Result<()> {
    let _guard = seeded(5);
    let (whole, inputs) = (model(Kind::Float)?, inputs());
    let quantized = whole.stored(Storage::Int8)?;
    let mut rounded = Parameters::new();
    for (name, _) in whole.named_parameters() {
        let tensor = &quantized.parameters()[&name];
        let tensor = match quantized.parameters().get(&format!("{name}_scale")) {
            Some(scale) => tensor.to_kind(Kind::Float) * scale.to_kind(Kind::Float),
            None => tensor.shallow_clone(),
        };
        drop(rounded.insert(name, tensor));
    }
    let rounded = ZImageTransformer::from_parameters(whole.config().clone(), rounded)?;
    let lora = adapter(&settings())?;
    for role in [Role::BASE, Role::adapted(&lora)] {
        let (found, expected) = (inputs.run(&quantized, role)?, inputs.run(&rounded, role)?);
        assert_eq!(max_difference(&found, &expected), 0.0);
    }
    let (found, expected) = (inputs.run(&quantized, Role::BASE)?, inputs.run(&whole, Role::BASE)?);
    let error = relative("8 bits against float32", &found, &expected);
    // The model of waves is sensitive: rounding it to bfloat16 moves its output by a seventh.
    let rounding = inputs.run(&whole.cast(Kind::BFloat16)?, Role::BASE)?;
    let rounding = relative("bfloat16 against float32", &rounding, &expected);
    println!("8 bits {error:.2}, bfloat16 {rounding:.2}");
    assert!(error > rounding && error < 10.0 * rounding, "{error} and {rounding}");

    let loss = inputs.run(&quantized, Role::adapted(&lora))?.f_square()?.f_sum(Kind::Float)?;
    loss.f_backward()?;
    assert!(lora.parameters().iter().all(|(_, leaf)| leaf.grad().defined()));

    for (what, error) in [
        ("copied", quantized.duplicate().err()),
        ("trained as a copy", RoleWeights::new(&quantized, None).err()),
        ("merged", quantized.merged(&lora, Device::Cpu).err()),
        ("written", quantized.save(tempdir()?.path()).err()),
        ("quantized again", quantized.stored(Storage::Int8).err()),
    ] {
        let error = error.expect(what).to_string();
        assert!(error.contains("8 bits"), "{what}: {error}");
    }
    Ok(())
}

/// The root of the mean squared error of the embedded model's velocity, over that of the velocity itself, on noised
/// held-out pictures.
#[test]
#[ignore = "a table for docs/zimage.md: cargo test --package zimage --test parts 8_bits -- --ignored --nocapture"]
fn the_error_of_8_bits_on_the_embedded_model() -> Result<()> {
    let _guard = seeded(0);
    let _no_grad = tch::no_grad_guard();
    let teacher = Pipeline::load(&workspace("assets/teacher"), Kind::Float, Device::Cpu)?;
    let whole = teacher.transformer;
    let data = EmojiData::load(&workspace("assets/emoji"))?;
    let items = &data.indices(true)[..40];
    let captions = items.iter().map(|item| data.items[*item as usize].caption.as_str());
    let prompts = data.vocabulary.encode_prompts(&whole, captions)?;
    let (cond, _) = prompts.conditions(&(0..40).collect::<Vec<_>>())?;
    let images = data.images.f_index_select(0, &Tensor::f_from_slice(items)?)?;
    let t = Tensor::f_rand([40], (Kind::Float, Device::Cpu))?;
    let x = &images * t.view([-1, 1, 1, 1]) + images.randn_like() * (1.0 - t.view([-1, 1, 1, 1]));
    let run = |model: &ZImageTransformer| {
        let cond = cond[0].to_kind(model.kind());
        model.forward_encoded(&x, &t, &cond, Role::BASE)
    };
    let expected = run(&whole)?;
    let rms = |tensor: &Tensor| tensor.square().mean(Kind::Double).sqrt().double_value(&[]);
    let mut fp8 = Parameters::new();
    for (name, weight) in whole.parameters() {
        let is_block = BLOCK_LINEARS.iter().any(|part| name.ends_with(&format!("{part}.weight")));
        let rounded = if is_block {
            // The largest number of e4m3 is 448.
            let scale = weight.abs().amax([-1i64].as_slice(), true) / 448.0;
            (weight / &scale).to_kind(Kind::Float8e4m3fn).to_kind(Kind::Float) * scale
        } else {
            weight.shallow_clone()
        };
        drop(fp8.insert(name.clone(), rounded));
    }
    let fp8 = ZImageTransformer::from_parameters(whole.config().clone(), fp8)?;
    let bfloat16 = whole.cast(Kind::BFloat16)?;
    for (what, model) in [
        ("bfloat16", &bfloat16),
        ("int8, float32 arithmetic", &whole.stored(Storage::Int8)?),
        ("int8, bfloat16 arithmetic", &bfloat16.stored(Storage::Int8)?),
        ("fp8 e4m3 with a scale a row, float32 arithmetic", &fp8),
    ] {
        println!("{what}: {:.2e}", rms(&(run(model)? - &expected)) / rms(&expected));
    }
    Ok(())
}
