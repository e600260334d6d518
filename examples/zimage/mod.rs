//! Z-Image (S3-DiT) over `tch`, with what it takes to train one.
//!
//! Each program that includes this folder uses a part of it, hence these lints.
#![allow(dead_code, unreachable_pub, unused_imports)]

pub mod blocks;
pub mod checkpoint;
pub mod classifier;
pub mod config;
pub mod data;
pub mod dispatcher;
pub mod ema;
pub mod flow_matching;
pub mod metrics;
pub mod optimizer;
pub mod picture;
pub mod rope;
pub mod sampler;
pub mod transformer;

pub use config::Config;
pub use transformer::ZImageTransformer;
