//! Tensors of tests, and how far two of them may be apart, for the tests of every crate of the workspace.
#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, Tensor};

/// The type and device of references.
pub const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Libtorch's generator is one for the whole process: tests that draw hold this lock.
pub fn seeded(seed: i64) -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    let guard = GENERATOR.lock().unwrap_or_else(PoisonError::into_inner);
    tch::manual_seed(seed);
    guard
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

pub fn value(tensor: &Tensor) -> f64 {
    tensor.double_value(&[])
}

/// The larger of two errors; NaN is above all, where `f64::max` would drop it.
pub fn worse(one: f64, other: f64) -> f64 {
    if other <= one || one.is_nan() { one } else { other }
}

/// The largest difference of two tensors of one shape.
pub fn max_difference(left: &Tensor, right: &Tensor) -> f64 {
    assert_eq!(left.size(), right.size());
    (left.to_kind(Kind::Double) - right.to_kind(Kind::Double)).abs().max().double_value(&[])
}

/// A smooth, asymmetric tensor that needs no generator.
pub fn wave(shape: &[i64], phase: f64, kind: Kind) -> Tensor {
    let count: i64 = shape.iter().product();
    let index = Tensor::arange(count, (Kind::Double, Device::Cpu));
    (index * 0.7 + phase).sin().view(shape).to_kind(kind)
}

/// The gradient of a scalar in one leaf.
pub fn gradient(loss: &Tensor, leaf: &Tensor) -> Tensor {
    Tensor::run_backward(&[loss], &[leaf], true, false).remove(0)
}

/// What float64 may be off, in proportion to the largest number expected: thousands of roundings.
pub const FLOAT64: f64 = 1e-12;

/// A number in bfloat16, of eight bits, is off by half a unit of its last.
pub const BFLOAT16: f64 = 1.0 / 256.0;

/// How many times the distance of PyTorch's float32 from float64 a float32 answer may be from the reference.
///
/// CPUs round in different orders, so no bound is that of one machine: the files hold the distance, which
/// `scripts/reference/precision.py` measures. PyTorch's own is up to 2.1 times as large on one CPU as on
/// another (an AMD EPYC with AVX2, the same with plain kernels, and the machine of earlier files), and ours
/// may be off to the other side of its answer. The worst found on the EPYC is half the bound.
pub const MARGIN: f64 = 4.0;

/// The bound of an error in float32 where PyTorch's is `distance`, both in proportion to the largest number
/// expected. An answer that PyTorch happens to round well is not asked for better than the type has it.
pub fn float32_bound(distance: f64) -> f64 {
    MARGIN * distance.max(f64::from(f32::EPSILON))
}

/// The bound of the float32 tensor `name`, or of a kind of tensors, by the distance that stands in its file.
pub fn bound_of(file: &BTreeMap<String, Tensor>, name: &str) -> f64 {
    let distance = file.get(&format!("{name}:distance"));
    float32_bound(value(distance.unwrap_or_else(|| panic!("no distance of {name}"))))
}

/// Asserts that `found`, computed in float32, is the tensor `name` of a file.
pub fn assert_float32(found: &Tensor, file: &BTreeMap<String, Tensor>, name: &str) {
    let (error, bound) = (relative(name, found, &file[name]), bound_of(file, name));
    println!("{name}: {error:.1e} of {bound:.1e}");
    assert!(error <= bound, "{name}: {error:e} > {bound:e}");
}

/// Asserts that `other` is `one`, computed in another order, but for rounding in float32: that it is no
/// farther from it than `one`, a few times, from `exact`, the same in float64.
pub fn assert_rounding(what: &str, one: &Tensor, other: &Tensor, exact: &Tensor) {
    let (error, bound) = (relative(what, other, one), float32_bound(relative(what, one, exact)));
    println!("{what}: {error:.1e} of {bound:.1e}");
    assert!(error <= bound, "{what}: {error:e} > {bound:e}");
}

/// Asserts that two ways to compute the same in float64 agree.
pub fn assert_float64(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!((found.kind(), expected.kind()), (Kind::Double, Kind::Double), "{what}");
    let error = relative(what, found, expected);
    println!("{what}: {error:.1e}");
    assert!(error <= FLOAT64, "{what}: {error:e}");
}

/// The largest error of `found`, relative to the largest number expected.
pub fn relative(name: &str, found: &Tensor, expected: &Tensor) -> f64 {
    let expected = expected.to_kind(Kind::Double);
    assert_eq!(found.size(), expected.size(), "{name}");
    let worst = (found.to_kind(Kind::Double) - &expected).abs().max();
    value(&(worst / expected.abs().max().clamp_min(1e-300)))
}
