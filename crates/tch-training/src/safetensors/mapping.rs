//! A file mapped into memory, whose pages can be given back.
#![allow(unsafe_code)]

use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use tch::{Device, Kind, Tensor};

use super::format::{Entry, FormatError};
use crate::error::{Error, Result};
use crate::files::open_file;

/// The bytes of a file, which the system reads when they are looked at.
#[derive(Debug)]
pub(super) struct Mapping {
    path: PathBuf,
    map: Mmap,
}

impl Mapping {
    /// Maps a file, reading nothing yet. The file must not be cut short or rewritten while it is in use;
    /// files of this program are replaced as a whole, which is no danger.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be opened or mapped.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = open_file(path).map_err(Error::file("opening", path))?;
        // SAFETY: the mapping is read-only, and that nobody changes the file is the condition above.
        let map = unsafe { Mmap::map(&file) }.map_err(Error::file("mapping", path))?;
        Ok(Self { path: path.to_owned(), map })
    }

    /// The whole file.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// A tensor of the file, cast and moved, without a copy in between.
    ///
    /// # Errors
    /// [`Error::Safetensors`] if the entry does not fit this file, [`Error::Torch`] if the tensor cannot be
    /// allocated.
    pub(super) fn copy_tensor(&self, entry: &Entry, kind: Kind, device: Device) -> Result<Tensor> {
        let count = entry
            .shape
            .iter()
            .try_fold(1, |count: usize, axis| count.checked_mul(usize::try_from(*axis).ok()?));
        let width = entry.kind.elt_size_in_bytes();
        let bytes = self
            .map
            .get(entry.bytes.clone())
            .filter(|bytes| count.and_then(|count| count.checked_mul(width)) == Some(bytes.len()))
            .ok_or_else(|| {
                self.broken(FormatError::Entry { entry: entry.clone(), bytes: self.map.len() })
            })?;
        if bytes.as_ptr().align_offset(width) != 0 {
            // Rare: files of today are aligned.
            let aligned = Tensor::f_from_data_size(bytes, &entry.shape, entry.kind)?;
            return Ok(aligned.f_to_device(device)?.f_to_kind(kind)?);
        }
        let mut copy = Tensor::f_empty(&entry.shape, (kind, device))?;
        // SAFETY: the bytes are as many as shape and kind need, aligned, and outlive the view, which is
        // only read from and does not leave this function. Every bit pattern is a number of these kinds.
        let view = unsafe {
            Tensor::f_from_blob(bytes.as_ptr(), &entry.shape, &[], entry.kind, Device::Cpu)?
        };
        copy.f_copy_(&view)?;
        Ok(copy)
    }

    /// The error of a fault in this file.
    pub(super) fn broken(&self, source: FormatError) -> Error {
        Error::Safetensors { path: self.path.clone(), source }
    }

    /// Gives the memory of a range back to the system. Its bytes stay valid: they are read from the file
    /// again if looked at again.
    pub(super) fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        if !range.is_empty() && range.end <= self.map.len() {
            // SAFETY: the pages are those of an unchanged file and were never written to, so reading
            // them again gives the same bytes. A refusal costs memory only.
            let _ = unsafe {
                self.map.unchecked_advise_range(
                    memmap2::UncheckedAdvice::DontNeed,
                    range.start,
                    range.len(),
                )
            };
        }
    }
}
