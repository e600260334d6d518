//! The border to the C++ half, `shim/c10d.cpp`: all unsafe code of the crate.
//!
//! Handles are owned by [`Store`] and [`Group`] and freed once. Tensors are lent for the length of a call,
//! which returns when the collective is complete. No exception crosses: the C++ half turns each into a
//! status and a message of the calling thread, read here at once.
#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::time::Duration;

use tch::Tensor;

type Handle = *mut c_void;

unsafe extern "C" {
    fn c10d_message() -> *const c_char;
    fn c10d_store_open(
        host: *const c_char,
        port: u16,
        server: bool,
        timeout: i64,
        prefix: *const c_char,
        result: *mut Handle,
    ) -> c_int;
    fn c10d_store_set(store: Handle, key: *const c_char, value: *const c_char) -> c_int;
    fn c10d_store_add(store: Handle, key: *const c_char, amount: i64, result: *mut i64) -> c_int;
    fn c10d_store_get(
        store: Handle,
        key: *const c_char,
        timeout: i64,
        value: *mut c_char,
        capacity: usize,
    ) -> c_int;
    fn c10d_store_free(store: Handle);
    fn c10d_group_new(
        store: Handle,
        prefix: *const c_char,
        rank: c_int,
        size: c_int,
        backend: c_int,
        connect: i64,
        timeout: i64,
        loopback: bool,
        result: *mut Handle,
    ) -> c_int;
    fn c10d_all_reduce_sum(group: Handle, tensor: Handle) -> c_int;
    fn c10d_broadcast(group: Handle, tensor: Handle, root: i64) -> c_int;
    fn c10d_all_gather(group: Handle, output: Handle, input: Handle) -> c_int;
    fn c10d_gather(group: Handle, output: Handle, input: Handle) -> c_int;
    fn c10d_group_free(group: Handle);
    fn c10d_layout(tensor: Handle, result: *mut c_int) -> c_int;
}

/// Why a call failed, in libtorch's words.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) timed_out: bool,
    pub(crate) reason: String,
}

/// How the elements of a tensor lie in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    Contiguous,
    /// With gaps, or in another order of dimensions.
    Strided,
    /// Several elements share one place, as after `expand`.
    Overlapping,
    /// Sparse, quantized or opaque.
    NotStrided,
}

/// Which of libtorch's process groups.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kind {
    Gloo = 0,
    #[cfg(feature = "nccl")]
    Nccl = 1,
}

fn check(status: c_int) -> Result<(), Failure> {
    if status == 0 {
        return Ok(());
    }
    // SAFETY: the function returns a zero-terminated array of this thread that lives as long as the thread,
    // and only calls of this thread write into it.
    let message = unsafe { CStr::from_ptr(c10d_message()) }.to_string_lossy();
    // Further lines are a C++ stack.
    let reason = message.lines().next().unwrap_or_default().to_owned();
    Err(Failure { timed_out: status == 2, reason })
}

fn text(value: &str) -> Result<CString, Failure> {
    CString::new(value)
        .map_err(|_| Failure { timed_out: false, reason: format!("{value:?} has a zero byte") })
}

fn milliseconds(time: Duration) -> i64 {
    i64::try_from(time.as_millis()).unwrap_or(i64::MAX / 2).max(1)
}

fn handle(result: Handle) -> Result<NonNull<c_void>, Failure> {
    NonNull::new(result)
        .ok_or_else(|| Failure { timed_out: false, reason: "no handle was made".to_owned() })
}

fn pointer(tensor: &Tensor) -> Handle {
    tensor.as_ptr().cast_mut().cast()
}

pub(crate) fn layout(tensor: &Tensor) -> Result<Layout, Failure> {
    let mut found = 0;
    // SAFETY: the pointer is that of a live `at::Tensor`, defined as callers ensure, which is only read;
    // `found` outlives the call.
    check(unsafe { c10d_layout(pointer(tensor), &raw mut found) })?;
    Ok(match found {
        0 => Layout::Contiguous,
        1 => Layout::Strided,
        2 => Layout::Overlapping,
        _ => Layout::NotStrided,
    })
}

/// A connection to the key-value store of a launch.
#[derive(Debug)]
pub(crate) struct Store(NonNull<c_void>);

// SAFETY: c10d's store locks each operation and is bound to no thread.
unsafe impl Send for Store {}

impl Store {
    /// Connects, and serves the store too where `server` is set. Keys are prefixed with `prefix`.
    pub(crate) fn open(
        host: &str,
        port: u16,
        server: bool,
        timeout: Duration,
        prefix: &str,
    ) -> Result<Self, Failure> {
        let (host, prefix) = (text(host)?, text(prefix)?);
        let mut result = null_mut();
        // SAFETY: both texts are zero-terminated and outlive the call, and so does `result`, which receives
        // a handle that the value made here owns.
        check(unsafe {
            c10d_store_open(
                host.as_ptr(),
                port,
                server,
                milliseconds(timeout),
                prefix.as_ptr(),
                &raw mut result,
            )
        })?;
        handle(result).map(Self)
    }

    pub(crate) fn set(&self, key: &str, value: &str) -> Result<(), Failure> {
        let (key, value) = (text(key)?, text(value)?);
        // SAFETY: the handle is live, and the texts are zero-terminated and outlive the call.
        check(unsafe { c10d_store_set(self.0.as_ptr(), key.as_ptr(), value.as_ptr()) })
    }

    /// Adds to a number, 0 at first, and returns the sum.
    pub(crate) fn add(&self, key: &str, amount: i64) -> Result<i64, Failure> {
        let key = text(key)?;
        let mut sum = 0;
        // SAFETY: the handle is live; `key` is zero-terminated and outlives the call, as does `sum`.
        check(unsafe { c10d_store_add(self.0.as_ptr(), key.as_ptr(), amount, &raw mut sum) })?;
        Ok(sum)
    }

    /// Waits for a key and returns its value, of at most 4095 bytes.
    pub(crate) fn get(&self, key: &str, timeout: Duration) -> Result<String, Failure> {
        let key = text(key)?;
        let mut value = [0_u8; 4096];
        // SAFETY: the handle is live, `key` is zero-terminated, and at most `value.len()` bytes are written
        // into `value`, the ending zero included; both outlive the call.
        check(unsafe {
            c10d_store_get(
                self.0.as_ptr(),
                key.as_ptr(),
                milliseconds(timeout),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        })?;
        let value = CStr::from_bytes_until_nul(&value).unwrap_or_default();
        Ok(value.to_string_lossy().into_owned())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `c10d_store_open`, is owned by this value and freed here alone.
        unsafe { c10d_store_free(self.0.as_ptr()) }
    }
}

/// A place in a group of processes and how it is reached.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Whether all processes are on this machine.
    pub(crate) loopback: bool,
    /// Bounds the making of the connections.
    pub(crate) connect: Duration,
    /// Bounds each wait for a peer afterwards.
    pub(crate) timeout: Duration,
}

/// One of libtorch's process groups. Its methods wait until the collective is complete.
#[derive(Debug)]
pub(crate) struct Group(NonNull<c_void>);

// SAFETY: c10d's backends are bound to no thread. They are not made for calls from several threads at once,
// and `Group` is not `Sync`.
unsafe impl Send for Group {}

impl Group {
    pub(crate) fn new(
        store: &Store,
        prefix: &str,
        kind: Kind,
        place: Place,
    ) -> Result<Self, Failure> {
        let prefix = text(prefix)?;
        let number = |value: usize| {
            c_int::try_from(value)
                .map_err(|_| Failure { timed_out: false, reason: format!("{value} is too large") })
        };
        let (rank, size) = (number(place.rank)?, number(place.world_size)?);
        let mut result = null_mut();
        // SAFETY: the store's handle is live and only borrowed (the group shares the store itself);
        // `prefix` is zero-terminated and outlives the call, as does `result`, which receives a handle that
        // the value made here owns.
        check(unsafe {
            c10d_group_new(
                store.0.as_ptr(),
                prefix.as_ptr(),
                rank,
                size,
                kind as c_int,
                milliseconds(place.connect),
                milliseconds(place.timeout),
                place.loopback,
                &raw mut result,
            )
        })?;
        handle(result).map(Self)
    }

    /// Replaces a contiguous tensor by its sum over all ranks.
    pub(crate) fn all_reduce_sum(&self, tensor: &mut Tensor) -> Result<(), Failure> {
        // SAFETY: the group's handle and the tensor are live for the whole call, which ends when the
        // collective does; the tensor is borrowed mutably, and its type and size agree on all ranks, as
        // callers ensure (Gloo would end the process otherwise).
        check(unsafe { c10d_all_reduce_sum(self.0.as_ptr(), pointer(tensor)) })
    }

    /// Replaces a contiguous tensor by the one of rank `root`.
    pub(crate) fn broadcast(&self, tensor: &mut Tensor, root: usize) -> Result<(), Failure> {
        // SAFETY: as in `all_reduce_sum`; a root beyond the group is refused by libtorch.
        check(unsafe { c10d_broadcast(self.0.as_ptr(), pointer(tensor), root as i64) })
    }

    /// Fills the rows of a contiguous `output` with `input` of each rank.
    pub(crate) fn all_gather(&self, output: &mut Tensor, input: &Tensor) -> Result<(), Failure> {
        // SAFETY: as in `all_reduce_sum`; libtorch checks that `output` has a row of the shape and type of
        // `input` for each rank, and `input` is only read.
        check(unsafe { c10d_all_gather(self.0.as_ptr(), pointer(output), pointer(input)) })
    }

    /// As [`Group::all_gather`], on rank 0 alone, which gives an `output`; the others give none.
    pub(crate) fn gather(
        &self,
        output: Option<&mut Tensor>,
        input: &Tensor,
    ) -> Result<(), Failure> {
        let output = output.map_or(null_mut(), |output| pointer(output));
        // SAFETY: as in `all_gather`; a null `output` is allowed, and refused by libtorch on rank 0.
        check(unsafe { c10d_gather(self.0.as_ptr(), output, pointer(input)) })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `c10d_group_new`, is owned by this value and freed here alone.
        unsafe { c10d_group_free(self.0.as_ptr()) }
    }
}
