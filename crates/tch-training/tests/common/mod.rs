//! Helpers of the tests. Libtorch's generator is one for the whole process: tests that draw hold a lock.
#![allow(dead_code, reason = "each test program uses a part")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

/// The errors of all tests.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Seeds the generator, and keeps other tests from it.
pub fn seeded(seed: i64) -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    guard
}

/// A smooth, asymmetric tensor that needs no generator.
pub fn wave(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
    let count: i64 = shape.iter().product();
    let index = Tensor::arange(count, (Kind::Double, Device::Cpu));
    (index * 0.7 + phase).sin().view(shape).to_kind(kind)
}

/// The largest difference of two tensors of one shape.
pub fn max_difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    (left.to_kind(Kind::Double) - right.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
