//! Flow matching: the training loss of the base model.

use anyhow::Result;
use decoupled_dmd::{Condition, Renoising, Shift, Uniform};
use tch::{Kind, Tensor};

use super::adapter::denoiser;
use super::lora::Role;
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

/// Mean squared error of the velocity on images `[B, 3, H, W]`, drawing noise and times: one time
/// from each of B equal strata before the shift.
///
/// # Errors
/// If there are not as many captions as images.
pub fn flow_matching_loss(
    model: &ZImageTransformer,
    images: &Tensor,
    captions: &[Tensor],
) -> Result<Tensor> {
    let batch = images.size()[0];
    let options = (Kind::Float, images.device());
    let u = Tensor::f_arange(batch, options)?
        .f_add(&Tensor::f_rand([batch], options)?)?
        .f_div_scalar(batch)?;
    let denoiser = denoiser(model, Shift::new(SHIFT)?);
    let time = Renoising::new(Uniform::FULL).at(denoiser.path(), &u, None)?;
    let noise = images.f_randn_like()?;
    let condition = Condition::from(model.encode_captions(captions, Role::BASE)?);
    Ok(denoiser.denoising_loss(images, &time, &noise, &condition)?)
}
