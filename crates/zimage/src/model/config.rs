//! The model's shape, as `transformer/config.json` of a diffusers folder states it.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch_training::files::read_json;
use tch_training::lora::LinearLayer;

/// The class that diffusers names in the file.
pub(crate) const CLASS_NAME: &str = "ZImageTransformer2DModel";

/// Sequences are padded to a multiple of this many tokens.
pub(crate) const SEQUENCE_MULTIPLE: i64 = 32;

/// Width of the sinusoidal time features.
pub(crate) const TIME_FEATURES: i64 = 256;

/// The linear layers of a block that an adapter is put on where nothing else is said.
pub const BLOCK_LINEARS: [&str; 7] = [
    "attention.to_q",
    "attention.to_k",
    "attention.to_v",
    "attention.to_out.0",
    "feed_forward.w1",
    "feed_forward.w2",
    "feed_forward.w3",
];

/// Hidden width of the time MLP; it does not grow with the model.
const TIME_HIDDEN: i64 = 1024;

/// No size in a config may be larger: far above every model, and its products stay in range.
const LARGEST_SIZE: i64 = 1 << 16;
/// More layers than any model has: each is a dozen names before a file is looked at.
pub(crate) const MOST_LAYERS: i64 = 1024;

/// Hyper-parameters of a Z-Image transformer. Fields of the file that are not listed are ignored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Patch sizes in pixels; one only is supported.
    pub all_patch_size: Vec<i64>,
    /// Patch sizes in frames; `[1]`, as images have one frame.
    pub all_f_patch_size: Vec<i64>,
    pub in_channels: i64,
    /// Width D of the token stream.
    pub dim: i64,
    /// Blocks over image and caption together.
    pub n_layers: i64,
    /// Blocks over the image alone, and again over the caption alone.
    pub n_refiner_layers: i64,
    pub n_heads: i64,
    pub n_kv_heads: i64,
    pub norm_eps: f64,
    pub qk_norm: bool,
    /// Width of the caption features.
    pub cap_feat_dim: i64,
    pub rope_theta: f64,
    /// Times in [0, 1] are multiplied by this before the sinusoids.
    pub t_scale: f64,
    /// Head channels that rotate with caption position, row and column.
    pub axes_dims: Vec<i64>,
    /// Position limits of the three axes.
    pub axes_lens: Vec<i64>,
    /// Width of image features in the Omni models, which are not supported; none in the others.
    pub siglip_feat_dim: Option<i64>,
}

impl Default for Config {
    /// The released 6B model.
    fn default() -> Self {
        Self {
            all_patch_size: vec![2],
            all_f_patch_size: vec![1],
            in_channels: 16,
            dim: 3840,
            n_layers: 30,
            n_refiner_layers: 2,
            n_heads: 30,
            n_kv_heads: 30,
            norm_eps: 1e-5,
            qk_norm: true,
            cap_feat_dim: 2560,
            rope_theta: 256.0,
            t_scale: 1000.0,
            axes_dims: vec![32, 48, 48],
            axes_lens: vec![1536, 512, 512],
            siglip_feat_dim: None,
        }
    }
}

impl Config {
    /// The small model of the repository: 32x32 RGB images, captions of word vectors.
    pub fn embedded() -> Self {
        Self {
            all_patch_size: vec![4],
            in_channels: 3,
            dim: 144,
            n_layers: 4,
            n_refiner_layers: 1,
            n_heads: 3,
            n_kv_heads: 3,
            cap_feat_dim: 64,
            axes_dims: vec![16, 16, 16],
            axes_lens: vec![128, 16, 16],
            ..Self::default()
        }
    }

    /// Reads and checks `transformer/config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, is of another class, or asks for what is not supported.
    pub fn load(path: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Class {
            #[serde(rename = "_class_name")]
            name: String,
        }
        let Class { name } = read_json(path)?;
        ensure!(
            name == CLASS_NAME,
            "{} is the config of a {name}, expected {CLASS_NAME}",
            path.display()
        );
        let config: Self = read_json(path)?;
        config.validate().with_context(|| format!("checking {}", path.display()))?;
        Ok(config)
    }

    /// Checks what the forward pass relies on.
    ///
    /// # Errors
    /// Names the first field that does not fit.
    pub fn validate(&self) -> Result<()> {
        ensure!(
            self.siglip_feat_dim.is_none(),
            "siglip_feat_dim must be null: the Omni models are not supported"
        );
        ensure!(
            self.all_patch_size.len() == 1,
            "all_patch_size must hold one size, found {:?}",
            self.all_patch_size
        );
        ensure!(
            self.all_f_patch_size == [1],
            "all_f_patch_size must be [1] for images, found {:?}",
            self.all_f_patch_size
        );
        for (name, smallest, value) in [
            ("all_patch_size", 1, self.all_patch_size[0]),
            ("in_channels", 1, self.in_channels),
            ("dim", 1, self.dim),
            ("n_heads", 1, self.n_heads),
            ("cap_feat_dim", 1, self.cap_feat_dim),
        ] {
            ensure!(
                (smallest..=LARGEST_SIZE).contains(&value),
                "{name} must be in {smallest}..={LARGEST_SIZE}, found {value}"
            );
        }
        for (name, value) in
            [("n_layers", self.n_layers), ("n_refiner_layers", self.n_refiner_layers)]
        {
            ensure!(
                (0..=MOST_LAYERS).contains(&value),
                "{name} must be in 0..={MOST_LAYERS}, found {value}"
            );
        }
        ensure!(
            self.dim % self.n_heads == 0,
            "dim ({}) must be a multiple of n_heads ({})",
            self.dim,
            self.n_heads
        );
        ensure!(
            self.n_kv_heads == self.n_heads,
            "n_kv_heads ({}) must equal n_heads ({})",
            self.n_kv_heads,
            self.n_heads
        );
        ensure!(self.qk_norm, "qk_norm must be true");
        ensure!(
            self.axes_dims.len() == 3
                && self.axes_dims.iter().all(|d| *d > 0 && *d <= LARGEST_SIZE && d % 2 == 0),
            "axes_dims must be three positive even numbers up to {LARGEST_SIZE}, found {:?}",
            self.axes_dims
        );
        ensure!(
            self.axes_dims.iter().sum::<i64>() == self.head_dim(),
            "axes_dims {:?} must sum to dim / n_heads = {}",
            self.axes_dims,
            self.head_dim()
        );
        ensure!(
            self.axes_lens.len() == 3
                && self.axes_lens.iter().all(|n| (1..=LARGEST_SIZE).contains(n)),
            "axes_lens must be three positive numbers up to {LARGEST_SIZE}, found {:?}",
            self.axes_lens
        );
        ensure!(
            [self.norm_eps, self.rope_theta, self.t_scale]
                .iter()
                .all(|x| *x > 0.0 && x.is_finite()),
            "norm_eps, rope_theta and t_scale must be positive and finite"
        );
        Ok(())
    }

    /// Channels of one attention head.
    pub fn head_dim(&self) -> i64 {
        self.dim / self.n_heads
    }

    /// Side of a patch in pixels (latent pixels, where there is an autoencoder).
    pub fn patch_size(&self) -> i64 {
        self.all_patch_size[0]
    }

    /// Values in one patch.
    pub fn patch_dim(&self) -> i64 {
        self.patch_size().pow(2) * self.in_channels
    }

    /// Width of the feed-forward's hidden layer: `dim / 3 * 8`, truncated.
    pub fn feed_forward_dim(&self) -> i64 {
        // The reference divides in floating point and then truncates.
        (self.dim as f64 / 3.0 * 8.0) as i64
    }

    /// Width of the time embedding that modulates the blocks.
    fn time_dim(&self) -> i64 {
        self.dim.min(TIME_FEATURES)
    }

    /// The part of parameter names that tells patch sizes apart.
    pub fn patch_key(&self) -> String {
        format!("{}-{}", self.patch_size(), self.all_f_patch_size[0])
    }

    /// Name and shape of every parameter, sorted by name.
    pub fn parameters(&self) -> Vec<(String, Vec<i64>)> {
        let (dim, time) = (self.dim, self.time_dim());
        let key = self.patch_key();
        let mut list: Vec<(String, Vec<i64>)> = Vec::new();
        let mut add = |name: String, shape: &[i64]| list.push((name, shape.to_vec()));

        add(format!("all_x_embedder.{key}.weight"), &[dim, self.patch_dim()]);
        add(format!("all_x_embedder.{key}.bias"), &[dim]);
        add("cap_embedder.0.weight".into(), &[self.cap_feat_dim]);
        add("cap_embedder.1.weight".into(), &[dim, self.cap_feat_dim]);
        add("cap_embedder.1.bias".into(), &[dim]);
        add("t_embedder.mlp.0.weight".into(), &[TIME_HIDDEN, TIME_FEATURES]);
        add("t_embedder.mlp.0.bias".into(), &[TIME_HIDDEN]);
        add("t_embedder.mlp.2.weight".into(), &[time, TIME_HIDDEN]);
        add("t_embedder.mlp.2.bias".into(), &[time]);
        add("x_pad_token".into(), &[1, dim]);
        add("cap_pad_token".into(), &[1, dim]);
        let last = format!("all_final_layer.{key}");
        add(format!("{last}.linear.weight"), &[self.patch_dim(), dim]);
        add(format!("{last}.linear.bias"), &[self.patch_dim()]);
        add(format!("{last}.adaLN_modulation.1.weight"), &[dim, time]);
        add(format!("{last}.adaLN_modulation.1.bias"), &[dim]);

        for (stack, count, modulated) in [
            ("noise_refiner", self.n_refiner_layers, true),
            ("context_refiner", self.n_refiner_layers, false),
            ("layers", self.n_layers, true),
        ] {
            for block in (0..count).map(|i| format!("{stack}.{i}")) {
                for linear in ["to_q", "to_k", "to_v", "to_out.0"] {
                    add(format!("{block}.attention.{linear}.weight"), &[dim, dim]);
                }
                for norm in ["norm_q", "norm_k"] {
                    add(format!("{block}.attention.{norm}.weight"), &[self.head_dim()]);
                }
                for norm in ["attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"] {
                    add(format!("{block}.{norm}.weight"), &[dim]);
                }
                let hidden = self.feed_forward_dim();
                add(format!("{block}.feed_forward.w1.weight"), &[hidden, dim]);
                add(format!("{block}.feed_forward.w2.weight"), &[dim, hidden]);
                add(format!("{block}.feed_forward.w3.weight"), &[hidden, dim]);
                if modulated {
                    add(format!("{block}.adaLN_modulation.0.weight"), &[4 * dim, time]);
                    add(format!("{block}.adaLN_modulation.0.bias"), &[4 * dim]);
                }
            }
        }
        list.sort();
        list
    }

    /// Names and shapes `[out, in]` of the linear layers, sorted by name.
    pub fn linears(&self) -> Vec<LinearLayer> {
        let linear = |(name, shape): (String, Vec<i64>)| match shape[..] {
            [rows, columns] => Some((name.strip_suffix(".weight")?.to_owned(), [rows, columns])),
            _ => None,
        };
        let mut list: Vec<_> = self.parameters().into_iter().filter_map(linear).collect();
        list.sort();
        list
    }
}

/// Whether a parameter belongs to the caption side, which stays frozen.
pub fn is_caption_side(parameter: &str) -> bool {
    ["cap_embedder.", "context_refiner.", "cap_pad_token"]
        .iter()
        .any(|prefix| parameter.starts_with(prefix))
}
