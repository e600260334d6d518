//! Captions and a rollout of the student for them.

use anyhow::Result;
use decoupled_dmd::arithmetic::whole_number;
use decoupled_dmd::{Condition, Steps, Trajectory};
use tch::{Kind, Tensor};

/// The captions of an update.
#[derive(Debug)]
pub struct Captions {
    /// Their indices among the prompts.
    pub items: Vec<i64>,
    pub cond: Condition,
    pub null: Condition,
    /// Real samples of the captions, where the terms want them.
    pub real: Option<Tensor>,
}

/// A rollout of the student for the captions.
#[derive(Debug)]
pub struct Rollout<'c> {
    pub trajectory: Trajectory,
    pub captions: &'c Captions,
    /// Steps of the longest grid in one of this rollout.
    pub(super) stride: i64,
}

impl Rollout<'_> {
    /// The condition for all networks: encoded captions, the student's step as its place on the longest grid,
    /// which the fake score wants to know, and the indices of the captions.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn cond_at(&self, steps: &Steps) -> Result<Condition> {
        let cond = self.captions.cond[0].shallow_clone();
        let steps = steps.tensor();
        // Not waited for: libtorch reads the indices before it returns.
        let items = Tensor::f_from_slice(&self.captions.items)?;
        let items = items.f_to_device_(steps.device(), Kind::Int64, true, false)?;
        Ok(Condition::from(vec![cond, steps.f_mul(&whole_number(self.stride)?)?, items]))
    }
}
