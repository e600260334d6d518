//! The forward pass: captions refined, image tokens refined, and both in one stream.

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::Tensor;

use super::ZImageTransformer;
use crate::model::grid::{Grid, padded};
use crate::model::layout::{
    Sequence, fill_padding, first_rows, join, longest, patchify, stack_tokens, unpatchify,
};
use crate::model::role::Role;
use crate::model::stack::run_blocks;

/// Epsilon of the final layer norm; the other norms take theirs from the config.
const FINAL_NORM_EPS: f64 = 1e-6;

impl ZImageTransformer {
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
