//! The role of a model in one forward pass: its weights alone, or with an adapter.

use anyhow::Result;
use tch::Tensor;
use tch_training::Tape;
use tch_training::lora::{Dropout, Lora};

/// A model's weights alone, or its weights and an adapter, in one forward pass.
///
/// Teacher, student and fake score are three roles of one model, which none of them changes.
#[derive(Clone, Copy, Debug)]
pub struct Role<'a> {
    /// Of the model itself, below the role's own.
    frozen: Option<&'a Lora>,
    lora: Option<&'a Lora>,
    dropout: Dropout,
    tape: Option<&'a Tape>,
}

impl<'a> Role<'a> {
    /// The model's own weights.
    pub const BASE: Role<'static> =
        Role { frozen: None, lora: None, dropout: Dropout::Off, tape: None };

    /// The model with an adapter, without dropout.
    pub fn adapted(lora: &'a Lora) -> Self {
        Self { lora: Some(lora), ..Self::BASE }
    }

    /// The model with an adapter and the adapter's dropout.
    pub fn training(lora: &'a Lora) -> Self {
        Self { dropout: Dropout::On, ..Self::adapted(lora) }
    }

    /// The same role with gradient checkpointing: gradients come from [`Tape::backward`].
    #[must_use]
    pub fn checkpointed(self, tape: &'a Tape) -> Self {
        Self { tape: Some(tape), ..self }
    }

    pub(super) fn tape(self) -> Option<&'a Tape> {
        self.tape
    }

    /// The same role over a model with a frozen adapter of its own.
    pub(super) fn over(self, frozen: Option<&'a Lora>) -> Self {
        Self { frozen, ..self }
    }

    /// What outlives the pass: handles on the adapters.
    pub(super) fn kept(self) -> KeptRole {
        let (frozen, lora) = (self.frozen.cloned(), self.lora.cloned());
        KeptRole { frozen, lora, dropout: self.dropout }
    }

    /// Whether a pass draws random numbers.
    pub(super) fn draws(self) -> bool {
        self.dropout == Dropout::On && self.lora.is_some_and(Lora::has_dropout)
    }

    /// Adds the pairs of a layer, if there are any, to what the layer makes of `x`.
    pub(super) fn add_to(self, mut output: Tensor, layer: &str, x: &Tensor) -> Result<Tensor> {
        if let Some(frozen) = self.frozen {
            output = frozen.add_to(output, layer, x, Dropout::Off)?;
        }
        Ok(match self.lora {
            Some(lora) => lora.add_to(output, layer, x, self.dropout)?,
            None => output,
        })
    }
}

/// A role off its tape, with handles of its own on its adapters.
pub(super) struct KeptRole {
    frozen: Option<Lora>,
    lora: Option<Lora>,
    dropout: Dropout,
}

impl KeptRole {
    pub(super) fn role(&self) -> Role<'_> {
        let Self { frozen, lora, dropout } = self;
        Role { frozen: frozen.as_ref(), lora: lora.as_ref(), dropout: *dropout, tape: None }
    }
}
