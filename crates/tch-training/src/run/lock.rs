//! A lock on the folder of a run.

use std::fs::File;
use std::path::Path;

use fs4::{FileExt, TryLockError};

use crate::error::{Error, Result};

/// Keeps a second process out of a folder, as long as it lives; the system forgets it with the process.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock of a folder: that on the file `.lock` in it. Where the file system knows no locks, as
    /// some network drives, nobody is kept out.
    ///
    /// # Errors
    /// [`Error::Locked`] if another process has it, [`Error::File`] if the file cannot be made.
    pub fn take(folder: &Path) -> Result<Self> {
        let path = folder.join(".lock");
        let file = File::create(&path).map_err(Error::file("creating", &path))?;
        match FileExt::try_lock(&file) {
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { folder: folder.to_owned() }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lock_is_one_and_goes_with_its_owner() -> Result<(), Box<dyn std::error::Error>> {
        let folder = tempfile::tempdir()?;
        let lock = Lock::take(folder.path())?;
        let second = Lock::take(folder.path());
        assert!(matches!(second, Err(Error::Locked { .. })), "{second:?}");
        drop(lock);
        let _third = Lock::take(folder.path())?;
        let missing = Lock::take(&folder.path().join("missing"));
        assert!(matches!(missing, Err(Error::File { action: "creating", .. })), "{missing:?}");
        Ok(())
    }
}
