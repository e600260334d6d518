//! The example `zimage_8step` as from the command line: options, refusals, training and sampling.

#[path = "../../examples/zimage_8step/commands.rs"]
mod commands;
#[path = "../../crates/zimage/tests/common/mod.rs"]
mod common;
mod continuing;
mod embedded;
mod export;
mod my_data;
mod my_model;
#[path = "../../examples/zimage_8step/options.rs"]
mod options;
mod processes;
mod released;
mod tensorboard;
mod trust;

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use common::small_pipeline::{SIDE, Workplace};
use options::Options;
use tch_c10d::Launch;

/// Does the work of the program in this process alone.
fn run(options: &Options) -> Result<ExitCode> {
    commands::run(options, &Launch::alone())
}

/// What the program would be told on the command line.
fn command_line(place: &Workplace, more: &[&str]) -> Vec<String> {
    let folder = |name: &str| place.0.path().join(name).display().to_string();
    let mut arguments = vec!["zimage_8step".to_owned()];
    for (option, value) in [("--checkpoint", folder("model")), ("--out", folder("out"))] {
        arguments.extend([option.to_owned(), value]);
    }
    arguments.extend(["--device", "cpu", "--threads", "1"].map(str::to_owned));
    if !more.contains(&"--size") {
        arguments.extend(["--size".to_owned(), SIDE.to_string()]);
    }
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    arguments
}

fn parsed(place: &Workplace, more: &[&str]) -> Result<Options> {
    Ok(Options::try_parse_from(command_line(place, more))?)
}
