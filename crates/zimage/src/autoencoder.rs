//! The autoencoder between pictures and latents.

mod blocks;
mod config;
mod decoder;

pub use config::{AutoencoderConfig, Half};
pub use decoder::{Autoencoder, Decoder};
