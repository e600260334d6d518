//! Encodes prompts with the text encoder of a Z-Image model, once, on another machine for instance:
//! `zimage_8step --features` then runs no encoder for them, though it looks at its files to tell whether
//! the features are those of this model.
//!
//! ```sh
//! cargo run --release --example encode_prompts -- --model Z-Image --prompts prompts.txt --out features
//! ```
//! An interrupted run goes on where it was. The features are 5 KB a token in bfloat16, at most 2.6 MB a
//! prompt.

use std::path::PathBuf;

use anyhow::Result;
use clap::Parser;
use tch::Kind;
use zimage::device::{DeviceChoice, set_threads};
use zimage::text::{FeatureCache, read_prompts};

/// Encodes prompts with the text encoder of a Z-Image model.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    /// A diffusers folder with text_encoder/ and tokenizer/
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Text file in UTF-8, a prompt a line; the empty prompt is added
    #[arg(long, value_name = "FILE")]
    prompts: PathBuf,
    /// Folder for the features; what it holds already is kept
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Where to compute: auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Compute in float32 instead of bfloat16
    #[arg(long)]
    float32: bool,
    /// CPU threads of libtorch; all cores by default
    #[arg(long)]
    threads: Option<i32>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    set_threads(arguments.threads)?;
    let device = arguments.device.resolve()?;
    let kind = if arguments.float32 { Kind::Float } else { Kind::BFloat16 };
    let prompts = read_prompts(&arguments.prompts)?;
    println!("Encoding {} prompts on {device:?} in {kind:?}", prompts.len());
    let out = &arguments.out;
    let texts = prompts.iter().map(|prompt| prompt.text.as_str());
    let negatives = prompts.iter().filter_map(|prompt| prompt.negative.as_deref());
    let all: Vec<&str> = texts.chain(negatives).chain([""]).collect();
    FeatureCache::encode_observed(out, &arguments.model, (kind, device), &all)?;
    println!("Features of {} prompts and of the empty one in {}", prompts.len(), out.display());
    Ok(())
}
