//! The autoencoder against diffusers' (`scripts/reference/autoencoder.py`), and hostile folders.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::{TempDir, tempdir};
use zimage::autoencoder::{Autoencoder, AutoencoderConfig, Decoder, Half};

use super::common::{
    assert_float32, assert_float64, gradient, max_difference, reference, relative, wave,
};

const MODELS: [&str; 2] = ["two_levels", "four_levels"];
const WEIGHTS: &str = "vae/diffusion_pytorch_model.safetensors";

fn original(model: &str) -> PathBuf {
    reference("autoencoder").join(model)
}

fn values(model: &str) -> Result<Parameters> {
    Ok(read_tensors(&original(model).join("values.safetensors"))?)
}

/// Asserts that `found` has the values of the reference, which are float64's, rounded to float32.
fn assert_equal(found: &Tensor, values: &Parameters, name: &str) {
    if found.kind() == Kind::Float {
        return assert_float32(found, values, name);
    }
    let error = relative(name, found, &values[name]);
    println!("{name}, float64: {error:.1e}");
    assert!(error <= f64::from(f32::EPSILON) / 2.0, "{name}: {error:e}");
}

#[test]
fn encodings_equal_those_of_diffusers() -> Result<()> {
    for (model, kind) in MODELS.into_iter().flat_map(|m| [(m, Kind::Float), (m, Kind::Double)]) {
        let autoencoder = Autoencoder::load(&original(model), kind, Device::Cpu)?;
        let values = values(model)?;
        for i in 0..2 {
            let of = |name: &str| &values[&format!("encode.{i}.{name}")];
            let mean = autoencoder.encode(of("image"), None)?;
            let sample = autoencoder.encode(of("image"), Some(of("noise")))?;
            for (name, found) in [("mean", mean), ("sample", sample)] {
                assert_equal(&found, &values, &format!("encode.{i}.{name}"));
            }
        }
    }
    Ok(())
}

#[test]
fn decoded_images_and_gradients_equal_those_of_diffusers() -> Result<()> {
    for (model, kind) in MODELS.into_iter().flat_map(|m| [(m, Kind::Float), (m, Kind::Double)]) {
        let decoder = Decoder::load(&original(model), kind, Device::Cpu)?;
        let values = values(model)?;
        for i in 0..2 {
            let of = |name: &str| &values[&format!("decode.{i}.{name}")];
            let latents = of("latents").to_kind(kind).copy().set_requires_grad(true);
            let image = decoder.decode(&latents)?;
            let loss = (&image * of("cotangent")).sum(kind);
            let gradient = gradient(&loss, &latents);
            for (name, found) in [("image", image.detach()), ("gradient", gradient)] {
                assert_equal(&found, &values, &format!("decode.{i}.{name}"));
            }
        }
    }
    Ok(())
}

#[test]
fn the_released_config_has_the_released_parameters() -> Result<()> {
    let config = AutoencoderConfig::released();
    config.validate()?;
    let count = |half| {
        let list = config.parameters(half);
        (list.len(), list.iter().map(|(_, shape)| shape.iter().product::<i64>()).sum::<i64>())
    };
    let (encoder, decoder) = (count(Half::Encoder), count(Half::Decoder));
    assert_eq!((encoder.0 + decoder.0, encoder.1 + decoder.1), (244, 83_819_683));
    assert_eq!(decoder, (138, 49_545_475));
    assert_eq!(config.spatial_factor(), 8);
    Ok(())
}

#[test]
fn parts_of_a_batch_decode_as_the_whole() -> Result<()> {
    let autoencoder = Autoencoder::load(&original("two_levels"), Kind::Double, Device::Cpu)?;
    let latents = wave(&[5, 4, 3, 4], 0.3, Kind::Double);
    let whole = autoencoder.decode(&latents)?;
    for part in [1, 2, 7] {
        let parts = autoencoder.decoder.decode_in_parts(&latents, part)?;
        assert_float64(&format!("parts of {part}"), &parts, &whole);
    }
    let error = autoencoder.decoder.decode_in_parts(&latents, 0).unwrap_err().to_string();
    assert!(error.contains("must be positive, found 0"), "{error}");
    Ok(())
}

#[test]
fn force_upcast_computes_in_float32_and_its_absence_does_not() -> Result<()> {
    let latents = wave(&[1, 4, 3, 4], 0.3, Kind::BFloat16);
    let decode = |folder: &Path| -> Result<Tensor> {
        Decoder::load(folder, Kind::BFloat16, Device::Cpu)?.decode(&latents)
    };
    let upcast = decode(&original("two_levels"))?;
    assert_eq!(upcast.kind(), Kind::Float);
    let folder = Folder::copy()?;
    folder.set("force_upcast", false.into())?;
    let rounded = decode(folder.0.path())?;
    assert_eq!(rounded.kind(), Kind::BFloat16);
    let difference = max_difference(&upcast, &rounded);
    assert!(difference > 0.0 && difference < 0.1, "{difference}");
    Ok(())
}

#[test]
fn a_model_without_the_middle_attention_differs() -> Result<()> {
    let folder = Folder::copy()?;
    folder.set("mid_block_add_attention", false.into())?;
    folder.change_weights(|tensors| tensors.retain(|name, _| !name.contains("attentions")))?;
    let latents = wave(&[1, 4, 3, 4], 0.3, Kind::Float);
    let decode = |folder: &Path| -> Result<Tensor> {
        Decoder::load(folder, Kind::Float, Device::Cpu)?.decode(&latents)
    };
    assert!(max_difference(&decode(folder.0.path())?, &decode(&original("two_levels"))?) > 1e-3);
    Ok(())
}

#[test]
fn wrong_shapes_are_refused() -> Result<()> {
    let autoencoder = Autoencoder::load(&original("four_levels"), Kind::Float, Device::Cpu)?;
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    for shape in [&[3, 2, 2][..], &[1, 4, 2, 2], &[0, 3, 2, 2], &[1, 3, 0, 2]] {
        let error = autoencoder.decode(&zeros(shape)).unwrap_err().to_string();
        assert!(error.contains("latents must be [B, 3, h, w]"), "{error}");
    }
    for shape in [&[3, 16, 16][..], &[1, 1, 16, 16], &[1, 3, 7, 16], &[0, 3, 16, 16]] {
        let error = autoencoder.encode(&zeros(shape), None).unwrap_err().to_string();
        assert!(error.contains("images must be [B, 3, H, W]"), "{error}");
    }
    let error =
        autoencoder.encode(&zeros(&[1, 3, 16, 16]), Some(&zeros(&[1, 3, 1, 2]))).unwrap_err();
    assert!(error.to_string().contains("noise must be [1, 3, 2, 2]"), "{error}");
    Ok(())
}

#[test]
fn configs_that_are_not_supported_are_refused_by_field() -> Result<()> {
    let folder = Folder::copy()?;
    for (field, value) in [
        ("use_quant_conv", serde_json::json!(true)),
        ("use_post_quant_conv", true.into()),
        ("act_fn", "gelu".into()),
        ("block_out_channels", serde_json::json!([])),
        ("block_out_channels", serde_json::json!([8, 10])),
        ("block_out_channels", serde_json::json!([8, i64::MAX])),
        ("norm_num_groups", 0.into()),
        ("layers_per_block", (-1).into()),
        ("layers_per_block", i64::MAX.into()),
        ("latent_channels", i64::MAX.into()),
        ("in_channels", 0.into()),
        ("out_channels", (-3).into()),
        ("down_block_types", serde_json::json!(["DownEncoderBlock2D"])),
        ("up_block_types", serde_json::json!(["UpDecoderBlock2D", "AttnUpDecoderBlock2D"])),
        ("scaling_factor", 0.into()),
        ("latents_mean", serde_json::json!([0.0])),
        ("latents_std", serde_json::json!([1.0])),
    ] {
        folder.set(field, value.clone())?;
        let error = format!("{:#}", folder.load().unwrap_err());
        assert!(
            error.contains("vae/config.json") && error.contains(&format!(": {field} ")),
            "{field} = {value}: {error}"
        );
        folder.restore_config()?;
    }
    fs::write(folder.0.path().join("vae/config.json"), "{}")?;
    let error = format!("{:#}", folder.load().unwrap_err());
    assert!(error.contains("use_quant_conv must be false"), "{error}");
    fs::write(folder.0.path().join("vae/config.json"), "[")?;
    let error = format!("{:#}", folder.load().unwrap_err());
    assert!(error.contains("parsing") && error.contains("vae/config.json"), "{error}");
    Ok(())
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() -> Result<()> {
    let folder = Folder::copy()?;
    let bias = || Tensor::zeros([12], (Kind::Float, Device::Cpu));
    type Change = fn(&mut Parameters, Tensor);
    let changes: [(Change, &str); 4] = [
        (|t, _| drop(t.remove("decoder.conv_in.bias")), "decoder.conv_in.bias is missing"),
        (|t, b| drop(t.insert("extra".into(), b)), "extra is unexpected"),
        (
            |t, b| drop(t.insert("decoder.conv_out.bias".into(), b)),
            "decoder.conv_out.bias has shape [12], expected [3]",
        ),
        // A shape that libtorch would broadcast.
        (
            |t, b| drop(t.insert("decoder.conv_norm_out.weight".into(), b.narrow(0, 0, 1))),
            "decoder.conv_norm_out.weight has shape [1], expected [8]",
        ),
    ];
    for (change, complaint) in changes {
        folder.change_weights(|tensors| change(tensors, bias()))?;
        let both = folder.load().map(drop);
        let decoder = Decoder::load(folder.0.path(), Kind::Float, Device::Cpu).map(drop);
        for outcome in [both, decoder] {
            let error = format!("{:#}", outcome.unwrap_err());
            assert!(error.contains(complaint), "expected {complaint:?} in: {error}");
        }
        folder.restore_weights()?;
    }

    // A decoder needs no encoder.
    folder.change_weights(|tensors| tensors.retain(|name, _| name.starts_with("decoder.")))?;
    drop(Decoder::load(folder.0.path(), Kind::Float, Device::Cpu)?);
    let error = format!("{:#}", folder.load().unwrap_err());
    assert!(error.contains("encoder.conv_in.weight is missing"), "{error}");

    fs::write(folder.0.path().join(WEIGHTS), [0xff; 40])?;
    let error = format!("{:#}", folder.load().unwrap_err());
    assert!(error.contains("diffusion_pytorch_model"), "{error}");
    fs::remove_file(folder.0.path().join(WEIGHTS))?;
    let error = format!("{:#}", folder.load().unwrap_err());
    assert!(error.contains("diffusion_pytorch_model"), "{error}");
    Ok(())
}

/// A copy of the smaller model to damage.
struct Folder(TempDir);

impl Folder {
    fn copy() -> Result<Self> {
        let folder = Self(tempdir()?);
        fs::create_dir(folder.0.path().join("vae"))?;
        folder.restore_config()?;
        folder.restore_weights()?;
        Ok(folder)
    }

    fn restore_config(&self) -> Result<()> {
        self.restore("vae/config.json")
    }

    fn restore_weights(&self) -> Result<()> {
        self.restore(WEIGHTS)
    }

    fn restore(&self, file: &str) -> Result<()> {
        fs::copy(original("two_levels").join(file), self.0.path().join(file))?;
        Ok(())
    }

    fn set(&self, field: &str, value: serde_json::Value) -> Result<()> {
        let path = self.0.path().join("vae/config.json");
        let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
        config[field] = value;
        Ok(fs::write(path, config.to_string())?)
    }

    fn change_weights(&self, change: impl FnOnce(&mut Parameters)) -> Result<()> {
        let path = self.0.path().join(WEIGHTS);
        let mut tensors = read_tensors(&path)?;
        change(&mut tensors);
        Ok(write_tensors(&path, &tensors)?)
    }

    fn load(&self) -> Result<Autoencoder> {
        Autoencoder::load(self.0.path(), Kind::Float, Device::Cpu)
    }
}
