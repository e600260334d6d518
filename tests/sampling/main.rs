//! Paths, and samples drawn along them.

#[path = "../common/mod.rs"]
mod common;
mod paths;
mod rollout;
mod trajectory;
