//! The Qwen3 language model as Z-Image's text encoder: hidden states before the last layer.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::arithmetic::{Arithmetic as _, counting, filled};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::files::read_json;
use tch_training::parameters::{check_shapes, parameter};
use tch_training::safetensors::Weights;

use crate::model::{MOST_LAYERS, RmsNorm};

/// `text_encoder/config.json`. Fields that are not listed are ignored.
#[derive(Clone, Debug, Deserialize)]
pub struct Qwen3Config {
    pub model_type: String,
    pub vocab_size: i64,
    /// Width F of the token stream, and of the features.
    pub hidden_size: i64,
    pub intermediate_size: i64,
    pub num_hidden_layers: i64,
    pub num_attention_heads: i64,
    /// Heads of keys and values, each of which serves a group of query heads.
    pub num_key_value_heads: i64,
    /// Channels of one head, whatever `hidden_size / num_attention_heads` is.
    pub head_dim: i64,
    pub rms_norm_eps: f64,
    pub hidden_act: String,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub use_sliding_window: bool,
    /// Kind of attention of each layer, in files of newer versions of transformers.
    pub layer_types: Option<Vec<String>>,
    /// Where older versions of transformers put the base of the rotary frequencies.
    pub rope_theta: Option<f64>,
    pub rope_scaling: Option<serde_json::Value>,
    /// Where newer versions put it.
    pub rope_parameters: Option<RopeParameters>,
    /// A file with quantised weights says so here.
    pub quantization_config: Option<serde_json::Value>,
}

/// The rotary embedding as newer versions of transformers describe it.
#[derive(Clone, Debug, Deserialize)]
pub struct RopeParameters {
    pub rope_theta: Option<f64>,
    pub rope_type: Option<String>,
}

impl Qwen3Config {
    /// Checks what the forward pass relies on.
    ///
    /// # Errors
    /// Names the first field that is out of range, or asks for what is not supported.
    pub fn validate(&self) -> Result<()> {
        ensure!(self.model_type == "qwen3", "model_type must be qwen3, found {}", self.model_type);
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
        ] {
            // The bound keeps products of two of them far from overflow.
            ensure!((1..=1 << 24).contains(&value), "{name} is out of range: {value}");
        }
        // Each is a dozen names before a file is looked at.
        ensure!(
            self.num_hidden_layers <= MOST_LAYERS,
            "num_hidden_layers must be at most {MOST_LAYERS}, found {}",
            self.num_hidden_layers
        );
        ensure!(
            self.num_attention_heads % self.num_key_value_heads == 0,
            "num_attention_heads ({}) must be a multiple of num_key_value_heads ({})",
            self.num_attention_heads,
            self.num_key_value_heads
        );
        ensure!(self.head_dim % 2 == 0, "head_dim must be even, found {}", self.head_dim);
        ensure!(
            self.rms_norm_eps.is_finite() && self.rms_norm_eps > 0.0,
            "rms_norm_eps must be positive, found {}",
            self.rms_norm_eps
        );
        ensure!(
            self.hidden_act == "silu",
            "hidden_act {} is not supported, silu is",
            self.hidden_act
        );
        ensure!(!self.attention_bias, "attention_bias is not supported");
        ensure!(!self.use_sliding_window, "use_sliding_window is not supported");
        if let Some(other) = self.layer_types.iter().flatten().find(|t| *t != "full_attention") {
            anyhow::bail!("layer_types: {other} is not supported, full_attention is");
        }
        ensure!(self.rope_scaling.is_none(), "rope_scaling is not supported, it must be null");
        let rope_type = self.rope_parameters.as_ref().and_then(|rope| rope.rope_type.as_deref());
        ensure!(
            matches!(rope_type, None | Some("default")),
            "rope_parameters: rope_type {} is not supported, default is",
            rope_type.unwrap_or_default()
        );
        ensure!(self.quantization_config.is_none(), "quantization_config is not supported");
        self.theta().map(drop)
    }

    /// The base of the rotary frequencies.
    fn theta(&self) -> Result<f64> {
        let newer = self.rope_parameters.as_ref().and_then(|rope| rope.rope_theta);
        let theta = newer.or(self.rope_theta).context("rope_theta is missing")?;
        ensure!(theta.is_finite() && theta > 0.0, "rope_theta must be positive, found {theta}");
        Ok(theta)
    }

    /// Layers that are run: the features are taken before the last.
    fn layers(&self) -> i64 {
        self.num_hidden_layers - 1
    }

    /// Name and shape of every parameter that is used.
    fn parameters(&self, prefix: &str) -> Vec<(String, Vec<i64>)> {
        let (width, inner) = (self.hidden_size, self.intermediate_size);
        let queries = self.num_attention_heads * self.head_dim;
        let keys = self.num_key_value_heads * self.head_dim;
        let mut list = vec![(format!("{prefix}embed_tokens.weight"), vec![self.vocab_size, width])];
        for layer in 0..self.layers() {
            for (name, shape) in [
                ("input_layernorm", vec![width]),
                ("self_attn.q_proj", vec![queries, width]),
                ("self_attn.k_proj", vec![keys, width]),
                ("self_attn.v_proj", vec![keys, width]),
                ("self_attn.o_proj", vec![width, queries]),
                ("self_attn.q_norm", vec![self.head_dim]),
                ("self_attn.k_norm", vec![self.head_dim]),
                ("post_attention_layernorm", vec![width]),
                ("mlp.gate_proj", vec![inner, width]),
                ("mlp.up_proj", vec![inner, width]),
                ("mlp.down_proj", vec![width, inner]),
            ] {
                list.push((format!("{prefix}layers.{layer}.{name}.weight"), shape));
            }
        }
        list
    }
}

/// `x W^T`, `[.., in]` to `[.., out]`.
fn project(weight: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(x.f_linear(weight, None::<&Tensor>)?)
}

/// Grouped causal self-attention with normed queries and keys.
#[derive(Debug)]
struct Attention {
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    query_norm: RmsNorm,
    key_norm: RmsNorm,
    head_dim: i64,
}

impl Attention {
    fn new(parameters: &Parameters, name: &str, config: &Qwen3Config) -> Result<Self> {
        let linear = |part: &str| parameter(parameters, &format!("{name}.{part}.weight"));
        let norm =
            |part: &str| RmsNorm::new(parameters, &format!("{name}.{part}"), config.rms_norm_eps);
        Ok(Self {
            query: linear("q_proj")?,
            key: linear("k_proj")?,
            value: linear("v_proj")?,
            out: linear("o_proj")?,
            query_norm: norm("q_norm")?,
            key_norm: norm("k_norm")?,
            head_dim: config.head_dim,
        })
    }

    /// `[B, L, F]` to `[B, L, F]`.
    fn forward(&self, x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
        let (batch, length, _) = x.size3()?;
        let heads = |x: Tensor| x.f_view([batch, length, -1, self.head_dim]);
        let query =
            self.query_norm.forward(&heads(project(&self.query, x)?)?)?.f_transpose(1, 2)?;
        let key = self.key_norm.forward(&heads(project(&self.key, x)?)?)?.f_transpose(1, 2)?;
        let value = heads(project(&self.value, x)?)?.f_transpose(1, 2)?;
        let mixed = Tensor::f_scaled_dot_product_attention(
            &rotary.rotate(&query)?,
            &rotary.rotate(&key)?,
            &value,
            None::<&Tensor>,
            0.0,
            true,
            None,
            true,
        )?;
        project(&self.out, &mixed.f_transpose(1, 2)?.f_reshape([batch, length, -1])?)
    }
}

/// One layer: attention and SwiGLU, each after a norm and added to the stream.
#[derive(Debug)]
struct Layer {
    attention_norm: RmsNorm,
    attention: Attention,
    feed_forward_norm: RmsNorm,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Layer {
    fn new(parameters: &Parameters, name: &str, config: &Qwen3Config) -> Result<Self> {
        let linear = |part: &str| parameter(parameters, &format!("{name}.{part}.weight"));
        let norm =
            |part: &str| RmsNorm::new(parameters, &format!("{name}.{part}"), config.rms_norm_eps);
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::new(parameters, &format!("{name}.self_attn"), config)?,
            feed_forward_norm: norm("post_attention_layernorm")?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
        })
    }

    fn forward(&self, x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
        let x = x.f_add(&self.attention.forward(&self.attention_norm.forward(x)?, rotary)?)?;
        let normed = self.feed_forward_norm.forward(&x)?;
        let hidden = project(&self.gate, &normed)?.f_silu()?.f_mul(&project(&self.up, &normed)?)?;
        Ok(x.f_add(&project(&self.down, &hidden)?)?)
    }
}

/// Rotation by position in the half-split form: channel i turns with channel i + d/2.
struct Rotary {
    /// `[L, d]`, angles computed in float32, like the sines.
    cosines: Tensor,
    sines: Tensor,
}

impl Rotary {
    fn new(config: &Qwen3Config, length: i64, kind: Kind, device: Device) -> Result<Self> {
        let options = (Kind::Float, device);
        let exponents =
            counting(config.head_dim / 2, options)?.times(2.0)?.over(config.head_dim as f64)?;
        let theta = filled(&[], config.theta()?, options)?;
        let frequencies = theta.f_pow(&exponents)?.f_reciprocal()?;
        let angles = counting(length, options)?.f_unsqueeze(1)?.f_mul(&frequencies)?;
        let angles = Tensor::f_cat(&[&angles, &angles], 1)?;
        Ok(Self {
            cosines: angles.f_cos()?.f_to_kind(kind)?,
            sines: angles.f_sin()?.f_to_kind(kind)?,
        })
    }

    /// `x` `[B, heads, L, d]`.
    fn rotate(&self, x: &Tensor) -> Result<Tensor> {
        let halves = x.f_chunk(2, -1)?;
        let turned = Tensor::f_cat(&[&halves[1].f_neg()?, &halves[0]], -1)?;
        Ok(x.f_mul(&self.cosines)?.f_add(&turned.f_mul(&self.sines)?)?)
    }
}

/// Qwen3 up to the last layer but one. What transformers calls `hidden_states[-2]` is the output of
/// that layer, without the final norm; the last layer, the norm and the head are not even read.
#[derive(Debug)]
pub struct Qwen3Encoder {
    config: Qwen3Config,
    embedding: Tensor,
    layers: Vec<Layer>,
}

impl Qwen3Encoder {
    /// Reads `config.json` and the weights (`model.safetensors`, or shards with an index) of a folder.
    /// Names may start with `model.`, as those of a language model with a head do.
    ///
    /// # Errors
    /// If a file cannot be read, the config asks for what is not supported, or tensors are missing,
    /// unexpected or mis-shaped.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let path = folder.join("config.json");
        let config: Qwen3Config = read_json(&path)?;
        config.validate().with_context(|| format!("checking {}", path.display()))?;
        let weights = Weights::open(folder, "model")?;
        let headed = weights.shapes().any(|(name, _)| name.starts_with("model."));
        let prefix = if headed { "model." } else { "" };
        let unused = [
            format!("{prefix}layers.{}.", config.layers()),
            format!("{prefix}norm."),
            "lm_head.".into(),
        ];
        let used = |name: &str| !unused.iter().any(|start| name.starts_with(start));

        let expected = config.parameters(prefix);
        let place = format!("weights in {}", folder.display());
        check_shapes(place, &expected, weights.shapes().filter(|(name, _)| used(name)))?;
        let parameters = expected
            .into_iter()
            .map(|(name, _)| {
                let tensor = weights.tensor(&name, kind, device)?;
                Ok((name, tensor))
            })
            .collect::<Result<Parameters>>()?;
        Ok(Self {
            embedding: parameter(&parameters, &format!("{prefix}embed_tokens.weight"))?,
            layers: (0..config.layers())
                .map(|i| Layer::new(&parameters, &format!("{prefix}layers.{i}"), &config))
                .collect::<Result<_>>()?,
            config,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Qwen3Config {
        &self.config
    }

    /// Features `[L, F]` of L token ids, in the dtype of the weights and outside any graph. Each row
    /// depends on the ids up to its own.
    ///
    /// # Errors
    /// If there are no ids, or one lies outside the vocabulary.
    pub fn forward(&self, ids: &[i64]) -> Result<Tensor> {
        ensure!(!ids.is_empty(), "at least one token is needed");
        // Checked here, as an index out of range would take a whole CUDA context down.
        if let Some(id) = ids.iter().find(|id| !(0..self.config.vocab_size).contains(*id)) {
            anyhow::bail!("token {id} lies outside the vocabulary of {}", self.config.vocab_size);
        }
        let _guard = tch::no_grad_guard();
        let (kind, device) = (self.embedding.f_kind()?, self.embedding.device());
        let rotary = Rotary::new(&self.config, ids.len() as i64, kind, device)?;
        let index = Tensor::f_from_slice(ids)?.f_to_device(device)?;
        let mut hidden = self.embedding.f_index_select(0, &index)?.f_unsqueeze(0)?;
        for layer in &self.layers {
            hidden = layer.forward(&hidden, &rotary)?;
        }
        Ok(hidden.f_squeeze_dim(0)?)
    }
}
