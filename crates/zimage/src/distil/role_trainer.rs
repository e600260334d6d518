//! The weights of a role under training.

use anyhow::{Result, ensure};
use tch::Tensor;
use tch_training::lora::LoraSettings;
use tch_training::parameters::prefixed;
use tch_training::seed::draw_seed;
use tch_training::{AdamW, AdamWSettings, Tape};

use crate::distil::processes::Processes;
use crate::distil::weights::RoleWeights;
use crate::model::ZImageTransformer;

/// Weights that are trained, and their optimizer.
#[derive(Debug)]
pub struct RoleTrainer {
    pub weights: RoleWeights,
    pub optimizer: AdamW,
    /// What several processes have said of a gradient that is not finite.
    blame: Option<String>,
}

impl RoleTrainer {
    /// Equal to `teacher` to begin with; `more` parameters are trained beside its own.
    ///
    /// # Errors
    /// If the adapter's settings do not fit the model, or libtorch cannot allocate the weights.
    pub fn new(
        teacher: &ZImageTransformer,
        adapter: Option<&LoraSettings>,
        settings: AdamWSettings,
        more: Option<(&str, &Tensor)>,
    ) -> Result<Self> {
        Self::with_trained(teacher, adapter, settings, more, |_| true)
    }

    /// The same, but of its own parameters those alone are trained of whose name `is_trained` holds.
    ///
    /// # Errors
    /// As [`Self::new`]; if nothing would be trained.
    pub fn with_trained(
        teacher: &ZImageTransformer,
        adapter: Option<&LoraSettings>,
        settings: AdamWSettings,
        more: Option<(&str, &Tensor)>,
        is_trained: impl Fn(&str) -> bool,
    ) -> Result<Self> {
        let weights = RoleWeights::new(teacher, adapter)?;
        let more = more.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
        let trainable = weights
            .parameters()
            .into_iter()
            .filter(|(name, _)| is_trained(name))
            .chain(more)
            .map(|(name, tensor)| Ok((name, tensor.f_set_requires_grad(true)?)))
            .collect::<Result<Vec<_>>>()?;
        ensure!(!trainable.is_empty(), "no parameter would be trained");
        Ok(Self { weights, optimizer: AdamW::new(trainable, settings)?, blame: None })
    }

    /// The trained parameters and the optimizer's moments; storage is shared.
    pub fn state(&self) -> impl Iterator<Item = (String, Tensor)> {
        prefixed("weights", self.optimizer.parameters())
            .chain(prefixed("adamw", self.optimizer.state()))
    }

    /// Adds the gradient of a loss, made with `tape` if there is one, to those since the optimizer forgot all.
    ///
    /// # Errors
    /// If the loss does not depend on the weights.
    pub fn accumulate(&self, loss: &Tensor, tape: Option<&Tape>) -> Result<()> {
        // What is computed again draws again: what is drawn next does not depend on it.
        let next = if self.weights.draws() { Some(draw_seed()?) } else { None };
        match tape {
            Some(tape) => tape.backward(loss)?,
            None => loss.f_backward()?,
        }
        if let Some(seed) = next {
            tch::manual_seed(seed as i64);
        }
        Ok(())
    }

    /// Descends along the gradient that was accumulated; returns its norm. Several processes descend
    /// along the mean of their gradients, which is clipped as one process would clip it. A gradient that is not finite
    /// moves nothing, on any process, and shows in the norm.
    ///
    /// # Errors
    /// If there is no gradient; of several processes if one is lost.
    pub fn step(&mut self, processes: Processes<'_>) -> Result<Tensor> {
        if let Some(blame) = processes.average_gradients(&self.optimizer)? {
            self.blame = Some(blame);
        }
        Ok(self.optimizer.step()?)
    }

    /// What several processes have said of a gradient that is not finite since this was last asked.
    pub(super) fn take_blame(&mut self) -> Option<String> {
        self.blame.take()
    }

    /// Forgets all gradients, then [`Self::accumulate`] of one loss and [`Self::step`].
    ///
    /// # Errors
    /// As those.
    pub fn descend(
        &mut self,
        loss: &Tensor,
        tape: Option<&Tape>,
        processes: Processes<'_>,
    ) -> Result<Tensor> {
        self.optimizer.zero_grad()?;
        self.accumulate(loss, tape)?;
        self.step(processes)
    }
}
