//! The library on a CUDA device: the same numbers as on the CPU, every result on the device, and nothing that waits
//! for it in the loop.
//!
//! The device is pretended (`crates/pretend-cuda`) where libtorch has no CUDA half, and a true one elsewhere, on
//! which waits are not counted and what is drawn is not compared. The command is the same, but that cuDNN must not
//! round the inputs of convolutions to TF32, of ten bits:
//!
//! ```sh
//! NVIDIA_TF32_OVERRIDE=0 ./with-libtorch cargo test --test cuda
//! ```
//!
//! Bugs of these kinds fail a test here and none elsewhere; each was planted by hand:
//!
//! - a tensor left on the CPU: the times of a grid in `Sampler::times_like`;
//! - a generator of the CPU: the noise of `noise_like`, drawn on the CPU and moved;
//! - a new read in the loop: the range of the steps in `Trajectory::samples_at`.

#[path = "../common/mod.rs"]
mod common;
mod device;
mod frames;
mod launches;
mod sampling;
mod schedules;
mod setting;
mod terms;
mod training_loop;
