//! The one error type of the crate.

use std::fmt;
use std::time::Duration;

use tch::{Device, Kind, TchError};

/// What went wrong: on which rank, in which operation, what was expected, what was found.
///
/// The data are in the fields, so that callers can match on them; the words are made on display.
/// [`Error::leaves_group_usable`] tells a wrong call from a lost peer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A launcher's variable is missing or cannot be read.
    #[error("environment variable {variable}: expected {expected}, {}", found_value(found.as_deref()))]
    Environment {
        /// The variable.
        variable: &'static str,
        /// What it must be.
        expected: String,
        /// Its value, if it is set.
        found: Option<String>,
    },
    /// An argument is out of its range.
    #[error("{what}: expected {expected}, found {found}")]
    Argument {
        /// The argument.
        what: &'static str,
        /// Its range.
        expected: String,
        /// The value given.
        found: String,
    },
    /// Rank 0 cannot serve the store, for another program has the port.
    #[error("rank {rank}: port {port} is in use on this machine: choose another MASTER_PORT")]
    PortInUse {
        /// This process.
        rank: usize,
        /// The port.
        port: u16,
    },
    /// The store of rank 0 does not answer, or no longer.
    #[error("rank {rank}: store at {address}: {reason}")]
    Store {
        /// This process.
        rank: usize,
        /// Host and port.
        address: String,
        /// Libtorch's words.
        reason: String,
    },
    /// Ranks that did not come to the rendezvous in time.
    #[error("rank {rank}: ranks {missing:?} did not come within {waited:.1?}")]
    Absent {
        /// This process.
        rank: usize,
        /// The ranks that are missing.
        missing: Vec<usize>,
        /// How long rank 0 waited for them.
        waited: Duration,
    },
    /// Two processes have been given the same rank.
    #[error("rank {rank}: another process has this rank")]
    RankTaken {
        /// This process.
        rank: usize,
    },
    /// Two processes have been given different numbers of processes.
    #[error("rank {rank}: rank {other_rank} was started for {other} processes, not for {own}")]
    WorldSize {
        /// This process.
        rank: usize,
        /// The number that this process was given.
        own: usize,
        /// The process that differs.
        other_rank: usize,
        /// The number that it was given.
        other: usize,
    },
    /// A tensor's elements cannot be exchanged by this operation.
    #[error("rank {rank}: {operation}: expected {expected}, found {found:?}")]
    Kind {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
        /// The element types that it takes.
        expected: &'static str,
        /// The element type given.
        found: Kind,
    },
    /// A tensor's memory cannot be written in place.
    #[error("rank {rank}: {operation}: expected a dense tensor, found one that {found}")]
    Layout {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
        /// Why not.
        found: &'static str,
    },
    /// A tensor is on a device that no backend reaches.
    #[error(
        "rank {rank}: {operation}: expected a tensor on the CPU or a CUDA device, found one on {found:?}"
    )]
    Device {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
        /// The device given.
        found: Device,
    },
    /// A tensor has a graph, of which an operation in place would know nothing.
    #[error(
        "rank {rank}: {operation}: the tensor has a graph, through which no gradient would flow: detach it"
    )]
    Graph {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
    },
    /// Two ranks are at different points of the program, or call with different shapes.
    #[error("rank {rank}: {operation}: this rank calls {own}, rank {other_rank} calls {other}")]
    Disagree {
        /// This process.
        rank: usize,
        /// What this process calls.
        operation: Operation,
        /// The call in words, with type and shape.
        own: String,
        /// A rank that calls something else.
        other_rank: usize,
        /// Its call.
        other: String,
    },
    /// Ranks differ in the number of parameters whose gradients they average.
    #[error("rank {rank}: average_gradients: {own} parameters here, {other} on rank {other_rank}")]
    ParameterCount {
        /// This process.
        rank: usize,
        /// The number here.
        own: usize,
        /// A rank with another number.
        other_rank: usize,
        /// Its number.
        other: usize,
    },
    /// A parameter has a gradient on some ranks only.
    #[error(
        "rank {rank}: average_gradients: parameter {parameter} has a gradient on ranks {present:?}, not on ranks {absent:?}"
    )]
    GradientAbsent {
        /// This process.
        rank: usize,
        /// The first such parameter, as an index into the list.
        parameter: usize,
        /// The ranks that have its gradient.
        present: Vec<usize>,
        /// The ranks that have none.
        absent: Vec<usize>,
    },
    /// A parameter's gradient has another type, shape or device on another rank.
    #[error(
        "rank {rank}: average_gradients: the gradient of parameter {parameter} has another type, shape or device on rank {other_rank}"
    )]
    GradientShape {
        /// This process.
        rank: usize,
        /// The first such parameter, as an index into the list.
        parameter: usize,
        /// A rank that differs.
        other_rank: usize,
    },
    /// The mean of the gradients is infinite or not a number. All ranks get this error.
    #[error(
        "rank {rank}: average_gradients: the mean is not finite; gradients of ranks {ranks:?} are not"
    )]
    NotFinite {
        /// This process.
        rank: usize,
        /// The ranks whose own gradients are not finite; none where only their sum overflowed.
        ranks: Vec<usize>,
    },
    /// A peer did not take its part in time.
    #[error("rank {rank}: {operation}: no answer within {waited:.1?}: {reason}")]
    TimedOut {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
        /// How long this call lasted.
        waited: Duration,
        /// Libtorch's words.
        reason: String,
    },
    /// A peer ended, or the connection to it broke.
    #[error("rank {rank}: {operation}: a peer is lost: {reason}")]
    Peer {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
        /// Libtorch's words.
        reason: String,
    },
    /// An earlier operation failed, after which the ranks are no longer in step.
    #[error("rank {rank}: {operation}: the group ended when {since} failed")]
    Broken {
        /// This process.
        rank: usize,
        /// The operation that was asked for now.
        operation: Operation,
        /// The operation that failed.
        since: Operation,
    },
    /// Libtorch refused an operation on this process alone.
    #[error("rank {rank}: {operation}: libtorch: {}", first_line(source))]
    Torch {
        /// This process.
        rank: usize,
        /// The operation.
        operation: Operation,
        /// Libtorch's error.
        source: TchError,
    },
}

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Whether the ranks are still in step: a caller who knows what to do may use the group further.
    ///
    /// That is so where nothing was exchanged (wrong arguments), and where all ranks found the same error
    /// together ([`Error::Disagree`], [`Error::GradientAbsent`], [`Error::NotFinite`] and their like).
    #[must_use]
    pub fn leaves_group_usable(&self) -> bool {
        matches!(
            self,
            Self::Argument { .. }
                | Self::Kind { .. }
                | Self::Layout { .. }
                | Self::Device { .. }
                | Self::Graph { .. }
                | Self::Disagree { .. }
                | Self::ParameterCount { .. }
                | Self::GradientAbsent { .. }
                | Self::GradientShape { .. }
                | Self::NotFinite { .. }
        )
    }
}

/// An operation of all ranks of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Operation {
    /// The making of the connections.
    Connect,
    /// [`ProcessGroup::barrier`](crate::ProcessGroup::barrier).
    Barrier,
    /// [`ProcessGroup::all_reduce`](crate::ProcessGroup::all_reduce).
    AllReduce,
    /// [`ProcessGroup::broadcast`](crate::ProcessGroup::broadcast).
    Broadcast,
    /// [`ProcessGroup::all_gather`](crate::ProcessGroup::all_gather).
    AllGather,
    /// [`ProcessGroup::average_gradients`](crate::ProcessGroup::average_gradients).
    AverageGradients,
}

impl Operation {
    /// All operations; a place in this list stands for its operation on the wire.
    pub(crate) const ALL: [Self; 6] = [
        Self::Connect,
        Self::Barrier,
        Self::AllReduce,
        Self::Broadcast,
        Self::AllGather,
        Self::AverageGradients,
    ];
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connect => "connect",
            Self::Barrier => "barrier",
            Self::AllReduce => "all_reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::AverageGradients => "average_gradients",
        })
    }
}

fn found_value(value: Option<&str>) -> String {
    value.map_or_else(|| "it is not set".to_owned(), |value| format!("found \"{value}\""))
}

/// Libtorch's messages end in some twenty lines of C++ stack; the first line says what is wrong.
fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
