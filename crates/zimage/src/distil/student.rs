//! A student under training: the weights of its role, and what tells a flow map the length of its jump.

use anyhow::Result;
use decoupled_dmd::{Denoiser, DistributionMatching, FlowMap, Shift};
use tch::{Kind, Tensor};
use tch_training::lora::LoraSettings;
use tch_training::{AdamWSettings, Tape};

use crate::distil::adapter::{denoiser, flow_map};
use crate::distil::role_trainer::RoleTrainer;
use crate::distil::terms::{Networks, Terms};
use crate::distil::weights::{Network, RoleWeights};
use crate::model::{TIME_FEATURES, ZImageTransformer};

/// The name of the table of lengths among the parameters.
const LENGTHS: &str = "jump_lengths";

/// The student's weights and their optimizer.
#[derive(Debug)]
pub(super) struct Student {
    pub(super) trainer: RoleTrainer,
    lengths: Option<Tensor>,
}

impl Student {
    /// Equal to `teacher` to begin with; `terms` say whether it is a network of two times, and what of it is
    /// trained.
    ///
    /// # Errors
    /// As [`RoleTrainer::new`].
    pub(super) fn new(
        teacher: &ZImageTransformer,
        adapter: Option<&LoraSettings>,
        settings: AdamWSettings,
        terms: &impl Terms,
    ) -> Result<Self> {
        // Of zeros, so that all jumps begin with the teacher's velocity.
        let options = (Kind::Float, teacher.device());
        let table = || Tensor::f_zeros([TIME_FEATURES, teacher.config().dim], options);
        let lengths = terms.is_flow_map().then(table).transpose()?;
        let more = lengths.as_ref().map(|table| (LENGTHS, table));
        let is_trained = |name: &str| terms.is_trained(name);
        let trainer = RoleTrainer::with_trained(teacher, adapter, settings, more, is_trained)?;
        Ok(Self { trainer, lengths })
    }

    /// A deep copy of the weights, outside any graph.
    ///
    /// # Errors
    /// If libtorch cannot allocate it.
    pub(super) fn duplicate(&self) -> Result<StudentWeights> {
        let lengths = self.lengths.as_ref().map(Tensor::f_detach_copy).transpose()?;
        Ok(StudentWeights { role: self.trainer.weights.duplicate()?, lengths })
    }

    /// Names and handles of what is trained.
    pub(super) fn parameters(&self) -> Vec<(String, Tensor)> {
        parameters(&self.trainer.weights, self.lengths.as_ref())
    }

    /// The student as it is, for rollouts.
    pub(super) fn denoiser<'a>(
        &'a self,
        base: &'a ZImageTransformer,
        shift: Shift,
    ) -> Denoiser<'a> {
        predictor(self.trainer.weights.network(base), self.lengths.as_ref(), shift)
    }

    /// The networks of an update: the student as it is trained, `teacher`, and distribution matching, if any.
    pub(super) fn networks<'a>(
        &'a self,
        teacher: &'a ZImageTransformer,
        tape: Option<&'a Tape>,
        shift: Shift,
        dm: Option<&'a DistributionMatching<'a>>,
    ) -> Networks<'a> {
        let network = self.trainer.weights.training(teacher, tape);
        let lengths = self.lengths.as_ref();
        Networks {
            teacher: denoiser(teacher, shift),
            student: predictor(network, lengths, shift),
            flow_map: lengths.map(|lengths| flow_map(network, lengths, shift)),
            dm,
        }
    }
}

/// The weights of a student, to sample with and to keep.
#[derive(Debug)]
pub struct StudentWeights {
    pub role: RoleWeights,
    /// Of a flow map: what is added to the captions for each feature of the length of a jump, `[F, D]`.
    pub lengths: Option<Tensor>,
}

impl StudentWeights {
    /// Names and handles.
    pub(super) fn parameters(&self) -> Vec<(String, Tensor)> {
        parameters(&self.role, self.lengths.as_ref())
    }

    /// A predictor of the clean sample: of a flow map, the jump to the data.
    pub fn denoiser<'a>(&'a self, base: &'a ZImageTransformer, shift: Shift) -> Denoiser<'a> {
        predictor(self.role.network(base), self.lengths.as_ref(), shift)
    }

    /// The flow map, where the student is one.
    pub fn flow_map<'a>(
        &'a self,
        base: &'a ZImageTransformer,
        shift: Shift,
    ) -> Option<FlowMap<'a>> {
        self.lengths.as_ref().map(|lengths| flow_map(self.role.network(base), lengths, shift))
    }
}

fn parameters(role: &RoleWeights, lengths: Option<&Tensor>) -> Vec<(String, Tensor)> {
    let table = lengths.map(|table| (LENGTHS.to_owned(), table.shallow_clone()));
    role.parameters().into_iter().chain(table).collect()
}

fn predictor<'a>(network: Network<'a>, lengths: Option<&'a Tensor>, shift: Shift) -> Denoiser<'a> {
    match lengths {
        Some(lengths) => flow_map(network, lengths, shift).denoiser(),
        None => denoiser(network, shift),
    }
}
