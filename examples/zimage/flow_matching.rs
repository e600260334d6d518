//! Flow matching: the training loss of the base model, and what it draws.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use super::transformer::ZImageTransformer;

/// Shift of the embedded model's noise levels, in training and in sampling.
pub const SHIFT: f64 = 3.0;

/// The seed of everything drawn at one step, so that a resumed run draws the same.
pub fn step_seed(seed: u64, step: u64) -> i64 {
    // SplitMix64's mixing.
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(step.wrapping_add(1));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 1) as i64
}

/// Noise levels `[B]`: one from each of B equal strata, shifted.
pub fn draw_noise_levels(batch: i64, device: Device) -> Result<Tensor> {
    let options = (Kind::Float, device);
    let u = Tensor::f_arange(batch, options)?
        .f_add(&Tensor::f_rand([batch], options)?)?
        .f_div_scalar(batch)?;
    let denominator = u.f_mul_scalar(SHIFT - 1.0)?.f_add_scalar(1.0)?;
    Ok(u.f_mul_scalar(SHIFT)?.f_div(&denominator)?)
}

/// Mean squared error of the velocity on images `[B, 3, H, W]`, drawing noise and noise levels.
pub fn flow_matching_loss(
    model: &ZImageTransformer,
    images: &Tensor,
    captions: &[Tensor],
) -> Result<Tensor> {
    let sigma = draw_noise_levels(images.size()[0], images.device())?;
    let noise = images.f_randn_like()?;
    let target = images.f_sub(&noise)?;
    let weight = sigma.f_view([-1, 1, 1, 1])?;
    // x0 - sigma (x0 - eps) = (1 - sigma) x0 + sigma eps
    let noisy = images.f_sub(&target.f_mul(&weight)?)?;
    let t = sigma.f_neg()?.f_add_scalar(1.0)?;
    let output = model.forward(&noisy, &t, captions)?;
    Ok(output.f_mse_loss(&target, tch::Reduction::Mean)?)
}
