//! Paths, and samples drawn along them.

#[path = "../common/mod.rs"]
mod common;
mod grids;
mod paths;
mod rollout;
mod trajectory;
