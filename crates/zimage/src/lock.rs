//! A lock on the folder of a run.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result, bail};
use fs4::{FileExt, TryLockError};

/// Keeps a second process out of a folder, as long as it lives; the system forgets it with the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of a folder.
    ///
    /// # Errors
    /// If another process has it, or the file cannot be made.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(".lock");
        let file = File::create(&path).with_context(|| format!("creating {}", path.display()))?;
        match FileExt::try_lock(&file) {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {
                bail!("another process is at work in {}", folder.display())
            }
            // Some network drives cannot lock; that is no reason not to run there.
            Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}
