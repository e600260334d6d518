//! Helpers of the tests of Z-Image, and of the programs that train it.
#![allow(dead_code, unused_imports, reason = "each test program uses a part")]

pub mod narrow;
pub mod readers;
pub mod small_model;
pub mod small_pipeline;
#[path = "../../../../tests/common/tensors.rs"]
mod tensors;
pub mod tiny;

use std::path::{Path, PathBuf};

pub use tensors::*;

/// A file of the workspace, from whichever of its packages a test is.
pub fn workspace(path: &str) -> PathBuf {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = package.ancestors().find(|folder| folder.join("Cargo.lock").exists());
    root.expect("a workspace").join(path)
}

/// What the scripts in scripts/reference have made for Z-Image.
pub fn reference(path: &str) -> PathBuf {
    workspace("crates/zimage/tests/reference").join(path)
}
