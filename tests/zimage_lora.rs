//! Low-rank adapters: three roles over one frozen model.

#[path = "../examples/zimage/mod.rs"]
mod zimage;

mod common;

use std::path::{Path, PathBuf};

use anyhow::Result;
use common::{max_difference, seeded, value, wave};
use tch::{Device, Kind, Tensor};
use zimage::blocks::Parameters;
use zimage::checkpoint::{read_tensors, write_tensors};
use zimage::lora::{Lora, LoraSettings};
use zimage::{Config, Role, ZImageTransformer};

fn config() -> Config {
    Config {
        in_channels: 4,
        dim: 24,
        n_layers: 2,
        n_refiner_layers: 1,
        n_heads: 2,
        n_kv_heads: 2,
        cap_feat_dim: 8,
        axes_dims: vec![4, 4, 4],
        axes_lens: vec![96, 16, 16],
        ..Config::default()
    }
}

/// A model whose parameters are waves of a size at which every part matters.
fn model(kind: Kind) -> Result<ZImageTransformer> {
    let config = config();
    let parameters = config
        .parameters()
        .into_iter()
        .enumerate()
        .map(|(k, (name, shape))| {
            let values = wave(&shape, 0.9 * k as f64, Kind::Float);
            let tensor = match shape[..] {
                [_, columns] => values / (columns as f64).sqrt(),
                _ if name.ends_with("bias") => values * 0.1,
                _ => values * 0.1 + 1.0,
            };
            (name, tensor.to_kind(kind))
        })
        .collect();
    ZImageTransformer::from_parameters(config, parameters)
}

fn settings() -> LoraSettings {
    LoraSettings { rank: 3, alpha: 6.0, ..LoraSettings::default() }
}

/// Fills B, so that the adapter acts.
fn fill(lora: &Lora) -> Result<()> {
    let _guard = tch::no_grad_guard();
    for pair in lora.pairs().values() {
        let _ = pair.up.shallow_clone().f_normal_(0.0, 0.1)?;
    }
    Ok(())
}

struct Inputs {
    latents: Tensor,
    t: Tensor,
    captions: [Tensor; 2],
}

fn inputs() -> Inputs {
    Inputs {
        latents: wave(&[2, 4, 4, 6], 0.3, Kind::Float),
        t: Tensor::from_slice(&[0.25f32, 0.9]),
        captions: [wave(&[5, 8], 0.0, Kind::Float), wave(&[5, 8], 1.0, Kind::Float)],
    }
}

impl Inputs {
    fn run(&self, model: &ZImageTransformer, role: Role<'_>) -> Result<Tensor> {
        // In the model's dtype, so that double precision is not lost at the output.
        model.forward(&self.latents.to_kind(model.kind()), &self.t, &self.captions, role)
    }
}

/// The model with `W + scale B A` for weights.
fn merged_by_hand(model: &ZImageTransformer, lora: &Lora) -> Result<ZImageTransformer> {
    let _guard = tch::no_grad_guard();
    let mut parameters: Parameters = model.duplicate()?.named_parameters().into_iter().collect();
    for (module, pair) in lora.pairs() {
        let weight = parameters.get_mut(&format!("{module}.weight")).expect("a linear layer");
        *weight += (pair.up.matmul(&pair.down) * pair.scale).to_kind(weight.kind());
    }
    ZImageTransformer::from_parameters(model.config().clone(), parameters)
}

/// The adapter with its tensors in float64 and the scale folded in.
fn double(lora: &Lora) -> Result<Lora> {
    let _guard = tch::no_grad_guard();
    let scales: Vec<f64> = lora.pairs().values().flat_map(|pair| [1.0, pair.scale]).collect();
    let parameters = lora
        .parameters()
        .into_iter()
        .zip(scales)
        .map(|((name, tensor), scale)| (name, tensor.to_kind(Kind::Double) * scale))
        .collect();
    Lora::from_parameters(&config(), &parameters)
}

#[test]
fn a_new_adapter_is_the_base_bit_for_bit() -> Result<()> {
    let _guard = seeded(1);
    let inputs = inputs();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let model = model(kind)?;
        let lora = Lora::new(model.config(), &settings(), Device::Cpu)?;
        let base = inputs.run(&model, Role::BASE)?;
        assert_eq!(inputs.run(&model, Role::adapted(&lora))?, base, "{kind:?}");
        fill(&lora)?;
        let moved = max_difference(&inputs.run(&model, Role::adapted(&lora))?, &base);
        assert!(moved > 1e-2, "{kind:?}: a filled adapter moves the output by {moved}");
        assert_eq!(inputs.run(&model, Role::BASE)?, base, "{kind:?}");
    }
    Ok(())
}

/// All linear layers of the model, those outside the blocks included.
fn every_linear() -> LoraSettings {
    let targets = config().linears().into_iter().map(|(name, _)| name).collect();
    LoraSettings { targets, ..settings() }
}

#[test]
fn an_adapter_equals_merged_weights() -> Result<()> {
    let _guard = seeded(2);
    let inputs = inputs();
    let model = model(Kind::Float)?;
    for settings in [settings(), every_linear()] {
        let lora = Lora::new(model.config(), &settings, Device::Cpu)?;
        fill(&lora)?;
        let base = inputs.run(&model, Role::BASE)?;
        let adapted = inputs.run(&model, Role::adapted(&lora))?;
        let error =
            max_difference(&adapted, &inputs.run(&merged_by_hand(&model, &lora)?, Role::BASE)?);
        assert!(error < 1e-5, "float32: {error}");
        assert!(max_difference(&adapted, &base) > 1e-2);

        let (model, lora) = (model.cast(Kind::Double)?, double(&lora)?);
        let adapted = inputs.run(&model, Role::adapted(&lora))?;
        let error =
            max_difference(&adapted, &inputs.run(&merged_by_hand(&model, &lora)?, Role::BASE)?);
        assert!(error < 1e-12, "float64: {error}");
        println!("{} pairs: float64 error {error:.1e}", lora.pairs().len());
    }
    Ok(())
}

#[test]
fn bfloat16_base_trains_float32_pairs() -> Result<()> {
    let _guard = seeded(3);
    let inputs = inputs();
    let model = model(Kind::BFloat16)?;
    let lora = Lora::new(model.config(), &settings(), Device::Cpu)?;
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
    let new = || Lora::new(model.config(), &settings(), Device::Cpu);
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
    let lora = Lora::new(model.config(), &every_linear(), Device::Cpu)?;
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
    let lora = Lora::new(model.config(), &settings, Device::Cpu)?;
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
        let settings = LoraSettings { targets, ..LoraSettings::default() };
        Ok(settings.modules(&config)?.into_iter().map(|(name, _)| name).collect())
    };
    // Four blocks, three of them modulated.
    assert_eq!(LoraSettings::default().modules(&config)?.len(), 28);
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
    assert_eq!(LoraSettings::default().modules(&Config::default())?.len(), 7 * 34);
    Ok(())
}

#[test]
fn settings_are_checked() {
    let refused = |settings: LoraSettings, name: &str| {
        let error = Lora::new(&config(), &settings, Device::Cpu).expect_err(name).to_string();
        assert!(error.contains(name), "{error}");
    };
    refused(LoraSettings { rank: 0, ..settings() }, "rank");
    for alpha in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        refused(LoraSettings { alpha, ..settings() }, "alpha");
    }
    for dropout in [-0.1, 1.0, f64::NAN] {
        refused(LoraSettings { dropout, ..settings() }, "dropout");
    }
    let parsed: LoraSettings = serde_json::from_str(r#"{"rank": 8}"#).expect("settings");
    assert_eq!(parsed, LoraSettings { rank: 8, ..LoraSettings::default() });
    assert!(serde_json::from_str::<LoraSettings>(r#"{"ranks": 8}"#).is_err());
}

/// An empty folder below the build's own.
fn folder(name: &str) -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    if folder.exists() {
        std::fs::remove_dir_all(&folder)?;
    }
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

const REFERENCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/zimage_lora");

/// `scripts/reference/lora.py` wrote the adapter through diffusers' own save path.
#[test]
fn a_file_of_diffusers_gives_the_outputs_of_diffusers() -> Result<()> {
    let reference = Path::new(REFERENCE);
    let case = read_tensors(&reference.join("case.safetensors"))?;
    let inputs = Inputs {
        latents: case["latents"].shallow_clone(),
        t: case["t"].shallow_clone(),
        captions: [case["captions"].get(0), case["captions"].get(1)],
    };
    let model = model(Kind::Float)?;
    let path = reference.join("pytorch_lora_weights.safetensors");
    let lora = Lora::load(&path, model.config(), Device::Cpu)?;
    assert_eq!(lora.pairs().len(), 28);
    for (role, name) in [(Role::BASE, "base"), (Role::adapted(&lora), "adapted")] {
        let error = max_difference(&inputs.run(&model, role)?, &case[name]);
        println!("{name}: {error:.1e}");
        assert!(error < 1e-5, "{name}: {error}");
    }
    let merged = lora.merge(&model)?;
    let error = max_difference(&inputs.run(&merged, Role::BASE)?, &case["adapted"]);
    assert!(error < 1e-5, "merged: {error}");
    assert!(max_difference(&case["adapted"], &case["base"]) > 0.1);
    Ok(())
}

/// Leaves a folder that `scripts/reference/lora.py --check` compares with diffusers.
#[test]
fn a_saved_adapter_and_a_merged_model_give_the_same_outputs() -> Result<()> {
    let _guard = seeded(7);
    let folder = folder("zimage_lora")?;
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let lora = Lora::new(model.config(), &every_linear(), Device::Cpu)?;
    fill(&lora)?;
    let path = folder.join("lora.safetensors");
    lora.save(&path)?;
    let (base, adapted) =
        (inputs.run(&model, Role::BASE)?, inputs.run(&model, Role::adapted(&lora))?);

    let tensors = read_tensors(&path)?;
    assert_eq!(tensors.len(), 2 * lora.pairs().len());
    let module = "transformer.layers.1.attention.to_out.0";
    let up = &tensors[&format!("{module}.lora_B.weight")];
    let pair = &lora.pairs()["layers.1.attention.to_out.0"];
    assert_eq!(pair.scale, 2.0);
    assert_eq!(max_difference(up, &(&pair.up * 2.0)), 0.0);
    assert_eq!(tensors[&format!("{module}.lora_A.weight")], pair.down.detach());

    let loaded = Lora::load(&path, model.config(), Device::Cpu)?;
    let again = inputs.run(&model, Role::adapted(&loaded))?;
    assert!(max_difference(&again, &adapted) < 1e-6);
    assert!(loaded.parameters().iter().all(|(_, tensor)| tensor.requires_grad()));

    let merged = lora.merge(&model)?;
    for module in ["layers.0.attention_norm1", "cap_embedder.0"] {
        let name = format!("{module}.weight");
        assert_eq!(merged.parameters()[&name].data_ptr(), model.parameters()[&name].data_ptr());
    }
    assert_eq!(inputs.run(&model, Role::BASE)?, base, "merging changed the model");
    merged.save(&folder.join("merged"))?;
    model.save(&folder.join("base"))?;
    let merged = ZImageTransformer::load(&folder.join("merged"), Kind::Float, Device::Cpu)?;
    assert!(max_difference(&inputs.run(&merged, Role::BASE)?, &adapted) < 1e-5);

    let case = [
        ("latents", inputs.latents),
        ("t", inputs.t),
        ("captions", Tensor::stack(&[&inputs.captions[0], &inputs.captions[1]], 0)),
        ("base", base),
        ("adapted", adapted),
    ];
    let case = case.map(|(name, tensor)| (name.to_owned(), tensor)).into();
    write_tensors(&folder.join("case.safetensors"), &case)
}

#[test]
fn a_merge_keeps_the_dtype_and_adds_in_float32() -> Result<()> {
    let _guard = seeded(8);
    let model = model(Kind::BFloat16)?;
    let lora = Lora::new(model.config(), &settings(), Device::Cpu)?;
    fill(&lora)?;
    let merged = lora.merge(&model)?;
    let exact = merged_by_hand(&model.cast(Kind::Float)?, &lora)?;
    for (name, tensor) in merged.parameters() {
        assert_eq!(tensor.kind(), Kind::BFloat16, "{name}");
        assert_eq!(tensor, &exact.parameters()[name].to_kind(Kind::BFloat16), "{name}");
    }
    let other = ZImageTransformer::init(Config { n_layers: 1, ..config() }, Device::Cpu)?;
    let error = lora.merge(&other).expect_err("a model with fewer layers").to_string();
    assert!(error.contains("no linear layer layers.1."), "{error}");
    Ok(())
}

#[test]
fn files_of_other_programs_load_with_their_scale() -> Result<()> {
    let _guard = seeded(9);
    let folder = folder("zimage_lora_other")?;
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let lora = Lora::new(model.config(), &settings(), Device::Cpu)?;
    fill(&lora)?;
    let expected = inputs.run(&model, Role::adapted(&lora))?;
    let path = folder.join("other.safetensors");
    let error = |tensors: &Parameters| -> Result<f64> {
        write_tensors(&path, tensors)?;
        let loaded = Lora::load(&path, model.config(), Device::Cpu)?;
        Ok(max_difference(&inputs.run(&model, Role::adapted(&loaded))?, &expected))
    };
    for prefix in ["diffusion_model.", "transformer."] {
        for shape in [&[][..], &[1]] {
            let mut tensors = Parameters::new();
            for (module, pair) in lora.pairs() {
                let name = format!("{prefix}{module}");
                tensors.insert(format!("{name}.lora_A.weight"), pair.down.detach());
                tensors.insert(format!("{name}.lora_B.weight"), pair.up.detach());
                tensors.insert(format!("{name}.alpha"), Tensor::from(6.0f32).reshape(shape));
            }
            assert!(error(&tensors)? < 1e-5, "{prefix} {shape:?}");
        }
    }

    // Rank and alpha in the metadata, as diffusers writes them.
    let tensors = lora.parameters().into_iter().map(|(name, t)| (name, t.detach())).collect();
    assert!(error(&tensors)? > 1e-2, "the scale must matter");
    let plain = std::fs::read(&path)?;
    let with_metadata = |settings: &str| -> Result<Lora> {
        let (length, rest) = plain.split_at(8);
        let length = u64::from_le_bytes(length.try_into()?) as usize;
        let mut header: serde_json::Value = serde_json::from_slice(&rest[..length])?;
        header["__metadata__"] = serde_json::json!({ "lora_adapter_metadata": settings });
        let header = serde_json::to_vec(&header)?;
        let length = (header.len() as u64).to_le_bytes();
        std::fs::write(
            &path,
            [&length, &header[..], &rest[u64::from_le_bytes(plain[..8].try_into()?) as usize..]]
                .concat(),
        )?;
        Lora::load(&path, model.config(), Device::Cpu)
    };
    let loaded = with_metadata(r#"{"transformer.r": 3, "transformer.lora_alpha": 6}"#)?;
    assert!(max_difference(&inputs.run(&model, Role::adapted(&loaded))?, &expected) < 1e-5);
    for (settings, part) in [
        (r#"{"transformer.r": 3}"#, "lora_alpha"),
        (r#"{"transformer.r": 0, "transformer.lora_alpha": 6}"#, "positive r"),
        (
            r#"{"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.use_rslora": true}"#,
            "use_rslora",
        ),
        (
            r#"{"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.rank_pattern": {"w1": 2}}"#,
            "rank_pattern",
        ),
        ("rank 3", "parsing the metadata"),
    ] {
        let error = format!("{:#}", with_metadata(settings).expect_err(part));
        assert!(error.contains(part), "{error}");
    }
    Ok(())
}

#[test]
fn files_that_do_not_fit_are_refused() -> Result<()> {
    let _guard = seeded(10);
    let folder = folder("zimage_lora_broken")?;
    let config = config();
    let path = folder.join("broken.safetensors");
    let whole = || -> Result<Parameters> {
        let parameters = Lora::new(&config, &settings(), Device::Cpu)?.parameters();
        Ok(parameters.into_iter().map(|(name, tensor)| (name, tensor.detach())).collect())
    };
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let module = "transformer.layers.0.attention.to_q";
    let (down, up) = (format!("{module}.lora_A.weight"), format!("{module}.lora_B.weight"));
    type Change<'a> = &'a dyn Fn(&mut Parameters);
    let cases: [(&str, Change<'_>); 9] = [
        ("layers.0.attention.to_q.lora_B.weight is missing", &|p| drop(p.remove(&up))),
        ("layers.0.attention.to_q.lora_A.weight is missing", &|p| drop(p.remove(&down))),
        ("expected [r, 24] and [24, r]", &|p| drop(p.insert(up.clone(), zeros(&[24, 2])))),
        ("expected [r, 24] and [24, r]", &|p| drop(p.insert(down.clone(), zeros(&[3, 1])))),
        ("expected [r, 24] and [24, r]", &|p| drop(p.insert(down.clone(), zeros(&[])))),
        ("layers.9.attention.to_q.lora_A.weight belongs to no linear layer", &|p| {
            p.insert("transformer.layers.9.attention.to_q.lora_A.weight".into(), zeros(&[3, 24]));
        }),
        // diffusers loads nothing from names without a prefix.
        ("layers.0.attention.to_k.lora_A.weight belongs to no linear layer", &|p| {
            p.insert("layers.0.attention.to_k.lora_A.weight".into(), zeros(&[3, 24]));
        }),
        ("to_q.lora_A.weight holds numbers that are not finite", &|p| {
            p.insert(down.clone(), zeros(&[3, 24]).log());
        }),
        ("has an alpha but no", &|p| {
            p.insert("diffusion_model.layers.9.attention.to_q.alpha".into(), zeros(&[]));
        }),
    ];
    for (expected, change) in cases {
        let mut parameters = whole()?;
        change(&mut parameters);
        write_tensors(&path, &parameters)?;
        let error = Lora::load(&path, &config, Device::Cpu).expect_err(expected);
        let error = format!("{error:#}");
        assert!(error.contains(expected) && error.contains("broken.safetensors"), "{error}");
    }
    write_tensors(&path, &Parameters::new())?;
    assert!(Lora::load(&path, &config, Device::Cpu).is_err(), "an empty file");
    std::fs::write(&path, "not a safetensors file")?;
    assert!(Lora::load(&path, &config, Device::Cpu).is_err());
    assert!(Lora::load(&folder.join("absent.safetensors"), &config, Device::Cpu).is_err());
    Ok(())
}
