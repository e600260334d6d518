//! A rollout of the student.

use decoupled_dmd::{Condition, Trajectory};
use tch::Tensor;

/// A rollout of the student and the conditions that it was made for.
#[derive(Debug)]
pub struct Rollout {
    pub trajectory: Trajectory,
    pub cond: Condition,
    pub null: Condition,
    /// Real samples of the same captions, where the terms want them.
    pub real: Option<Tensor>,
}

impl Rollout {
    /// The condition for the fake score too, which wants to know the student's step.
    pub fn cond_at(&self, steps: &Tensor) -> Condition {
        Condition::from(vec![self.cond[0].shallow_clone(), steps.shallow_clone()])
    }
}
