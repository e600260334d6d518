//! What cached features are filed under: short keys for prompts and encoders.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::Kind;

/// Files up to this size are hashed whole.
const WHOLE: u64 = 1 << 20;
/// Of larger files, this many blocks at even distances are hashed, the first and the last among them.
const BLOCKS: u64 = 256;
const BLOCK: u64 = 4096;

/// FNV-1a with 128 bits (Fowler, Noll, Vo): tells texts and files apart by accident, not against
/// intent. The hash of the standard library may change with its version, and this one is kept on disk.
#[derive(Debug)]
pub struct Hash(u128);

impl Default for Hash {
    fn default() -> Self {
        Self(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }
}

impl Hash {
    /// Adds bytes and their number, so that neighbours cannot trade bytes.
    pub fn add(&mut self, bytes: &[u8]) {
        for byte in bytes.iter().chain(&(bytes.len() as u64).to_le_bytes()) {
            self.0 = (self.0 ^ u128::from(*byte))
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }

    /// 32 hexadecimal digits.
    pub fn hex(&self) -> String {
        format!("{:032x}", self.0)
    }
}

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
        add_file(&mut hash, path).with_context(|| format!("reading {}", path.display()))?;
    }
    Ok(hash.hex())
}

/// Adds the size of a file, and its content or blocks of it.
fn add_file(hash: &mut Hash, path: &Path) -> Result<()> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    hash.add(&size.to_le_bytes());
    if size <= WHOLE {
        let mut content = Vec::new();
        file.read_to_end(&mut content)?;
        hash.add(&content);
        return Ok(());
    }
    let mut block = [0; BLOCK as usize];
    let room = u128::from(size - BLOCK);
    for index in 0..BLOCKS {
        let start = room * u128::from(index) / u128::from(BLOCKS - 1);
        file.seek(SeekFrom::Start(start as u64))?;
        file.read_exact(&mut block)?;
        hash.add(&block);
    }
    Ok(())
}
