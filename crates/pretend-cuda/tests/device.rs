//! What the pretended device refuses, and what it counts.

use std::process::Command;
use std::sync::{Mutex, MutexGuard};

use pretend_cuda::{Crossing, expect_waits, share_generator, try_device, watch};
use tch::{Device, Kind, Tensor};

/// The device, and the lock of this process's events; none where libtorch has a CUDA half of its own.
fn device() -> Option<(Device, MutexGuard<'static, ()>)> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let device = try_device();
    if device.is_none() {
        println!("skipped: libtorch has a CUDA half of its own");
    }
    Some((device?, guard))
}

#[test]
fn operands_on_two_devices_are_refused_in_the_words_of_cuda() {
    let Some((device, _guard)) = device() else { return };
    let x = Tensor::ones([2, 3], (Kind::Float, device));
    let host = Tensor::ones([2, 3], (Kind::Float, Device::Cpu));
    for error in [
        x.f_add(&host).unwrap_err(),
        x.f_matmul(&host.tr()).unwrap_err(),
        Tensor::f_cat(&[&x, &host], 0).unwrap_err(),
        x.f_index_select(0, &Tensor::from_slice(&[0i64])).unwrap_err(),
        x.f_gather(0, &Tensor::zeros([1, 3], (Kind::Int64, Device::Cpu)), false).unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(text.contains("Expected all tensors to be on the same device"), "{text}");
    }
    // As on CUDA, scalars and indices may be on the CPU.
    let sum = &x + Tensor::from(1.0f32);
    let row = x.f_index(&[Some(Tensor::from_slice(&[0i64]))]).unwrap();
    assert_eq!([sum.device(), row.device()], [device; 2]);
}

#[test]
fn waits_are_seen_with_the_line_that_waits() {
    let Some((device, _guard)) = device() else { return };
    assert_eq!(Device::cuda_if_available(), device);
    let weight = Tensor::ones([3, 4], (Kind::Float, device)).set_requires_grad(true);
    expect_waits("a forward and a backward pass", 0, || {
        let x = Tensor::randn([2, 3], (Kind::Float, device));
        x.matmul(&weight).square().mean(None::<Kind>).backward();
    });
    assert_eq!(weight.grad().device(), device);
    let host = Tensor::from_slice(&[1.0f32, 2.0]);
    let ((), seen) = watch(|| {
        let x = host.to_device(device);
        assert_eq!(x.sum(Kind::Float).double_value(&[]), 3.0);
        let _copy = x.to_device(Device::Cpu);
        let _places = x.nonzero();
        let _later = host.to_device_(device, Kind::Float, true, false);
    });
    let crossings: Vec<_> = seen.events.iter().map(|event| event.crossing).collect();
    use Crossing::{Asynchronous, Read, Size, ToDevice, ToHost};
    assert_eq!(crossings, [ToDevice, Read, ToHost, Size, Asynchronous]);
    assert_eq!(seen.waits().len(), 4);
    for event in seen.waits() {
        assert!(event.at[0].starts_with("crates/pretend-cuda/tests/device.rs:"), "{event}");
    }
    assert_eq!(seen.operators["aten::sum.IntList_out"] + seen.operators["aten::nonzero"], 2);
}

#[test]
fn the_generator_is_its_own_unless_shared() {
    let Some((device, _guard)) = device() else { return };
    let draw = |device| {
        tch::manual_seed(3);
        let x = Tensor::rand([4], (Kind::Double, device));
        (x.to_device(Device::Cpu), Tensor::rand([4], (Kind::Double, Device::Cpu)))
    };
    let (on_the_cpu, _) = draw(Device::Cpu);
    let (first, cpu) = draw(device);
    assert_eq!(first, cpu, "drawing on the device has moved the generator of the CPU");
    assert_eq!(first, draw(device).0, "the seed of the device");
    share_generator(true);
    let (shared, next) = draw(device);
    share_generator(false);
    assert_eq!(shared, on_the_cpu);
    assert_ne!(next, cpu);
}

/// Runs a test of this file that is ignored, in a process of its own; whether it succeeded.
fn succeeds(ignored: &str) -> bool {
    let program = std::env::current_exe().expect("this program");
    let arguments = ["--ignored", "--exact", ignored];
    Command::new(program).args(arguments).output().expect("to run").status.success()
}

#[test]
fn comes_first_or_not_at_all_and_its_memory_is_out_of_reach() {
    if device().is_none() {
        return;
    }
    assert!(succeeds("installs"));
    assert!(!succeeds("installs_after_a_seed"));
    assert!(!succeeds("reads_memory_of_the_device"));
}

#[test]
#[ignore = "a process of its own"]
fn installs() {
    assert!(try_device().is_some());
}

#[test]
#[ignore = "a process of its own"]
fn installs_after_a_seed() {
    tch::manual_seed(0);
    assert!(try_device().is_some());
}

#[test]
#[ignore = "a process of its own"]
fn reads_memory_of_the_device() {
    let x = Tensor::ones([1], (Kind::Float, try_device().expect("a device")));
    // SAFETY: none: it is what must fault.
    let value = unsafe { *x.data_ptr().cast::<f32>() };
    println!("{value}");
}
