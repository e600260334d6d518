//! The log of a run: one JSON object a line.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use serde_json::json;
//! use tch_training::run::Log;
//!
//! # let folder = tempfile::tempdir()?;
//! let path = folder.path().join("metrics.jsonl");
//! let (mut log, _) = Log::open(&path, 0)?;
//! log.write(&json!({ "step": 1, "loss": 0.5 }))?;
//! let saved = log.sync()?; // keep this number with the state of the run
//! log.write(&json!({ "step": 2, "loss": 0.4 }))?;
//!
//! // The run goes on from the state, and logs step 2 again.
//! let (_log, lines) = Log::open(&path, saved)?;
//! assert_eq!(lines?, [json!({ "step": 1, "loss": 0.5 })]);
//! # Ok(())
//! # }
//! ```

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};

/// A log that can be cut back to where a state was saved, so that no line is lost or written twice.
#[derive(Debug)]
pub struct Log {
    path: PathBuf,
    file: File,
}

/// The lines of a log up to where it was cut, or why there are none.
pub type Lines = std::result::Result<Vec<Value>, LostLines>;

/// Why a log starts anew. The run can go on without it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LostLines {
    /// It is shorter than it was.
    #[error("{} has {found} bytes but had {expected} when the state was saved", path.display())]
    Short {
        /// The file.
        path: PathBuf,
        /// The bytes that it had.
        expected: u64,
        /// The bytes that it has.
        found: u64,
    },
    /// It holds something else than lines of JSON up to there.
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Log {
    /// Opens the log and forgets what is behind its first `bytes` bytes. Returns the lines before; a log that
    /// is shorter, or holds something else, starts anew.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read or written.
    pub fn open(path: &Path, bytes: u64) -> Result<(Self, Lines)> {
        let (file, lines) = cut(path, bytes).map_err(Error::file("opening", path))?;
        Ok((Self { path: path.to_owned(), file }, lines))
    }

    /// Adds a line.
    ///
    /// # Errors
    /// [`Error::File`] if it cannot be written.
    pub fn write(&mut self, line: &Value) -> Result<()> {
        // In one piece, without a buffer: the file can be watched.
        let written = self.file.write_all(format!("{line}\n").as_bytes());
        written.map_err(Error::file("writing", &self.path))
    }

    /// Flushes the log to the disk and returns its length in bytes.
    ///
    /// # Errors
    /// [`Error::File`] if the disk fails.
    pub fn sync(&mut self) -> Result<u64> {
        let length = self.file.sync_all().and_then(|()| Ok(self.file.metadata()?.len()));
        length.map_err(Error::file("flushing", &self.path))
    }
}

fn cut(path: &Path, bytes: u64) -> io::Result<(File, Lines)> {
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
    let mut file = options.open(path)?;
    let found = file.metadata()?.len();
    let lines = if found < bytes {
        Err(LostLines::Short { path: path.to_owned(), expected: bytes, found })
    } else {
        file.set_len(bytes)?;
        let parsed =
            |line: io::Result<String>| -> io::Result<Value> { Ok(serde_json::from_str(&line?)?) };
        // A log that was begun anew and has grown since is cut somewhere.
        BufReader::new(&file).lines().map(parsed).collect::<io::Result<_>>().map_err(|error| {
            LostLines::Unreadable { path: path.to_owned(), reason: error.to_string() }
        })
    };
    if lines.is_err() {
        file.set_len(0)?;
    }
    file.seek(SeekFrom::End(0))?;
    Ok((file, lines))
}
