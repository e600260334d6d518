//! The processes that train together: what they exchange, and what the first of them does alone.

use anyhow::{Result, ensure};
use decoupled_dmd::Collective;
use tch::{Device, Tensor};
use tch_c10d::{Averaging, Error, ProcessGroup, Reduce, Statistics};
use tch_training::AdamW;
use tch_training::seed::seed_of;

use crate::distil::stream::Stream;

/// The processes of a training: one, unless a group is given.
///
/// Each has a part of every batch, and all step by the mean of their gradients. So they have equal weights, as
/// long as their libtorch computes equally, and the first can write for all. One process exchanges nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Processes<'g>(Option<&'g ProcessGroup>);

impl<'g> From<&'g ProcessGroup> for Processes<'g> {
    fn from(group: &'g ProcessGroup) -> Self {
        Self(Some(group).filter(|group| group.world_size() > 1))
    }
}

impl<'g> Processes<'g> {
    /// How many there are.
    pub fn count(self) -> usize {
        self.0.map_or(1, ProcessGroup::world_size)
    }

    /// The number of this one, from 0.
    pub fn rank(self) -> usize {
        self.0.map_or(0, ProcessGroup::rank)
    }

    /// Whether this one writes for all.
    pub fn is_first(self) -> bool {
        self.rank() == 0
    }

    /// The seed of what this process draws in a run of the seed `run`.
    pub(super) fn seed(self, run: u64) -> u64 {
        seed_of_rank(run, self.rank())
    }

    /// The samples of this process in batches of `batch` of all.
    ///
    /// # Errors
    /// If they cannot be parted equally.
    pub fn part(self, batch: usize) -> Result<usize> {
        let count = self.count();
        ensure!(
            batch.is_multiple_of(count) && batch > 0,
            "a batch of {batch} cannot be parted among {count} processes: choose a multiple of {count}"
        );
        Ok(batch / count)
    }

    /// What terms that look at the whole batch need; `None` for one process.
    pub(super) fn collective(self) -> Option<Collective<'g>> {
        let group = self.0?;
        let all_gather = move |part: &Tensor| group.all_gather(part);
        Collective::new(group.world_size(), group.rank(), all_gather).ok()
    }

    /// Replaces the gradients of the parameters of an optimizer by their means. Where a mean is not finite, all
    /// processes hold it, and get a word on the ranks whose gradients are not.
    ///
    /// # Errors
    /// If a process is lost, or they are not in step.
    pub(super) fn average_gradients(self, optimizer: &AdamW) -> Result<Option<String>> {
        let Some(group) = self.0 else { return Ok(None) };
        let parameters: Vec<Tensor> = optimizer.parameters().into_values().collect();
        match group.average_gradients(&parameters, &Averaging::default()) {
            Err(error @ Error::NotFinite { .. }) => Ok(Some(error.to_string())),
            averaged => averaged.map(|_| None).map_err(Into::into),
        }
    }

    /// The numbers `[M]` of each of the N processes, `[N, M]`, those of the first before the others.
    ///
    /// # Errors
    /// If a process is lost, or they are not in step.
    pub(super) fn stack(self, numbers: &Tensor) -> Result<Tensor> {
        Ok(match self.0 {
            Some(group) => group.all_gather(numbers)?,
            None => numbers.f_unsqueeze(0)?,
        })
    }

    /// Whether something is so on any process.
    ///
    /// # Errors
    /// If a process is lost, or they are not in step.
    pub fn any(self, here: bool) -> Result<bool> {
        let Some(group) = self.0 else { return Ok(here) };
        let mut count = Tensor::f_from_slice(&[i64::from(here)])?;
        group.all_reduce(&mut count, Reduce::Sum)?;
        Ok(count.f_int64_value(&[0])? > 0)
    }

    /// Replaces tensors by those of the first process.
    ///
    /// # Errors
    /// If a process is lost, or they are not in step.
    pub(super) fn share<'t>(self, tensors: impl IntoIterator<Item = &'t Tensor>) -> Result<()> {
        if let Some(group) = self.0 {
            for tensor in tensors {
                group.broadcast(&mut tensor.shallow_clone(), 0)?;
            }
        }
        Ok(())
    }

    /// Waits until all are here, before this process ends and closes its connections: the last exchange is then
    /// behind all.
    pub(super) fn leave_together(self) {
        if let Some(group) = self.0 {
            // Nothing is left to do: who is gone already is not missed.
            let _ = group.barrier();
        }
    }

    /// What there is to say of them where a training is named.
    pub(crate) fn described(self) -> String {
        match self.count() {
            1 => String::new(),
            count => format!(", {count} processes"),
        }
    }

    /// What has been exchanged so far; `None` for one process.
    pub fn statistics(self) -> Option<Statistics> {
        self.0.map(ProcessGroup::statistics)
    }

    /// What was exchanged in `updates` updates since an earlier reading, as a sentence; `None` for one process.
    pub(super) fn exchanged(self, since: Option<Statistics>, updates: u64) -> Option<String> {
        let group = self.0?;
        let statistics = group.statistics().since(since?);
        let updates = updates.max(1) as f64;
        Some(format!(
            "{} processes: {:.1} calls and {:.3} MB exchanged in an update, {:.3} s with the wait for each other",
            group.world_size(),
            (statistics.calls + statistics.agreements) as f64 / updates,
            statistics.bytes as f64 / updates / 1e6,
            statistics.time.as_secs_f64() / updates,
        ))
    }
}

/// The seed of what process `rank` draws in a run of the seed `run`. That of the first is `run`, so that it draws
/// what one process would.
pub fn seed_of_rank(run: u64, rank: usize) -> u64 {
    match rank {
        0 => run,
        rank => seed_of(run, Stream::Rank(rank as u64)) as u64,
    }
}

/// The device of this process: where `device` is the first GPU, that of its number on the machine.
///
/// # Errors
/// If the launcher has not said that number, or libtorch sees no such GPU.
pub fn own_device(group: &ProcessGroup, device: Device) -> Result<Device> {
    if group.world_size() == 1 || device != Device::Cuda(0) {
        return Ok(device);
    }
    let (rank, count) = (group.local_rank()?, tch::Cuda::device_count());
    ensure!(
        (rank as i64) < count,
        "process {rank} of this machine has no GPU: libtorch sees {count}. Start as many processes as GPUs"
    );
    Ok(Device::Cuda(rank))
}
