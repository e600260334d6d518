//! The role of a model in one forward pass: its weights alone, or with an adapter.

use anyhow::Result;
use tch::{Device, Kind, Tensor};

use crate::lora::Lora;
use crate::tape::Tape;

/// What a model is in one forward pass: its weights alone, or its weights and an adapter.
///
/// Teacher, student and fake score are three roles of one model, which none of them changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Role<'a> {
    lora: Option<&'a Lora>,
    training: bool,
    /// Seed of the dropout masks of one forward pass.
    seed: Option<i64>,
    tape: Option<&'a Tape>,
}

/// A role that a tape keeps.
#[derive(Debug)]
pub(crate) struct OwnedRole {
    lora: Option<Lora>,
    seed: Option<i64>,
}

impl OwnedRole {
    /// The role of the same forward pass, off the tape.
    pub(crate) fn role(&self) -> Role<'_> {
        Role { lora: self.lora.as_ref(), seed: self.seed, ..Role::BASE }
    }
}

impl<'a> Role<'a> {
    /// The model's own weights.
    pub const BASE: Role<'static> = Role { lora: None, training: false, seed: None, tape: None };

    /// The model with an adapter, without dropout.
    pub fn adapted(lora: &'a Lora) -> Self {
        Self { lora: Some(lora), ..Self::BASE }
    }

    /// The model with an adapter and the adapter's dropout.
    pub fn training(lora: &'a Lora) -> Self {
        Self { training: true, ..Self::adapted(lora) }
    }

    /// The same role with gradient checkpointing: gradients come from [`Tape::backward`].
    #[must_use]
    pub fn checkpointed(self, tape: &'a Tape) -> Self {
        Self { tape: Some(tape), ..self }
    }

    pub(crate) fn tape(self) -> Option<&'a Tape> {
        self.tape
    }

    /// What a tape keeps of the role.
    pub(crate) fn owned(self) -> OwnedRole {
        OwnedRole { lora: self.lora.cloned(), seed: self.seed }
    }

    /// The role for one forward pass: with dropout, a seed is drawn, and each layer's mask follows from it.
    pub(crate) fn begin(self) -> Result<Self> {
        if !self.training || self.lora.is_none_or(|lora| lora.dropout == 0.0) {
            return Ok(self);
        }
        let seed = Tensor::f_randint(i64::MAX, [1], (Kind::Int64, Device::Cpu))?;
        Ok(Self { seed: Some(seed.f_int64_value(&[0])?), ..self })
    }

    /// Adds the pair of the layer `module`, if there is one, to what the layer makes of `x`.
    pub(crate) fn add_to(self, output: Tensor, module: &str, x: &Tensor) -> Result<Tensor> {
        let Some((lora, pair)) = self.lora.and_then(|lora| Some((lora, lora.pair(module)?))) else {
            return Ok(output);
        };
        pair.add_to(output, x, self.seed.map(|seed| (lora.dropout, seed)))
    }
}
