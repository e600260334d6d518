//! The distillation of a model of a few thousand parameters, undisturbed and interrupted, by one process and by
//! several, and pairs for it.

mod alarms;
#[path = "../common/mod.rs"]
mod common;
mod distillation;
mod pairs;
mod processes;
mod resume;
