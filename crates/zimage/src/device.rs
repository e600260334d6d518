//! The device that a program computes on, and its threads.

use std::str::FromStr;

use anyhow::{Error, Result, bail, ensure};
use tch::Device;

/// A device as people name it: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug)]
pub enum DeviceChoice {
    /// The GPU if there is one, else the CPU.
    Auto,
    /// This one.
    Named(Device),
}

impl DeviceChoice {
    /// The device, where there is one.
    ///
    /// # Errors
    /// If a GPU was asked for that libtorch cannot use.
    pub fn resolve(self) -> Result<Device> {
        let best = decoupled_dmd::default_device();
        match self {
            Self::Auto => Ok(best),
            Self::Named(Device::Cuda(index)) => {
                let devices = tch::Cuda::device_count();
                ensure!(
                    (index as i64) < devices,
                    "device cuda:{index}: libtorch sees {devices} CUDA devices here"
                );
                Ok(Device::Cuda(index))
            }
            Self::Named(device) => Ok(device),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        Ok(match text {
            "auto" => Self::Auto,
            "cpu" => Self::Named(Device::Cpu),
            "cuda" => Self::Named(Device::Cuda(0)),
            _ => match text.strip_prefix("cuda:").and_then(|index| index.parse().ok()) {
                Some(index) => Self::Named(Device::Cuda(index)),
                None => bail!("expected auto, cpu, cuda or cuda:N"),
            },
        })
    }
}

/// Libtorch makes as many threads as it is told, whatever becomes of the process.
pub const MOST_THREADS: i32 = 1024;

/// Gives libtorch so many CPU threads, all cores if nothing is said.
///
/// # Errors
/// Unless the number is from 1 to [`MOST_THREADS`].
pub fn set_threads(threads: Option<i32>) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as i32);
    let threads = threads.unwrap_or(cores);
    ensure!(
        (1..=MOST_THREADS).contains(&threads),
        "threads must be from 1 to {MOST_THREADS}, found {threads}"
    );
    tch::set_num_threads(threads);
    Ok(())
}
