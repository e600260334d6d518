//! Files that are there as a whole or not at all.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A JSON file as a value of a type.
///
/// # Errors
/// If the file cannot be read or parsed.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
}

/// Writes a value as indented JSON; a crash leaves the old file or the new one.
///
/// # Errors
/// If the file cannot be written.
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_atomically(path, |temporary| {
        Ok(fs::write(temporary, serde_json::to_string_pretty(value)? + "\n")?)
    })
}

/// Runs `write` on a temporary path and renames the outcome to `path`; it is on the disk then.
///
/// # Errors
/// If the file cannot be written.
pub fn write_atomically(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let mut temporary = PathBuf::from(path).into_os_string();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    let written = write(&temporary).and_then(|()| Ok(File::open(&temporary)?.sync_all()?));
    if written.is_err() {
        // Half a file is of no use, and a full disk is short of its room.
        let _ = fs::remove_file(&temporary);
    }
    written.with_context(|| format!("writing {}", temporary.display()))?;
    fs::rename(&temporary, path)
        .map_err(Into::into)
        .and_then(|()| sync_folder(path.parent().unwrap_or(Path::new(""))))
        .with_context(|| format!("renaming to {}", path.display()))
}

/// Makes the names in a folder last, which syncing a file does not.
///
/// # Errors
/// If the disk fails.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // Elsewhere folders cannot be opened as files.
    if cfg!(unix) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

/// Creates a folder, and those that it lies in.
///
/// # Errors
/// If it cannot be created.
pub fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))
}
