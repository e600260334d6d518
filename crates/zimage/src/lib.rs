//! Z-Image (S3-DiT) over `tch`, with what it takes to train one.
//!
//! No part of the promises of decoupled-dmd: what is public here is what its examples, tests and benchmarks use.
#![allow(dead_code, unreachable_pub)]

pub mod autoencoder;
pub mod distil;
pub mod emoji;
pub mod failure;
pub mod model;
pub mod options;
pub mod picture;
pub mod teacher_options;
pub mod text;

pub mod dispatcher;
pub mod ema;
pub mod files;
pub mod fingerprint;
pub mod interrupt;
pub mod lock;
pub mod log;
pub mod lora;
pub mod mapping;
pub mod optimizer;
pub mod parameters;
pub mod progress;
pub mod safetensors;
pub mod seed;
pub mod tape;
pub mod training_state;
pub mod weights;

mod lora_file;

pub use model::{Config, Role, ZImageTransformer};
