//! Z-Image and its distillation on a CUDA device, pretended or true: `tests/cuda/main.rs` of the workspace says more.

#[path = "../common/mod.rs"]
mod common;
#[path = "../../../../tests/cuda/device.rs"]
mod device;
mod distillation;
mod launches;
mod model;

use anyhow::Result;
use tch::{Device, Kind};
use zimage::ZImageTransformer;

use common::tiny;

/// The tiny teacher, in a dtype on a device.
fn teacher(device: Device, kind: Kind) -> Result<ZImageTransformer> {
    let teacher = tiny::teacher()?;
    let moved = teacher.parameters().iter();
    let moved = moved.map(|(name, tensor)| (name.clone(), tensor.to_device(device).to_kind(kind)));
    ZImageTransformer::from_parameters(teacher.config().clone(), moved.collect())
}
