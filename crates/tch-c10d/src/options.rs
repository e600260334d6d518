//! How a group is made, and what it tells of itself.

use std::time::Duration;

/// Which library carries the tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Backend {
    /// Gloo, over TCP. Tensors on CUDA devices go through the memory of the host.
    #[default]
    Gloo,
    /// NCCL between CUDA devices, one for each process. Tensors on the CPU go through Gloo.
    #[cfg(feature = "nccl")]
    Nccl,
}

/// How the values of all ranks become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reduce {
    /// Their sum.
    Sum,
    /// Their sum, divided by the number of ranks; of floating-point tensors only.
    Mean,
}

/// How a group is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    pub(crate) backend: Backend,
    pub(crate) connect_timeout: Duration,
    pub(crate) timeout: Duration,
}

impl Default for Options {
    /// Gloo; five minutes for all ranks to come, which is the default of PyTorch's store, and ten for each
    /// wait afterwards, which is PyTorch's default with NCCL.
    fn default() -> Self {
        Self {
            backend: Backend::default(),
            connect_timeout: Duration::from_secs(300),
            timeout: Duration::from_secs(600),
        }
    }
}

impl Options {
    /// With another backend.
    #[must_use]
    pub fn backend(self, backend: Backend) -> Self {
        Self { backend, ..self }
    }

    /// How long rank 0 waits for the others, and each of them for rank 0.
    ///
    /// A rank gives up after three times as long at most: it may have come that much before rank 0, which
    /// waits for the others in its turn.
    #[must_use]
    pub fn connect_timeout(self, connect_timeout: Duration) -> Self {
        Self { connect_timeout, ..self }
    }

    /// The longest wait for one message of a peer in an operation.
    ///
    /// It must outlast the longest difference between the ranks: one that writes a checkpoint or loads data
    /// keeps the others waiting.
    #[must_use]
    pub fn timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }
}

/// What a group has exchanged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Statistics {
    /// Collectives with data.
    pub calls: u64,
    /// Bytes of the tensors given to them. A ring of N ranks sends 2 (N - 1) / N of it from each rank in an
    /// `all_reduce`, and N - 1 times of it in an `all_gather`.
    pub bytes: u64,
    /// Comparisons of what the ranks are about to do, one for each operation.
    pub agreements: u64,
    /// Time in both, the wait for slower ranks included.
    pub time: Duration,
}

impl Statistics {
    /// What came since an earlier reading.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            calls: self.calls.saturating_sub(earlier.calls),
            bytes: self.bytes.saturating_sub(earlier.bytes),
            agreements: self.agreements.saturating_sub(earlier.agreements),
            time: self.time.saturating_sub(earlier.time),
        }
    }
}
