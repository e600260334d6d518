//! The layers of the transformer.

use anyhow::{Context, Result};
use decoupled_dmd::arithmetic::{Arithmetic as _, counting, filled};
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::parameters::parameter;

use crate::model::config::{Config, TIME_FEATURES};
use crate::model::layout::{Sequence, first_rows};
use crate::model::quantization::Weight;
use crate::model::role::Role;
use crate::model::rope::rotate;

/// Longest sequence for which attention scores are kept whole on the CPU.
const SHORT_SEQUENCE: i64 = 512;

/// `x W^T + b`, and what the role adds to it.
#[derive(Debug)]
pub(crate) struct Linear {
    name: String,
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// `{name}.weight` and, where `bias` says so, `{name}.bias`.
    pub(crate) fn new(parameters: &Parameters, name: &str, bias: bool) -> Result<Self> {
        Ok(Self {
            name: name.to_owned(),
            weight: Weight::new(parameters, name)?,
            bias: bias.then(|| parameter(parameters, &format!("{name}.bias"))).transpose()?,
        })
    }

    /// `[.., in]` to `[.., out]`.
    pub(crate) fn forward(&self, x: &Tensor, role: Role<'_>) -> Result<Tensor> {
        let weight = self.weight.in_kind(x.f_kind()?)?;
        role.add_to(x.f_linear(&weight, self.bias.as_ref())?, &self.name, x)
    }

    /// The dtype this layer computes in, where its weight is whole.
    pub(crate) fn kind(&self) -> Kind {
        self.weight.kind()
    }
}

/// Root-mean-square normalisation of the last axis. Differentiable once: second derivatives, as R1 by double
/// backward would take through this model, are not those of the formula.
#[derive(Debug)]
pub(crate) struct RmsNorm {
    weight: Tensor,
    eps: f64,
    scale: Option<f64>,
}

impl RmsNorm {
    pub(crate) fn new(parameters: &Parameters, name: &str, eps: f64) -> Result<Self> {
        let weight = parameter(parameters, &format!("{name}.weight"))?;
        Ok(Self { weight, eps, scale: None })
    }

    /// The same, and what comes out times `scale`.
    fn scaled(mut self, scale: f64) -> Self {
        self.scale = Some(scale);
        self
    }

    /// Same shape as `x`; the mean square is taken in float32 or wider.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_times(x, None)
    }

    /// [`Self::forward`], times `factor` if there is one.
    fn forward_times(&self, x: &Tensor, factor: Option<&Tensor>) -> Result<Tensor> {
        let kind = x.f_kind()?;
        if !matches!(kind, Kind::BFloat16 | Kind::Half) {
            // In this order: what is written is laid out as the gain is, which has no gaps, also where x is a
            // view of heads. Attention's products would copy it.
            return Ok(self.gain(x, factor)?.f_mul(x)?);
        }
        let width = self.weight.size();
        let normed = x.f_to_kind(Kind::Float)?.f_rms_norm(&width, None::<&Tensor>, self.eps)?;
        let mut scaled = normed.f_to_kind(kind)?.f_mul(&self.weight)?;
        if let Some(scale) = self.scale {
            scaled = scaled.times(scale)?;
        }
        Ok(match factor {
            None => scaled,
            Some(factor) => scaled.f_mul(factor)?,
        })
    }

    /// What `x` is multiplied by. With weight and factor joined before they meet the activations, passes
    /// over these are fewest; libtorch's own function takes more on the CPU, where it has no kernel.
    fn gain(&self, x: &Tensor, factor: Option<&Tensor>) -> Result<Tensor> {
        let width = self.weight.size()[0] as f64;
        let norm = row_norms(&x.f_detach()?)?;
        let mut mean_square = norm.f_square()?.over(width)?;
        if x.requires_grad() {
            // The slope of a square from one of its factors, which is half of it: in one pass, where that of
            // libtorch's norm takes three. The bracket is exactly zero.
            let half = x.f_mul(&x.f_detach()?)?;
            let half = half.f_sum_dim_intlist([-1i64].as_slice(), true, None::<Kind>)?;
            let bracket = half.f_sub(&half.f_detach()?)?;
            mean_square = mean_square.f_add(&bracket.times(2.0 / width)?)?;
        }
        let inverse = mean_square.plus(self.eps)?.f_rsqrt()?;
        // As a product of a column and a row, whose gradients read what they sum and write nothing.
        let mut row = self.weight.f_unsqueeze(0)?;
        if let Some(scale) = self.scale {
            row = row.times(scale)?;
        }
        Ok(match factor {
            None => inverse.f_matmul(&row)?,
            Some(factor) => inverse.f_matmul(&row.f_mul(factor)?)?,
        })
    }
}

/// The 2-norm over the last axis, which stays with length one: that of matrices of one row, since libtorch's norm of
/// vectors takes a number, with which tch's call panics where libtorch fails.
fn row_norms(x: &Tensor) -> Result<Tensor> {
    let rows = x.f_unsqueeze(-2)?;
    let axes = [-2i64, -1];
    Ok(rows.f_linalg_norm_ord_str("fro", axes.as_slice(), true, None::<Kind>)?.f_squeeze_dim(-2)?)
}

/// Sinusoidal time features and the MLP over them.
#[derive(Debug)]
pub(crate) struct TimeEmbedder {
    first: Linear,
    second: Linear,
    scale: f64,
}

impl TimeEmbedder {
    pub(crate) fn new(parameters: &Parameters, config: &Config) -> Result<Self> {
        Ok(Self {
            first: Linear::new(parameters, "t_embedder.mlp.0", true)?,
            second: Linear::new(parameters, "t_embedder.mlp.2", true)?,
            scale: config.t_scale,
        })
    }

    /// `t` `[B]` to `[B, E]`.
    pub(crate) fn forward(&self, t: &Tensor, role: Role<'_>) -> Result<Tensor> {
        let features = time_features(&t.f_to_kind(Kind::Float)?.times(self.scale)?)?;
        let hidden = self.first.forward(&features.f_to_kind(self.first.kind())?, role)?.f_silu()?;
        self.second.forward(&hidden, role)
    }
}

/// Cosines, then sines, of `tau` `[B]` at 128 frequencies: `[B, 256]`, all in float32, because
/// rounding a time near 1000 to bfloat16 moves it by several units.
///
/// # Errors
/// If `tau` is not one-dimensional.
pub fn time_features(tau: &Tensor) -> Result<Tensor> {
    let half = TIME_FEATURES / 2;
    let frequencies = counting(half, (Kind::Float, tau.device()))?
        .times(-(10_000f64.ln()))?
        .over(half as f64)?
        .f_exp()?;
    let angles = tau.f_unsqueeze(1)?.f_mul(&frequencies)?;
    Ok(Tensor::f_cat(&[angles.f_cos()?, angles.f_sin()?], 1)?)
}

/// Multi-head attention over the whole sequence.
#[derive(Debug)]
struct Attention {
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    heads: i64,
}

impl Attention {
    fn new(parameters: &Parameters, name: &str, config: &Config) -> Result<Self> {
        let linear = |part: &str| Linear::new(parameters, &format!("{name}.{part}"), false);
        let norm =
            |part: &str| RmsNorm::new(parameters, &format!("{name}.{part}"), config.norm_eps);
        Ok(Self {
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            out: linear("to_out.0")?,
            // On the weight of the norm the scale costs nothing, on the queries two passes.
            query_norm: norm("norm_q")?.scaled(1.0 / (config.head_dim() as f64).sqrt()),
            key_norm: norm("norm_k")?,
            heads: config.n_heads,
        })
    }

    /// `[B, S, D]` to `[B, rows, D]`: what the first `rows` tokens see in all of them.
    fn forward(
        &self,
        x: &Tensor,
        sequence: &Sequence,
        rows: i64,
        role: Role<'_>,
    ) -> Result<Tensor> {
        let (batch, length, dim) = x.size3()?;
        let split = |x: Tensor, rows| -> Result<Tensor> {
            Ok(x.f_view([batch, rows, self.heads, dim / self.heads])?.f_transpose(1, 2)?)
        };
        // Contiguous, or else libtorch's product would depend on whether a gradient is wanted.
        let asking = first_rows(x, 1, rows)?.f_contiguous()?;
        let query = split(self.query.forward(&asking, role)?, rows)?;
        let key = split(self.key.forward(x, role)?, length)?;
        let value = split(self.value.forward(x, role)?, length)?;
        let rotary = &sequence.rotary;
        let query_rotary = first_rows(rotary, rotary.dim() as i64 - 2, rows)?;
        let query = rotate(&self.query_norm.forward(&query)?, &query_rotary)?;
        let key = rotate(&self.key_norm.forward(&key)?, rotary)?;
        let mixed = attend(&query, &key, &value, sequence.mask.as_ref())?;
        self.out.forward(&mixed.f_transpose(1, 2)?.f_reshape([batch, rows, dim])?, role)
    }
}

/// `softmax(q k^T) v` for `[B, heads, S, d]`, the queries scaled already, over the keys where `mask` `[B, 1, 1, S]` is true.
///
/// libtorch's fused kernel is left out for short sequences on the CPU, where its backward pass takes longer
/// than these products, in bfloat16 three times (and cannot be differentiated again). That would be no reason
/// where no gradient is asked for, but a pass with gradients is to give the same bits as one without.
fn attend(query: &Tensor, key: &Tensor, value: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    if query.device() == Device::Cpu && key.size()[2] <= SHORT_SEQUENCE {
        let mut scores = query.f_matmul(&key.f_transpose(2, 3)?)?;
        if let Some(mask) = mask {
            let never = filled(&[], f64::NEG_INFINITY, (scores.f_kind()?, Device::Cpu))?;
            scores = scores.f_masked_fill_tensor(&mask.f_logical_not()?, &never)?;
        }
        return Ok(scores.f_softmax(-1, query.f_kind()?)?.f_matmul(value)?);
    }
    Ok(Tensor::f_scaled_dot_product_attention(
        query,
        key,
        value,
        mask,
        0.0,
        false,
        Some(1.0),
        false,
    )?)
}

/// SwiGLU: `w2(silu(w1 x) * w3 x)`.
#[derive(Debug)]
struct FeedForward {
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl FeedForward {
    fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        let linear = |part: &str| Linear::new(parameters, &format!("{name}.{part}"), false);
        Ok(Self { gate: linear("w1")?, up: linear("w3")?, down: linear("w2")? })
    }

    fn forward(&self, x: &Tensor, role: Role<'_>) -> Result<Tensor> {
        let mut gate = self.gate.forward(x, role)?;
        let up = self.up.forward(x, role)?;
        let hidden = if gate.requires_grad() || up.requires_grad() {
            gate.f_silu()?.f_mul(&up)?
        } else {
            // The same numbers in place: these are the widest tensors of a block.
            gate.f_silu_()?.f_mul_(&up)?
        };
        self.down.forward(&hidden, role)
    }
}

/// Attention and feed-forward, each between two norms, scaled and gated by time where modulated.
#[derive(Debug)]
pub(crate) struct Block {
    attention: Attention,
    feed_forward: FeedForward,
    attention_norms: [RmsNorm; 2],
    feed_forward_norms: [RmsNorm; 2],
    modulation: Option<Linear>,
}

impl Block {
    pub(crate) fn new(
        parameters: &Parameters,
        name: &str,
        config: &Config,
        modulated: bool,
    ) -> Result<Self> {
        let norm =
            |part: &str| RmsNorm::new(parameters, &format!("{name}.{part}"), config.norm_eps);
        let modulation = || Linear::new(parameters, &format!("{name}.adaLN_modulation.0"), true);
        Ok(Self {
            attention: Attention::new(parameters, &format!("{name}.attention"), config)?,
            feed_forward: FeedForward::new(parameters, &format!("{name}.feed_forward"))?,
            attention_norms: [norm("attention_norm1")?, norm("attention_norm2")?],
            feed_forward_norms: [norm("ffn_norm1")?, norm("ffn_norm2")?],
            modulation: modulated.then(modulation).transpose()?,
        })
    }

    /// `x` `[B, S, D]` to `[B, rows, D]`, of the first `rows` tokens; `time` `[B, E]` (ignored by blocks that
    /// are not modulated).
    ///
    /// # Errors
    /// If the shapes do not fit.
    pub(crate) fn forward(
        &self,
        x: &Tensor,
        sequence: &Sequence,
        rows: i64,
        time: Option<&Tensor>,
        role: Role<'_>,
    ) -> Result<Tensor> {
        let attend = |x: &Tensor| self.attention.forward(x, sequence, rows, role);
        let feed = |x: &Tensor| self.feed_forward.forward(x, role);
        let Some(modulation) = &self.modulation else {
            let x = residual(x, rows, &self.attention_norms, None, attend)?;
            return residual(&x, rows, &self.feed_forward_norms, None, feed);
        };
        let time = time.context("a modulated block needs the time embedding")?;
        // Order: scale and gate of attention, scale and gate of the feed-forward; no shifts.
        let parts = modulation.forward(time, role)?.f_unsqueeze(1)?.f_chunk(4, 2)?;
        let scale_gate = |i: usize| -> Result<(Tensor, Tensor)> {
            Ok((parts[i].plus(1.0)?, parts[i + 1].f_tanh()?))
        };
        let x = residual(x, rows, &self.attention_norms, Some(scale_gate(0)?), attend)?;
        residual(&x, rows, &self.feed_forward_norms, Some(scale_gate(2)?), feed)
    }
}

/// `x + gate * norm2(layer(norm1(x) * scale))` of the first `rows` tokens, scale and gate `[B, 1, D]`.
fn residual(
    x: &Tensor,
    rows: i64,
    norms: &[RmsNorm; 2],
    scale_gate: Option<(Tensor, Tensor)>,
    layer: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let (scale, gate) = scale_gate.as_ref().map(|(scale, gate)| (scale, gate)).unzip();
    let output = layer(&norms[0].forward_times(x, scale)?)?;
    let mut update = norms[1].forward_times(&output, gate)?;
    Ok(update.f_add_(&first_rows(x, 1, rows)?)?)
}
