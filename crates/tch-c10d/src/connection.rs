//! The connections between the processes of a group.

use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use crate::ffi::{self, Failure, Place};
use crate::launch::StoreAddress;
use crate::options::{Backend, Options};
use crate::{Error, Launch, Operation, Result, rendezvous};

/// The connections of a group.
#[derive(Debug)]
pub(crate) struct Links {
    /// Tensors on the CPU, and the agreements.
    pub(crate) gloo: ffi::Group,
    /// Tensors on CUDA devices, where there is such a backend.
    pub(crate) nccl: Option<ffi::Group>,
}

/// Connects the ranks of a launch.
///
/// It does so on a thread of its own, which is left behind if it does not end: the store has no time-out where
/// something else answers at its port, or where its process stands still.
pub(crate) fn connect_within(
    launch: &Launch,
    address: &StoreAddress,
    options: &Options,
) -> Result<Links> {
    let rank = launch.rank();
    let limit = options.connect_timeout.saturating_mul(3);
    let (sender, receiver) = mpsc::channel();
    let (launch, moved, options) = (launch.clone(), address.clone(), *options);
    let failed = |reason: String| Error::Store { rank, address: address.to_string(), reason };
    thread::Builder::new()
        .name("tch-c10d connect".into())
        .spawn(move || sender.send(connect(&launch, &moved, &options)))
        .map_err(|error| failed(format!("no thread: {error}")))?;
    receiver.recv_timeout(limit).map_err(|_| failed(format!("no answer within {limit:.1?}")))?
}

fn connect(launch: &Launch, address: &StoreAddress, options: &Options) -> Result<Links> {
    let start = Instant::now();
    let store = rendezvous::meet(launch, address, options.connect_timeout)?;
    let place = Place {
        rank: launch.rank(),
        world_size: launch.world_size(),
        loopback: address.is_loopback(),
        connect: options.connect_timeout,
        timeout: options.timeout,
    };
    let connect = |prefix, kind| {
        ffi::Group::new(&store, prefix, kind, place)
            .map_err(|failure| lost(launch.rank(), Operation::Connect, start, failure))
    };
    let gloo = connect("gloo", ffi::Kind::Gloo)?;
    let nccl = match options.backend {
        Backend::Gloo => None,
        #[cfg(feature = "nccl")]
        Backend::Nccl => Some(connect("nccl", ffi::Kind::Nccl)?),
    };
    Ok(Links { gloo, nccl })
}

/// The error of an exchange that failed.
pub(crate) fn lost(rank: usize, operation: Operation, start: Instant, failure: Failure) -> Error {
    let reason = failure.reason;
    if failure.timed_out {
        Error::TimedOut { rank, operation, waited: start.elapsed(), reason }
    } else {
        Error::Peer { rank, operation, reason }
    }
}
