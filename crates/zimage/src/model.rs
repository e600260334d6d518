//! The Z-Image transformer (S3-DiT), its files, and the memory that its training takes.

mod blocks;
mod checkpoint;
mod config;
mod files;
mod grid;
mod layout;
mod memory_plan;
mod pipeline;
mod quantization;
mod role;
mod rope;
mod stack;
mod transformer;

pub use blocks::time_features;
pub(crate) use blocks::{Linear, RmsNorm};
pub use checkpoint::{Checkpoint, read_config};
pub use config::{BLOCK_LINEARS, Config, is_caption_side};
pub(crate) use config::{MOST_LAYERS, TIME_FEATURES};
pub use files::{ADAPTER_NAMES, ADAPTER_PREFIX};
pub(crate) use files::{OTHER_NAMES, WEIGHTS};
pub use grid::{Grid, padded};
pub use layout::{patchify, unpatchify};
pub use memory_plan::{MemoryPlan, Part, TrainingSetup};
pub(crate) use pipeline::INDEX;
pub use pipeline::Pipeline;
pub use quantization::Storage;
pub use role::Role;
pub use rope::rotary_factors;
pub use transformer::ZImageTransformer;
