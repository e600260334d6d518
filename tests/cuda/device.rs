//! The device, and the comparison with the CPU, for the tests of every crate of the workspace.

use std::fmt::Display;

use decoupled_dmd::default_device;
use pretend_cuda::{expect_waits, share_generator, try_device};
use tch::{Device, Kind, Tensor};

use crate::common::{seeded, worse};

/// The pretended device, or a true one; none where libtorch has a CUDA half and there is no GPU.
pub fn device() -> Option<Device> {
    let device = try_device().unwrap_or_else(default_device);
    if device == Device::Cpu {
        println!("skipped: this libtorch has CUDA, and there is no GPU");
    }
    (device != Device::Cpu).then_some(device)
}

/// How far a float32 result may be from the CPU's, in proportion to its largest number. The pretended device has the
/// CPU's kernels; a true one sums in other orders, which quotients of small differences magnify.
pub fn float32() -> f64 {
    if try_device().is_some() { 1e-5 } else { 1e-3 }
}

/// Runs `work` on the CPU and on the device with one seed, and compares what it returns: its results may be
/// `tolerance` apart. What it draws must go through [`drawn`].
pub fn compare<E: Display>(
    what: &str,
    tolerance: f64,
    work: impl Fn(Device) -> Result<Vec<Tensor>, E>,
) {
    let Some(device) = device() else { return };
    let _guard = seeded(0);
    let run = |on: Device| {
        tch::manual_seed(11);
        work(on).unwrap_or_else(|error| panic!("{what} on {on:?}: {error:#}"))
    };
    share_generator(true);
    let (expected, found) = (run(Device::Cpu), run(device));
    assert_eq!(expected.len(), found.len(), "{what}");
    for (index, (one, two)) in expected.iter().zip(&found).enumerate() {
        assert_eq!(two.device(), device, "{what}: result {index} is not on the device");
        assert_eq!((one.size(), one.kind()), (two.size(), two.kind()), "{what}: result {index}");
    }
    let distance = distance(&expected, &found);
    println!("{what}: {} results, {distance:.1e} apart", expected.len());
    assert!(distance < tolerance, "{what}: {distance}");
}

/// Results that numbers drawn on the device are part of: left out on a true one, which draws others.
pub fn drawn(results: Vec<Tensor>) -> Vec<Tensor> {
    if try_device().is_some() { results } else { Vec::new() }
}

/// The largest difference in a result, in proportion to its largest number, or to a hundredth of the largest of all:
/// a gradient that cancels has the rounding of what it is made of.
fn distance(expected: &[Tensor], found: &[Tensor]) -> f64 {
    let largest = |tensor: Tensor| tensor.abs().max().double_value(&[]);
    let double = |tensor: &Tensor| tensor.to_device(Device::Cpu).to_kind(Kind::Double);
    let of_all = expected.iter().map(|tensor| largest(double(tensor))).fold(1e-6, f64::max);
    let pairs = expected.iter().zip(found).map(|(one, two)| (double(one), double(two)));
    let distances = pairs.map(|(one, two)| {
        let scale = largest(one.shallow_clone()).max(1e-2 * of_all);
        largest(one - two) / scale
    });
    distances.fold(0.0, worse)
}

/// Runs `work`; on the pretended device the host must wait `count` times for it.
pub fn waits<T>(on: Device, what: &str, count: usize, work: impl FnOnce() -> T) -> T {
    if on == Device::Cpu { work() } else { expect_waits(what, count, work) }
}
