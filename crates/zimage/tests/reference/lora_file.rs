//! Adapters as files: round trips, files of other programs, broken files.

use std::path::Path;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::Lora;
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::tempdir;
use zimage::model::{ADAPTER_NAMES, ADAPTER_PREFIX};
use zimage::{Config, Role, ZImageTransformer};

use super::common::small_model::{
    Inputs, config, double, every_linear, fill, inputs, merged_by_hand, model, settings,
};
use super::common::{assert_float32, assert_rounding, max_difference, reference, seeded};

/// The output of an adapted model in float64.
fn exact(model: &ZImageTransformer, lora: &Lora) -> Result<Tensor> {
    inputs().run(&model.cast(Kind::Double)?, Role::adapted(&double(lora)?))
}

/// `scripts/reference/lora.py` wrote the adapter through diffusers' own save path.
#[test]
fn a_file_of_diffusers_gives_the_outputs_of_diffusers() -> Result<()> {
    let reference = reference("lora");
    let case = read_tensors(&reference.join("case.safetensors"))?;
    let inputs = Inputs {
        latents: case["latents"].shallow_clone(),
        t: case["t"].shallow_clone(),
        captions: [case["captions"].get(0), case["captions"].get(1)],
    };
    let model = model(Kind::Float)?;
    let path = reference.join("pytorch_lora_weights.safetensors");
    let lora = Lora::load(&path, &model.config().linears(), ADAPTER_NAMES, Device::Cpu)?;
    assert_eq!(lora.pairs().len(), 28);
    for (role, name) in [(Role::BASE, "base"), (Role::adapted(&lora), "adapted")] {
        assert_float32(&inputs.run(&model, role)?, &case, name);
    }
    let merged = model.merged(&lora, Device::Cpu)?;
    assert_float32(&inputs.run(&merged, Role::BASE)?, &case, "adapted");
    assert!(max_difference(&case["adapted"], &case["base"]) > 0.1);
    Ok(())
}

/// Leaves the folder `lora` below the build's own, which `scripts/reference/lora.py --check` compares with diffusers.
#[test]
fn a_saved_adapter_and_a_merged_model_give_the_same_outputs() -> Result<()> {
    let _guard = seeded(7);
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lora");
    std::fs::create_dir_all(&folder)?;
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let lora = Lora::new(&model.config().linears(), &every_linear(), Device::Cpu)?;
    fill(&lora)?;
    let path = folder.join("lora.safetensors");
    lora.save(&path, ADAPTER_PREFIX)?;
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

    let loaded = Lora::load(&path, &model.config().linears(), ADAPTER_NAMES, Device::Cpu)?;
    let again = inputs.run(&model, Role::adapted(&loaded))?;
    let exact = exact(&model, &lora)?;
    assert_rounding("loaded", &adapted, &again, &exact);
    assert!(loaded.parameters().iter().all(|(_, tensor)| tensor.requires_grad()));

    let merged = model.merged(&lora, Device::Cpu)?;
    for module in ["layers.0.attention_norm1", "cap_embedder.0"] {
        let name = format!("{module}.weight");
        assert_eq!(merged.parameters()[&name].data_ptr(), model.parameters()[&name].data_ptr());
    }
    assert_eq!(inputs.run(&model, Role::BASE)?, base, "merging changed the model");
    merged.save(&folder.join("merged"))?;
    model.save(&folder.join("base"))?;
    let merged = ZImageTransformer::load(&folder.join("merged"), Kind::Float, Device::Cpu)?;
    assert_rounding("merged", &adapted, &inputs.run(&merged, Role::BASE)?, &exact);

    let case = [
        ("latents", inputs.latents),
        ("t", inputs.t),
        ("captions", Tensor::stack(&[&inputs.captions[0], &inputs.captions[1]], 0)),
        ("base", base),
        ("adapted", adapted),
    ];
    let case = case.map(|(name, tensor)| (name.to_owned(), tensor)).into();
    Ok(write_tensors(&folder.join("case.safetensors"), &case)?)
}

#[test]
fn a_merge_keeps_the_dtype_and_adds_in_float32() -> Result<()> {
    let _guard = seeded(8);
    let model = model(Kind::BFloat16)?;
    let lora = Lora::new(&model.config().linears(), &settings(), Device::Cpu)?;
    fill(&lora)?;
    let merged = model.merged(&lora, Device::Cpu)?;
    let exact = merged_by_hand(&model.cast(Kind::Float)?, &lora)?;
    for (name, tensor) in merged.parameters() {
        assert_eq!(tensor.kind(), Kind::BFloat16, "{name}");
        assert_eq!(tensor, &exact.parameters()[name].to_kind(Kind::BFloat16), "{name}");
    }
    let other = ZImageTransformer::init(Config { n_layers: 1, ..config() }, Device::Cpu)?;
    let error =
        other.merged(&lora, Device::Cpu).expect_err("a model with fewer layers").to_string();
    assert!(error.contains("layers.1.attention.to_k belongs to no linear layer"), "{error}");
    Ok(())
}

#[test]
fn files_of_other_programs_load_with_their_scale() -> Result<()> {
    let _guard = seeded(9);
    let folder = tempdir()?;
    let folder = folder.path();
    let inputs = inputs();
    let model = model(Kind::Float)?;
    let lora = Lora::new(&model.config().linears(), &settings(), Device::Cpu)?;
    fill(&lora)?;
    let expected = inputs.run(&model, Role::adapted(&lora))?;
    let exact = exact(&model, &lora)?;
    let path = folder.join("other.safetensors");
    let output = |tensors: &Parameters| -> Result<Tensor> {
        write_tensors(&path, tensors)?;
        let loaded = Lora::load(&path, &model.config().linears(), ADAPTER_NAMES, Device::Cpu)?;
        inputs.run(&model, Role::adapted(&loaded))
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
            assert_rounding(&format!("{prefix} {shape:?}"), &expected, &output(&tensors)?, &exact);
        }
    }

    // Rank and alpha in the metadata, as diffusers writes them.
    let named = |(name, t): (String, Tensor)| (format!("transformer.{name}"), t.detach());
    let tensors: Parameters = lora.parameters().into_iter().map(named).collect();
    let moved = max_difference(&output(&tensors)?, &expected);
    assert!(moved > 1e-2, "the scale must matter");
    let plain = std::fs::read(&path)?;
    let with_metadata = |plain: &[u8], settings: &str| -> Result<Lora> {
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
        Ok(Lora::load(&path, &model.config().linears(), ADAPTER_NAMES, Device::Cpu)?)
    };
    let loaded = with_metadata(&plain, r#"{"transformer.r": 3, "transformer.lora_alpha": 6}"#)?;
    let found = inputs.run(&model, Role::adapted(&loaded))?;
    assert_rounding("metadata", &expected, &found, &exact);
    for (settings, part) in [
        (r#"{"transformer.r": 3}"#, "lora_alpha"),
        (r#"{"transformer.r": 0, "transformer.lora_alpha": 6}"#, "r must be positive"),
        (
            r#"{"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.use_rslora": true}"#,
            "use_rslora",
        ),
        (
            r#"{"transformer.r": 3, "transformer.lora_alpha": 6, "transformer.rank_pattern": {"w1": 2}}"#,
            "rank_pattern",
        ),
        (r#"{"transformer.r": 4, "transformer.lora_alpha": 6}"#, "another rank of"),
        ("rank 3", "parsing the metadata"),
    ] {
        let error = format!("{:#}", with_metadata(&plain, settings).expect_err(part));
        assert!(error.contains(part), "{error}");
    }
    // A scale that is said twice would be taken twice.
    let mut twice = tensors;
    for module in lora.pairs().keys() {
        twice.insert(format!("transformer.{module}.alpha"), Tensor::from(6.0f32));
    }
    write_tensors(&path, &twice)?;
    let settings = r#"{"transformer.r": 3, "transformer.lora_alpha": 6}"#;
    let refused = with_metadata(&std::fs::read(&path)?, settings).expect_err("two scales");
    assert!(format!("{refused:#}").contains("again in tensors of alpha"), "{refused:#}");
    Ok(())
}

#[test]
fn files_that_do_not_fit_are_refused() -> Result<()> {
    let _guard = seeded(10);
    let folder = tempdir()?;
    let folder = folder.path();
    let config = config();
    let path = folder.join("broken.safetensors");
    let whole = || -> Result<Parameters> {
        let parameters = Lora::new(&config.linears(), &settings(), Device::Cpu)?.parameters();
        let named = |(name, t): (String, Tensor)| (format!("transformer.{name}"), t.detach());
        Ok(parameters.into_iter().map(named).collect())
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
        ("is there twice", &|p| {
            p.insert("layers.0.attention.to_q.lora_A.weight".into(), zeros(&[3, 24]));
        }),
        ("to_q.lora_A.weight holds numbers that are not finite", &|p| {
            p.insert(down.clone(), zeros(&[3, 24]).log());
        }),
        ("has an alpha but no", &|p| {
            p.insert("diffusion_model.t_embedder.mlp.2.alpha".into(), zeros(&[]));
        }),
    ];
    for (expected, change) in cases {
        let mut parameters = whole()?;
        change(&mut parameters);
        write_tensors(&path, &parameters)?;
        let error =
            Lora::load(&path, &config.linears(), ADAPTER_NAMES, Device::Cpu).expect_err(expected);
        let error = format!("{:#}", anyhow::Error::from(error));
        assert!(error.contains(expected) && error.contains("broken.safetensors"), "{error}");
    }
    write_tensors(&path, &Parameters::new())?;
    assert!(
        Lora::load(&path, &config.linears(), ADAPTER_NAMES, Device::Cpu).is_err(),
        "an empty file"
    );
    std::fs::write(&path, "not a safetensors file")?;
    assert!(Lora::load(&path, &config.linears(), ADAPTER_NAMES, Device::Cpu).is_err());
    assert!(
        Lora::load(
            &folder.join("absent.safetensors"),
            &config.linears(),
            ADAPTER_NAMES,
            Device::Cpu
        )
        .is_err()
    );
    Ok(())
}
