//! The distillation of a model of a few thousand parameters, undisturbed and interrupted, by one process and by
//! several, pairs for it, and terms that give their own draws.

mod alarms;
#[path = "../common/mod.rs"]
mod common;
mod distillation;
mod given_draws;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[path = "../memory_plan/live_bytes.rs"]
mod live_bytes;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod long_run;
mod pairs;
mod processes;
mod resume;
