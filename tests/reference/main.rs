//! What the library computes, against values from stock PyTorch that `scripts/reference/` wrote beside this file.

#[path = "../common/mod.rs"]
mod common;
mod consistency;
mod exact_tangent;
mod fake_score;
#[path = "../../examples/exact_tangent/forward_mode.rs"]
mod forward_mode;
mod more_terms;
mod objective;
mod paths;
mod terms;
#[path = "../../examples/exact_tangent/ways.rs"]
mod ways;
