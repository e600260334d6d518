//! Safetensors files: sharded ones too, without a second copy of a tensor in memory, and safe with files of
//! strangers.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use tch::{Device, Kind, Tensor};
//! use tch_training::Parameters;
//! use tch_training::safetensors::{Weights, write_tensors};
//!
//! # let folder = tempfile::tempdir()?;
//! let bias = Tensor::from_slice(&[0.5f32, -1.0]);
//! write_tensors(
//!     &folder.path().join("model.safetensors"),
//!     &Parameters::from([("bias".to_owned(), bias.shallow_clone())]),
//! )?;
//! let weights = Weights::open(folder.path(), "model")?; // or model.safetensors.index.json and its shards
//! weights.check(&[("bias".to_owned(), vec![2])])?;
//! assert_eq!(weights.tensor("bias", Kind::Float, Device::Cpu)?, bias);
//! # Ok(())
//! # }
//! ```

mod format;
mod mapping;
mod weights;

use std::path::Path;

use tch::Tensor;

pub use format::{Entry, FormatError};
pub use weights::Weights;

use crate::error::Result;
use crate::files::write_atomically;
use crate::parameters::Parameters;

/// All tensors of a file by name, in the dtypes of the file, on the CPU.
///
/// # Errors
/// As [`Weights::open_file`].
pub fn read_tensors(path: &Path) -> Result<Parameters> {
    Weights::open_file(path)?.all()
}

/// Writes named tensors as a file; a crash leaves the old file or the new one.
///
/// # Errors
/// As [`write_atomically`].
pub fn write_tensors(path: &Path, tensors: &Parameters) -> Result<()> {
    let list = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    write_atomically(path, |temporary| Tensor::write_safetensors(&list, temporary))
}
