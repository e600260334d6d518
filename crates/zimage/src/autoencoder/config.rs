//! The autoencoder's shape, as `vae/config.json` of a diffusers folder states it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use tch_training::files::read_json;

/// Bounds against sizes that no model has and whose products would overflow.
const MAX_CHANNELS: i64 = 1 << 16;
const MAX_LAYERS: i64 = 64;
const MAX_LEVELS: usize = 8;

/// Hyper-parameters of diffusers' `AutoencoderKL`. What the file leaves out has the default of that
/// class; fields that are not listed are ignored.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(default)]
pub struct AutoencoderConfig {
    /// Channels of images.
    pub in_channels: i64,
    pub out_channels: i64,
    pub down_block_types: Vec<String>,
    pub up_block_types: Vec<String>,
    /// Channels at each resolution, from the image's down to the latents'; each halves the one before.
    pub block_out_channels: Vec<i64>,
    /// Residual blocks at each resolution of the encoder; the decoder has one more.
    pub layers_per_block: i64,
    pub act_fn: String,
    pub latent_channels: i64,
    pub norm_num_groups: i64,
    /// Latents of the model are those of the encoder, minus the shift, times this.
    pub scaling_factor: f64,
    /// None is zero.
    pub shift_factor: Option<f64>,
    pub latents_mean: Option<Vec<f64>>,
    pub latents_std: Option<Vec<f64>>,
    /// Compute in float32 even where the rest of the pipeline computes in less.
    pub force_upcast: bool,
    pub use_quant_conv: bool,
    pub use_post_quant_conv: bool,
    pub mid_block_add_attention: bool,
}

impl Default for AutoencoderConfig {
    fn default() -> Self {
        Self {
            in_channels: 3,
            out_channels: 3,
            down_block_types: vec!["DownEncoderBlock2D".into()],
            up_block_types: vec!["UpDecoderBlock2D".into()],
            block_out_channels: vec![64],
            layers_per_block: 1,
            act_fn: "silu".into(),
            latent_channels: 4,
            norm_num_groups: 32,
            scaling_factor: 0.18215,
            shift_factor: None,
            latents_mean: None,
            latents_std: None,
            force_upcast: true,
            use_quant_conv: true,
            use_post_quant_conv: true,
            mid_block_add_attention: true,
        }
    }
}

/// The two networks of an autoencoder; the text is the prefix of parameter names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    Encoder,
    Decoder,
}

impl Half {
    /// The first part of its parameters' names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Encoder => "encoder",
            Self::Decoder => "decoder",
        }
    }

    /// Names of its stages and of what changes the resolution at their ends.
    pub fn stage_names(self) -> (&'static str, &'static str) {
        match self {
            Self::Encoder => ("down_blocks", "downsamplers"),
            Self::Decoder => ("up_blocks", "upsamplers"),
        }
    }
}

/// Residual blocks at one resolution.
#[derive(Clone, Copy, Debug)]
pub struct Stage {
    /// Channels that enter the first block.
    pub inputs: i64,
    /// Channels from there on.
    pub outputs: i64,
    pub blocks: i64,
    /// Whether the resolution changes at the end.
    pub resamples: bool,
}

impl AutoencoderConfig {
    /// That of the released Z-Image models, which is that of Flux.
    pub fn released() -> Self {
        Self {
            down_block_types: vec!["DownEncoderBlock2D".into(); 4],
            up_block_types: vec!["UpDecoderBlock2D".into(); 4],
            block_out_channels: vec![128, 256, 512, 512],
            layers_per_block: 2,
            latent_channels: 16,
            scaling_factor: 0.3611,
            shift_factor: Some(0.1159),
            use_quant_conv: false,
            use_post_quant_conv: false,
            ..Self::default()
        }
    }

    /// Reads and checks `vae/config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, or asks for what is not supported.
    pub fn load(path: &Path) -> Result<Self> {
        let config: Self = read_json(path)?;
        config.validate().with_context(|| format!("checking {}", path.display()))?;
        Ok(config)
    }

    /// Checks what the forward pass relies on.
    ///
    /// # Errors
    /// Names the first field that does not fit or is not supported.
    pub fn validate(&self) -> Result<()> {
        let levels = self.block_out_channels.len();
        ensure!(
            (1..=MAX_LEVELS).contains(&levels),
            "block_out_channels must hold 1 to {MAX_LEVELS} numbers, found {levels}"
        );
        for (name, value) in [
            ("in_channels", self.in_channels),
            ("out_channels", self.out_channels),
            ("latent_channels", self.latent_channels),
            ("norm_num_groups", self.norm_num_groups),
        ] {
            ensure!(
                (1..=MAX_CHANNELS).contains(&value),
                "{name} must be in 1..={MAX_CHANNELS}, found {value}"
            );
        }
        ensure!(
            self.block_out_channels
                .iter()
                .all(|c| (1..=MAX_CHANNELS).contains(c) && c % self.norm_num_groups == 0),
            "block_out_channels must be multiples of norm_num_groups ({}) in 1..={MAX_CHANNELS}, \
             found {:?}",
            self.norm_num_groups,
            self.block_out_channels
        );
        ensure!(
            (1..=MAX_LAYERS).contains(&self.layers_per_block),
            "layers_per_block must be in 1..={MAX_LAYERS}, found {}",
            self.layers_per_block
        );
        for (name, types, supported) in [
            ("down_block_types", &self.down_block_types, "DownEncoderBlock2D"),
            ("up_block_types", &self.up_block_types, "UpDecoderBlock2D"),
        ] {
            ensure!(
                types.len() == levels && types.iter().all(|t| t == supported),
                "{name} must be {levels} times {supported}, found {types:?}"
            );
        }
        ensure!(self.act_fn == "silu", "act_fn must be silu, found {:?}", self.act_fn);
        for (name, value) in [
            ("use_quant_conv", self.use_quant_conv),
            ("use_post_quant_conv", self.use_post_quant_conv),
        ] {
            ensure!(!value, "{name} must be false (a file that leaves it out means true)");
        }
        for (name, value) in
            [("latents_mean", &self.latents_mean), ("latents_std", &self.latents_std)]
        {
            ensure!(value.is_none(), "{name} is not supported, it must be null");
        }
        ensure!(
            self.scaling_factor.is_finite() && self.scaling_factor > 0.0,
            "scaling_factor must be positive, found {}",
            self.scaling_factor
        );
        ensure!(
            self.shift().is_finite(),
            "shift_factor must be a finite number, found {}",
            self.shift()
        );
        Ok(())
    }

    /// What latents of the model are shifted by.
    pub fn shift(&self) -> f64 {
        self.shift_factor.unwrap_or(0.0)
    }

    /// Pixels of an image along one side of a latent pixel.
    pub fn spatial_factor(&self) -> i64 {
        1 << (self.block_out_channels.len() - 1)
    }

    /// Channels at the resolution of the latents.
    fn inner_channels(&self) -> i64 {
        self.block_out_channels[self.block_out_channels.len() - 1]
    }

    /// Channels that enter and leave a half.
    pub fn ends(&self, half: Half) -> (i64, i64) {
        match half {
            // Mean and log-variance.
            Half::Encoder => (self.in_channels, 2 * self.latent_channels),
            Half::Decoder => (self.latent_channels, self.out_channels),
        }
    }

    /// The stages of a half in the order of work.
    pub fn stages(&self, half: Half) -> Vec<Stage> {
        let mut channels = self.block_out_channels.clone();
        let mut blocks = self.layers_per_block;
        if half == Half::Decoder {
            channels.reverse();
            blocks += 1;
        }
        let last = channels.len() - 1;
        (0..channels.len())
            .map(|i| Stage {
                inputs: channels[i.saturating_sub(1)],
                outputs: channels[i],
                blocks,
                resamples: i < last,
            })
            .collect()
    }

    /// Name and shape of every parameter of a half, sorted by name.
    pub fn parameters(&self, half: Half) -> Vec<(String, Vec<i64>)> {
        let mut list = Vec::new();
        let root = half.name();
        let stages = self.stages(half);
        let (first, last) = (stages[0].inputs, stages[stages.len() - 1].outputs);
        let (inputs, outputs) = self.ends(half);
        let inner = self.inner_channels();

        add(&mut list, &format!("{root}.conv_in"), &[first, inputs, 3, 3]);
        let (stage_name, resampler) = half.stage_names();
        for (i, stage) in stages.iter().enumerate() {
            let name = format!("{root}.{stage_name}.{i}");
            for block in 0..stage.blocks {
                let inputs = if block == 0 { stage.inputs } else { stage.outputs };
                let name = format!("{name}.resnets.{block}");
                add_residual_block(&mut list, &name, inputs, stage.outputs);
            }
            if stage.resamples {
                let shape = [stage.outputs, stage.outputs, 3, 3];
                add(&mut list, &format!("{name}.{resampler}.0.conv"), &shape);
            }
        }
        for block in 0..2 {
            let name = format!("{root}.mid_block.resnets.{block}");
            add_residual_block(&mut list, &name, inner, inner);
        }
        if self.mid_block_add_attention {
            let name = format!("{root}.mid_block.attentions.0");
            add(&mut list, &format!("{name}.group_norm"), &[inner]);
            for linear in ["to_q", "to_k", "to_v", "to_out.0"] {
                add(&mut list, &format!("{name}.{linear}"), &[inner, inner]);
            }
        }
        add(&mut list, &format!("{root}.conv_norm_out"), &[last]);
        add(&mut list, &format!("{root}.conv_out"), &[outputs, last, 3, 3]);
        list.sort();
        list
    }
}

/// Weight and bias of one layer.
fn add(list: &mut Vec<(String, Vec<i64>)>, name: &str, weight: &[i64]) {
    list.push((format!("{name}.weight"), weight.to_vec()));
    list.push((format!("{name}.bias"), vec![weight[0]]));
}

fn add_residual_block(list: &mut Vec<(String, Vec<i64>)>, name: &str, inputs: i64, outputs: i64) {
    add(list, &format!("{name}.norm1"), &[inputs]);
    add(list, &format!("{name}.conv1"), &[outputs, inputs, 3, 3]);
    add(list, &format!("{name}.norm2"), &[outputs]);
    add(list, &format!("{name}.conv2"), &[outputs, outputs, 3, 3]);
    if inputs != outputs {
        add(list, &format!("{name}.conv_shortcut"), &[outputs, inputs, 1, 1]);
    }
}
