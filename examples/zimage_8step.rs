//! Distils a text-to-image model of the Z-Image architecture into an 8-step generator without
//! guidance, by Decoupled DMD: the small model of this repository, or a released checkpoint
//! (docs/zimage.md).
//!
//! ```sh
//! ./with-libtorch cargo run --release --example zimage_8step                  # less than ten minutes
//! cargo run --release --example zimage_8step -- --sample "google cat" --steps 8
//! torchrun --no-python --nproc-per-node=2 target/release/examples/zimage_8step   # docs/scale.md
//! ```

#[path = "zimage_8step/commands.rs"]
mod commands;
#[path = "zimage_8step/options.rs"]
mod options;

use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory as _, FromArgMatches as _};
use commands::{advice, run};
use options::Options;
use tch_c10d::Launch;
use zimage::distil::Preset;
use zimage::failure::described;

const EXAMPLES: &str = "\
Of your own prompts, on one GPU:
  zimage_8step --checkpoint Z-Image --prompt-file prompts.txt --plan       says what it takes
  zimage_8step --checkpoint Z-Image --prompt-file prompts.txt --out mine   trains the student in mine/student
  zimage_8step --checkpoint Z-Image --out mine --sample \"a red fox\"       makes a picture with it
docs/zimage.md leads through them.";

/// The command line of this process, or a message about what is wrong with it, after which the process ends.
fn from_command_line() -> Result<Options> {
    let command = Options::command().after_help(format!("{}\n{EXAMPLES}", Preset::table()?));
    Ok(Options::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit()))
}

fn main() -> ExitCode {
    from_command_line().and_then(|options| run(&options, &Launch::from_env()?)).unwrap_or_else(
        |error| {
            eprintln!("error: {}", described(&error));
            if let Some(advice) = advice(&error) {
                eprintln!("{advice}");
            }
            ExitCode::FAILURE
        },
    )
}
