//! Peak memory of a large batch. One test, alone in its process, whose peak it reads.
#![cfg(target_os = "linux")]

use decoupled_dmd::{Bandwidth, Kernel, MaximumMeanDiscrepancy, Result};
use tch::{Device, Kind, Tensor};

/// The most memory that this process has had, in bytes; `None` where the system does not tell.
fn peak() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<f64>().ok()? * 1024.0)
}

#[test]
fn the_discrepancy_never_holds_all_pairs() -> Result<()> {
    let kernel = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(1.0), scales: vec![1.0] };
    let term = MaximumMeanDiscrepancy::new(kernel)?;
    let peak_with = |count: i64| -> Result<Option<f64>> {
        let points = (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.7).sin().unsqueeze(1);
        let x = points.copy().set_requires_grad(true);
        term.between(&x, &(points + 0.1))?.backward();
        Ok(peak())
    };
    // Libtorch's one-time setup does not count.
    let Some(before) = peak_with(10)? else {
        println!("skipped: the system does not tell the peak of the memory");
        return Ok(());
    };
    const COUNT: i64 = 6000;
    let matrices = |bytes: f64| bytes / (COUNT * COUNT * 4) as f64;
    let grown = matrices(peak_with(COUNT)?.expect("told before") - before);
    println!("as much memory as {grown:.1} matrices of all pairs");
    // Six if all pairs are visited at once. Blocks are next to nothing, of which an allocator has made
    // up to one.
    assert!(grown < 3.0, "as much memory as {grown} matrices of all pairs");
    Ok(())
}
