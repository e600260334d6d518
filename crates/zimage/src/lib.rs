//! Z-Image (S3-DiT) over `tch`, with everything that it takes to distil one. Not published, and no part of what
//! decoupled-dmd promises.
//!
//! | folder | what it holds |
//! |---|---|
//! | `model/` | the transformer: configuration, grid, rotary embedding, blocks, files, the memory it takes |
//! | `autoencoder/` | the decoder from latents to pictures |
//! | `text/` | the Qwen3 encoder, its tokenizer, a cache of features |
//! | `distil/` | student and fake score as roles of one model, the training loop, recipes, saved students |
//! | `emoji/` | the embedded text-to-image model: pictures, words, a classifier, scores |
#![warn(unreachable_pub)]

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
