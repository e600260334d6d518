//! An allocator that fails on request: libtorch's tensors on the CPU come from `posix_memalign`, which this
//! program puts itself in front of.
#![allow(unsafe_code)]

use std::any::Any;
use std::cell::Cell;
use std::error::Error;
use std::ffi::{c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// How many allocations of this thread succeed before one fails; `None` if all do.
    static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
}

unsafe extern "C" {
    fn memalign(alignment: usize, size: usize) -> *mut c_void;
}

/// # Safety
/// That of the function of this name in POSIX.
#[unsafe(no_mangle)]
unsafe extern "C" fn posix_memalign(to: *mut *mut c_void, alignment: usize, size: usize) -> c_int {
    const ENOMEM: c_int = 12;
    let left = LEFT.get();
    LEFT.set(left.and_then(|left| left.checked_sub(1)));
    if left == Some(0) {
        return ENOMEM;
    }
    // SAFETY: the caller promises a power of two, and a place for the pointer.
    unsafe {
        *to = memalign(alignment, size);
        if (*to).is_null() { ENOMEM } else { 0 }
    }
}

/// No stack: libtorch describes it with every error, which takes as long as thousands of operations.
#[unsafe(no_mangle)]
extern "C" fn backtrace(_frames: *mut *mut c_void, _most: c_int) -> c_int {
    0
}

/// Whether an allocation of `compute` failed, after the first `count`.
fn failing<T>(count: u64, compute: impl FnOnce() -> T) -> (bool, std::thread::Result<T>) {
    LEFT.set(Some(count));
    let result = catch_unwind(AssertUnwindSafe(compute));
    (LEFT.take().is_none(), result)
}

/// Lets each allocation of `compute` fail in turn: it returns libtorch's error each time, and does not panic.
pub fn each_allocation_may_fail<T>(name: &str, compute: impl Fn() -> decoupled_dmd::Result<T>) {
    allocations_may_fail(name, 1, || Ok(compute()?));
}

/// The same with every so many of the allocations.
pub fn allocations_may_fail<T>(
    name: &str,
    every: usize,
    mut compute: impl FnMut() -> anyhow::Result<T>,
) {
    // With several threads, libraries below libtorch take memory too, and do not all look whether they get it.
    tch::set_num_threads(1);
    // Libtorch's own set-up does not count.
    if let Err(error) = compute() {
        panic!("{name}, with all its memory: {error:?}");
    }
    for count in (0..).step_by(every) {
        match failing(count, &mut compute) {
            (true, Ok(Err(error))) => {
                assert!(is_of_memory(&*error), "{name}, allocation {count}: {error:?}");
            }
            (false, Ok(Ok(_))) => {
                assert!(count > 0, "{name} takes no memory, or not from posix_memalign");
                println!("{name}: {count} allocations");
                return;
            }
            (failed, Ok(result)) => {
                let end = result.err().map(|error| error.to_string());
                panic!("{name}, allocation {count}, which failed: {failed}; the error: {end:?}");
            }
            (_, Err(panic)) => panic!("{name} panics at allocation {count}: {}", words(&*panic)),
        }
    }
}

fn is_of_memory(error: &(dyn Error + 'static)) -> bool {
    error.to_string().contains("can't allocate memory") || error.source().is_some_and(is_of_memory)
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no words")
}

#[test]
fn a_call_of_tch_that_panics_is_noticed() {
    let x = tch::Tensor::ones([2], (tch::Kind::Float, tch::Device::Cpu));
    let panics = |compute: &dyn Fn() -> decoupled_dmd::Result<tch::Tensor>| {
        catch_unwind(AssertUnwindSafe(|| each_allocation_may_fail("a call", compute))).is_err()
    };
    assert!(!panics(&|| Ok(x.f_mul(&x)?)));
    // The number outlives the error of the operation, and its destructor unwraps that error.
    assert!(panics(&|| Ok(x.f_mul_scalar(2.0)?)));
    assert!(panics(&|| Ok(&x * &x)));
    // Nor may an error be dropped.
    assert!(panics(&|| Ok(x.f_mul(&x).unwrap_or(x.shallow_clone()))));
}
