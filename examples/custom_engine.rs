//! A custom engine: auto-guidance (Karras et al. 2024), with a weaker model as the null
//! branch. `./with-libtorch cargo run --example custom_engine`
//!
//! Data N(c, 0.5^2 I); the teacher is exact, the weak model believes in the wider N(c, 0.9^2 I). The
//! student draws mean + spread z. Expected: Distribution Matching alone ends on the data. CFG
//! Augmentation moves the mean away from the null, past the data. Auto-guidance leaves the mean and
//! narrows the spread.

use std::cell::RefCell;

use anyhow::Result;
use decoupled_dmd::arithmetic::Arithmetic;
use decoupled_dmd::testing::check_engine;
use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Engine, Group,
    Guidance, Objective, PreShift, Prediction, Probe, RectifiedFlow, Renoising, Uniform,
};
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const BATCH: i64 = 256;

/// direction = (alpha - 1) (x0_teacher - x0_weak) / n
struct AutoGuidance<'a> {
    weak: Denoiser<'a>,
    guidance: Guidance,
}

impl Engine for AutoGuidance<'_> {
    fn direction(&self, probe: &Probe<'_>) -> decoupled_dmd::Result<Tensor> {
        let weak = self.weak.denoise(probe.noised(), probe.tau(), probe.batch().cond())?;
        let difference = probe.teacher_cond()?.f_sub(&weak)?.times(self.guidance.w())?;
        probe.normalize(&difference)
    }
}

/// E[x0 | x_t] of N(mean, spread^2 I) on rectified flow.
fn gaussian(x: &Tensor, t: &Tensor, mean: &Tensor, spread: &Tensor) -> Tensor {
    let (a, variance) = (t.unsqueeze(1), spread.square());
    let noise = (1.0f64 - &a).square();
    let gain = &a * &variance / (a.square() * &variance + noise);
    mean + gain * (x - a * mean)
}

fn model(spread: f64) -> Denoiser<'static> {
    let spread = Tensor::from(spread as f32);
    Denoiser::new(RectifiedFlow, Prediction::Sample, move |x, t, c: &Condition| {
        gaussian(x, t, &c[0], &spread)
    })
}

/// Trains with Distribution Matching and `engine`; returns the student's mean and spread.
fn train(engine: Option<&dyn Engine>) -> Result<(Vec<f32>, Vec<f32>)> {
    tch::manual_seed(0);
    let start = |value: f32| Tensor::from_slice(&[value, value]).set_requires_grad(true);
    let student = RefCell::new([start(0.0), start(1.2)]);
    // The student is Gaussian, so its score needs no network.
    let fake = Denoiser::new(RectifiedFlow, Prediction::Sample, |x, t, _: &Condition| {
        let [mean, spread] = &*student.borrow();
        gaussian(x, t, mean, spread)
    });
    let dm = DistributionMatching::new(fake);
    let mut objective = Objective::new(model(0.5))
        .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("dm", 1.0, &dm));
    if let Some(engine) = engine {
        let group = Group::new(Renoising::new(AboveStudent::FULL));
        objective = objective.with(group.engine("engine", 1.0, engine));
    }
    let cond = Condition::from(Tensor::from_slice(&[1.0f32, -0.5]).expand([BATCH, 2], false));
    let null = Condition::from(Tensor::zeros([BATCH, 2], CPU));
    let time = PreShift::all(0.0, BATCH, CPU)?;
    for _ in 0..800 {
        let [mean, spread] = student.borrow().each_ref().map(Tensor::shallow_clone);
        let x = &mean + &spread * Tensor::randn([BATCH, 2], CPU);
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
        let loss = objective.evaluate(&batch)?.loss;
        let gradients = Tensor::f_run_backward(&[loss], &[&mean, &spread], false, false)?;
        let _no_grad = tch::no_grad_guard();
        for (parameter, gradient) in student.borrow_mut().iter_mut().zip(gradients) {
            let _ = parameter.f_sub_(&(gradient * 0.05))?;
        }
    }
    let [mean, spread] = student.borrow().each_ref().map(Tensor::shallow_clone);
    Ok((Vec::try_from(mean)?, Vec::try_from(spread)?))
}

fn main() -> Result<()> {
    let guidance = Guidance::new(1.5)?;
    let (cfg, auto) = (CfgAugmentation::new(guidance), AutoGuidance { weak: model(0.9), guidance });
    // Shape, type, no graph, the same result twice, independence of samples.
    let (x, cond) = (
        Tensor::linspace(-1.0, 1.0, 8, CPU).view([4, 2]),
        Condition::from(Tensor::zeros([4, 2], CPU)),
    );
    check_engine(&auto, &model(0.5), &Batch::new(&x, &cond)?)?;
    println!("{:>25} mean [0.00, 0.00]   spread [1.20, 1.20]", "before");
    println!("{:>25} mean [1.00, -0.50]  spread [0.50, 0.50]", "data");
    for (name, engine) in [
        ("DM alone", None),
        ("DM and CA", Some(&cfg as &dyn Engine)),
        ("DM and auto-guidance", Some(&auto)),
    ] {
        let (mean, spread) = train(engine)?;
        println!("{name:>25} mean {mean:.2?}  spread {spread:.2?}");
    }
    Ok(())
}
