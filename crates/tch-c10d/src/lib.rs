//! Process groups of libtorch (c10d) for [`tch`] programs: collectives over Gloo and NCCL, and gradients
//! averaged over processes.
//!
//! # Data parallelism
//! Every process computes gradients of its own part of the batch, all average them, and all make the same
//! step. The program below is that for one process or many; the launcher's variables decide which.
//! ```
//! use tch::nn::{self, Module, OptimizerConfig};
//! use tch::{Device, Kind, Tensor};
//! use tch_c10d::{Averaging, ProcessGroup};
//!
//! let group = ProcessGroup::from_env()?;
//! let store = nn::VarStore::new(Device::Cpu);
//! let model = nn::linear(store.root(), 3, 1, Default::default());
//! let mut optimizer = nn::AdamW::default().build(&store, 1e-2)?;
//! let parameters = store.trainable_variables();
//!
//! // Equal parameters at first, and equal steps: equal parameters for ever.
//! for parameter in &parameters {
//!     group.broadcast(&mut parameter.shallow_clone(), 0)?;
//! }
//! // Unequal data: a different seed on each rank.
//! tch::manual_seed(group.rank() as i64);
//! for _ in 0..3 {
//!     let x = Tensor::randn([8, 3], (Kind::Float, Device::Cpu));
//!     let loss = (model.forward(&x) - x.sum_dim_intlist([1].as_slice(), true, Kind::Float)).square();
//!     optimizer.zero_grad();
//!     loss.mean(Kind::Float).backward();
//!     let averaged = group.average_gradients(&parameters, &Averaging::default().max_norm(1.0)?)?;
//!     assert!(averaged.norm > 0.0);
//!     optimizer.step();
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Starting it
//! The example `data_parallel` can be started in each of these ways; [`Launch::from_variables`] has the rules.
//! ```sh
//! ./data_parallel                                                # one process
//! torchrun --no-python --nproc-per-node=2 ./data_parallel        # Python for the launcher alone
//! mpirun -n 2 ./data_parallel
//! srun --ntasks=2 ./data_parallel
//! for rank in 0 1; do
//!     RANK=$rank WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500 ./data_parallel &
//! done
//! ```
//!
//! # Failures
//! Nothing hangs for ever, and nothing panics or aborts when a peer ends: every rank gets an [`Error`] that
//! names the rank and the operation, within the time-outs of [`Options`]. Calls that do not fit together are
//! found before any data is exchanged; see [`ProcessGroup`]. A launcher that restarts the processes, as
//! torchrun does with `--max-restarts`, then finds a fresh group.
//!
//! # Security
//! As in PyTorch, the store and the backends are neither encrypted nor authenticated, and rank 0 listens on
//! all interfaces: use them within a trusted network.
//!
//! # NCCL
//! The feature `nccl` needs a CUDA build of libtorch and, to compile, headers of CUDA and NCCL. It has been
//! compiled and linked, not run: see `build.rs`.
#![warn(missing_docs, missing_debug_implementations, unreachable_pub, clippy::missing_errors_doc)]
#![deny(unsafe_code)]
#![cfg_attr(not(test), deny(clippy::unwrap_used, clippy::expect_used, clippy::panic))]

mod agreement;
mod connection;
mod error;
mod ffi;
mod gradients;
mod group;
mod launch;
mod options;
mod rendezvous;

pub use error::{Error, Operation, Result};
pub use gradients::{Averaged, Averaging};
pub use group::ProcessGroup;
pub use launch::Launch;
pub use options::{Backend, Options, Reduce, Statistics};
