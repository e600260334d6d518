//! A group of processes and its collectives.

use std::cell::{Cell, RefCell};
use std::time::Instant;

use tch::{Device, Kind, TchError, Tensor};

use crate::agreement::{self, Call, KINDS, Outcome};
use crate::connection::{Links, connect_within, lost};
use crate::ffi::{self, Failure, Layout};
use crate::{Backend, Error, Launch, Operation, Options, Reduce, Result, Statistics};

/// A group of processes that exchange tensors.
///
/// All ranks must call the same operations in the same order, with tensors of the same type and shape. Each
/// operation first asks whether they do, and returns [`Error::Disagree`] on every rank if not. A rank that
/// calls nothing is noticed after [`Options::timeout`], one that ends at once.
///
/// After a lost peer or a time-out the ranks are no longer in step: the group closes its connections, so
/// that the others notice too, and every later operation is [`Error::Broken`].
///
/// A group of one process exchanges nothing and needs no store.
#[derive(Debug)]
pub struct ProcessGroup {
    launch: Launch,
    backend: Backend,
    state: RefCell<State>,
    sequence: Cell<u64>,
    statistics: Cell<Statistics>,
}

#[derive(Debug)]
enum State {
    Alone,
    Connected(Links),
    Broken(Operation),
}

impl ProcessGroup {
    /// The group of this process on its own.
    #[must_use]
    pub fn alone() -> Self {
        Self::with_state(Launch::alone(), Backend::default(), State::Alone)
    }

    /// Joins the group that a launcher's variables describe, with default [`Options`]; see
    /// [`Launch::from_variables`]. Without such variables: the group of this process on its own.
    ///
    /// # Errors
    /// See [`ProcessGroup::new`]; [`Error::Environment`] for a variable that cannot be read.
    pub fn from_env() -> Result<Self> {
        Self::new(&Launch::from_env()?, &Options::default())
    }

    /// Joins the group of a launch, and returns when all ranks are there.
    ///
    /// # Errors
    /// [`Error::Argument`] for a time-out of zero, [`Error::PortInUse`], [`Error::Store`],
    /// [`Error::RankTaken`], [`Error::Absent`], [`Error::WorldSize`]; [`Error::TimedOut`] or
    /// [`Error::Peer`] if a rank is lost while connections are made.
    pub fn new(launch: &Launch, options: &Options) -> Result<Self> {
        for (what, time) in
            [("connect_timeout", options.connect_timeout), ("timeout", options.timeout)]
        {
            if time.is_zero() {
                let expected = "more than zero".into();
                return Err(Error::Argument { what, expected, found: format!("{time:?}") });
            }
        }
        let Some(address) = launch.store().filter(|_| launch.world_size() > 1) else {
            return Ok(Self::with_state(launch.clone(), options.backend, State::Alone));
        };
        let links = connect_within(launch, address, options)?;
        Ok(Self::with_state(launch.clone(), options.backend, State::Connected(links)))
    }

    fn with_state(launch: Launch, backend: Backend, state: State) -> Self {
        let (sequence, statistics) = (Cell::new(0), Cell::default());
        Self { launch, backend, state: RefCell::new(state), sequence, statistics }
    }

    /// The number of this process in the group, from 0.
    #[must_use]
    pub fn rank(&self) -> usize {
        self.launch.rank()
    }

    /// The number of processes.
    #[must_use]
    pub fn world_size(&self) -> usize {
        self.launch.world_size()
    }

    /// The number of this process on its machine, from 0: which GPU it should take.
    ///
    /// # Errors
    /// [`Error::Environment`] if the launcher did not say: set `LOCAL_RANK`.
    pub fn local_rank(&self) -> Result<usize> {
        self.launch.local_rank()
    }

    /// The backend that was asked for.
    #[must_use]
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// What this group has exchanged so far; nothing in a group of one process.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        self.statistics.get()
    }

    /// Waits until all ranks are here.
    ///
    /// The processes wait for each other, not for kernels that a GPU still has to run.
    ///
    /// # Errors
    /// [`Error::Disagree`], [`Error::TimedOut`], [`Error::Peer`], [`Error::Broken`].
    pub fn barrier(&self) -> Result<()> {
        // An agreement is a barrier.
        self.agree(Operation::Barrier, Call::new(Operation::Barrier)).map(drop)
    }

    /// Replaces a tensor by its sum or mean over all ranks, with equal bits on all ranks.
    ///
    /// Sums are made in the tensor's own type. A tensor that is not contiguous is copied and copied back.
    ///
    /// # Errors
    /// [`Error::Kind`] for a complex, boolean or quantized tensor, or the mean of whole numbers;
    /// [`Error::Layout`], [`Error::Device`], [`Error::Graph`]; those of [`ProcessGroup::barrier`].
    pub fn all_reduce(&self, tensor: &mut Tensor, reduce: Reduce) -> Result<()> {
        let operation = Operation::AllReduce;
        let kind = self.check_in_place(operation, tensor)?;
        if kind == Kind::Bool || (reduce == Reduce::Mean && !is_float(kind)) {
            let expected = match reduce {
                Reduce::Sum => "a floating-point or integer tensor",
                Reduce::Mean => "a floating-point tensor",
            };
            return Err(Error::Kind { rank: self.rank(), operation, expected, found: kind });
        }
        self.agree(
            operation,
            Call::on(operation, tensor, kind, self.is_by_nccl(tensor)).reducing(reduce),
        )?;
        self.sum(operation, tensor)?;
        match reduce {
            Reduce::Sum => Ok(()),
            Reduce::Mean => self.divide(operation, tensor),
        }
    }

    /// Replaces a tensor by the one of rank `root`.
    ///
    /// # Errors
    /// [`Error::Argument`] for a root beyond the group; [`Error::Kind`] for a complex or quantized tensor;
    /// [`Error::Layout`], [`Error::Device`], [`Error::Graph`]; those of [`ProcessGroup::barrier`].
    pub fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<()> {
        let operation = Operation::Broadcast;
        if root >= self.world_size() {
            let expected = format!("a rank below {}", self.world_size());
            return Err(Error::Argument { what: "root", expected, found: root.to_string() });
        }
        let kind = self.check_in_place(operation, tensor)?;
        self.agree(
            operation,
            Call::on(operation, tensor, kind, self.is_by_nccl(tensor)).sent_by(root),
        )?;
        self.send(operation, tensor, root)
    }

    /// The tensors of all ranks, stacked: `[..]` becomes `[world_size, ..]`, rank 0 first.
    ///
    /// The result has no graph.
    ///
    /// # Errors
    /// [`Error::Kind`] for a complex or quantized tensor; [`Error::Layout`], [`Error::Device`]; those of
    /// [`ProcessGroup::barrier`].
    pub fn all_gather(&self, tensor: &Tensor) -> Result<Tensor> {
        let operation = Operation::AllGather;
        let kind = self.check(operation, tensor)?;
        self.agree(operation, Call::on(operation, tensor, kind, self.is_by_nccl(tensor)))?;
        self.gather_all(operation, tensor)
    }

    /// `all_gather` of ranks that agreed.
    pub(crate) fn gather_all(&self, operation: Operation, tensor: &Tensor) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let refused = |source| self.refused(operation, source);
        let input = self.buffer(tensor).map_err(refused)?;
        let size = [&[self.world_size() as i64], tensor.size().as_slice()].concat();
        let mut output = Tensor::f_empty(size, (input.kind(), input.device())).map_err(refused)?;
        if self.world_size() == 1 {
            input.f_unsqueeze(0).and_then(|input| output.f_copy_(&input)).map_err(refused)?;
        } else {
            self.exchange(operation, &input.shallow_clone(), |group| {
                group.all_gather(&mut output, &input)
            })?;
        }
        output.f_to_device(tensor.device()).map_err(refused)
    }

    /// Sums a tensor of ranks that agreed.
    pub(crate) fn sum(&self, operation: Operation, tensor: &mut Tensor) -> Result<()> {
        self.in_place(operation, tensor, |group, tensor| group.all_reduce_sum(tensor))
    }

    /// Divides by the number of ranks.
    pub(crate) fn divide(&self, operation: Operation, tensor: &mut Tensor) -> Result<()> {
        if self.world_size() == 1 {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let divided = number(self.world_size() as f64).and_then(|count| tensor.f_div_(&count));
        divided.map(drop).map_err(|source| self.refused(operation, source))
    }

    /// Replaces a tensor of ranks that agreed by the one of rank `root`.
    pub(crate) fn send(
        &self,
        operation: Operation,
        tensor: &mut Tensor,
        root: usize,
    ) -> Result<()> {
        self.in_place(operation, tensor, |group, tensor| group.broadcast(tensor, root))
    }

    /// Runs a collective on the tensor itself where a backend can, else on a copy.
    fn in_place(
        &self,
        operation: Operation,
        tensor: &mut Tensor,
        collective: impl FnOnce(&ffi::Group, &mut Tensor) -> Result<(), Failure>,
    ) -> Result<()> {
        if self.world_size() == 1 {
            return Ok(());
        }
        let _guard = tch::no_grad_guard();
        let refused = |source| self.refused(operation, source);
        let mut buffer = self.buffer(tensor).map_err(refused)?;
        let is_copy = buffer.data_ptr() != tensor.data_ptr();
        self.exchange(operation, &buffer.shallow_clone(), |group| collective(group, &mut buffer))?;
        if is_copy {
            tensor.f_copy_(&buffer).map_err(refused)?;
        }
        Ok(())
    }

    /// Whether NCCL carries a tensor; else Gloo does.
    pub(crate) fn is_by_nccl(&self, tensor: &Tensor) -> bool {
        self.backend != Backend::Gloo && tensor.device().is_cuda()
    }

    /// The tensor where its backend can take it, contiguous: itself, or a copy.
    fn buffer(&self, tensor: &Tensor) -> Result<Tensor, TchError> {
        let device = if self.is_by_nccl(tensor) { tensor.device() } else { Device::Cpu };
        tensor.f_detach()?.f_to_device(device)?.f_contiguous()
    }

    /// Runs a collective on a tensor, counts it, and ends the group if it fails.
    fn exchange(
        &self,
        operation: Operation,
        tensor: &Tensor,
        collective: impl FnOnce(&ffi::Group) -> Result<(), Failure>,
    ) -> Result<()> {
        let bytes = tensor.numel() * tensor.kind().elt_size_in_bytes();
        if bytes == 0 {
            return Ok(());
        }
        let start = Instant::now();
        self.with_links(operation, |links| {
            let nccl = links.nccl.as_ref().filter(|_| tensor.device().is_cuda());
            collective(nccl.unwrap_or(&links.gloo))
        })?;
        let mut statistics = self.statistics.get();
        statistics.calls += 1;
        statistics.bytes += bytes as u64;
        statistics.time += start.elapsed();
        self.statistics.set(statistics);
        Ok(())
    }

    /// Asks whether all ranks make this call now: an error on every rank if not.
    ///
    /// Returns whether the gradients of [`Operation::AverageGradients`] fit together, too; of another
    /// operation, always true.
    pub(crate) fn agree(&self, operation: Operation, call: Call) -> Result<bool> {
        self.sequence.set(self.sequence.get() + 1);
        if self.world_size() == 1 {
            return Ok(true);
        }
        let start = Instant::now();
        let call = call.numbered(self.sequence.get());
        let outcome = self.with_links(operation, |links| {
            agreement::exchange(&links.gloo, &call, self.rank(), self.world_size())
        })?;
        let mut statistics = self.statistics.get();
        statistics.agreements += 1;
        statistics.time += start.elapsed();
        self.statistics.set(statistics);
        match outcome {
            Outcome::Agreed => Ok(true),
            Outcome::GradientsDiffer => Ok(false),
            Outcome::Differ(difference) => {
                Err(difference.into_error(self.rank(), operation, &call))
            }
        }
    }

    fn with_links<T>(
        &self,
        operation: Operation,
        exchange: impl FnOnce(&Links) -> Result<T, Failure>,
    ) -> Result<T> {
        let start = Instant::now();
        let failure = match &*self.state.borrow() {
            State::Broken(since) => {
                return Err(Error::Broken { rank: self.rank(), operation, since: *since });
            }
            State::Connected(links) => match exchange(links) {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            },
            // Callers exchange nothing then.
            State::Alone => {
                Failure { timed_out: false, reason: "there is no other process".into() }
            }
        };
        self.break_off(operation);
        Err(lost(self.rank(), operation, start, failure))
    }

    /// Closes the connections, so that the other ranks fail too.
    fn break_off(&self, operation: Operation) {
        if self.world_size() > 1 {
            self.state.replace(State::Broken(operation));
        }
    }

    /// The error of a step that libtorch refused on this rank, maybe on this one alone.
    pub(crate) fn refused(&self, operation: Operation, source: TchError) -> Error {
        self.break_off(operation);
        Error::Torch { rank: self.rank(), operation, source }
    }

    /// Whether a tensor can be sent; returns its element type.
    fn check(&self, operation: Operation, tensor: &Tensor) -> Result<Kind> {
        let rank = self.rank();
        let layout = |found| Err(Error::Layout { rank, operation, found });
        if !tensor.defined() {
            return layout("is undefined");
        }
        match ffi::layout(tensor) {
            Ok(Layout::NotStrided) => return layout("is sparse, quantized or opaque"),
            Ok(Layout::Contiguous | Layout::Strided | Layout::Overlapping) => {}
            Err(failure) => return Err(Error::Peer { rank, operation, reason: failure.reason }),
        }
        let kind = tensor.f_kind().map_err(|source| Error::Torch { rank, operation, source })?;
        if !KINDS.contains(&kind) {
            let expected = "float, double, half, bfloat16, bool, or integers of 8, 32 or 64 bits";
            return Err(Error::Kind { rank, operation, expected, found: kind });
        }
        match tensor.device() {
            Device::Cpu | Device::Cuda(_) => Ok(kind),
            found => Err(Error::Device { rank, operation, found }),
        }
    }

    /// Whether a tensor can be sent and written, too.
    fn check_in_place(&self, operation: Operation, tensor: &Tensor) -> Result<Kind> {
        let rank = self.rank();
        let kind = self.check(operation, tensor)?;
        if ffi::layout(tensor).is_ok_and(|layout| layout == Layout::Overlapping) {
            let found = "has several elements in one place (after expand?)";
            return Err(Error::Layout { rank, operation, found });
        }
        let is_leaf =
            tensor.f_is_leaf().map_err(|source| Error::Torch { rank, operation, source })?;
        if tensor.requires_grad() && !is_leaf {
            return Err(Error::Graph { rank, operation });
        }
        Ok(kind)
    }
}

/// Whether the mean of tensors of a kind can be made.
pub(crate) fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16)
}

/// A number as a tensor without axes on the CPU, which operators in place take beside any other. The calls of tch 0.26
/// that take a number itself, such as `f_mul_scalar`, panic where libtorch fails.
pub(crate) fn number(value: f64) -> Result<Tensor, TchError> {
    Tensor::f_from_slice(&[value])?.f_reshape([0_i64; 0])
}
