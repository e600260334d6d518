//! The Z-Image transformer (S3-DiT): image and caption tokens in one stream.

use std::rc::Rc;

use anyhow::{Result, bail, ensure};
use tch::{Device, Kind, Tensor};

use super::blocks::{Block, Linear, Parameters, RmsNorm, TimeEmbedder, parameter};
use super::config::Config;
use super::lora::Role;
use super::rope::{RotaryCache, padded};
use super::tape::run_blocks;

/// Epsilon of the final layer norm; the other norms take theirs from the config.
const FINAL_NORM_EPS: f64 = 1e-6;

/// The transformer over named tensors, which it shares with whoever gave them.
#[derive(Debug)]
pub struct ZImageTransformer {
    config: Config,
    parameters: Parameters,
    patch_embedder: Linear,
    patch_padding: Tensor,
    caption_norm: RmsNorm,
    caption_embedder: Linear,
    caption_padding: Tensor,
    time_embedder: TimeEmbedder,
    noise_refiner: Rc<[Block]>,
    context_refiner: Rc<[Block]>,
    layers: Rc<[Block]>,
    final_modulation: Linear,
    final_linear: Linear,
    rotary: Rc<RotaryCache>,
}

impl ZImageTransformer {
    /// The model over `parameters`, whose storage is shared, not copied.
    ///
    /// # Errors
    /// Lists parameters that are missing, unexpected or of the wrong shape.
    pub fn from_parameters(config: Config, parameters: Parameters) -> Result<Self> {
        config.validate()?;
        check_parameters(&config, &parameters)?;
        Self::assemble(config, parameters, Rc::default())
    }

    fn assemble(config: Config, parameters: Parameters, rotary: Rc<RotaryCache>) -> Result<Self> {
        let p = &parameters;
        let key = config.patch_key();
        let stack = |name: &str, count: i64, modulated: bool| -> Result<Rc<[Block]>> {
            (0..count).map(|i| Block::new(p, &format!("{name}.{i}"), &config, modulated)).collect()
        };
        Ok(Self {
            patch_embedder: Linear::new(p, &format!("all_x_embedder.{key}"), true)?,
            patch_padding: parameter(p, "x_pad_token")?,
            caption_norm: RmsNorm::new(p, "cap_embedder.0", config.norm_eps)?,
            caption_embedder: Linear::new(p, "cap_embedder.1", true)?,
            caption_padding: parameter(p, "cap_pad_token")?,
            time_embedder: TimeEmbedder::new(p, &config)?,
            noise_refiner: stack("noise_refiner", config.n_refiner_layers, true)?,
            context_refiner: stack("context_refiner", config.n_refiner_layers, false)?,
            layers: stack("layers", config.n_layers, true)?,
            final_modulation: Linear::new(
                p,
                &format!("all_final_layer.{key}.adaLN_modulation.1"),
                true,
            )?,
            final_linear: Linear::new(p, &format!("all_final_layer.{key}.linear"), true)?,
            rotary,
            config,
            parameters,
        })
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every parameter by its diffusers name.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Names and handles, sorted by name.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect()
    }

    /// The dtype the model computes in.
    pub fn kind(&self) -> Kind {
        self.patch_embedder.kind()
    }

    /// Where the model lives.
    pub fn device(&self) -> Device {
        self.patch_padding.device()
    }

    /// A deep copy outside any graph.
    ///
    /// # Errors
    /// If libtorch cannot allocate it.
    pub fn duplicate(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        self.map(|tensor| Ok(tensor.f_detach()?.copy()))
    }

    /// The same model in another dtype. Gradients flow back to `self`, so that a float32 master can
    /// be trained through a bfloat16 forward pass.
    ///
    /// # Errors
    /// If libtorch cannot convert.
    pub fn cast(&self, kind: Kind) -> Result<Self> {
        self.map(|tensor| Ok(tensor.f_to_kind(kind)?))
    }

    fn map(&self, convert: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let parameters = self
            .parameters
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), convert(tensor)?)))
            .collect::<Result<_>>()?;
        Self::assemble(self.config.clone(), parameters, self.rotary.clone())
    }

    /// Makes every parameter trainable, or none.
    ///
    /// # Errors
    /// If a parameter is not a leaf of the graph.
    pub fn set_requires_grad(&self, requires_grad: bool) -> Result<()> {
        for tensor in self.parameters.values() {
            // Handles share the tensor, so this marks the one the layers use.
            let _ = tensor.f_set_requires_grad(requires_grad)?;
        }
        Ok(())
    }

    /// Embeds and refines captions, each `[L_i, cap_feat_dim]`, to `[B, L, D]`, padding included
    /// (padding takes part in attention). This depends on the captions and the role alone, not on time
    /// or image; the pairs that an adapter has on the caption side act here and nowhere else.
    ///
    /// # Errors
    /// If there is no caption, or their padded lengths differ.
    pub fn encode_captions(&self, captions: &[Tensor], role: Role<'_>) -> Result<Tensor> {
        let role = role.begin()?;
        let (features, is_padding) = self.pad_captions(captions)?;
        let normed = self.caption_norm.forward(&features)?;
        let embedded = self.caption_embedder.forward(&normed, role)?;
        let hidden = self.caption_padding.f_where_self(&is_padding, &embedded)?;
        let length = hidden.size()[1];
        let rotary = self.rotary.get(&self.config, (length, 1, 1), self.device())?;
        run_blocks(&self.context_refiner, hidden, &rotary.caption, None, role)
    }

    /// `[B, L, F]` features, zero where padded, and the selector `[B, L, 1]` of the padding.
    fn pad_captions(&self, captions: &[Tensor]) -> Result<(Tensor, Tensor)> {
        ensure!(!captions.is_empty(), "at least one caption is needed");
        let lengths: Vec<i64> = captions.iter().map(|caption| caption.size()[0]).collect();
        let length = padded(lengths[0]);
        for (index, (caption, own)) in captions.iter().zip(&lengths).enumerate() {
            ensure!(
                caption.size() == [*own, self.config.cap_feat_dim] && *own > 0,
                "caption {index} must be [L, {}] with L > 0, found {:?}",
                self.config.cap_feat_dim,
                caption.size()
            );
            if padded(*own) != length {
                bail!(
                    "captions of one batch must pad to one length: caption 0 has {} tokens, caption \
                     {index} has {own}",
                    lengths[0]
                );
            }
        }
        let rows = captions
            .iter()
            .zip(&lengths)
            .map(|(caption, own)| Ok(caption.f_constant_pad_nd([0, 0, 0, length - own])?))
            .collect::<Result<Vec<_>>>()?;
        let features =
            Tensor::f_stack(&rows, 0)?.f_to_device(self.device())?.f_to_kind(self.kind())?;
        let lengths = Tensor::f_from_slice(&lengths)?.f_to_device(self.device())?;
        let is_padding = Tensor::f_arange(length, (Kind::Int64, self.device()))?
            .f_ge_tensor(&lengths.f_unsqueeze(1)?)?
            .f_unsqueeze(2)?;
        Ok((features, is_padding))
    }

    /// The raw output, which estimates `x0 - eps`, as `[B, C, H, W]` in the dtype of `latents`.
    ///
    /// `latents` `[B, C, H, W]`, `t` `[B]` with 0 = noise and 1 = image, `captions` as for
    /// [`Self::encode_captions`].
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward(
        &self,
        latents: &Tensor,
        t: &Tensor,
        captions: &[Tensor],
        role: Role<'_>,
    ) -> Result<Tensor> {
        self.forward_encoded(latents, t, &self.encode_captions(captions, role)?, role)
    }

    /// [`Self::forward`] with captions already encoded, `[B, L, D]`.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn forward_encoded(
        &self,
        latents: &Tensor,
        t: &Tensor,
        captions: &Tensor,
        role: Role<'_>,
    ) -> Result<Tensor> {
        let role = role.begin()?;
        let (batch, channels, height, width) = latents.size4()?;
        let patch = self.config.patch_size();
        ensure!(
            channels == self.config.in_channels && height % patch == 0 && width % patch == 0,
            "latents must be [B, {}, H, W] with H and W multiples of {patch}, found {:?}",
            self.config.in_channels,
            latents.size()
        );
        let (count, caption_length, _) = captions.size3()?;
        ensure!(
            t.size() == [batch] && count == batch,
            "{batch} latents need as many times and captions, found {:?} and {count}",
            t.size()
        );
        let size = (height / patch, width / patch);
        let tokens = size.0 * size.1;
        let rotary =
            self.rotary.get(&self.config, (caption_length, size.0, size.1), self.device())?;
        let time = self.time_embedder.forward(t, role)?;

        let patches = patchify(&latents.f_to_kind(self.kind())?, patch)?;
        let mut image = self.patch_embedder.forward(&patches, role)?;
        let image_length = padded(tokens);
        if image_length > tokens {
            let rows = self
                .patch_padding
                .f_unsqueeze(0)?
                .f_expand([batch, image_length - tokens, -1], false)?;
            image = Tensor::f_cat(&[image, rows], 1)?;
        }
        let image = run_blocks(&self.noise_refiner, image, &rotary.image, Some(&time), role)?;
        let stream = Tensor::f_cat(&[&image, captions], 1)?;
        let stream = run_blocks(&self.layers, stream, &rotary.unified, Some(&time), role)?;

        // The rows of padding and caption would be dropped after the final layer.
        let output = self.final_layer(&stream.f_narrow(1, 0, tokens)?, &time, role)?;
        Ok(unpatchify(&output, patch, size)?.f_to_kind(latents.f_kind()?)?)
    }

    /// `[B, N, D]` to patches `[B, N, p * p * C]`.
    fn final_layer(&self, stream: &Tensor, time: &Tensor, role: Role<'_>) -> Result<Tensor> {
        let scale = self.final_modulation.forward(&time.f_silu()?, role)?.f_add_scalar(1.0)?;
        let none = None::<&Tensor>;
        let normed = stream.f_layer_norm([self.config.dim], none, none, FINAL_NORM_EPS, true)?;
        self.final_linear.forward(&normed.f_mul(&scale.f_unsqueeze(1)?)?, role)
    }
}

/// `[B, C, H, W]` to tokens `[B, H/p * W/p, p * p * C]`: row-major, channels fastest.
///
/// # Errors
/// If H or W is not a multiple of `patch`.
pub fn patchify(latents: &Tensor, patch: i64) -> Result<Tensor> {
    let (batch, channels, height, width) = latents.size4()?;
    let (rows, columns) = (height / patch, width / patch);
    Ok(latents
        .f_reshape([batch, channels, rows, patch, columns, patch])?
        .f_permute([0, 2, 4, 3, 5, 1])?
        .f_reshape([batch, rows * columns, patch * patch * channels])?)
}

/// The inverse of [`patchify`] for `(rows, columns)` patches.
///
/// # Errors
/// If the number of tokens is not `rows * columns`.
pub fn unpatchify(tokens: &Tensor, patch: i64, (rows, columns): (i64, i64)) -> Result<Tensor> {
    let (batch, _, width) = tokens.size3()?;
    let channels = width / (patch * patch);
    Ok(tokens
        .f_reshape([batch, rows, columns, patch, patch, channels])?
        .f_permute([0, 5, 1, 3, 2, 4])?
        .f_reshape([batch, channels, rows * patch, columns * patch])?)
}

/// Names every parameter that is missing, unexpected or mis-shaped.
pub(super) fn check_parameters(config: &Config, parameters: &Parameters) -> Result<()> {
    let mut faults = Vec::new();
    let expected = config.parameters();
    for (name, shape) in &expected {
        match parameters.get(name) {
            None => faults.push(format!("{name} is missing")),
            Some(tensor) if tensor.size() != *shape => {
                faults.push(format!("{name} has shape {:?}, expected {shape:?}", tensor.size()))
            }
            Some(_) => {}
        }
    }
    let is_known = |name: &String| expected.binary_search_by(|(known, _)| known.cmp(name)).is_ok();
    faults.extend(
        parameters
            .keys()
            .filter(|name| !is_known(name))
            .map(|name| format!("{name} is unexpected")),
    );
    ensure!(faults.is_empty(), "parameters do not fit the config: {}", faults.join("; "));
    Ok(())
}
