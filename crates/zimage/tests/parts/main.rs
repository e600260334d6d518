//! The parts of Z-Image one by one, on small models.

mod base;
#[path = "../common/mod.rs"]
mod common;
mod features;
mod hostile;
mod lora;
mod metrics;
mod model;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod out_of_memory;
mod pictures;
mod progress;
mod tape;
