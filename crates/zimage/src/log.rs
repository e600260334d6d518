//! metrics.jsonl: one JSON object a line.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

/// A log that can be cut back to where a state was saved, so that no line is lost or written twice.
#[derive(Debug)]
pub struct Log {
    file: File,
}

impl Log {
    /// Opens the log and forgets what is behind its first `bytes` bytes. Returns the lines before. A log
    /// that is shorter, or holds something else, starts anew, with a warning: the run can go on without it.
    ///
    /// # Errors
    /// If the file cannot be read or written.
    pub fn open(path: &Path, bytes: u64) -> Result<(Self, Vec<Value>)> {
        Self::cut(path, bytes).with_context(|| format!("opening {}", path.display()))
    }

    fn cut(path: &Path, bytes: u64) -> Result<(Self, Vec<Value>)> {
        let options =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
        let mut file = options.open(path)?;
        let length = file.metadata()?.len();
        if length < bytes {
            eprintln!(
                "warning: {} has {length} bytes but had {bytes} when the training state was saved: it \
                 starts anew, without what was observed before",
                path.display()
            );
        }
        file.set_len(if length < bytes { 0 } else { bytes })?;
        let lines: Result<Vec<Value>> =
            BufReader::new(&file).lines().map(|line| Ok(serde_json::from_str(&line?)?)).collect();
        let lines = lines.or_else(|error| {
            // A log that was begun anew and has grown since is cut somewhere.
            eprintln!("warning: {} cannot be read and starts anew: {error}", path.display());
            file.set_len(0).map(|()| Vec::new())
        })?;
        file.seek(SeekFrom::End(0))?;
        Ok((Self { file }, lines))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        // In one piece, without a buffer: the file can be watched.
        Ok(self.file.write_all(format!("{line}\n").as_bytes())?)
    }

    /// Makes all lines last and returns their bytes.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn sync(&mut self) -> Result<u64> {
        self.file.sync_all()?;
        Ok(self.file.metadata()?.len())
    }
}
