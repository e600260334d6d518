//! How long the exchanges of this machine, or of this cluster, take: start it as `data_parallel`.
//!
//! Rank 0 prints the median and the smallest time of each operation. `all_reduce` of few bytes gives the
//! latency, that of many bytes the bandwidth, which an estimate of scaling starts from.

use std::error::Error;
use std::time::Instant;

use tch::{Device, Kind, Tensor};
use tch_c10d::{Averaging, ProcessGroup, Reduce};

const REPEATS: usize = 15;

fn main() -> Result<(), Box<dyn Error>> {
    tch::set_num_threads(1);
    let group = ProcessGroup::from_env()?;
    let report = |what: &str, bytes: u64, times: &mut Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let (least, median) = (times[0], times[times.len() / 2]);
        if group.rank() == 0 {
            let bandwidth = bytes as f64 / median / 1e9;
            println!(
                "{what:<44} {:9.2} ms, least {:9.2} ms, {bandwidth:6.2} GB/s",
                1e3 * median,
                1e3 * least
            );
        }
    };
    if group.rank() == 0 {
        println!("{} processes, medians of {REPEATS}", group.world_size());
    }

    let mut times = measure(&group, || group.barrier())?;
    report("barrier, which is one agreement", 0, &mut times);
    for count in [10, 1_000, 100_000, 1_000_000, 10_000_000] {
        let mut tensor = Tensor::ones([count], (Kind::Float, Device::Cpu));
        let mut times = measure(&group, || group.all_reduce(&mut tensor, Reduce::Mean))?;
        report(&format!("all_reduce of {} bytes", 4 * count), 4 * count as u64, &mut times);
    }

    // 10 million parameters in 100 tensors.
    let parameters: Vec<_> = (0..100)
        .map(|_| Tensor::ones([100, 1000], (Kind::Float, Device::Cpu)).set_requires_grad(true))
        .collect();
    for parameter in &parameters {
        (parameter * 2.0).sum(Kind::Float).backward();
    }
    for bucket_bytes in [1, 4 << 20, 25 << 20, 64 << 20] {
        let averaging = Averaging::default().bucket_bytes(bucket_bytes)?;
        let mut statistics = Default::default();
        let mut times = measure(&group, || {
            statistics = group.average_gradients(&parameters, &averaging)?.statistics;
            Ok(())
        })?;
        let what =
            format!("gradients, buckets of {bucket_bytes} bytes: {} calls", statistics.calls);
        report(&what, statistics.bytes, &mut times);
    }
    Ok(())
}

/// Seconds of each call, all ranks starting together.
fn measure(
    group: &ProcessGroup,
    mut call: impl FnMut() -> tch_c10d::Result<()>,
) -> tch_c10d::Result<Vec<f64>> {
    call()?;
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        group.barrier()?;
        let start = Instant::now();
        call()?;
        times.push(start.elapsed().as_secs_f64());
    }
    Ok(times)
}
