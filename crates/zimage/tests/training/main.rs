//! The distillation of a model of a few thousand parameters, undisturbed and interrupted.

#[path = "../common/mod.rs"]
mod common;
mod distillation;
mod resume;
