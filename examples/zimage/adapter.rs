//! Z-Image as the library sees it: the one place where its sign is turned.

use anyhow::{Result, ensure};
use decoupled_dmd::{Condition, Denoiser, Prediction, RectifiedFlow};
use tch::Tensor;

use super::transformer::ZImageTransformer;

/// `model` as a denoiser of `[B, C, H, W]` whose condition is one tensor of encoded captions
/// `[B, L, D]`.
///
/// The model's clock is the library's (0 noise, 1 image); its raw output is x0 - eps, the negative of
/// the flow velocity. Two conditions are answered in one forward of twice the batch.
pub fn denoiser(model: &ZImageTransformer) -> Denoiser<'_> {
    let velocity = |x: &Tensor, t: &Tensor, captions: &Tensor| -> Result<Tensor> {
        Ok(model.forward_encoded(x, t, captions)?.f_neg()?)
    };
    Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        move |x: &Tensor, t: &Tensor, c: &Condition| velocity(x, t, captions(c)?),
    )
    .paired(move |x: &Tensor, t: &Tensor, one: &Condition, two: &Condition| -> Result<_> {
        let twice = |tensor: &Tensor| Tensor::f_cat(&[tensor, tensor], 0);
        let both = Tensor::f_cat(&[captions(one)?, captions(two)?], 0)?;
        let output = velocity(&twice(x)?, &twice(t)?, &both)?;
        let batch = x.size()[0];
        Ok((output.f_narrow(0, 0, batch)?, output.f_narrow(0, batch, batch)?))
    })
}

fn captions(condition: &Condition) -> Result<&Tensor> {
    ensure!(condition.len() == 1, "expected one tensor of encoded captions");
    Ok(&condition[0])
}
