//! Euler sampling with classifier-free guidance.

use anyhow::{Result, ensure};
use tch::Tensor;

use super::transformer::{CaptionStates, ZImageTransformer};

/// How to sample.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    pub steps: usize,
    /// Shift of the noise levels: above 1, more of them are spent on noisy images.
    pub shift: f64,
    /// `alpha` in `uncond + alpha (cond - uncond)`; 1 is unguided and saves the second call.
    pub guidance: f64,
}

/// `shift u / (1 + (shift - 1) u)`.
pub fn shifted(u: f64, shift: f64) -> f64 {
    shift * u / (1.0 + (shift - 1.0) * u)
}

/// The noise levels of `steps` steps, from 1 down to the last before 0, then 0 itself.
pub fn noise_levels(steps: usize, shift: f64) -> Vec<f64> {
    (0..=steps).map(|i| shifted((steps - i) as f64 / steps as f64, shift)).collect()
}

/// The velocity `eps - x0` at noise level `sigma` of `x` `[B, C, H, W]`. `captions` holds B captions,
/// `empty` one, the empty caption.
///
/// # Errors
/// If shapes do not fit.
pub fn velocity(
    model: &ZImageTransformer,
    x: &Tensor,
    sigma: f64,
    captions: &CaptionStates,
    empty: &CaptionStates,
    guidance: f64,
) -> Result<Tensor> {
    let batch = x.size()[0];
    // The model's time runs the other way, and its output has the other sign.
    let t = |n: i64| Tensor::f_full([n], 1.0 - sigma, (tch::Kind::Float, x.device()));
    if (guidance - 1.0).abs() < f64::EPSILON {
        return Ok(model.forward_encoded(x, &t(batch)?, captions)?.f_neg()?);
    }
    let pair = CaptionStates::cat(&[captions, &empty.expand(batch)?])?;
    let output = model.forward_encoded(&Tensor::f_cat(&[x, x], 0)?, &t(2 * batch)?, &pair)?;
    let (cond, uncond) = (output.f_narrow(0, 0, batch)?, output.f_narrow(0, batch, batch)?);
    Ok(uncond.f_add(&cond.f_sub(&uncond)?.f_mul_scalar(guidance)?)?.f_neg()?)
}

/// Integrates from `noise` `[B, C, H, W]` to images with Euler's method.
///
/// # Errors
/// If shapes do not fit, or there are no steps.
pub fn sample(
    model: &ZImageTransformer,
    noise: &Tensor,
    captions: &CaptionStates,
    empty: &CaptionStates,
    sampling: Sampling,
) -> Result<Tensor> {
    ensure!(sampling.steps > 0, "at least one step is needed");
    let _guard = tch::no_grad_guard();
    let mut x = noise.shallow_clone();
    for pair in noise_levels(sampling.steps, sampling.shift).windows(2) {
        let v = velocity(model, &x, pair[0], captions, empty, sampling.guidance)?;
        x = x.f_add(&v.f_mul_scalar(pair[1] - pair[0])?)?;
    }
    Ok(x)
}
