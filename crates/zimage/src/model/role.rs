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
    lora: Option<&'a Lora>,
    dropout: Dropout,
    tape: Option<&'a Tape>,
}

impl<'a> Role<'a> {
    /// The model's own weights.
    pub const BASE: Role<'static> = Role { lora: None, dropout: Dropout::Off, tape: None };

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

    pub(super) fn lora(self) -> Option<&'a Lora> {
        self.lora
    }

    pub(super) fn dropout(self) -> Dropout {
        self.dropout
    }

    /// The same role off its tape, with another handle on its adapter.
    pub(super) fn off_tape(lora: Option<&'a Lora>, dropout: Dropout) -> Self {
        Self { lora, dropout, tape: None }
    }

    /// Whether a pass draws random numbers.
    pub(super) fn draws(self) -> bool {
        self.dropout == Dropout::On && self.lora.is_some_and(Lora::has_dropout)
    }

    /// Adds the pair of a layer, if there is one, to what the layer makes of `x`.
    pub(super) fn add_to(self, output: Tensor, layer: &str, x: &Tensor) -> Result<Tensor> {
        Ok(match self.lora {
            Some(lora) => lora.add_to(output, layer, x, self.dropout)?,
            None => output,
        })
    }
}
