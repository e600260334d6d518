//! The Z-Image transformer (S3-DiT): image and caption tokens in one stream.

use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::Lora;
use tch_training::parameters::{check_shapes, parameter};

use crate::model::blocks::{Block, Linear, RmsNorm, TimeEmbedder};
use crate::model::config::Config;
use crate::model::grid::{Grid, padded};
use crate::model::layout::{
    Sequence, fill_padding, first_rows, join, longest, patchify, stack_tokens, unpatchify,
};
use crate::model::quantization::Storage;
use crate::model::role::Role;
use crate::model::rope::RotaryCache;
use crate::model::stack::run_blocks;

/// Epsilon of the final layer norm; the other norms take theirs from the config.
const FINAL_NORM_EPS: f64 = 1e-6;

/// The transformer over named tensors, which it shares with whoever gave them.
#[derive(Debug)]
pub struct ZImageTransformer {
    config: Config,
    parameters: Parameters,
    /// Frozen, and part of the model in all its roles.
    adapter: Option<Lora>,
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
        let shapes = parameters.iter().map(|(name, tensor)| (name.as_str(), tensor.size()));
        check_shapes("the parameters", &config.parameters(), shapes)?;
        Self::assemble(config, parameters, Rc::default())
    }

    /// The same model with its weights kept as `storage` says. Tensors that stay as they are are shared.
    ///
    /// # Errors
    /// If weights are kept in 8 bits already, or libtorch cannot allocate those.
    pub fn stored(&self, storage: Storage) -> Result<Self> {
        ensure!(!self.is_quantized(), "the weights are kept in 8 bits already");
        let mut parameters = Parameters::new();
        for (name, tensor) in &self.parameters {
            parameters.extend(storage.keep(name.clone(), tensor.shallow_clone())?);
        }
        self.over(parameters)
    }

    /// The model over what a [`Storage`] keeps of parameters that were checked.
    ///
    /// # Errors
    /// If the config is not valid, or a parameter is missing.
    pub(super) fn from_kept(config: Config, parameters: Parameters) -> Result<Self> {
        config.validate()?;
        Self::assemble(config, parameters, Rc::default())
    }

    /// The model over parameters, without an adapter.
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
            adapter: None,
        })
    }

    /// The same model, with its adapter, over other parameters.
    fn over(&self, parameters: Parameters) -> Result<Self> {
        let model = Self::assemble(self.config.clone(), parameters, self.rotary.clone())?;
        Ok(Self { adapter: self.adapter.clone(), ..model })
    }

    /// The same model with an adapter that belongs to it in all its roles, apart from the weights, which are shared:
    /// what rounding a sum of both would lose stays. The pairs are kept as [`Lora::frozen`] makes them, in the
    /// model's dtype.
    ///
    /// # Errors
    /// If the model has one already, or libtorch cannot allocate the pairs.
    pub fn with_adapter(&self, lora: &Lora) -> Result<Self> {
        ensure!(self.adapter.is_none(), "the model has an adapter already");
        let adapter = Some(lora.frozen(1.0, self.kind(), self.device())?);
        Ok(Self { adapter, ..self.map(|tensor| Ok(tensor.shallow_clone()))? })
    }

    /// The adapter that belongs to the model.
    pub fn adapter(&self) -> Option<&Lora> {
        self.adapter.as_ref()
    }

    /// Whether weights are kept in 8 bits.
    pub fn is_quantized(&self) -> bool {
        self.parameters.values().any(|tensor| tensor.kind() == Kind::Int8)
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

    /// A deep copy outside any graph, with the model's own adapter in its weights.
    ///
    /// # Errors
    /// If weights are kept in 8 bits, or libtorch cannot allocate the copy.
    pub fn duplicate(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        ensure!(!self.is_quantized(), "of a model in 8 bits there are no whole copies to train");
        let mut copy = self.map(|tensor| Ok(tensor.f_detach_copy()?))?;
        if let Some(adapter) = copy.adapter.take() {
            let parameters = adapter.merged(&copy.parameters, copy.device())?;
            copy = Self::from_parameters(copy.config, parameters)?;
        }
        Ok(copy)
    }

    /// The same model in another dtype; weights of 8 bits stay. Gradients flow back to `self`, so that a float32
    /// master can be trained through a bfloat16 forward pass.
    ///
    /// # Errors
    /// If libtorch cannot convert.
    pub fn cast(&self, kind: Kind) -> Result<Self> {
        self.map(|tensor| {
            let is_whole = tensor.f_kind()? != Kind::Int8;
            Ok(if is_whole { tensor.f_to_kind(kind)? } else { tensor.shallow_clone() })
        })
    }

    fn map(&self, convert: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let parameters = self
            .parameters
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), convert(tensor)?)))
            .collect::<Result<_>>()?;
        self.over(parameters)
    }

    /// The model with the pairs of `lora` and of its own adapter added to its weights, in its dtype and on `device`.
    /// Tensors without a pair are shared with this one.
    ///
    /// # Errors
    /// If the adapter was made for a model of another shape, or weights are kept in 8 bits.
    pub fn merged(&self, lora: &Lora, device: Device) -> Result<Self> {
        ensure!(!self.is_quantized(), "an adapter is not merged into weights of 8 bits");
        let joined = self.adapter.as_ref().map(|adapter| adapter.joined(lora)).transpose()?;
        let lora = joined.as_ref().unwrap_or(lora);
        Self::from_parameters(self.config.clone(), lora.merged(&self.parameters, device)?)
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
        let counts = self.caption_counts(captions)?;
        if let Some(index) = counts.iter().position(|own| padded(*own) != padded(counts[0])) {
            bail!(
                "captions of one batch must pad to one length: caption 0 has {} tokens, caption {index} \
                 has {}",
                counts[0],
                counts[index]
            );
        }
        self.refine_captions(captions, &counts, role)
    }

    /// [`Self::encode_captions`] for captions of any lengths; behind a caption's own tokens, padding
    /// included, the rows are of no use.
    fn refine_captions(
        &self,
        captions: &[Tensor],
        counts: &[i64],
        role: Role<'_>,
    ) -> Result<Tensor> {
        let role = role.over(self.adapter.as_ref());
        let features =
            stack_tokens(captions)?.f_to_device(self.device())?.f_to_kind(self.kind())?;
        let normed = self.caption_norm.forward(&features)?;
        let embedded = self.caption_embedder.forward(&normed, role)?;
        let hidden = fill_padding(&embedded, counts, &self.caption_padding)?;
        let tables = counts
            .iter()
            .map(|count| self.rotary.get(&self.config, padded(*count), Grid::POINT, self.device()))
            .collect::<Result<Vec<_>>>()?;
        let sequence = Sequence::new(&tables, |table| &table.caption)?;
        run_blocks(&self.context_refiner, hidden, sequence, None, role)
    }

    /// The numbers of tokens of captions, whose shapes are checked.
    fn caption_counts(&self, captions: &[Tensor]) -> Result<Vec<i64>> {
        ensure!(!captions.is_empty(), "at least one caption is needed");
        let width = self.config.cap_feat_dim;
        captions
            .iter()
            .enumerate()
            .map(|(index, caption)| match caption.size()[..] {
                [count, own_width] if own_width == width && count > 0 => Ok(count),
                _ => bail!(
                    "caption {index} must be [L, {width}] with L > 0, found {:?}",
                    caption.size()
                ),
            })
            .collect()
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
        let patch = self.config.patch_size();
        let (batch, ..) = latents.size4()?;
        let latents = latents.f_unsqueeze(2)?;
        let grid = Grid::new(&latents.size()[1..], self.config.in_channels, patch)?;
        let (count, length, _) = captions.size3()?;
        ensure!(count == batch, "{batch} latents need as many captions, found {count}");

        let patches = patchify(&latents.f_to_kind(self.kind())?, patch)?;
        let missing = padded(grid.tokens()) - grid.tokens();
        let patches =
            if missing > 0 { patches.f_constant_pad_nd([0, 0, 0, missing])? } else { patches };
        let items = vec![(grid, length); batch as usize];
        let output = self.transform(&patches, &items, t, captions, role)?;
        Ok(unpatchify(&output, patch, grid)?.f_squeeze_dim(2)?.f_to_kind(latents.f_kind()?)?)
    }

    /// The raw output for items of any sizes and captions of any lengths in one batch, each as if it were
    /// alone: `latents` `[C, F_i, H_i, W_i]` with F frames (1 for images), `t` `[B]`, `captions`
    /// `[L_i, cap_feat_dim]`, all on any device. The outputs have the shapes, dtypes and devices of the latents.
    ///
    /// The work is that of the longest item for all; a batch of one padded length is faster than others
    /// also because it needs no mask.
    ///
    /// # Errors
    /// If shapes do not fit, or an item exceeds the positions of the config.
    pub fn forward_items(
        &self,
        latents: &[Tensor],
        t: &Tensor,
        captions: &[Tensor],
        role: Role<'_>,
    ) -> Result<Vec<Tensor>> {
        let (patch, channels) = (self.config.patch_size(), self.config.in_channels);
        let counts = self.caption_counts(captions)?;
        ensure!(
            counts.len() == latents.len(),
            "{} latents need as many captions, found {}",
            latents.len(),
            counts.len()
        );
        let mut items = Vec::with_capacity(latents.len());
        let mut rows = Vec::with_capacity(latents.len());
        for (index, (latent, count)) in latents.iter().zip(&counts).enumerate() {
            let grid = Grid::new(&latent.size(), channels, patch)
                .with_context(|| format!("item {index}"))?;
            items.push((grid, padded(*count)));
            let latent = latent.f_to_device(self.device())?.f_to_kind(self.kind())?;
            rows.push(patchify(&latent.f_unsqueeze(0)?, patch)?.f_squeeze_dim(0)?);
        }
        let encoded = self.refine_captions(captions, &counts, role)?;
        let t = t.f_to_device(self.device())?;
        let output = self.transform(&stack_tokens(&rows)?, &items, &t, &encoded, role)?;
        (0..)
            .zip(items.iter().zip(latents))
            .map(|(index, ((grid, _), latent))| {
                let own = output.f_narrow(0, index, 1)?.f_narrow(1, 0, grid.tokens())?;
                let own = unpatchify(&own, patch, *grid)?.f_squeeze_dim(0)?;
                Ok(own.f_to_device(latent.device())?.f_to_kind(latent.f_kind()?)?)
            })
            .collect()
    }

    /// The forward pass over patches `[B, S, p * p * C]`, padded to the longest item's multiple of 32, and
    /// encoded captions `[B, L, D]`. Each item has a grid and a padded caption length. Returns as many
    /// patches as the largest grid has; behind an item's own they are of no use.
    fn transform(
        &self,
        patches: &Tensor,
        items: &[(Grid, i64)],
        t: &Tensor,
        captions: &Tensor,
        role: Role<'_>,
    ) -> Result<Tensor> {
        ensure!(
            t.size() == [items.len() as i64],
            "{} latents need as many times, found {:?}",
            items.len(),
            t.size()
        );
        let role = role.over(self.adapter.as_ref());
        let tables = items
            .iter()
            .map(|(grid, length)| self.rotary.get(&self.config, *length, *grid, self.device()))
            .collect::<Result<Vec<_>>>()?;
        let counts: Vec<i64> = items.iter().map(|(grid, _)| grid.tokens()).collect();
        let time = self.time_embedder.forward(t, role)?;

        let embedded = self.patch_embedder.forward(patches, role)?;
        let image = fill_padding(&embedded, &counts, &self.patch_padding)?;
        let sequence = Sequence::new(&tables, |table| &table.image)?;
        let image = run_blocks(&self.noise_refiner, image, sequence, Some(&time), role)?;

        let lengths: Vec<_> =
            items.iter().map(|(grid, length)| (padded(grid.tokens()), *length)).collect();
        let stream = join(&image, captions, &lengths)?;
        // The tokens of padding and caption would be dropped after the final layer.
        let kept = longest(&counts);
        let sequence = Sequence { kept, ..Sequence::new(&tables, |table| &table.unified)? };
        let stream = run_blocks(&self.layers, stream, sequence, Some(&time), role)?;
        self.final_layer(&first_rows(&stream, 1, kept)?, &time, role)
    }

    /// `[B, N, D]` to patches `[B, N, p * p * C]`.
    fn final_layer(&self, stream: &Tensor, time: &Tensor, role: Role<'_>) -> Result<Tensor> {
        let scale = self.final_modulation.forward(&time.f_silu()?, role)?.plus(1.0)?;
        let none = None::<&Tensor>;
        let normed = stream.f_layer_norm([self.config.dim], none, none, FINAL_NORM_EPS, true)?;
        self.final_linear.forward(&normed.f_mul(&scale.f_unsqueeze(1)?)?, role)
    }
}
