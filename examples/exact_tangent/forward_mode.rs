//! Forward-mode differentiation by libtorch. tch makes dual tensors and takes them apart, but has no call that
//! opens the level in which they live: the two C++ functions that do are called here.
//!
//! A level is libtorch's, for the whole process, and there is one. [`along`] opens it, waits for another
//! thread that has it, and closes it on every way out, so nothing of a failed network stays behind.
#![allow(unsafe_code, reason = "two functions of libtorch that tch does not bind")]

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Result, ensure};
use tch::Tensor;

// `uint64_t enter_dual_level()` and `void exit_dual_level(uint64_t)` of torch/csrc/autograd/autograd.h, by the
// names that the compilers of Linux and macOS give them. A missing name is an error of the linker.
unsafe extern "C-unwind" {
    #[link_name = "_ZN5torch8autograd10forward_ad16enter_dual_levelEv"]
    fn enter_dual_level() -> u64;
    #[cfg_attr(
        target_os = "macos",
        link_name = "_ZN5torch8autograd10forward_ad15exit_dual_levelEy"
    )]
    #[cfg_attr(
        not(target_os = "macos"),
        link_name = "_ZN5torch8autograd10forward_ad15exit_dual_levelEm"
    )]
    fn exit_dual_level(level: u64);
}

static ONE_LEVEL: Mutex<()> = Mutex::new(());

thread_local! {
    static IS_OPEN_HERE: Cell<bool> = const { Cell::new(false) };
}

/// The open dual level. It is closed when dropped: after an error and while a panic unwinds too.
struct Level {
    index: u64,
    _alone: MutexGuard<'static, ()>,
}

impl Level {
    fn open() -> Result<Self> {
        ensure!(!IS_OPEN_HERE.get(), "a dual level is open: libtorch does not nest them");
        let alone = ONE_LEVEL.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: a function without arguments that returns a plain integer. It throws if a level is open,
        // and none is while the lock is held; an exception would end the process, not run on.
        let index = unsafe { enter_dual_level() };
        IS_OPEN_HERE.set(true);
        Ok(Self { index, _alone: alone })
    }
}

impl Drop for Level {
    fn drop(&mut self) {
        IS_OPEN_HERE.set(false);
        // SAFETY: the index came from `enter_dual_level`, and is given back once. Dual tensors that outlive
        // the level lose their tangents, which libtorch holds by shared pointers.
        unsafe { exit_dual_level(self.index) }
    }
}

/// The output of `network` and its derivative while each input moves by its direction, shaped like it, without
/// a graph. One forward.
pub fn along<const N: usize>(
    inputs: [(&Tensor, &Tensor); N],
    network: impl FnOnce([&Tensor; N]) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    let _no_grad = tch::no_grad_guard();
    let level = Level::open()?;
    let index = level.index as i64;
    let mut duals = Vec::with_capacity(N);
    for (input, direction) in inputs {
        duals.push(Tensor::f_internal_make_dual(input, direction, index)?);
    }
    let output = network(std::array::from_fn(|i| &duals[i]))?;
    let (value, tangent) = Tensor::f_internal_unpack_dual(&output, index)?;
    // A network that ignores its inputs has no tangent.
    let tangent = if tangent.defined() { tangent } else { value.f_zeros_like()? };
    Ok((value.f_detach()?, tangent.f_detach()?))
}
