//! The cost of the terms without that of the networks: loss and gradient on `[8, 16, 128, 128]` in
//! float32, a batch of eight 1024-pixel images in a 16-channel latent space.
//!
//! `./with-libtorch cargo bench`

use criterion::{Criterion, criterion_group, criterion_main};
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Group, Guidance,
    MeanVariance, Objective, PreShift, Prediction, RectifiedFlow, Renoising, Result, Schedule,
    Shift, Uniform, default_device,
};
use tch::{Device, Kind, Tensor};

const SHAPE: [i64; 4] = [8, 16, 128, 128];

/// A network that costs one multiplication and sees its condition.
fn stub() -> Denoiser<'static> {
    Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, |x, _: &Tensor, c: &Condition| x * &c[0])
}

fn objectives<'a>(
    dm: &'a DistributionMatching<'static>,
) -> Result<Vec<(&'static str, Objective<'a>)>> {
    let guidance = Guidance::new(4.0)?;
    let group = || Group::new(Renoising::new(Uniform::FULL));
    let alone = |group| Objective::new(stub()).with(group);
    let scheduled = |schedule: Schedule| schedule.objective(stub(), guidance, dm, Shift::NONE);
    Ok(vec![
        ("ca", alone(group().engine("ca", 1.0, CfgAugmentation::new(guidance)))),
        ("dm", alone(group().regularizer("dm", 1.0, dm))),
        (
            "mean_variance",
            alone(group().regularizer("mv", 1.0, MeanVariance::per_sample(0.0, 1.0)?)),
        ),
        ("coupled_shared", scheduled(Schedule::CoupledShared)),
        ("decoupled_hybrid", scheduled(Schedule::DecoupledHybrid)),
    ])
}

fn terms(criterion: &mut Criterion) {
    let device: Device = default_device();
    let options = (Kind::Float, device);
    let x = Tensor::randn(SHAPE, options).set_requires_grad(true);
    let condition = |gain: f64| Condition::from(Tensor::full([1], gain, options));
    let (cond, null) = (condition(0.5), condition(0.4));
    let time = PreShift::all(0.25, SHAPE[0], options).expect("a time in range");
    let batch = Batch::new(&x, &cond)
        .and_then(|batch| batch.null(&null).student_time(&time))
        .expect("a batch of samples");
    let dm = DistributionMatching::new(stub(), Shift::NONE);
    let mut group = criterion.benchmark_group("terms");
    group.sample_size(10);
    for (name, objective) in objectives(&dm).expect("valid settings") {
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                let loss = objective.evaluate(&batch).expect("a loss").loss;
                let gradient = Tensor::run_backward(&[loss], &[&x], false, false);
                if device.is_cuda() {
                    tch::Cuda::synchronize(0);
                }
                gradient
            });
        });
    }
    group.finish();
}

criterion_group!(benches, terms);
criterion_main!(benches);
