//! The paper: its equations, its algorithm, and what implementations get wrong.

mod algorithm_1;
#[path = "../common/mod.rs"]
mod common;
mod equations;
mod pitfalls;
