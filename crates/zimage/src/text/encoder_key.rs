//! A key that tells text encoders apart whose features are cached.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::Kind;
use tch_training::run::Hash;

/// Names the text encoder of a diffusers folder that computes in `kind`.
///
/// This covers `text_encoder/config.json`, `tokenizer/tokenizer.json`, and of each weight file its
/// name, size and blocks of its content at even distances, so that another training of the same model
/// is another encoder, but a copy of the folder is not. A change that falls between the blocks (of a
/// few rows of one matrix, say) is not seen: reading all of 8 GB would take as long as encoding.
///
/// # Errors
/// If a file is missing or cannot be read.
pub fn encoder_key(folder: &Path, kind: Kind) -> Result<String> {
    let mut hash = Hash::default();
    hash.add(format!("{kind:?}").as_bytes());
    let weights = folder.join("text_encoder");
    for path in [weights.join("config.json"), folder.join("tokenizer").join("tokenizer.json")] {
        hash.add(&fs::read(&path).with_context(|| format!("reading {}", path.display()))?);
    }
    let mut files = Vec::new();
    for entry in fs::read_dir(&weights).with_context(|| format!("reading {}", weights.display()))? {
        let path = entry.with_context(|| format!("reading {}", weights.display()))?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            files.push(path);
        }
    }
    ensure!(!files.is_empty(), "there are no safetensors files in {}", weights.display());
    files.sort();
    for path in &files {
        hash.add(path.file_name().unwrap_or_default().as_encoded_bytes());
        hash.add_file(path)?;
    }
    Ok(hash.hex())
}
