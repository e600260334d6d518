//! Prompts to features, against transformers and diffusers (scripts/reference/text_encoder.py).

#[path = "../examples/zimage/mod.rs"]
mod zimage;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use serde::Deserialize;
use tch::{Device, Kind, Tensor};
use zimage::blocks::Parameters;
use zimage::checkpoint::{read_tensors, write_tensors};
use zimage::qwen3::Qwen3Encoder;
use zimage::text::{MAX_TOKENS, PromptTokenizer, TextEncoder, frame};

/// What the reference made of one prompt.
#[derive(Deserialize)]
struct Record {
    prompt: String,
    text: String,
    ids: Vec<i64>,
}

fn reference() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/text_encoder")
}

fn records() -> Vec<Record> {
    let text = fs::read_to_string(reference().join("prompts.json")).expect("the prompts");
    serde_json::from_str(&text).expect("records")
}

fn features() -> Parameters {
    read_tensors(&reference().join("features.safetensors")).expect("the features")
}

/// Norm of the difference over the norm of what is expected.
fn relative_error(found: &Tensor, expected: &Tensor) -> f64 {
    let double = |tensor: &Tensor| tensor.to_kind(Kind::Double);
    let norm = |tensor: Tensor| tensor.square().sum(Kind::Double).sqrt().double_value(&[]);
    norm(double(found) - double(expected)) / norm(double(expected))
}

#[test]
fn ids_equal_those_of_transformers() -> Result<()> {
    let tokenizer = PromptTokenizer::load(&reference().join("tokenizer/tokenizer.json"), 408)?;
    let records = records();
    for record in &records {
        assert_eq!(frame(&record.prompt), record.text);
        assert_eq!(tokenizer.encode(&record.prompt)?, record.ids, "{:?}", record.prompt);
    }
    assert!(records.iter().any(|record| record.ids.len() == MAX_TOKENS));
    assert!(records.iter().any(|record| record.prompt.is_empty()));
    Ok(())
}

#[test]
fn features_equal_those_of_the_pipeline() -> Result<()> {
    let encoder = TextEncoder::load(&reference(), Kind::Float, Device::Cpu)?;
    let (records, expected) = (records(), features());
    let prompts: Vec<&str> = records.iter().map(|record| record.prompt.as_str()).collect();
    let found = encoder.encode(&prompts)?;
    let mut worst: f64 = 0.0;
    for (index, found) in found.iter().enumerate() {
        let expected = &expected[&index.to_string()];
        assert_eq!(found.size(), [records[index].ids.len() as i64, encoder.width()]);
        assert_eq!(found.size(), expected.size());
        worst = worst.max(relative_error(found, expected));
    }
    println!("worst relative error in float32: {worst:.1e}");
    assert!(worst < 1e-5, "{worst}");
    Ok(())
}

#[test]
fn bfloat16_is_as_near_as_transformers_is() -> Result<()> {
    let encoder = TextEncoder::load(&reference(), Kind::BFloat16, Device::Cpu)?;
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
    let encoder = Qwen3Encoder::load(&reference().join("text_encoder"), Kind::Float, Device::Cpu)?;
    let whole = encoder.forward(&[5, 9, 300, 17])?;
    let part = encoder.forward(&[5, 9])?;
    assert!(relative_error(&whole.narrow(0, 0, 2), &part) < 1e-6);
    Ok(())
}
