//! Z-Image (S3-DiT) over `tch`, with what it takes to train one.
//!
//! No part of the promises of decoupled-dmd: what is public here is what its examples, tests and benchmarks use.
#![allow(dead_code, unreachable_pub, unused_imports)]

pub mod adapter;
pub mod autoencoder;
pub mod blocks;
pub mod checkpoint;
pub mod classifier;
pub mod config;
pub mod data;
pub mod dispatcher;
pub mod distillation;
pub mod ema;
pub mod embedded;
pub mod encoder_key;
pub mod evaluation;
pub mod failure;
pub mod features;
pub mod fingerprint;
pub mod flow_matching;
pub mod interrupt;
pub mod layout;
pub mod learner;
pub mod log;
pub mod lora;
pub mod lora_file;
pub mod mapping;
pub mod metrics;
pub mod model_card;
pub mod optimizer;
pub mod options;
pub mod picture;
pub mod pipeline;
pub mod plan;
pub mod prompts;
pub mod qwen3;
pub mod recipe;
pub mod released;
pub mod report;
pub mod rope;
pub mod safetensors;
pub mod student;
pub mod studio;
pub mod tape;
pub mod teacher_options;
pub mod text;
pub mod trained;
pub mod training;
pub mod training_state;
pub mod transformer;
pub mod weights;

pub use config::Config;
pub use lora::Role;
pub use transformer::ZImageTransformer;
