//! Low-rank adapters on plain linear layers, and their files.

use tch::{Device, Kind, Tensor};
use tch_training::lora::{Dropout, LayerNames, LinearLayer, Lora, LoraSettings};
use tch_training::safetensors::write_tensors;
use tch_training::{Error, Fault, Parameters};
use tempfile::tempdir;

use super::common::{Result, chain, max_difference, seeded, wave};

pub const PREFIXES: [&str; 3] = ["model.", "other.", "lora_unet_"];
pub const NAMES: LayerNames<'_> =
    LayerNames { prefixes: &PREFIXES, aliases: &[("qk", &["q", "k"]), ("last", &["o.0"])] };

pub fn layers() -> Vec<LinearLayer> {
    [("blocks.0.in", [6, 4]), ("blocks.0.out", [4, 6]), ("blocks.1.in", [6, 4])]
        .map(|(name, shape)| (name.to_owned(), shape))
        .into()
}

pub fn weights(kind: Kind) -> Parameters {
    let weight = |(index, (name, shape)): (usize, LinearLayer)| {
        (format!("{name}.weight"), wave(&shape, index as f64, kind) * 0.5)
    };
    layers().into_iter().enumerate().map(weight).collect()
}

/// Rank 2 at three times the plain scale on every layer, with a B that is not zero.
pub fn filled() -> Result<Lora> {
    let settings = LoraSettings { rank: 2, alpha: 6.0, ..LoraSettings::on(["in", "out"]) };
    let lora = Lora::new(&layers(), &settings, Device::Cpu)?;
    let _guard = tch::no_grad_guard();
    for (index, pair) in lora.pairs().values().enumerate() {
        pair.up.shallow_clone().copy_(&wave(&pair.up.size(), 0.3 * index as f64, Kind::Float));
    }
    Ok(lora)
}

pub fn forward(lora: &Lora, weights: &Parameters, layer: &str, x: &Tensor) -> Result<Tensor> {
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
