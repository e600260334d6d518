//! Z-Image (S3-DiT) over `tch`, with what it takes to train one.
//!
//! No part of the promises of decoupled-dmd: what is public here is what its examples, tests and benchmarks use.
#![allow(dead_code, unreachable_pub)]

pub mod autoencoder;
pub mod device;
pub mod distil;
pub mod emoji;
pub mod failure;
pub mod model;
pub mod picture;
pub mod progress;
pub mod text;

pub use model::{Config, Role, ZImageTransformer};
