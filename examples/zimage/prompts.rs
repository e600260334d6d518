//! Captions encoded once: what three networks that share a frozen caption side are conditioned on.

use anyhow::{Result, ensure};
use decoupled_dmd::Condition;
use tch::Tensor;

use super::data::Vocabulary;
use super::lora::Role;
use super::transformer::ZImageTransformer;

/// Encoded captions `[N, L, D]` and the encoded empty caption.
#[derive(Debug)]
pub struct Prompts {
    captions: Tensor,
    empty: Tensor,
}

impl Prompts {
    /// Encodes captions with the caption side of `model`.
    ///
    /// # Errors
    /// Names a word that is not in the vocabulary.
    pub fn encode<'a>(
        model: &ZImageTransformer,
        vocabulary: &Vocabulary,
        captions: impl Iterator<Item = &'a str>,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let features = captions
            .map(|caption| vocabulary.encode_caption(caption))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!features.is_empty(), "there are no captions");
        let encoded = features
            .chunks(256)
            .map(|chunk| model.encode_captions(chunk, Role::BASE))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            captions: Tensor::f_cat(&encoded, 0)?,
            empty: model.encode_captions(&[vocabulary.encode_caption("")?], Role::BASE)?,
        })
    }

    /// The conditions of the captions at `items`, and as many times the null condition.
    ///
    /// # Errors
    /// If an index is out of range.
    pub fn conditions(&self, items: &[i64]) -> Result<(Condition, Condition)> {
        let index = Tensor::f_from_slice(items)?.f_to_device(self.captions.device())?;
        let captions = self.captions.f_index_select(0, &index)?;
        let null = self.empty.f_expand([items.len() as i64, -1, -1], false)?;
        Ok((captions.into(), null.into()))
    }
}

/// Whether a parameter belongs to the caption side, which stays frozen.
pub fn is_caption_side(parameter: &str) -> bool {
    ["cap_embedder.", "context_refiner.", "cap_pad_token"]
        .iter()
        .any(|prefix| parameter.starts_with(prefix))
}
