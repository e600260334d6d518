//! Distils a text-to-image model of the Z-Image architecture into an 8-step generator without
//! guidance, by Decoupled DMD: the small model of this repository, or a released checkpoint
//! (docs/zimage.md).
//!
//! ```sh
//! ./with-libtorch cargo run --release --example zimage_8step                  # less than ten minutes
//! cargo run --release --example zimage_8step -- --sample "google cat" --steps 8
//! ```

#[path = "zimage_8step/commands.rs"]
mod commands;
#[path = "zimage_8step/options.rs"]
mod options;

use std::process::ExitCode;

use commands::{advice, run};
use options::Options;
use zimage::failure::described;

fn main() -> ExitCode {
    Options::from_command_line().and_then(|options| run(&options)).unwrap_or_else(|error| {
        eprintln!("error: {}", described(&error));
        if let Some(advice) = advice(&error) {
            eprintln!("{advice}");
        }
        ExitCode::FAILURE
    })
}
