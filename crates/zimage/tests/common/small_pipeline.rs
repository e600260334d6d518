//! A whole small Z-Image folder, put together from what the scripts in scripts/reference have made.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tempfile::{TempDir, tempdir};

use super::reference;

/// Parts of the folder, and where they come from.
const PARTS: [(&str, &str); 5] = [
    ("text_encoder", "text_encoder/text_encoder"),
    ("tokenizer", "text_encoder/tokenizer"),
    ("vae", "autoencoder/two_levels/vae"),
    ("transformer", "pipeline/transformer"),
    ("scheduler", "pipeline/scheduler"),
];
/// Pixels to a side of the reference's pictures.
pub const SIDE: i64 = 24;

/// A folder of its own for one test.
pub struct Workplace(pub TempDir);

impl Workplace {
    pub fn new() -> Result<Self> {
        let place = Self(tempdir()?);
        for (part, source) in PARTS {
            copy(&reference(source), &place.model().join(part))?;
        }
        fs::write(place.0.path().join("prompts.txt"), "A red fox\nA cat\n")?;
        Ok(place)
    }

    pub fn model(&self) -> PathBuf {
        self.0.path().join("model")
    }

    pub fn out(&self) -> PathBuf {
        self.0.path().join("out")
    }
}

/// Copies the files of a folder.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let path = entry?.path();
        fs::copy(&path, to.join(path.file_name().expect("a file")))?;
    }
    Ok(())
}
