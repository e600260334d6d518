//! What Z-Image computes, against values from diffusers and transformers that `scripts/reference/` wrote beside this file.

mod autoencoder;
#[path = "../common/mod.rs"]
mod common;
mod lora_file;
mod pipeline;
mod text;
mod transformer;
