//! Distils a text-to-image model of the Z-Image architecture into an 8-step generator without
//! guidance, by Decoupled DMD: the small model of this repository, or a released checkpoint
//! (docs/zimage.md).
//!
//! ```sh
//! ./with-libtorch cargo run --release --example zimage_8step                  # about ten minutes
//! cargo run --release --example zimage_8step -- --sample "google cat" --steps 8
//! ```

mod zimage;

use std::process::ExitCode;

use anyhow::{Result, ensure};
use tch::Device;
use zimage::options::Options;
use zimage::{embedded, released};

fn main() -> ExitCode {
    match Options::from_command_line().and_then(|options| run(&options)) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<ExitCode> {
    ensure!(options.count > 0, "--count must be at least 1");
    let is_released = released::is_released(&options.checkpoint);
    ensure!(
        is_released || options.prompt_file.is_none(),
        "--prompt-file is for released checkpoints: {} has neither text_encoder/ nor vae/",
        options.checkpoint.display()
    );
    if options.plan {
        return released::plan(options).map(|()| ExitCode::SUCCESS);
    }
    let (device, threads) = set_up(options)?;
    match &options.sample {
        Some(prompt) if is_released => released::sample(options, device, prompt)?,
        Some(caption) => embedded::sample(options, device, caption)?,
        None if is_released => return released::distil(options, device, threads),
        None => return embedded::distil(options, device, threads),
    }
    Ok(ExitCode::SUCCESS)
}

/// Chooses device and threads.
fn set_up(options: &Options) -> Result<(Device, i32)> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as i32);
    let threads = options.threads.unwrap_or(cores);
    ensure!(threads > 0, "--threads must be at least 1");
    tch::set_num_threads(threads);
    Ok((options.device.resolve()?, threads))
}
