//! The distillation of a model of a few thousand parameters, undisturbed and interrupted, and pairs for it.

mod alarms;
#[path = "../common/mod.rs"]
mod common;
mod distillation;
mod pairs;
mod resume;
