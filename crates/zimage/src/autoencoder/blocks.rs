//! The layers of the autoencoder.

use anyhow::Result;
use tch::{Kind, Tensor};
use tch_training::Parameters;
use tch_training::parameters::parameter;

use crate::autoencoder::config::{AutoencoderConfig, Half, Stage};
use crate::model::{Linear, Role};

/// Epsilon of every group normalisation; no config states it.
const NORM_EPS: f64 = 1e-6;

/// A convolution with a bias, 3x3 or 1x1.
#[derive(Debug)]
struct Convolution {
    weight: Tensor,
    bias: Tensor,
}

impl Convolution {
    fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        Ok(Self {
            weight: parameter(parameters, &format!("{name}.weight"))?,
            bias: parameter(parameters, &format!("{name}.bias"))?,
        })
    }

    /// `[B, in, H, W]` to `[B, out, H', W']`.
    fn forward(&self, x: &Tensor, stride: i64, padding: i64) -> Result<Tensor> {
        Ok(x.f_conv2d(&self.weight, Some(&self.bias), stride, padding, 1, 1)?)
    }
}

/// Group normalisation with a scale and a shift for each channel.
#[derive(Debug)]
struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
}

impl GroupNorm {
    fn new(parameters: &Parameters, name: &str, groups: i64) -> Result<Self> {
        Ok(Self {
            weight: parameter(parameters, &format!("{name}.weight"))?,
            bias: parameter(parameters, &format!("{name}.bias"))?,
            groups,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(x.f_group_norm(self.groups, Some(&self.weight), Some(&self.bias), NORM_EPS, false)?)
    }
}

/// `shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`.
#[derive(Debug)]
struct ResidualBlock {
    norms: [GroupNorm; 2],
    convolutions: [Convolution; 2],
    /// 1x1, where the channels change.
    shortcut: Option<Convolution>,
}

impl ResidualBlock {
    fn new(parameters: &Parameters, name: &str, groups: i64, has_shortcut: bool) -> Result<Self> {
        let norm = |part: &str| GroupNorm::new(parameters, &format!("{name}.{part}"), groups);
        let convolution = |part: &str| Convolution::new(parameters, &format!("{name}.{part}"));
        Ok(Self {
            norms: [norm("norm1")?, norm("norm2")?],
            convolutions: [convolution("conv1")?, convolution("conv2")?],
            shortcut: has_shortcut.then(|| convolution("conv_shortcut")).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut hidden = x.shallow_clone();
        for (norm, convolution) in self.norms.iter().zip(&self.convolutions) {
            hidden = convolution.forward(&norm.forward(&hidden)?.f_silu()?, 1, 1)?;
        }
        Ok(match &self.shortcut {
            Some(shortcut) => hidden.f_add(&shortcut.forward(x, 1, 0)?)?,
            None => hidden.f_add(x)?,
        })
    }
}

/// Attention of every position to every position, with one head.
#[derive(Debug)]
struct Attention {
    norm: GroupNorm,
    query: Linear,
    key: Linear,
    value: Linear,
    out: Linear,
}

impl Attention {
    fn new(parameters: &Parameters, name: &str, groups: i64) -> Result<Self> {
        let linear = |part: &str| Linear::new(parameters, &format!("{name}.{part}"), true);
        Ok(Self {
            norm: GroupNorm::new(parameters, &format!("{name}.group_norm"), groups)?,
            query: linear("to_q")?,
            key: linear("to_k")?,
            value: linear("to_v")?,
            out: linear("to_out.0")?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        // [B, 1, H * W, C]: positions are the sequence.
        let tokens = self.norm.forward(x)?.f_flatten(2, 3)?.f_transpose(1, 2)?.f_unsqueeze(1)?;
        let mixed = Tensor::f_scaled_dot_product_attention(
            &self.query.forward(&tokens, Role::BASE)?,
            &self.key.forward(&tokens, Role::BASE)?,
            &self.value.forward(&tokens, Role::BASE)?,
            None::<&Tensor>,
            0.0,
            false,
            None,
            false,
        )?;
        let output = self.out.forward(&mixed.f_squeeze_dim(1)?, Role::BASE)?;
        Ok(output.f_transpose(1, 2)?.f_reshape(x.size())?.f_add(x)?)
    }
}

/// Two residual blocks around the attention, at the resolution of the latents.
#[derive(Debug)]
struct MiddleBlock {
    blocks: [ResidualBlock; 2],
    attention: Option<Attention>,
}

impl MiddleBlock {
    fn new(parameters: &Parameters, name: &str, config: &AutoencoderConfig) -> Result<Self> {
        let groups = config.norm_num_groups;
        let block =
            |i| ResidualBlock::new(parameters, &format!("{name}.resnets.{i}"), groups, false);
        let attention = || Attention::new(parameters, &format!("{name}.attentions.0"), groups);
        Ok(Self {
            blocks: [block(0)?, block(1)?],
            attention: config.mid_block_add_attention.then(attention).transpose()?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let mut x = self.blocks[0].forward(x)?;
        if let Some(attention) = &self.attention {
            x = attention.forward(&x)?;
        }
        self.blocks[1].forward(&x)
    }
}

/// The blocks of one resolution and the step to the next.
#[derive(Debug)]
struct Level {
    blocks: Vec<ResidualBlock>,
    resample: Option<Convolution>,
    half: Half,
}

impl Level {
    fn new(
        parameters: &Parameters,
        name: &str,
        config: &AutoencoderConfig,
        half: Half,
        stage: Stage,
    ) -> Result<Self> {
        let blocks = (0..stage.blocks)
            .map(|i| {
                let has_shortcut = i == 0 && stage.inputs != stage.outputs;
                let name = format!("{name}.resnets.{i}");
                ResidualBlock::new(parameters, &name, config.norm_num_groups, has_shortcut)
            })
            .collect::<Result<_>>()?;
        let (_, resampler) = half.stage_names();
        let resample = || Convolution::new(parameters, &format!("{name}.{resampler}.0.conv"));
        Ok(Self { blocks, resample: stage.resamples.then(resample).transpose()?, half })
    }

    fn forward(&self, x: Tensor) -> Result<Tensor> {
        let mut x = x;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        let Some(convolution) = &self.resample else { return Ok(x) };
        match self.half {
            // One row and column of zeros at the right and below only.
            Half::Encoder => convolution.forward(&x.f_constant_pad_nd([0, 1, 0, 1])?, 2, 0),
            Half::Decoder => {
                let (_, _, height, width) = x.size4()?;
                let larger = x.f_upsample_nearest2d([2 * height, 2 * width], None, None)?;
                convolution.forward(&larger, 1, 1)
            }
        }
    }
}

/// Encoder or decoder: the same parts, the middle block at the end or at the start.
#[derive(Debug)]
pub(crate) struct Network {
    half: Half,
    first: Convolution,
    middle: MiddleBlock,
    levels: Vec<Level>,
    norm: GroupNorm,
    last: Convolution,
}

impl Network {
    /// Over the parameters of [`AutoencoderConfig::parameters`], whose storage it shares.
    ///
    /// # Errors
    /// Names a parameter that is missing.
    pub(crate) fn new(
        parameters: &Parameters,
        config: &AutoencoderConfig,
        half: Half,
    ) -> Result<Self> {
        let root = half.name();
        let (stage_name, _) = half.stage_names();
        let levels = config
            .stages(half)
            .into_iter()
            .enumerate()
            .map(|(i, stage)| {
                Level::new(parameters, &format!("{root}.{stage_name}.{i}"), config, half, stage)
            })
            .collect::<Result<_>>()?;
        let norm = format!("{root}.conv_norm_out");
        Ok(Self {
            half,
            first: Convolution::new(parameters, &format!("{root}.conv_in"))?,
            middle: MiddleBlock::new(parameters, &format!("{root}.mid_block"), config)?,
            levels,
            norm: GroupNorm::new(parameters, &norm, config.norm_num_groups)?,
            last: Convolution::new(parameters, &format!("{root}.conv_out"))?,
        })
    }

    /// The dtype it computes in.
    pub(crate) fn kind(&self) -> Kind {
        self.first.weight.kind()
    }

    /// `[B, in, H, W]` to `[B, out, H', W']` in the dtype and on the device of the parameters.
    ///
    /// # Errors
    /// If the shape does not fit.
    pub(crate) fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = x.f_to_device(self.first.weight.device())?.f_to_kind(self.kind())?;
        let mut x = self.first.forward(&x, 1, 1)?;
        if self.half == Half::Decoder {
            x = self.middle.forward(&x)?;
        }
        for level in &self.levels {
            x = level.forward(x)?;
        }
        if self.half == Half::Encoder {
            x = self.middle.forward(&x)?;
        }
        self.last.forward(&self.norm.forward(&x)?.f_silu()?, 1, 1)
    }
}
