//! Telling data apart without reading all of it.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Files up to this size are hashed whole.
const WHOLE: u64 = 1 << 20;
/// Of larger files, this many blocks at even distances are hashed, the first and the last among them.
const BLOCKS: u64 = 256;
const BLOCK: u64 = 4096;

/// FNV-1a with 128 bits (Fowler, Noll, Vo). It tells texts and files apart that differ by accident; it does not
/// withstand somebody who makes two alike on purpose. The hash of the standard library may change with its version, and this one is kept on disk.
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

    /// Adds the size of a file, and its content or, of a large one, blocks of it.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be read.
    pub fn add_file(&mut self, path: &Path) -> Result<()> {
        self.try_add_file(path).map_err(Error::file("reading", path))
    }

    fn try_add_file(&mut self, path: &Path) -> io::Result<()> {
        let mut file = File::open(path)?;
        let size = file.metadata()?.len();
        self.add(&size.to_le_bytes());
        if size <= WHOLE {
            let mut content = Vec::new();
            file.read_to_end(&mut content)?;
            self.add(&content);
            return Ok(());
        }
        let mut block = [0; BLOCK as usize];
        let room = u128::from(size - BLOCK);
        for index in 0..BLOCKS {
            let start = room * u128::from(index) / u128::from(BLOCKS - 1);
            file.seek(SeekFrom::Start(start as u64))?;
            file.read_exact(&mut block)?;
            self.add(&block);
        }
        Ok(())
    }

    /// 32 hexadecimal digits.
    pub fn hex(&self) -> String {
        format!("{:032x}", self.0)
    }
}

/// A key for the content of a file or of all files in a folder: of their names, their lengths, and all of
/// small files or blocks of large ones. Another training changes weights everywhere, and a checkpoint of
/// many gigabytes takes no time.
///
/// # Errors
/// [`Error::File`] if a file cannot be read.
pub fn fingerprint(path: &Path) -> Result<String> {
    let mut files = Vec::new();
    list(path, &mut files).map_err(Error::file("reading", path))?;
    files.sort();
    let mut hash = Hash::default();
    for file in files {
        let name = file.strip_prefix(path).unwrap_or(&file).to_string_lossy().into_owned();
        hash.add(name.as_bytes());
        hash.add_file(&file)?;
    }
    Ok(hash.hex())
}

fn list(path: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    if path.is_dir() {
        for entry in fs::read_dir(path)? {
            list(&entry?.path(), files)?;
        }
    } else {
        files.push(path.to_owned());
    }
    Ok(())
}
