//! Laws across terms: what holds for every one of them, and for the objectives that they make up.

#[path = "../common/mod.rs"]
mod common;
mod conformance;
mod diagnostics;
mod frames;
mod left_out;
mod networks;
mod own_consistency;
mod processes;
mod properties;
mod seeds;
mod settings;
mod shapes_and_types;
mod sharing;
mod threads;
mod without_privilege;
