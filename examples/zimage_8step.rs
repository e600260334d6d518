//! Distils a text-to-image model of the Z-Image architecture into an 8-step generator without
//! guidance, by Decoupled DMD: the small model of this repository, or a released checkpoint
//! (docs/zimage.md).
//!
//! ```sh
//! ./with-libtorch cargo run --release --example zimage_8step                  # less than ten minutes
//! cargo run --release --example zimage_8step -- --sample "google cat" --steps 8
//! ```

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use zimage::failure::{described, is_other_run, is_out_of_memory};
use zimage::options::{Options, TEACHER, set_threads};
use zimage::{distil, emoji};

fn main() -> ExitCode {
    match Options::from_command_line().and_then(|options| run(&options)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {}", described(&error));
            if is_out_of_memory(&error) {
                eprintln!(
                    "A smaller --batch needs less memory; with a released model a smaller --size or --rank too, \
                     and --plan says what each takes"
                );
            }
            if is_other_run(&error) {
                eprintln!("Use its options, another --out, or --fresh, which forgets it");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode> {
    ensure!(options.count > 0, "--count must be at least 1, found {}", options.count);
    // A student of the embedded model is sampled without its teacher.
    let is_needed = options.sample.is_none() || options.checkpoint != Path::new(TEACHER);
    ensure!(
        options.checkpoint.is_dir() || !is_needed,
        "--checkpoint {}: there is no such folder",
        options.checkpoint.display()
    );
    let is_released = distil::run::is_released(&options.checkpoint);
    if options.plan {
        return distil::run::plan(options).map(|()| ExitCode::SUCCESS);
    }
    let threads = set_threads(options.threads)?;
    let device = options.device.resolve()?;
    match &options.sample {
        Some(prompt) if is_released => distil::run::sample(options, device, prompt)?,
        Some(caption) => emoji::run::sample(options, device, caption)?,
        None if is_released => return distil::run::train(options, device, threads),
        None => return emoji::run::train(options, device, threads),
    }
    Ok(ExitCode::SUCCESS)
}
