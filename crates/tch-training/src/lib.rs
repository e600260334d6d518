//! What a trainer over [`tch`] lacks, for models of any kind. Not published, and no part of what decoupled-dmd
//! promises.
//!
//! | module | what it holds |
//! |---|---|
//! | [`parameters`] | tensors by name: checked, restored, put under a prefix |
//! | [`optimizer`] | AdamW with a state that can be saved, over libtorch's fused kernel |
//! | [`checkpointing`] | gradient checkpointing of any closures |
//! | [`ema`] | exponential moving average of weights |
//! | [`lora`] | low-rank adapters over frozen linear layers, and their files |
//! | [`safetensors`] | files of tensors, sharded ones too, read without a second copy |
//! | [`seed`] | a stream of random numbers for each thing that is drawn |
//! | [`run`] | a run's state, log, event files for TensorBoard, lock, interruption and fingerprints of its data |
//! | [`files`] | files that are there as a whole or not at all |
//!
//! No layer seeds the process: what draws random numbers takes them from libtorch's global generator, and says so.
#![warn(missing_docs)]

pub mod checkpointing;
mod dispatcher;
pub mod ema;
mod error;
pub mod files;
pub mod lora;
mod number;
pub mod optimizer;
pub mod parameters;
pub mod run;
pub mod safetensors;
pub mod seed;

pub use checkpointing::Tape;
pub use error::{BoxedError, Difference, Error, Fault, Result};
pub use optimizer::{AdamW, AdamWSettings};
pub use parameters::Parameters;
