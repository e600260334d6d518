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
        let file = lock_file(folder)?;
        match FileExt::try_lock(&file) {
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { folder: folder.to_owned() }),
        }
    }

    /// The same, but waits for the process that has it.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be made.
    pub fn wait(folder: &Path) -> Result<Self> {
        let file = lock_file(folder)?;
        // A file system without locks keeps nobody out.
        let _ = FileExt::lock(&file);
        Ok(Self { _file: file })
    }
}

fn lock_file(folder: &Path) -> Result<File> {
    let path = folder.join(".lock");
    File::create(&path).map_err(Error::file("creating", &path))
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
        let path = folder.path().to_owned();
        let waiting = std::thread::spawn(move || Lock::wait(&path).map(|_lock| ()));
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiting.is_finished());
        drop(lock);
        waiting.join().expect("no panic")?;
        let _third = Lock::take(folder.path())?;
        let missing = Lock::take(&folder.path().join("missing"));
        assert!(matches!(missing, Err(Error::File { action: "creating", .. })), "{missing:?}");
        Ok(())
    }
}
