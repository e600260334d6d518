//! Flow matching: the training loss of the base model.

use anyhow::Result;
use decoupled_dmd::arithmetic::{Arithmetic as _, counting};
use decoupled_dmd::{Condition, Renoising, Shift, Uniform};
use tch::{Kind, Tensor};

use crate::distil::adapter::denoiser;
use crate::distil::weights::Network;

/// Shift of the embedded model's noise levels, in training and in sampling.
pub const SHIFT: f64 = 3.0;

/// Mean squared error of the velocity on images `[B, 3, H, W]`, drawing noise and times: one time
/// from each of B equal strata before the shift.
///
/// # Errors
/// If there are not as many captions as images.
pub fn flow_matching_loss<'n>(
    network: impl Into<Network<'n>>,
    images: &Tensor,
    captions: &[Tensor],
) -> Result<Tensor> {
    let batch = images.size()[0];
    let options = (Kind::Float, images.device());
    let u =
        counting(batch, options)?.f_add(&Tensor::f_rand([batch], options)?)?.over(batch as f64)?;
    let network = network.into();
    let denoiser = denoiser(network, Shift::new(SHIFT)?);
    let time = Renoising::new(Uniform::FULL).at(denoiser.path(), &u, None)?;
    let noise = images.f_randn_like()?;
    let condition = Condition::from(network.model.encode_captions(captions, network.role)?);
    Ok(denoiser.denoising_loss(images, &time, &noise, &condition)?)
}
