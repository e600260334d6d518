//! Files of adapters: what is kept, and the names of other programs.

use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::{LayerNames, LinearLayer, Lora, LoraSettings};
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::tempdir;

use super::common::{Result, chain, max_difference, seeded, wave};
use super::lora::{NAMES, PREFIXES, filled, forward, layers, weights};

#[test]
fn files_keep_the_adapter_with_its_scale_folded_in() -> Result<()> {
    let _guard = seeded(4);
    let folder = tempdir()?;
    let path = folder.path().join("lora.safetensors");
    let (lora, weights) = (filled()?, weights(Kind::Float));
    lora.save(&path, PREFIXES[0])?;
    let stored = read_tensors(&path)?;
    assert_eq!(stored.len(), 6);
    let pair = &lora.pairs()["blocks.0.out"];
    assert_eq!(stored["model.blocks.0.out.lora_A.weight"], pair.down.detach());
    assert_eq!(stored["model.blocks.0.out.lora_B.weight"], (&pair.up * 3.0).detach());

    // As others write it: another prefix, and alphas beside pairs without scale.
    let other = folder.path().join("other.safetensors");
    let mut tensors = Parameters::new();
    for (name, tensor) in lora.parameters() {
        tensors.insert(format!("other.{name}"), tensor.detach());
    }
    for layer in lora.pairs().keys() {
        tensors.insert(format!("other.{layer}.alpha"), Tensor::from(6f32));
    }
    write_tensors(&other, &tensors)?;
    for path in [&path, &other] {
        let loaded = Lora::load(path, &layers(), NAMES, Device::Cpu)?;
        assert!(loaded.parameters().iter().all(|(_, leaf)| leaf.requires_grad()));
        for (layer, [_, inputs]) in layers() {
            let x = wave(&[3, inputs], 0.7, Kind::Float);
            let expected = forward(&lora, &weights, &layer, &x)?;
            let found = forward(&loaded, &weights, &layer, &x)?;
            let size = expected.abs().max().double_value(&[]);
            assert!(max_difference(&found, &expected) < 1e-6 * size, "{layer}");
        }
    }
    Ok(())
}

/// One adapter in the names of kohya, of older diffusers and of peft, with stacked and renamed layers.
#[test]
fn names_of_other_programs_are_those_of_the_model() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let layers: Vec<LinearLayer> = [("a.q", [3, 4]), ("a.k", [2, 4]), ("a.o.0", [4, 3])]
        .map(|(name, shape)| (name.to_owned(), shape))
        .into();
    let float = |shape: &[i64], phase| wave(shape, phase, Kind::Float);
    let (down, up) = (float(&[2, 4], 0.1), float(&[5, 2], 0.9));
    let (last_down, last_up) = (float(&[1, 3], 0.4), float(&[4, 1], 0.2));
    let written = |ends: [&str; 2], stacked: &str, last: &str| {
        Parameters::from([
            (format!("{stacked}.{}", ends[0]), down.shallow_clone()),
            (format!("{stacked}.{}", ends[1]), up.shallow_clone()),
            (format!("{stacked}.alpha"), Tensor::from(1f32)),
            (format!("{last}.{}", ends[0]), last_down.shallow_clone()),
            (format!("{last}.{}", ends[1]), last_up.shallow_clone()),
        ])
    };
    for (ends, stacked, last) in [
        (["lora_down.weight", "lora_up.weight"], "lora_unet_a_qk", "lora_unet_a_o_0"),
        (["lora_down.weight", "lora_up.weight"], "lora_unet_a_qk", "lora_unet_a_last"),
        (["lora.down.weight", "lora.up.weight"], "model.a.qk", "model.a.o.0"),
        (["lora_A.default.weight", "lora_B.default.weight"], "model.a.qk", "other.a.last"),
    ] {
        let tensors = written(ends, stacked, last);
        write_tensors(&path, &tensors)?;
        let lora = Lora::load(&path, &layers, NAMES, Device::Cpu)?;
        let pair = |layer: &str| -> Result<_> { Ok(lora.pair(layer).ok_or(layer.to_owned())?) };
        // Half the size, by an alpha of 1 at rank 2.
        let half = &up * 0.5;
        for (layer, start, rows) in [("a.q", 0, 3), ("a.k", 3, 2)] {
            assert_eq!(pair(layer)?.down.detach(), down, "{stacked}");
            assert_eq!(pair(layer)?.up.detach(), half.narrow(0, start, rows), "{stacked}");
        }
        assert_eq!(pair("a.o.0")?.up.detach(), last_up, "{last}");

        // Of the stacked rows one too few.
        let mut fewer = written(ends, stacked, last);
        drop(fewer.insert(format!("{stacked}.{}", ends[1]), up.narrow(0, 0, 4)));
        write_tensors(&path, &fewer)?;
        let error = chain(&Lora::load(&path, &layers, NAMES, Device::Cpu).unwrap_err());
        assert!(error.contains("expected [5, 2]"), "{error}");
    }
    let mut tensors = written(["lora_A.weight", "lora_B.weight"], "model.a.qk", "model.a.o.0");
    drop(tensors.insert("model.a.q.lora_A.weight".to_owned(), down.shallow_clone()));
    write_tensors(&path, &tensors)?;
    let error = chain(&Lora::load(&path, &layers, NAMES, Device::Cpu).unwrap_err());
    assert!(error.contains("twice"), "{error}");
    Ok(())
}

/// peft leaves alpha and rank in a file beside the adapter's own.
#[test]
fn the_scale_of_an_adapter_of_peft_is_in_the_file_beside_it() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("adapter_model.safetensors");
    let names = LayerNames { prefixes: &["model.", "base_model.model."], ..NAMES };
    let (down, up) = (wave(&[2, 4], 0.1, Kind::Float), wave(&[6, 2], 0.9, Kind::Float));
    let mut tensors = Parameters::from([
        ("base_model.model.blocks.0.in.lora_A.weight".to_owned(), down),
        ("base_model.model.blocks.0.in.lora_B.weight".to_owned(), up.shallow_clone()),
    ]);
    write_tensors(&path, &tensors)?;
    let load = || Lora::load(&path, &layers(), names, Device::Cpu);
    let refused = || chain(&load().unwrap_err());
    assert!(refused().contains("adapter_config.json"), "{}", refused());

    let beside = folder.path().join("adapter_config.json");
    assert_eq!(Lora::settings_file(&path)?, Some(beside.clone()));
    let settings = |text: &str| std::fs::write(&beside, text);
    settings(
        r#"{ "peft_type": "LORA", "r": 2, "lora_alpha": 16, "rank_pattern": {}, "init_lora_weights": true }"#,
    )?;
    assert_eq!(load()?.pair("blocks.0.in").ok_or("a pair")?.up.detach(), &up * 8.0);
    for (text, part) in [
        (r#"{ "r": 4, "lora_alpha": 16 }"#, "another rank"),
        (r#"{ "r": 2 }"#, "lora_alpha"),
        (r#"{ "r": 2, "lora_alpha": 16, "init_lora_weights": "pissa" }"#, "init_lora_weights"),
        (r#"{ "r": 2, "lora_alpha": 16, "peft_type": "LOHA" }"#, "peft_type"),
        (r#"{ "r": 2, "lora_alpha": 16, "use_rslora": true }"#, "use_rslora"),
        (r#"{ "r": 2, "lora_alpha": 16, "alpha_pattern": { "in": 4 } }"#, "alpha_pattern"),
        ("{", "adapter_config.json"),
    ] {
        settings(text)?;
        assert!(refused().contains(part), "{text}: {}", refused());
    }

    // An alpha of the layer's own, a whole number too, needs no settings, and is not said twice.
    drop(tensors.insert("base_model.model.blocks.0.in.alpha".to_owned(), Tensor::from(4i64)));
    write_tensors(&path, &tensors)?;
    settings(r#"{ "r": 2, "lora_alpha": 16 }"#)?;
    assert!(refused().contains("again in tensors of alpha"), "{}", refused());
    std::fs::remove_file(&beside)?;
    assert_eq!(Lora::settings_file(&path)?, None);
    assert_eq!(load()?.pair("blocks.0.in").ok_or("a pair")?.up.detach(), &up * 2.0);
    Ok(())
}

#[test]
fn integers_are_no_adapter_and_a_bound_holds() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("adapter.safetensors");
    let lora = filled()?;
    let bound = lora.bound()?;
    for pair in lora.pairs().values() {
        let update = pair.up.detach().matmul(&pair.down.detach()) * pair.scale;
        assert!(update.abs().max().double_value(&[]) <= bound);
    }
    let none = Lora::new(&layers(), &LoraSettings::on(["in"]), Device::Cpu)?;
    assert_eq!(none.bound()?, 0.0);
    {
        let _guard = tch::no_grad_guard();
        let mut first = none.pairs()["blocks.0.in"].up.shallow_clone();
        let _ = first.fill_(f64::NAN);
    }
    assert!(none.bound()?.is_nan());

    lora.save(&path, "")?;
    let mut tensors = read_tensors(&path)?;
    let half = tensors.get_mut("blocks.0.in.lora_A.weight").ok_or("a half")?;
    *half = (&*half * 100.0).to_kind(Kind::Int64);
    write_tensors(&path, &tensors)?;
    let error = chain(&Lora::load(&path, &layers(), NAMES, Device::Cpu).unwrap_err());
    assert!(error.contains("blocks.0.in.lora_A.weight is Int64"), "{error}");
    Ok(())
}
