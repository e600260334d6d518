//! Low-rank adapters on plain linear layers, and their files.

use tch::{Device, Kind, Tensor};
use tch_training::lora::{Dropout, LayerNames, LinearLayer, Lora, LoraSettings};
use tch_training::safetensors::{read_tensors, write_tensors};
use tch_training::{Error, Fault, Parameters};
use tempfile::tempdir;

use super::common::{Result, chain, max_difference, seeded, wave};

const PREFIXES: [&str; 3] = ["model.", "other.", "lora_unet_"];
const NAMES: LayerNames<'_> =
    LayerNames { prefixes: &PREFIXES, aliases: &[("qk", &["q", "k"]), ("last", &["o.0"])] };

fn layers() -> Vec<LinearLayer> {
    [("blocks.0.in", [6, 4]), ("blocks.0.out", [4, 6]), ("blocks.1.in", [6, 4])]
        .map(|(name, shape)| (name.to_owned(), shape))
        .into()
}

fn weights(kind: Kind) -> Parameters {
    let weight = |(index, (name, shape)): (usize, LinearLayer)| {
        (format!("{name}.weight"), wave(&shape, index as f64, kind) * 0.5)
    };
    layers().into_iter().enumerate().map(weight).collect()
}

/// Rank 2 at three times the plain scale on every layer, with a B that is not zero.
fn filled() -> Result<Lora> {
    let settings = LoraSettings { rank: 2, alpha: 6.0, ..LoraSettings::on(["in", "out"]) };
    let lora = Lora::new(&layers(), &settings, Device::Cpu)?;
    let _guard = tch::no_grad_guard();
    for (index, pair) in lora.pairs().values().enumerate() {
        pair.up.shallow_clone().copy_(&wave(&pair.up.size(), 0.3 * index as f64, Kind::Float));
    }
    Ok(lora)
}

fn forward(lora: &Lora, weights: &Parameters, layer: &str, x: &Tensor) -> Result<Tensor> {
    let output = x.f_linear(&weights[&format!("{layer}.weight")], None::<&Tensor>)?;
    Ok(lora.add_to(output, layer, x, Dropout::Off)?)
}

#[test]
fn a_pair_is_the_product_written_out_and_equals_merged_weights() -> Result<()> {
    let _guard = seeded(1);
    let (lora, weights) = (filled()?, weights(Kind::Float));
    let merged = lora.merged(&weights, Device::Cpu)?;
    for (layer, [_, inputs]) in layers() {
        let x = wave(&[3, inputs], 0.7, Kind::Float);
        let found = forward(&lora, &weights, &layer, &x)?.detach();
        let pair = lora.pair(&layer).ok_or("a pair")?;
        assert_eq!(pair.scale, 3.0);
        let double = |tensor: &Tensor| tensor.detach().to_kind(Kind::Double);
        let weight = &weights[&format!("{layer}.weight")];
        let effective = double(weight) + double(&pair.up).matmul(&double(&pair.down)) * 3.0;
        let exact = double(&x).matmul(&effective.transpose(0, 1));
        let size = exact.abs().max().double_value(&[]);
        // A few roundings of float32.
        assert!(max_difference(&found, &exact) < 1e-6 * size);
        assert!(max_difference(&merged[&format!("{layer}.weight")], &effective) < 1e-6 * size);
    }
    Ok(())
}

#[test]
fn a_new_adapter_changes_nothing_and_follows_the_generator() -> Result<()> {
    let settings = LoraSettings::on(["in"]);
    let new = |seed| -> Result<Lora> {
        let _guard = seeded(seed);
        Ok(Lora::new(&layers(), &settings, Device::Cpu)?)
    };
    let (lora, same, other) = (new(1)?, new(1)?, new(2)?);
    assert_eq!(lora.pairs().len(), 2);
    let down = |lora: &Lora| lora.pairs()["blocks.1.in"].down.detach();
    assert_eq!(down(&lora), down(&same));
    assert_ne!(down(&lora), down(&other));
    let x = wave(&[3, 4], 0.7, Kind::BFloat16);
    let plain = x.linear(&weights(Kind::BFloat16)["blocks.1.in.weight"], None::<&Tensor>);
    let adapted = lora.add_to(plain.copy(), "blocks.1.in", &x, Dropout::On)?;
    assert_eq!((adapted.kind(), &adapted), (Kind::BFloat16, &plain));
    // A layer without a pair.
    assert_eq!(lora.add_to(plain.copy(), "blocks.0.out", &x, Dropout::On)?, plain);
    Ok(())
}

#[test]
fn dropout_has_the_mean_of_the_pass_without() -> Result<()> {
    let _guard = seeded(3);
    let settings = LoraSettings { dropout: 0.5, ..LoraSettings::on(["blocks.0.in"]) };
    let lora = Lora::new(&layers(), &settings, Device::Cpu)?;
    assert!(lora.has_dropout());
    let _no_grad = tch::no_grad_guard();
    let mut up = lora.pairs()["blocks.0.in"].up.shallow_clone();
    up.copy_(&wave(&up.size(), 0.2, Kind::Float));
    let x = wave(&[2, 4], 0.1, Kind::Float);
    let run = |dropout| -> Result<Tensor> {
        let zero = Tensor::zeros([2, 6], (Kind::Float, Device::Cpu));
        Ok(lora.add_to(zero, "blocks.0.in", &x, dropout)?)
    };
    let still = run(Dropout::Off)?;
    assert_eq!(run(Dropout::Off)?, still);
    let outputs = (0..4000).map(|_| run(Dropout::On)).collect::<Result<Vec<_>>>()?;
    assert_ne!(outputs[0], outputs[1]);
    let outputs = Tensor::stack(&outputs, 0);
    let deviation = outputs.std_dim(0, true, false) / f64::sqrt(4000.0);
    let error = (outputs.mean_dim(0, false, Kind::Float) - still) / deviation;
    // Twelve numbers within four and a half deviations of their means.
    assert!(error.abs().max().double_value(&[]) < 4.5);
    Ok(())
}

#[test]
fn targets_are_names_or_whole_parts_of_them() -> Result<()> {
    let adapted = |targets: &[&str]| LoraSettings::on(targets.iter().copied()).adapted(&layers());
    let names = |targets: &[&str]| -> Result<Vec<String>> {
        Ok(adapted(targets)?.into_iter().map(|(name, _)| name).collect())
    };
    assert_eq!(names(&["in"])?, ["blocks.0.in", "blocks.1.in"]);
    assert_eq!(names(&["0.in", "in", "blocks.0.out"])?.len(), 3);
    for wrong in ["n", "blocks", "locks.0.in", "blocks.2.in", ""] {
        let error = adapted(&["in", wrong]).unwrap_err();
        assert!(matches!(&error, Error::NoSuchTarget { target } if target == wrong), "{error}");
    }
    let base = LoraSettings::on(["in"]);
    for (settings, name) in [
        (LoraSettings { rank: 0, ..base.clone() }, "rank"),
        (LoraSettings { rank: i64::MAX, ..base.clone() }, "rank"),
        (LoraSettings { alpha: 0.0, ..base.clone() }, "alpha"),
        (LoraSettings { alpha: f64::NAN, ..base.clone() }, "alpha"),
        (LoraSettings { dropout: 1.0, ..base.clone() }, "dropout"),
        (LoraSettings { dropout: f64::NAN, ..base.clone() }, "dropout"),
        (LoraSettings { targets: vec![], ..base }, "targets"),
    ] {
        let error = Lora::new(&layers(), &settings, Device::Cpu).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { what, .. } if what == name), "{error}");
    }
    Ok(())
}

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

#[test]
fn what_does_not_fit_is_listed() -> Result<()> {
    let _guard = seeded(5);
    let folder = tempdir()?;
    let path = folder.path().join("broken.safetensors");
    let whole = || -> Result<Parameters> {
        let parameters = filled()?.parameters().into_iter();
        Ok(parameters.map(|(name, tensor)| (format!("model.{name}"), tensor.detach())).collect())
    };
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let (down, up) = ("model.blocks.0.in.lora_A.weight", "model.blocks.0.in.lora_B.weight");
    let owned = |name: &str| name.to_owned();
    type Change<'a> = &'a dyn Fn(&mut Parameters);
    let cases: [(Fault, Change<'_>); 7] = [
        (Fault::Missing { name: owned("blocks.0.in.lora_B.weight") }, &|p| drop(p.remove(up))),
        (Fault::Missing { name: owned("blocks.0.in.lora_A.weight") }, &|p| drop(p.remove(down))),
        (
            Fault::Pair {
                layer: owned("blocks.0.in"),
                down: vec![2, 4],
                up: vec![6, 3],
                inputs: 4,
                outputs: 6,
            },
            &|p| drop(p.insert(owned(up), zeros(&[6, 3]))),
        ),
        (Fault::NoSuchLayer { name: owned("model.blocks.9.in.lora_A.weight") }, &|p| {
            p.insert(owned("model.blocks.9.in.lora_A.weight"), zeros(&[2, 4]));
        }),
        // A name without a prefix.
        (Fault::NoSuchLayer { name: owned("blocks.0.in.lora_A.weight") }, &|p| {
            p.insert(owned("blocks.0.in.lora_A.weight"), zeros(&[2, 4]));
        }),
        (Fault::NotFinite { name: owned(down) }, &|p| {
            p.insert(owned(down), zeros(&[2, 4]).log());
        }),
        (Fault::Twice { name: owned("other.blocks.0.in.lora_A.weight") }, &|p| {
            p.insert(owned("other.blocks.0.in.lora_A.weight"), zeros(&[2, 4]));
        }),
    ];
    for (expected, change) in cases {
        let mut parameters = whole()?;
        change(&mut parameters);
        write_tensors(&path, &parameters)?;
        let error = Lora::load(&path, &layers(), NAMES, Device::Cpu).unwrap_err();
        assert!(error.to_string().contains("broken.safetensors"), "{error}");
        let Error::In { source, .. } = error else { return Err("a file is named".into()) };
        let is_listed =
            matches!(&*source, Error::Tensors { faults, .. } if *faults == [expected.clone()]);
        assert!(is_listed, "{expected}: {source}");
    }
    write_tensors(&path, &Parameters::new())?;
    let error = Lora::load(&path, &layers(), NAMES, Device::Cpu).unwrap_err();
    assert!(chain(&error).ends_with("the adapter holds no pair"), "{}", chain(&error));

    let fewer: Parameters = weights(Kind::Float).into_iter().take(1).collect();
    let error = filled()?.merged(&fewer, Device::Cpu).unwrap_err().to_string();
    assert!(error.contains("blocks.1.in belongs to no linear layer"), "{error}");
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

    let settings = |text: &str| std::fs::write(Lora::settings_file(&path), text);
    settings(r#"{ "peft_type": "LORA", "r": 2, "lora_alpha": 16, "rank_pattern": {} }"#)?;
    assert_eq!(load()?.pair("blocks.0.in").ok_or("a pair")?.up.detach(), &up * 8.0);
    for (text, part) in [
        (r#"{ "r": 4, "lora_alpha": 16 }"#, "another rank"),
        (r#"{ "r": 2 }"#, "lora_alpha"),
        (r#"{ "r": 2, "lora_alpha": 16, "use_rslora": true }"#, "use_rslora"),
        (r#"{ "r": 2, "lora_alpha": 16, "alpha_pattern": { "in": 4 } }"#, "alpha_pattern"),
        ("{", "adapter_config.json"),
    ] {
        settings(text)?;
        assert!(refused().contains(part), "{text}: {}", refused());
    }

    // An alpha of the layer's own needs no settings.
    drop(tensors.insert("base_model.model.blocks.0.in.alpha".to_owned(), Tensor::from(4f32)));
    write_tensors(&path, &tensors)?;
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

#[test]
fn two_adapters_joined_do_what_both_do() -> Result<()> {
    let _guard = seeded(9);
    let (one, weights) = (filled()?, weights(Kind::Float));
    let settings = LoraSettings { rank: 1, alpha: 2.0, ..LoraSettings::on(["in"]) };
    let two = Lora::new(&layers(), &settings, Device::Cpu)?;
    {
        let _guard = tch::no_grad_guard();
        for pair in two.pairs().values() {
            pair.up.shallow_clone().copy_(&wave(&pair.up.size(), 0.2, Kind::Float));
        }
    }
    let (joined, frozen) = (one.joined(&two)?, two.frozen(0.5, Kind::Float, Device::Cpu)?);
    assert!(frozen.parameters().iter().all(|(_, tensor)| !tensor.requires_grad()));
    for (layer, [_, inputs]) in layers() {
        let x = wave(&[3, inputs], 0.7, Kind::Float);
        let first = forward(&one, &weights, &layer, &x)?;
        let expected = two.add_to(first, &layer, &x, Dropout::Off)?;
        let found = forward(&joined, &weights, &layer, &x)?;
        let size = expected.abs().max().double_value(&[]);
        assert!(max_difference(&found, &expected) < 1e-6 * size, "{layer}");

        let plain = x.f_linear(&weights[&format!("{layer}.weight")], None::<&Tensor>)?;
        let whole = forward(&two, &weights, &layer, &x)? - &plain;
        let half = forward(&frozen, &weights, &layer, &x)? - &plain;
        assert!(max_difference(&(half * 2.0), &whole) < 1e-6 * size, "{layer}");
    }
    Ok(())
}

#[test]
fn a_merge_says_what_it_keeps() -> Result<()> {
    let _guard = seeded(7);
    let lora = filled()?;
    let exact = weights(Kind::Float);
    let kept_of = |parameters: &Parameters| {
        lora.kept_by_merge(parameters, &lora.merged(parameters, Device::Cpu)?)
    };
    assert!((kept_of(&exact)? - 1.0).abs() < 1e-6);
    let kept = |kind: Kind, size: f64| -> Result<f64> {
        let large =
            exact.iter().map(|(name, weight)| (name.clone(), (weight * size).to_kind(kind)));
        Ok(kept_of(&large.collect())?)
    };
    // Weights far above the update: bfloat16 has eight bits, float32 enough.
    let (near, far) = (kept(Kind::BFloat16, 1.0)?, kept(Kind::BFloat16, 1e6)?);
    assert!((near - 1.0).abs() < 0.05 && far < 0.3, "{near} and {far}");
    assert!((kept(Kind::Float, 1e3)? - 1.0).abs() < 1e-3);
    Ok(())
}
