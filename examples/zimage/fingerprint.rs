//! Telling data apart without reading all of it.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Bytes read at either end of a file.
const SAMPLE: u64 = 1 << 20;

/// Folders of a checkpoint that a run reads.
const PARTS: [&str; 5] = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"];

/// [`fingerprint`] of those parts of a diffusers folder that there are: what else lies in it, a run of ours
/// for instance, is not the model.
///
/// # Errors
/// If a file cannot be read.
pub fn fingerprint_model(folder: &Path) -> Result<String> {
    let mut hash = Fnv::default();
    for part in PARTS {
        let path = folder.join(part);
        if path.exists() {
            hash.add(format!("{part} {}", fingerprint(&path)?).as_bytes());
        }
    }
    Ok(format!("{:016x}", hash.0))
}

/// A number for the content of a file or of all files in a folder: of their names, their lengths, and
/// the first and the last mebibyte of each. Weights that were trained differ there, and a checkpoint of
/// many gigabytes takes no time.
///
/// # Errors
/// If a file cannot be read.
pub fn fingerprint(path: &Path) -> Result<String> {
    let mut files = Vec::new();
    list(path, &mut files).with_context(|| format!("reading {}", path.display()))?;
    files.sort();
    let mut hash = Fnv::default();
    for file in files {
        let name = file.strip_prefix(path)?.to_string_lossy().into_owned();
        hash.add(name.as_bytes());
        add_file(&mut hash, &file).with_context(|| format!("reading {}", file.display()))?;
    }
    Ok(format!("{:016x}", hash.0))
}

fn list(path: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            list(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}

fn add_file(hash: &mut Fnv, path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    hash.add(&length.to_le_bytes());
    let mut bytes = Vec::new();
    file.by_ref().take(SAMPLE).read_to_end(&mut bytes)?;
    if length > SAMPLE {
        file.seek(SeekFrom::Start(SAMPLE.max(length.saturating_sub(SAMPLE))))?;
        file.take(SAMPLE).read_to_end(&mut bytes)?;
    }
    hash.add(&bytes);
    Ok(())
}

/// FNV-1a with 64 bits: unlike the standard library's hash, the same in every release.
struct Fnv(u64);

impl Default for Fnv {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Fnv {
    fn add(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}
