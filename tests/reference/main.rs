//! What the library computes, against values from stock PyTorch that `scripts/reference/` wrote beside this file.

#[path = "../common/mod.rs"]
mod common;
mod fake_score;
mod objective;
mod paths;
mod terms;
