//! Losses on latents of 1024-pixel images, with networks that cost nothing.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Adversarial, Bandwidth, Batch, Condition, Denoiser, DistributionMatching, Draw, Estimator,
    Guidance, Kernel, MaximumMeanDiscrepancy, MeanVariance, PostShift, PreShift, Prediction, Probe,
    RectifiedFlow, Regularizer, Schedule,
};
use tch::{Device, Kind, Tensor};

use super::{Work, gradient};

const SAMPLE: [i64; 3] = [16, 128, 128];
const STUDENT_TIME: f64 = 0.25;
const GUIDANCE: f64 = 4.0;

fn latents(batch: i64, options: (Kind, Device)) -> Result<Tensor> {
    let [channels, height, width] = SAMPLE;
    Ok(Tensor::f_randn([batch, channels, height, width], options)?)
}

fn leaf(tensor: Tensor) -> Result<Tensor> {
    Ok(tensor.f_set_requires_grad(true)?)
}

/// A denoiser whose condition is what it answers.
fn ready() -> Denoiser<'static> {
    Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        |_: &Tensor, _: &Tensor, c: &Condition| c[0].shallow_clone(),
    )
}

fn ready_as(answer: &Tensor) -> Denoiser<'static> {
    let answer = answer.shallow_clone();
    Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        move |_: &Tensor, _: &Tensor, _: &Condition| answer.shallow_clone(),
    )
}

/// What times and noise of an objective are, and whether it is observed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Draws {
    /// The same each time.
    Given,
    Drawn,
    /// Drawn, with diagnostics.
    Observed,
}

/// CFG Augmentation and Distribution Matching, loss and gradient.
pub fn objective(
    schedule: &str,
    batch: i64,
    draws: Draws,
    options: (Kind, Device),
) -> Result<Work> {
    let name = serde_json::Value::from(schedule);
    let schedule: Schedule = serde_json::from_value(name).context("name of the schedule")?;
    let guidance = Guidance::new(GUIDANCE)?;
    let float = (Kind::Float, options.1);
    tch::manual_seed(0);
    let x = leaf(latents(batch, options)?)?;
    let cond = Condition::from(latents(batch, options)?);
    let null = Condition::from(latents(batch, options)?);
    let fake = latents(batch, options)?;
    let time = PreShift::all(STUDENT_TIME, batch, float)?;
    let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
    let given = (0..groups)
        .map(|_| Ok(Draw { u: Tensor::f_rand([batch], float)?, noise: latents(batch, options)? }))
        .collect::<Result<Vec<_>>>()?;
    Ok(Box::new(move || {
        let dm = DistributionMatching::new(ready_as(&fake));
        let mut objective = schedule.objective(ready(), guidance, &dm);
        if draws == Draws::Observed {
            objective = objective.observed();
        }
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
        let loss = if draws == Draws::Given {
            let draw =
                |draw: &Draw| Draw { u: draw.u.shallow_clone(), noise: draw.noise.shallow_clone() };
            objective.evaluate_at(&batch, given.iter().map(draw).collect())?.loss
        } else {
            tch::manual_seed(1);
            objective.evaluate(&batch)?.loss
        };
        let gradient = gradient(&loss, &x)?;
        Ok(vec![loss, gradient])
    }))
}

/// Eq. 7 with the paper's numbers for SDXL, loss and gradient.
pub fn mean_variance(batch: i64, options: (Kind, Device)) -> Result<Work> {
    tch::manual_seed(0);
    let x = leaf(latents(batch, options)?)?;
    let noise = latents(batch, options)?;
    let term = MeanVariance::per_sample(0.075, 0.81)?;
    of_regularizer(term, x, noise)
}

/// Loss and gradient of a regularizer at time 0.5. Where it shares a probe with others, the probe costs it
/// nothing: made once, it lives as long as the process.
fn of_regularizer(term: impl Regularizer + 'static, x: Tensor, noise: Tensor) -> Result<Work> {
    let time = PostShift::all(0.5, x.size()[0], (Kind::Float, x.device()))?;
    let owned = Box::leak(Box::new((x.shallow_clone(), ready(), Condition::none())));
    let batch = Box::leak(Box::new(Batch::new(&owned.0, &owned.2)?));
    let probe = Probe::at(&owned.1, batch, time, noise)?;
    Ok(Box::new(move || {
        let loss = term.loss(&probe)?;
        let gradient = gradient(&loss, &x)?;
        Ok(vec![loss, gradient])
    }))
}

/// DAN's discrepancy: five radial basis functions, biased estimate, mean distance as the unit.
pub fn mmd(points: i64, width: i64, device: Device) -> Result<Work> {
    tch::manual_seed(0);
    let draw = || Tensor::f_randn([points, width], (Kind::Float, device));
    let x = leaf(draw()?)?;
    let real = draw()?.f_add_scalar(0.5)?;
    let kernel =
        Kernel::Gaussian { bandwidth: Bandwidth::Mean, scales: vec![0.25, 0.5, 1.0, 2.0, 4.0] };
    let term = MaximumMeanDiscrepancy::new(kernel)?.estimator(Estimator::Biased);
    Ok(Box::new(move || {
        let loss = term.between(&x, &real)?;
        let gradient = gradient(&loss, &x)?;
        Ok(vec![loss, gradient])
    }))
}

/// Non-saturating losses with a small convolutional critic: `generator` with the gradient in x, or
/// `critic` with that in the critic's weights.
pub fn gan(part: &str, batch: i64, device: Device) -> Result<Work> {
    let options = (Kind::Float, device);
    tch::manual_seed(0);
    let x = leaf(latents(batch, options)?)?;
    let real = latents(batch, options)?;
    let noise = latents(batch, options)?;
    let first = leaf(Tensor::f_randn([32, 16, 4, 4], options)?.f_mul_scalar(0.06)?)?;
    let second = leaf(Tensor::f_randn([1, 32, 1, 1], options)?.f_mul_scalar(0.2)?)?;
    let weights = [first.shallow_clone(), second.shallow_clone()];
    let critic = move |x: &Tensor, _: &Tensor, _: &Condition| -> Result<Tensor> {
        let none = None::<&Tensor>;
        let hidden = x.f_conv2d(&first, none, [4, 4], [0, 0], [1, 1], 1)?.f_silu()?;
        Ok(hidden.f_conv2d(&second, none, [1, 1], [0, 0], [1, 1], 1)?)
    };
    let gan = Adversarial::new(RectifiedFlow, critic);
    if part == "critic" {
        let cond = Condition::none();
        let time = Tensor::f_full([batch], 0.5, options)?;
        return Ok(Box::new(move || {
            let time = PostShift::new(time.shallow_clone())?;
            let batch = Batch::new(&x, &cond)?.with_real(&real)?;
            let loss = gan.critic_loss_at(&batch, &time, &noise, &noise)?;
            let mut found = Tensor::f_run_backward(&[&loss], &weights, false, false)?;
            found.insert(0, loss);
            Ok(found)
        }));
    }
    of_regularizer(gan, x, noise)
}

/// The denoising loss of the fake score, with the gradient in what the network answers.
pub fn fake(batch: i64, options: (Kind, Device)) -> Result<Work> {
    tch::manual_seed(0);
    let x = latents(batch, options)?;
    let noise = latents(batch, options)?;
    let answer = leaf(latents(batch, options)?)?;
    let time = Tensor::f_full([batch], 0.5, (Kind::Float, options.1))?;
    let cond = Condition::none();
    Ok(Box::new(move || {
        let dm = DistributionMatching::new(ready_as(&answer));
        let time = PostShift::new(time.shallow_clone())?;
        let loss = dm.denoising_loss_at(&Batch::new(&x, &cond)?, &time, &noise)?;
        let gradient = gradient(&loss, &answer)?;
        Ok(vec![loss, gradient])
    }))
}
