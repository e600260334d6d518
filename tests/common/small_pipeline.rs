//! A whole small Z-Image folder, put together from what the scripts in scripts/reference have made.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Parser;
use tempfile::{TempDir, tempdir};

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
            copy(&Path::new("tests/reference").join(source), &place.model().join(part))?;
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

    /// What `zimage_8step` would be told on the command line.
    pub fn arguments(&self, more: &[&str]) -> Vec<String> {
        let folder = |name: &str| self.0.path().join(name).display().to_string();
        let mut arguments = vec!["zimage_8step".to_owned()];
        for (option, value) in [("--checkpoint", folder("model")), ("--out", folder("out"))] {
            arguments.extend([option.to_owned(), value]);
        }
        arguments.extend(["--device", "cpu", "--threads", "1"].map(str::to_owned));
        if !more.contains(&"--size") {
            arguments.extend(["--size".to_owned(), SIDE.to_string()]);
        }
        arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
        arguments
    }

    pub fn options<Options: Parser>(&self, more: &[&str]) -> Result<Options> {
        Ok(Options::try_parse_from(self.arguments(more))?)
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
