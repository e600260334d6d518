//! A small network of (x, t), and two ways to its derivative besides forward mode.

use anyhow::{Context, Result};
use tch::{Kind, Tensor, nn};

/// Three linear layers with SiLU between them, of x `[B, D]` and t `[B]`.
pub struct Mlp {
    layers: [nn::Linear; 3],
}

impl Mlp {
    /// With `width` hidden units.
    pub fn new(root: &nn::Path<'_>, dimensions: i64, width: i64) -> Self {
        let layer = |name, from, to| nn::linear(root / name, from, to, nn::LinearConfig::default());
        Self {
            layers: [
                layer("in", dimensions + 1, width),
                layer("mid", width, width),
                layer("out", width, dimensions),
            ],
        }
    }

    /// The output `[B, D]`.
    pub fn forward(&self, x: &Tensor, t: &Tensor) -> Result<Tensor> {
        let [first, second, third] = &self.layers;
        let hidden = linear(first, &Tensor::f_cat(&[x, &t.f_unsqueeze(1)?], 1)?)?.f_silu()?;
        linear(third, &linear(second, &hidden)?.f_silu()?)
    }

    /// The output and its derivative while x moves by `dx` and t by `dt`: each layer carries both.
    pub fn forward_along(
        &self,
        x: &Tensor,
        t: &Tensor,
        dx: &Tensor,
        dt: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let [first, second, third] = &self.layers;
        let mut value = Tensor::f_cat(&[x, &t.f_unsqueeze(1)?], 1)?;
        let mut tangent = Tensor::f_cat(&[dx, &dt.f_unsqueeze(1)?], 1)?;
        for layer in [first, second] {
            (value, tangent) = (linear(layer, &value)?, moved(layer, &tangent)?);
            // d/dz of z s(z) is s (1 + z (1 - s)).
            let gate = value.f_sigmoid()?;
            let rest: Tensor = 1.0 - &gate;
            let slope = rest.f_mul(&value)?.f_add_scalar(1.0)?.f_mul(&gate)?;
            tangent = tangent.f_mul(&slope)?;
            value = value.f_mul(&gate)?;
        }
        Ok((linear(third, &value)?, moved(third, &tangent)?))
    }
}

fn linear(layer: &nn::Linear, x: &Tensor) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let bias = layer.bs.as_ref().context("a layer without a bias")?.f_to_kind(kind)?;
    Ok(x.f_linear(&layer.ws.f_to_kind(kind)?, Some(&bias))?)
}

/// A bias does not move.
fn moved(layer: &nn::Linear, tangent: &Tensor) -> Result<Tensor> {
    Ok(tangent.f_linear(&layer.ws.f_to_kind(tangent.f_kind()?)?, None::<&Tensor>)?)
}

/// The same derivative by reverse mode twice. With y = f(x) and a seed u, the gradient of `<y, u>` in x is
/// `J^T u`; it is linear in u, and the gradient of `<J^T u, dx>` in u is `J dx`. It costs a forward and two
/// backwards and keeps the graph of the first, so about ten times the memory of a forward. Inside of an engine
/// gradients are off: `with_grad` turns them on.
pub fn twice_reversed(
    inputs: [(&Tensor, &Tensor); 2],
    network: impl FnOnce([&Tensor; 2]) -> Result<Tensor>,
) -> Result<(Tensor, Tensor)> {
    tch::with_grad(|| {
        let leaf = |tensor: &Tensor| tensor.f_detach()?.f_set_requires_grad(true);
        let leaves = [leaf(inputs[0].0)?, leaf(inputs[1].0)?];
        let output = network([&leaves[0], &leaves[1]])?;
        let seed = leaf(&output.f_zeros_like()?)?;
        let dot = output.f_mul(&seed)?.f_sum(None::<Kind>)?;
        let slopes = Tensor::f_run_backward(&[&dot], &[&leaves[0], &leaves[1]], true, true)?;
        let mut sum = Tensor::f_zeros([1], (output.f_kind()?, output.device()))?;
        for (slope, (_, direction)) in slopes.iter().zip(&inputs) {
            if slope.defined() {
                sum = sum.f_add(&slope.f_mul(direction)?.f_sum(None::<Kind>)?)?;
            }
        }
        let tangent = Tensor::f_run_backward(&[&sum], &[&seed], false, false)?.remove(0);
        Ok((output.f_detach()?, tangent))
    })
}
