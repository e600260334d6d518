//! Prompts to features, against transformers and diffusers (scripts/reference/text_encoder.py).

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::{TempDir, tempdir};
use zimage::text::{MAX_TOKENS, PromptTokenizer, Qwen3Encoder, TextEncoder, frame};

use super::common::{assert_float32, assert_float64, reference};

/// The reference's tokens and features of one prompt.
#[derive(Deserialize)]
struct Record {
    prompt: String,
    text: String,
    ids: Vec<i64>,
}

fn original() -> PathBuf {
    reference("text_encoder")
}

fn records() -> Vec<Record> {
    records_of("prompts.json")
}

fn records_of(file: &str) -> Vec<Record> {
    let text = fs::read_to_string(original().join(file)).expect("the prompts");
    serde_json::from_str(&text).expect("records")
}

fn features() -> Parameters {
    read_tensors(&original().join("features.safetensors")).expect("the features")
}

/// Norm of the difference over the norm of what is expected.
fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let double = |tensor: &Tensor| tensor.to_kind(Kind::Double);
    let norm = |tensor: Tensor| tensor.square().sum(Kind::Double).sqrt().double_value(&[]);
    norm(double(found) - double(expected)) / norm(double(expected))
}

#[test]
fn ids_equal_those_of_transformers() -> Result<()> {
    let tokenizer = PromptTokenizer::load(&original().join("tokenizer/tokenizer.json"), 408)?;
    let records = records();
    for record in records.iter().chain(&records_of("strange_prompts.json")) {
        assert_eq!(frame(&record.prompt), record.text);
        assert_eq!(tokenizer.encode(&record.prompt)?.0, record.ids, "{:?}", record.prompt);
    }
    assert!(records.iter().any(|record| record.ids.len() == MAX_TOKENS));
    assert!(records.iter().any(|record| record.prompt.is_empty()));
    Ok(())
}

#[test]
fn features_equal_those_of_the_pipeline() -> Result<()> {
    let encoder = TextEncoder::load(&original(), Kind::Float, Device::Cpu)?;
    let (records, expected) = (records(), features());
    let prompts: Vec<&str> = records.iter().map(|record| record.prompt.as_str()).collect();
    let found = encoder.encode(&prompts)?;
    for (index, found) in found.iter().enumerate() {
        assert_eq!(found.size(), [records[index].ids.len() as i64, encoder.width()]);
        assert_float32(found, &expected, &index.to_string());
    }
    Ok(())
}

#[test]
fn bfloat16_is_as_near_as_transformers_is() -> Result<()> {
    let encoder = TextEncoder::load(&original(), Kind::BFloat16, Device::Cpu)?;
    let expected = features();
    for (index, record) in records().iter().enumerate() {
        let found = &encoder.encode(&[&record.prompt])?[0];
        assert_eq!(found.kind(), Kind::BFloat16);
        let exact = &expected[&index.to_string()];
        let Some(theirs) = expected.get(&format!("{index}/bfloat16")) else { continue };
        let (ours, theirs, apart) = (
            relative_error(found, exact),
            relative_error(theirs, exact),
            relative_error(found, theirs),
        );
        println!(
            "bfloat16, prompt {index}: ours {ours:.1e}, theirs {theirs:.1e}, apart {apart:.1e}"
        );
        assert!(ours < 1.3 * theirs && apart < 0.02, "{ours} {theirs} {apart}");
    }
    Ok(())
}

#[test]
fn a_feature_depends_on_earlier_tokens_alone() -> Result<()> {
    let encoder = Qwen3Encoder::load(&original().join("text_encoder"), Kind::Double, Device::Cpu)?;
    let whole = encoder.forward(&[5, 9, 300, 17])?;
    let part = encoder.forward(&[5, 9])?;
    assert_float64("earlier tokens", &whole.narrow(0, 0, 2), &part);
    Ok(())
}

/// A copy of the reference's folder that a test may spoil.
fn copy() -> TempDir {
    let folder = tempdir().expect("a temporary folder");
    for part in ["text_encoder", "tokenizer"] {
        fs::create_dir(folder.path().join(part)).expect("a folder");
        for file in fs::read_dir(original().join(part)).expect("the reference") {
            let file = file.expect("a file");
            fs::copy(file.path(), folder.path().join(part).join(file.file_name())).expect("a copy");
        }
    }
    folder
}

/// Changes the JSON file `path`.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("written");
}

/// The message of a refusal, causes included.
fn refusal<T>(result: Result<T>) -> String {
    format!("{:#}", result.err().expect("a refusal"))
}

fn load(folder: &Path) -> Result<TextEncoder> {
    TextEncoder::load(folder, Kind::Float, Device::Cpu)
}

#[test]
fn configs_of_older_files_are_read() -> Result<()> {
    let folder = copy();
    edit(&folder.path().join("text_encoder/config.json"), |config| {
        let fields = config.as_object_mut().expect("an object");
        fields.remove("rope_parameters");
        fields.remove("layer_types");
        fields.insert("rope_theta".into(), json!(1_000_000));
        fields.insert("rope_scaling".into(), Value::Null);
    });
    let found = &load(folder.path())?.encode(&["A red fox in the snow."])?[0];
    assert_float32(found, &features(), "0");
    Ok(())
}

#[test]
fn what_a_config_asks_for_in_vain_is_refused() {
    for (field, value, message) in [
        ("model_type", json!("llama"), "model_type must be qwen3, found llama"),
        ("hidden_act", json!("gelu"), "hidden_act gelu is not supported"),
        ("attention_bias", json!(true), "attention_bias is not supported"),
        ("use_sliding_window", json!(true), "use_sliding_window is not supported"),
        ("layer_types", json!(["sliding_attention"]), "sliding_attention is not supported"),
        ("rope_scaling", json!({"type": "yarn"}), "rope_scaling is not supported"),
        ("rope_parameters", json!({"rope_theta": 1e6, "rope_type": "yarn"}), "rope_type yarn"),
        ("rope_parameters", json!({}), "rope_theta is missing"),
        ("rope_parameters", json!({"rope_theta": -1.0}), "rope_theta must be positive, found -1"),
        ("quantization_config", json!({}), "quantization_config is not supported"),
        ("num_key_value_heads", json!(3), "num_attention_heads (4) must be a multiple"),
        ("num_key_value_heads", json!(0), "num_key_value_heads is out of range: 0"),
        ("vocab_size", json!(1_i64 << 60), "vocab_size is out of range"),
        ("head_dim", json!(15), "head_dim must be even, found 15"),
        ("head_dim", Value::Null, "parsing"),
        ("rms_norm_eps", json!(0.0), "rms_norm_eps must be positive, found 0"),
        // These are fine in themselves, but the weights are of another shape.
        (
            "hidden_size",
            json!(64),
            "model.embed_tokens.weight has shape [408, 32], expected [408, 64]",
        ),
        ("head_dim", json!(32), "self_attn.q_norm.weight has shape [16], expected [32]"),
        ("num_hidden_layers", json!(5), "model.layers.3.input_layernorm.weight is missing"),
        ("num_hidden_layers", json!(2), "model.layers.2.input_layernorm.weight is unexpected"),
    ] {
        let folder = copy();
        let path = folder.path().join("text_encoder/config.json");
        edit(&path, |config| config[field] = value.clone());
        let refusal = refusal(load(folder.path()));
        assert!(refusal.contains(message), "{field} {value}: {refusal}");
        assert!(refusal.contains("text_encoder"), "{refusal}");
    }
}

/// The reference's weights as one file.
fn weights(folder: &Path) -> Parameters {
    let folder = folder.join("text_encoder");
    let mut all = Parameters::new();
    for shard in ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"] {
        all.extend(read_tensors(&folder.join(shard)).expect("a shard"));
        fs::remove_file(folder.join(shard)).expect("removed");
    }
    fs::remove_file(folder.join("model.safetensors.index.json")).expect("removed");
    all
}

#[test]
fn only_the_weights_that_are_used_matter() -> Result<()> {
    let folder = copy();
    let file = folder.path().join("text_encoder/model.safetensors");
    let all = weights(folder.path());
    let check = |weights: &Parameters| -> Result<()> {
        write_tensors(&file, weights)?;
        let found = &load(folder.path())?.encode(&[""])?[0];
        assert_float32(found, &features(), "1");
        Ok(())
    };
    // Saved without a head, names have no prefix.
    let strip = |(name, tensor): (&String, &Tensor)| {
        (name.trim_start_matches("model.").to_owned(), tensor.shallow_clone())
    };
    check(&all.iter().map(strip).collect())?;

    let mut some = all;
    for name in some.keys().cloned().collect::<Vec<_>>() {
        if name.starts_with("model.layers.2.") || name == "model.norm.weight" {
            some.remove(&name);
        }
    }
    check(&some)?;
    some.insert(
        "model.layers.2.mlp.up_proj.weight".into(),
        Tensor::zeros([1], (Kind::Float, Device::Cpu)),
    );
    some.insert("lm_head.weight".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
    check(&some)?;

    let mut broken: Parameters =
        some.iter().map(|(name, tensor)| (name.clone(), tensor.copy())).collect();
    let norm = broken.get_mut("model.layers.1.input_layernorm.weight").expect("a norm");
    let _ = norm.fill_(f64::NAN);
    write_tensors(&file, &broken)?;
    let refused = refusal(load(folder.path())?.encode(&["a fox"]));
    assert!(refused.contains("features of \"a fox\" are not finite"), "{refused}");

    some.insert("model.vision.weight".into(), Tensor::zeros([1], (Kind::Float, Device::Cpu)));
    some.remove("model.layers.0.self_attn.k_norm.weight");
    write_tensors(&file, &some)?;
    let refusal = refusal(load(folder.path()));
    for fault in
        ["model.layers.0.self_attn.k_norm.weight is missing", "model.vision.weight is unexpected"]
    {
        assert!(refusal.contains(fault), "{refusal}");
    }
    Ok(())
}

#[test]
fn tokens_outside_the_vocabulary_are_refused() -> Result<()> {
    let model = Qwen3Encoder::load(&original().join("text_encoder"), Kind::Float, Device::Cpu)?;
    let last = model.config().vocab_size - 1;
    assert_eq!(model.forward(&[last])?.size(), [1, 32]);
    for id in [last + 1, -1, i64::MAX] {
        let refusal = refusal(model.forward(&[0, id]));
        assert!(refusal.contains(&format!("token {id} lies outside")), "{refusal}");
    }
    assert!(refusal(model.forward(&[])).contains("at least one token"));
    Ok(())
}

#[test]
fn tokenizers_that_do_not_fit_are_refused() {
    let check = |name: &str, spoil: &dyn Fn(&Path), message: &str| {
        let folder = copy();
        let path = folder.path().join("tokenizer/tokenizer.json");
        spoil(&path);
        let refusal = refusal(load(folder.path()));
        assert!(
            refusal.contains(message) && refusal.contains("tokenizer.json"),
            "{name}: {refusal}"
        );
    };
    check("gone", &|path| fs::remove_file(path).unwrap(), "reading");
    check("empty", &|path| fs::write(path, "").unwrap(), "parsing");
    check("list", &|path| fs::write(path, "[1, 2]").unwrap(), "parsing");
    check("bytes", &|path| fs::write(path, [0xff, 0xfe, 0]).unwrap(), "parsing");
    let cut = |path: &Path| {
        let bytes = fs::read(path).unwrap();
        fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
    };
    check("cut", &cut, "parsing");
    let unmarked = |path: &Path| edit(path, |json| json["added_tokens"] = json!([]));
    check("unmarked", &unmarked, "<|im_start|> must be one token");
    let far = |path: &Path| edit(path, |json| json["model"]["vocab"]["zebra"] = json!(5000));
    check("far", &far, "token \"zebra\" has id 5000, but the model's vocabulary ends at 407");
}

/// A tokenizer file may come with padding and truncation of whoever saved it.
#[test]
fn settings_of_the_tokenizer_file_are_not_used() -> Result<()> {
    let folder = copy();
    let path = folder.path().join("tokenizer/tokenizer.json");
    edit(&path, |json| {
        json["truncation"] = json!({
            "direction": "Left", "max_length": 8, "strategy": "LongestFirst", "stride": 0
        });
        json["padding"] = json!({
            "strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": null,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"
        });
    });
    let tokenizer = PromptTokenizer::load(&path, 408)?;
    for record in records() {
        assert_eq!(tokenizer.encode(&record.prompt)?.0, record.ids);
    }
    Ok(())
}
