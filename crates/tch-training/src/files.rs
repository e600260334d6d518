//! Files that are there as a whole or not at all.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{BoxedError, Error, Result};

/// A JSON file as a value of a type.
///
/// # Errors
/// [`Error::File`] if the file cannot be read or is longer than [`LONGEST_JSON`], [`Error::Json`] if it cannot be
/// parsed.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    parse(&read_text(path)?, path)
}

/// The longest JSON file that is read, in bytes.
pub const LONGEST_JSON: u64 = 256 << 20;

/// The text of a JSON file.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let read = || {
        let mut text = String::new();
        open_file(path)?.take(LONGEST_JSON + 1).read_to_string(&mut text)?;
        if text.len() as u64 > LONGEST_JSON {
            return Err(io::Error::other(format!("it is longer than {LONGEST_JSON} bytes")));
        }
        Ok(text)
    };
    read().map_err(Error::file("reading", path))
}

/// Opens a file to read from. A pipe, from which reading may never end, is none.
pub(crate) fn open_file(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.is_file() {
        File::open(path)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"))
    }
}

/// A JSON text that stands in `path` as a value of a type.
pub(crate) fn parse<T: for<'de> Deserialize<'de>>(text: &str, path: &Path) -> Result<T> {
    serde_json::from_str(text)
        .map_err(|source| Error::Json { place: path.display().to_string(), source })
}

/// Writes a value as indented JSON; a crash leaves the old file or the new one.
///
/// # Errors
/// [`Error::Writing`] if the value cannot be written as JSON, or as [`write_atomically`].
pub fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    write_atomically(path, |temporary| -> Result<(), BoxedError> {
        Ok(fs::write(temporary, serde_json::to_string_pretty(value)? + "\n")?)
    })
}

/// Runs `write` on a temporary path and renames the outcome to `path`; it is on the disk then. A crash at any
/// moment leaves the old file or the new one.
///
/// ```
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use tch_training::files::write_atomically;
///
/// # let folder = tempfile::tempdir()?;
/// let path = folder.path().join("notes.txt");
/// write_atomically(&path, |temporary| std::fs::write(temporary, "a line\n"))?;
/// assert_eq!(std::fs::read_to_string(path)?, "a line\n");
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Writing`] if `write` fails or its outcome cannot be flushed, [`Error::File`] if that cannot be
/// renamed. The temporary file is gone in the first case.
pub fn write_atomically<E: Into<BoxedError>>(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<(), E>,
) -> Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".partial");
    let temporary = PathBuf::from(temporary);
    let written = write(&temporary)
        .map_err(Into::into)
        .and_then(|()| Ok(File::open(&temporary)?.sync_all()?));
    if let Err(source) = written {
        // Half a file is of no use, and a full disk is short of its room.
        let _ = fs::remove_file(&temporary);
        return Err(Error::Writing { path: path.to_owned(), source });
    }
    fs::rename(&temporary, path).map_err(Error::file("renaming to", path))?;
    sync_folder(path.parent().unwrap_or(Path::new("")))
}

/// Flushes a folder, so that new names in it survive a crash; flushing a file alone does not see to that.
///
/// # Errors
/// [`Error::File`] if the disk fails.
pub fn sync_folder(folder: &Path) -> Result<()> {
    // Elsewhere folders cannot be opened as files.
    if cfg!(unix) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)
            .and_then(|file| file.sync_all())
            .map_err(Error::file("flushing", folder))?;
    }
    Ok(())
}

/// Creates a folder, and those that it lies in.
///
/// # Errors
/// [`Error::File`] if it cannot be created.
pub fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::file("creating", folder))
}
