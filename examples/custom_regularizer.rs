//! A custom regularizer: the batch keeps the mean and covariance of real samples.
//! `./with-libtorch cargo run --example custom_regularizer`
//!
//! It is Eq. 7 of Decoupled DMD for a whole batch with a full covariance. The engine is CFG
//! Augmentation between two closed-form Gaussians; the student draws mean + A z. Expected: the engine
//! alone carries the mean far past the data and lets the spread collapse; with the regularizer both
//! settle near the data.

use anyhow::Result;
use decoupled_dmd::arithmetic::Arithmetic;
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, Group, Guidance, Objective, Prediction, Probe,
    RectifiedFlow, Regularizer, Renoising, Uniform,
};
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const BATCH: i64 = 512;

/// KL(N(m, C) || N(mu, S)) = 0.5 [tr(S^-1 C) + (m - mu)' S^-1 (m - mu) - D - ln det C + ln det S]
/// with m, C of the batch `[B, D]` and mu, S of the real samples `[M, D]`.
struct BatchGaussian;

impl Regularizer for BatchGaussian {
    fn loss(&self, probe: &Probe<'_>) -> decoupled_dmd::Result<Tensor> {
        let (x, real) = (probe.x(), probe.batch().real()?);
        let mean_of = |t: &Tensor| t.f_mean_dim(&[0i64][..], false, Kind::Float);
        let offset = mean_of(x)?.f_sub(&mean_of(real)?)?;
        let covariance = |t: &Tensor| t.f_tr()?.f_cov(1, None::<&Tensor>, None::<&Tensor>);
        let (c, s) = (covariance(x)?, covariance(real)?);
        let inverse = s.f_inverse()?;
        let trace = inverse.f_matmul(&c)?.f_trace()?;
        let distance = inverse.f_mv(&offset)?.f_dot(&offset)?;
        let volumes = s.f_logdet()?.f_sub(&c.f_logdet()?)?;
        let dimension = x.size().last().copied().unwrap_or_default() as f64;
        let sum = trace.f_add(&distance)?.f_add(&volumes)?.minus(dimension)?;
        Ok(sum.times(0.5)?)
    }
}

/// The teacher: N(c, 0.5^2 I), where a condition holds c; the null condition is the wider N(0, I).
fn teacher() -> Denoiser<'static> {
    Denoiser::new(RectifiedFlow, Prediction::Sample, |x, t, c: &Condition| {
        let (a, mean, spread) = (t.unsqueeze(1), &c[0], &c[1]);
        let noise = (1.0f64 - &a).square();
        let gain = &a * spread.square() / (a.square() * spread.square() + noise);
        mean + gain * (x - a * mean)
    })
}

/// The mean and the standard deviations of the samples after each quarter of the training.
fn train(objective: &Objective<'_>) -> Result<()> {
    tch::manual_seed(0);
    let mut student =
        [Tensor::zeros([2], CPU), Tensor::eye(2, CPU) * 1.2].map(|t| t.set_requires_grad(true));
    let center = Tensor::from_slice(&[1.0f32, -0.5]);
    let condition = |c: &Tensor, spread: f32| {
        Condition::from(vec![c.expand([BATCH, 2], false), Tensor::from(spread)])
    };
    let (cond, null) = (condition(&center, 0.5), condition(&center.zeros_like(), 1.0));
    for step in 0..=1600 {
        let x = &student[0] + Tensor::randn([BATCH, 2], CPU).matmul(&student[1]);
        let real = &center + Tensor::randn([BATCH, 2], CPU) * 0.5;
        if step % 400 == 0 {
            let mean = Vec::<f32>::try_from(x.mean_dim(&[0i64][..], false, Kind::Float))?;
            let spread = Vec::<f32>::try_from(x.std_dim(&[0i64][..], true, false))?;
            println!("  after {step:>4} updates: mean {mean:>5.2?}  spread {spread:.2?}");
        }
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_real(&real)?;
        let loss = objective.evaluate(&batch)?.loss;
        let gradients = Tensor::f_run_backward(&[loss], &student, false, false)?;
        let _no_grad = tch::no_grad_guard();
        for (parameter, gradient) in student.iter_mut().zip(gradients) {
            let _ = parameter.f_sub_(&(gradient * 0.02))?;
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let engine = CfgAugmentation::new(Guidance::new(2.0)?);
    let group = || Group::new(Renoising::new(Uniform::FULL)).engine("ca", 1.0, &engine);
    println!("data: mean [1.00, -0.50], spread [0.50, 0.50]");
    println!("CA alone");
    train(&Objective::new(teacher()).with(group()))?;
    println!("CA and the batch's Gaussian");
    let regularized = group().regularizer("batch Gaussian", 1.0, BatchGaussian);
    train(&Objective::new(teacher()).with(regularized))
}
