//! The parts of the Z-Image transformer, and its files.

use std::fs;

use anyhow::Result;
use approx::assert_abs_diff_eq;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::tempdir;
use zimage::model::{Grid, patchify, rotary_factors, time_features, unpatchify};
use zimage::{Config, Role, ZImageTransformer};

use super::common::narrow::narrow;
use super::common::{assert_float64, float32_bound};

/// `f(i)` for i = 0, 1, .. in row-major order, rounded to float32.
fn filled(shape: &[i64], f: impl Fn(f64) -> f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    let values: Vec<f32> = (0..count).map(|i| f(i as f64) as f32).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// The tiny model with every parameter a known wave.
fn wave_model() -> Result<ZImageTransformer> {
    let config = narrow();
    let parameters = config
        .parameters()
        .into_iter()
        .enumerate()
        .map(|(k, (name, shape))| {
            let wave = |i: f64| (1.7 * i + 0.9 * k as f64 + 0.3).sin();
            let tensor = if name.ends_with("pad_token") {
                filled(&shape, |i| 0.5 * wave(i))
            } else if name.ends_with("bias") {
                filled(&shape, |i| 0.1 * wave(i))
            } else if let [_, columns] = shape[..] {
                filled(&shape, |i| wave(i) / (columns as f64).sqrt())
            } else {
                filled(&shape, |i| 1.0 + 0.1 * wave(i))
            };
            (name, tensor)
        })
        .collect();
    ZImageTransformer::from_parameters(config, parameters)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.flatten(0, -1).to_kind(Kind::Double)).expect("a float tensor")
}

/// Against numbers of six digits.
fn assert_values(found: &[f64], expected: &[f64]) {
    for (found, expected) in found.iter().zip(expected) {
        assert_abs_diff_eq!(found, expected, epsilon = 1e-6);
    }
}

#[test]
fn a_batch_equals_its_items() -> Result<()> {
    let model = wave_model()?.cast(Kind::Double)?;
    assert_eq!(model.parameters().len(), 58);
    let latents = filled(&[2, 4, 4, 6], |i| (0.7 * i).cos()).to_kind(Kind::Double);
    let t = Tensor::from_slice(&[0.3f32, 0.8]);
    let captions = [filled(&[5, 8], f64::sin), filled(&[9, 8], f64::cos)];
    let together = model.forward(&latents, &t, &captions, Role::BASE)?;
    for (i, caption) in (0..).zip(&captions) {
        let alone = model.forward(
            &latents.narrow(0, i, 1),
            &t.narrow(0, i, 1),
            std::slice::from_ref(caption),
            Role::BASE,
        )?;
        assert_float64(&format!("item {i}"), &alone, &together.narrow(0, i, 1));
    }
    let states = model.encode_captions(&captions, Role::BASE)?;
    assert_eq!(model.forward_encoded(&latents, &t, &states, Role::BASE)?, together);
    let swapped =
        model.forward_encoded(&latents.flip([0]), &t.flip([0]), &states.flip([0]), Role::BASE)?;
    assert_float64("swapped", &swapped.flip([0]), &together);
    Ok(())
}

#[test]
fn captions_of_unequal_padded_length_are_refused() -> Result<()> {
    let model = wave_model()?;
    let captions = [filled(&[5, 8], f64::sin), filled(&[33, 8], f64::cos)];
    let error = model.encode_captions(&captions, Role::BASE).expect_err("unequal lengths");
    assert!(error.to_string().contains("pad to one length"), "{error}");
    Ok(())
}

#[test]
fn bfloat16_stays_close_and_carries_gradients_to_the_master() -> Result<()> {
    let model = wave_model()?;
    model.set_requires_grad(true)?;
    let latents = filled(&[1, 4, 4, 6], |i| (0.7 * i).cos());
    let t = Tensor::from_slice(&[0.999f32]);
    let captions = [filled(&[5, 8], f64::sin)];
    let exact = model.forward(&latents, &t, &captions, Role::BASE)?;
    let rough = model.cast(Kind::BFloat16)?.forward(&latents, &t, &captions, Role::BASE)?;
    assert_eq!(rough.kind(), Kind::Float);
    let error = f64::try_from((&rough - &exact).norm())? / f64::try_from(exact.norm())?;
    assert!(error < 0.05, "relative error {error}");
    rough.square().sum(Kind::Float).backward();
    for (name, parameter) in model.parameters() {
        let gradient = parameter.grad();
        assert_eq!(gradient.kind(), Kind::Float, "{name}");
        assert!(f64::try_from(gradient.abs().sum(Kind::Float))? > 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn released_config_has_the_released_size() {
    let parameters = Config::default().parameters();
    let count: i64 = parameters.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum();
    assert_eq!((parameters.len(), count), (521, 6_154_908_736));
    assert_eq!(Config { dim: 44, ..Config::default() }.feed_forward_dim(), 117);
}

#[test]
fn configs_are_checked() {
    assert!(Config::default().validate().is_ok());
    assert!(Config::embedded().validate().is_ok());
    let error = Config { axes_dims: vec![32, 48, 32], ..Config::default() }.validate();
    assert!(error.expect_err("head_dim").to_string().contains("axes_dims"));
    assert!(Config { n_heads: 7, ..Config::default() }.validate().is_err());
    assert!(Config { all_patch_size: vec![2, 4], ..Config::default() }.validate().is_err());
}

#[test]
fn time_features_put_cosines_first() -> Result<()> {
    let time = 300f32;
    let features = values(&time_features(&Tensor::from_slice(&[time]))?);
    assert_eq!(features.len(), 256);
    for i in 0..128 {
        let angle = f64::from(time) * 10_000f64.powf(-(i as f64) / 128.0);
        for (found, expected) in [(features[i], angle.cos()), (features[128 + i], angle.sin())] {
            // A frequency is rounded to float32, so that an angle is off in proportion to its size.
            assert!(
                (found - expected).abs() <= (1.0 + angle) * float32_bound(0.0),
                "{i}: {found} {expected}"
            );
        }
    }
    Ok(())
}

#[test]
fn patches_run_row_major_with_channels_fastest() -> Result<()> {
    let latents = filled(&[1, 4, 1, 4, 4], |i| i);
    let tokens = patchify(&latents, 2)?;
    let found = values(&tokens.select(1, 0));
    let expected = [0, 16, 32, 48, 1, 17, 33, 49, 4, 20, 36, 52, 5, 21, 37, 53].map(f64::from);
    assert_values(&found, &expected);
    assert_values(&values(&tokens.select(1, 1))[..4], &[2.0, 18.0, 34.0, 50.0]);
    assert_eq!(unpatchify(&tokens, 2, Grid { frames: 1, rows: 2, columns: 2 })?, latents);
    Ok(())
}

#[test]
fn rotary_factors_equal_the_reference() -> Result<()> {
    let factors = rotary_factors(&Config::default(), &[[33, 5, 7]], Device::Cpu)?;
    let factors = values(&factors.view_as_real());
    for (k, re, im) in [
        (0, -0.013277, 0.999912),
        (1, -0.225465, -0.974251),
        (16, 0.283662, -0.958924),
        (40, 0.753902, 0.656987),
        (63, 0.999407, 0.034444),
    ] {
        assert_values(&factors[2 * k..2 * k + 2], &[re, im]);
    }
    Ok(())
}

#[test]
fn a_saved_model_loads_and_a_broken_one_does_not() -> Result<()> {
    let folder = tempdir()?;
    let folder = folder.path();
    let model = wave_model()?;
    model.save(folder)?;
    let loaded = ZImageTransformer::load(folder, Kind::Float, Device::Cpu)?;
    assert_eq!(loaded.config(), model.config());
    for (name, tensor) in model.parameters() {
        assert_eq!(&loaded.parameters()[name], tensor, "{name}");
    }
    let rough = ZImageTransformer::load(folder, Kind::BFloat16, Device::Cpu)?;
    assert_eq!(rough.kind(), Kind::BFloat16);

    let path = folder.join("transformer/diffusion_pytorch_model.safetensors");
    let mut tensors = read_tensors(&path)?;
    tensors.remove("layers.0.attention.to_q.weight");
    tensors.insert("layers.0.attention.to_z.weight".into(), Tensor::from(1.0));
    // This shape would broadcast.
    tensors.insert("cap_embedder.1.bias".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
    write_tensors(&path, &tensors)?;
    let error = ZImageTransformer::load(folder, Kind::Float, Device::Cpu).expect_err("broken");
    let error = format!("{error:#}");
    for part in [
        "layers.0.attention.to_q.weight is missing",
        "layers.0.attention.to_z.weight is unexpected",
        "cap_embedder.1.bias has shape [1], expected [24]",
    ] {
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}

#[test]
fn a_duplicate_does_not_share_storage() -> Result<()> {
    let model = wave_model()?;
    let copy = model.duplicate()?;
    let _ = model.parameters()["x_pad_token"].shallow_clone().fill_(7.0);
    assert_ne!(copy.parameters()["x_pad_token"], model.parameters()["x_pad_token"]);
    Ok(())
}

#[test]
fn configs_of_strangers_are_checked() -> Result<()> {
    let folder = tempdir()?;
    fs::create_dir(folder.path().join("transformer"))?;
    let path = folder.path().join("transformer/config.json");
    let class = "ZImageTransformer2DModel";
    let cases = [
        (json!({"_class_name": class, "dim": 1e15}).to_string(), "parsing"),
        (json!({"_class_name": class, "dim": 1_000_000_000_000_000i64}).to_string(), "dim must be"),
        (json!({"_class_name": class, "dim": i64::MAX}).to_string(), "dim must be in"),
        (json!({"_class_name": class, "dim": -3840}).to_string(), "dim must be in"),
        (json!({"_class_name": class, "n_heads": 0}).to_string(), "n_heads must be in"),
        (json!({"_class_name": class, "n_layers": i64::MAX}).to_string(), "n_layers must be in"),
        (json!({"_class_name": class, "in_channels": 1i64 << 62}).to_string(), "in_channels must"),
        (json!({"_class_name": class, "all_patch_size": [i64::MAX]}).to_string(), "all_patch_size"),
        (json!({"_class_name": class, "all_patch_size": [2, 4]}).to_string(), "all_patch_size"),
        (json!({"_class_name": class, "all_patch_size": []}).to_string(), "all_patch_size"),
        (json!({"_class_name": class, "all_f_patch_size": [2]}).to_string(), "all_f_patch_size"),
        (json!({"_class_name": class, "axes_dims": [i64::MAX - 1, 2, 2]}).to_string(), "axes_dims"),
        (json!({"_class_name": class, "axes_lens": [i64::MAX, 1, 1]}).to_string(), "axes_lens"),
        (json!({"_class_name": class, "n_kv_heads": 10}).to_string(), "n_kv_heads (10)"),
        (json!({"_class_name": class, "siglip_feat_dim": 1152}).to_string(), "Omni"),
        (
            json!({"_class_name": "FluxTransformer2DModel"}).to_string(),
            "of a FluxTransformer2DModel",
        ),
        (json!({}).to_string(), "_class_name"),
        (format!("{{\"_class_name\": \"{class}\", \"norm_eps\": 1e999}}"), "parsing"),
        (format!("{{\"_class_name\": \"{class}\", \"dim\": {}", "[".repeat(1_000_000)), "parsing"),
        (format!("{{\"_class_name\": \"{class}\", \"x\": {}", "[".repeat(1_000_000)), "parsing"),
        (String::new(), "parsing"),
    ];
    for (text, expected) in cases {
        fs::write(&path, &text)?;
        let found = ZImageTransformer::load(folder.path(), Kind::Float, Device::Cpu);
        let found = format!("{:#}", found.expect_err(expected));
        let start: String = text.chars().take(80).collect();
        assert!(found.contains(expected) && found.contains("config.json"), "{start}: {found}");
    }
    let plain = json!({"_class_name": class, "siglip_feat_dim": null, "something_new": [1]});
    fs::write(&path, plain.to_string())?;
    assert_eq!(Config::load(&path)?, Config::default());
    Ok(())
}
