//! Memory of the process: of a large batch, and over a long training. One test at a time, alone in its process.
#![cfg(target_os = "linux")]

use std::time::Instant;

use decoupled_dmd::{
    Bandwidth, Batch, Condition, Denoiser, DistributionMatching, FewStepGrid, Guidance, Kernel,
    MaximumMeanDiscrepancy, Prediction, RectifiedFlow, Result, Sampler, Schedule, Transition,
};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

/// The most memory that this process has had, in bytes; `None` where the system does not tell.
fn peak() -> Option<f64> {
    status("VmHWM:")
}

fn status(name: &str) -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
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

/// Updates of each schedule in the long training.
const UPDATES: u64 = 20_000;

/// A network of three layers for points `[B, 2]`.
fn network(vs: &nn::Path<'_>) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor + use<> {
    let net = nn::seq()
        .add(nn::linear(vs / "in", 4, 32, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(vs / "out", 32, 2, Default::default()));
    move |x, t, cond| net.forward(&Tensor::cat(&[x, &t.unsqueeze(1), &cond[0]], 1))
}

/// The posterior mean of a Gaussian around the condition, and around zero without one.
fn teacher<'a>() -> Denoiser<'a> {
    Denoiser::new(RectifiedFlow, Prediction::Sample, |x: &Tensor, t: &Tensor, c: &Condition| {
        let a = t.unsqueeze(1);
        let mean = &c[0] * 1.0f64;
        let gain = &a * 0.25 / (a.square() * 0.25 + (1.0f64 - &a).square());
        &mean + gain * (x - &a * &mean)
    })
}

#[test]
#[ignore = "some minutes: cargo test --release --test memory -- --ignored --nocapture"]
fn a_long_training_stays_finite_and_takes_no_more_memory_or_time() -> Result<()> {
    const OPTIONS: (Kind, Device) = (Kind::Float, Device::Cpu);
    tch::set_num_threads(1);
    for schedule in [
        Schedule::CoupledShared,
        Schedule::DecoupledFull,
        Schedule::DecoupledConstrained,
        Schedule::DecoupledHybrid,
    ] {
        tch::manual_seed(0);
        let [student_vs, fake_vs] = [(); 2].map(|()| nn::VarStore::new(Device::Cpu));
        let model = |vs: &nn::VarStore| {
            Denoiser::new(RectifiedFlow, Prediction::Sample, network(&vs.root()))
        };
        let (student, fake) = (model(&student_vs), model(&fake_vs));
        let dm = DistributionMatching::new(fake);
        let objective = schedule.objective(teacher(), Guidance::new(1.5)?, &dm);
        let sampler = Sampler::new(&student, FewStepGrid::even(2)?, Transition::Ddim);
        let mut student_optimizer = nn::AdamW::default().build(&student_vs, 1e-3)?;
        let mut fake_optimizer = nn::AdamW::default().build(&fake_vs, 2e-3)?;
        let cond = Condition::from(Tensor::from_slice(&[1.0f32]).expand([32, 1], false));
        let null = Condition::from(Tensor::zeros([32, 1], OPTIONS));
        let (mut times, mut memory) = (Vec::new(), Vec::new());
        let mut start = Instant::now();
        for update in 1..=UPDATES {
            let noise = Tensor::randn([32, 2], OPTIONS);
            let made = sampler.simulate(&noise, &cond, sampler.draw_step()?)?;
            let batch = Batch::of(&made, &cond)?.with_null(&null);
            let own = dm.denoising_loss(&batch)?;
            fake_optimizer.backward_step(&own);
            let loss = objective.evaluate(&batch)?.loss;
            student_optimizer.backward_step(&loss);
            if update % 1000 == 0 {
                for loss in [&loss, &own] {
                    assert!(loss.double_value(&[]).is_finite(), "{schedule:?}, update {update}");
                }
                times.push(start.elapsed().as_secs_f64());
                memory.extend(status("VmRSS:"));
                start = Instant::now();
            }
        }
        let median = |times: &[f64]| {
            let mut times = times.to_vec();
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        };
        let (early, late) = (median(&times[..10]), median(&times[10..]));
        println!("{schedule:?}: a thousand updates {early:.2} s, then {late:.2} s");
        // A busy machine is no leak.
        assert!(late < 1.5 * early, "{schedule:?}: {early} s a thousand updates, then {late} s");
        if let (Some(first), Some(last)) = (memory.get(1), memory.last()) {
            println!(
                "{schedule:?}: {:.1} MB after 2000 updates, {:.1} MB at the end",
                first / 1e6,
                last / 1e6
            );
            assert!(*last < 1.01 * first, "{schedule:?}: {first} bytes, then {last}");
        }
        for (name, tensor) in student_vs.variables().into_iter().chain(fake_vs.variables()) {
            assert!(
                bool::try_from(tensor.isfinite().all()).unwrap_or(false),
                "{schedule:?}: {name}"
            );
        }
    }
    Ok(())
}
