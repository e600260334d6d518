//! Weights of a role, a copy of the model or an adapter on it, and the network that they make of the base.

use anyhow::Result;
use tch::Tensor;
use tch_training::Tape;
use tch_training::lora::{Lora, LoraSettings};

use crate::model::{Role, ZImageTransformer, is_caption_side};

/// A model in one of its roles: what is run.
#[derive(Clone, Copy, Debug)]
pub struct Network<'a> {
    pub model: &'a ZImageTransformer,
    pub role: Role<'a>,
}

impl<'a> From<&'a ZImageTransformer> for Network<'a> {
    fn from(model: &'a ZImageTransformer) -> Self {
        Self { model, role: Role::BASE }
    }
}

/// The weights that make a student or a fake score of the frozen base.
#[derive(Debug)]
pub enum RoleWeights {
    /// A whole model of its own, trained but for its caption side.
    Copy(Box<ZImageTransformer>),
    /// Pairs on top of the base, which is shared.
    Adapter(Lora),
}

impl RoleWeights {
    /// Equal to `base` to begin with: an adapter if there are settings for one, else a copy.
    ///
    /// # Errors
    /// If the settings do not fit the model, or libtorch cannot allocate the weights.
    pub fn new(base: &ZImageTransformer, adapter: Option<&LoraSettings>) -> Result<Self> {
        Ok(match adapter {
            Some(settings) => {
                let layers = base.config().linears();
                Self::Adapter(Lora::new(&layers, settings, base.device())?)
            }
            None => Self::Copy(Box::new(base.duplicate()?)),
        })
    }

    /// Names and handles of what is trained, sorted by name.
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        match self {
            Self::Copy(model) => model
                .named_parameters()
                .into_iter()
                .filter(|(name, _)| !is_caption_side(name))
                .collect(),
            Self::Adapter(lora) => lora.parameters(),
        }
    }

    /// Whether a pass of training draws random numbers.
    pub(super) fn draws(&self) -> bool {
        matches!(self, Self::Adapter(lora) if lora.has_dropout())
    }

    /// A deep copy outside any graph.
    ///
    /// # Errors
    /// If libtorch cannot allocate it.
    pub fn duplicate(&self) -> Result<Self> {
        Ok(match self {
            Self::Copy(model) => Self::Copy(Box::new(model.duplicate()?)),
            Self::Adapter(lora) => Self::Adapter(lora.duplicate()?),
        })
    }

    /// What to sample with.
    pub fn network<'a>(&'a self, base: &'a ZImageTransformer) -> Network<'a> {
        match self {
            Self::Copy(model) => (&**model).into(),
            Self::Adapter(lora) => Network { model: base, role: Role::adapted(lora) },
        }
    }

    /// What to train: with dropout, and gradient checkpointing where there is a tape.
    pub fn training<'a>(
        &'a self,
        base: &'a ZImageTransformer,
        tape: Option<&'a Tape>,
    ) -> Network<'a> {
        let Network { model, role } = match self {
            Self::Copy(model) => (&**model).into(),
            Self::Adapter(lora) => Network { model: base, role: Role::training(lora) },
        };
        Network { model, role: tape.map_or(role, |tape| role.checkpointed(tape)) }
    }
}
