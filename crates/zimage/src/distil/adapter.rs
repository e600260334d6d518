//! Z-Image as the library sees it: the one place where its sign is turned.

use anyhow::{Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use decoupled_dmd::{Condition, Denoiser, FlowMap, NoisePath, Prediction, RectifiedFlow, Shift};
use tch::Tensor;

use crate::distil::weights::Network;
use crate::model::time_features;

/// Makes the rows of a table of steps or lengths learn faster than the weights that they start beside.
const STEP_SCALE: f64 = 10.0;
/// The argument of the features of a jump's length, for a length of 1. Small, so that the network is smooth in
/// it: losses of flow maps take derivatives.
const LENGTH_SCALE: f64 = 10.0;

/// `network` as a denoiser of `[B, C, H, W]` that is run with `shift`, and whose condition is one tensor
/// of encoded captions `[B, L, D]`.
///
/// Two conditions are answered in one forward of twice the batch, where they are of one length.
pub fn denoiser<'a>(network: impl Into<Network<'a>>, shift: Shift) -> Denoiser<'a> {
    let network = network.into();
    Denoiser::new(
        RectifiedFlow.shifted(shift),
        Prediction::FlowVelocity,
        move |x: &Tensor, t: &Tensor, c: &Condition| velocity(network, x, t, captions(c)?),
    )
    .paired(move |x: &Tensor, t: &Tensor, one: &Condition, two: &Condition| -> Result<_> {
        let (one, two) = (captions(one)?, captions(two)?);
        if one.size() != two.size() {
            return Ok((velocity(network, x, t, one)?, velocity(network, x, t, two)?));
        }
        let twice = |tensor: &Tensor| Tensor::f_cat(&[tensor, tensor], 0);
        let both = Tensor::f_cat(&[one, two], 0)?;
        let output = velocity(network, &twice(x)?, &twice(t)?, &both)?;
        let batch = x.size()[0];
        Ok((output.f_narrow(0, 0, batch)?, output.f_narrow(0, batch, batch)?))
    })
}

/// `network` as a fake score that tells the student's steps apart: its condition is the encoded captions
/// and the student's step `[B]`, and `steps` `[K, D]` holds what is added to the captions for each.
///
/// The K outputs of a rollout are K distributions. A fake score that does not know which one it sees
/// models their mixture, and then the samples of one step may be too faint where those of another
/// are too bold.
pub fn fake_denoiser<'a>(
    network: impl Into<Network<'a>>,
    steps: &'a Tensor,
    shift: Shift,
) -> Denoiser<'a> {
    let network = network.into();
    Denoiser::new(
        RectifiedFlow.shifted(shift),
        Prediction::FlowVelocity,
        move |x: &Tensor, t: &Tensor, condition: &Condition| -> Result<Tensor> {
            ensure!(condition.len() >= 2, "expected encoded captions and the student's steps");
            let captions = &condition[0];
            let step = steps.f_index_select(0, &condition[1])?;
            velocity(network, x, t, &marked(captions, &step)?)
        },
    )
}

/// `network` as a flow map: `lengths` `[F, D]` holds what is added to the captions for each feature of the length
/// of a jump.
pub(super) fn flow_map<'a>(
    network: impl Into<Network<'a>>,
    lengths: &'a Tensor,
    shift: Shift,
) -> FlowMap<'a> {
    let network = network.into();
    FlowMap::new(
        move |x: &Tensor, from: &Tensor, to: &Tensor, condition: &Condition| -> Result<Tensor> {
            let captions = captions(condition)?;
            let length = to.f_sub(from)?.times(LENGTH_SCALE)?;
            let length = time_features(&length)?.f_matmul(lengths)?;
            velocity(network, x, from, &marked(captions, &length)?)
        },
    )
    .shifted(shift)
}

/// Captions `[B, L, D]` with a row of a trained table, `[B, D]`, on every token.
fn marked(captions: &Tensor, row: &Tensor) -> Result<Tensor> {
    let row = row.times(STEP_SCALE)?.f_unsqueeze(1)?.f_to_kind(captions.f_kind()?)?;
    Ok(captions.f_add(&row)?)
}

/// The flow velocity eps - x0. The model's clock is the library's (0 noise, 1 image), but its raw
/// output is x0 - eps.
fn velocity(network: Network<'_>, x: &Tensor, t: &Tensor, captions: &Tensor) -> Result<Tensor> {
    let Network { model, role } = network;
    Ok(model.forward_encoded(x, t, captions, role)?.f_neg()?)
}

fn captions(condition: &Condition) -> Result<&Tensor> {
    ensure!(!condition.is_empty(), "expected encoded captions");
    Ok(&condition[0])
}
