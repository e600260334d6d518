//! The state of a distillation: all that training changes, as tensors by name.

use anyhow::{Context, Result, ensure};
use tch::Tensor;
use tch_training::Parameters;
use tch_training::parameters::{prefixed, restore};

use super::Distillation;
use crate::distil::role_trainer::RoleTrainer;
use crate::distil::terms::Terms;

/// Names of the counts in the state.
const WARMED: &str = "fake_warmup_updates";
const UPDATES: &str = "updates";
/// Updates in all, which decide where the learning rate falls.
const PLANNED: &str = "planned_updates";
/// Updates that were left out.
const SKIPPED: &str = "skipped_updates";
/// The number of processes that a state was made by, where there were several.
const PROCESSES: &str = "processes";

/// How a state was made.
#[derive(Clone, Copy, Debug)]
pub struct MadeBy {
    /// The number of processes.
    pub processes: u64,
    /// The updates that it was to have in the end.
    pub updates: u64,
}

impl<T: Terms> Distillation<'_, T> {
    /// Everything that training changes, by name: the trained parameters, moments and step counts of
    /// all roles, the moving average, and how far training is. Storage is shared, but for the counts.
    /// What an update draws depends on the seed, its number, and the number and rank of the processes, so that
    /// this is all there is.
    pub fn state(&self) -> Parameters {
        let role = |name, trainer: &RoleTrainer| prefixed(name, trainer.state().collect());
        let count = |count: u64| Tensor::from(count as i64);
        let processes = self.processes.count() as u64;
        let processes = (processes > 1).then(|| (PROCESSES.to_owned(), count(processes)));
        role("student", &self.student.trainer)
            .chain(self.fake.iter().flat_map(|fake| role("fake", &fake.trainer)))
            .chain(prefixed("terms", self.terms.state()))
            .chain(prefixed("average", self.average.parameters().into_iter().collect()))
            .chain([
                (WARMED.to_owned(), count(self.warmed)),
                (UPDATES.to_owned(), count(self.update)),
                (PLANNED.to_owned(), count(self.recipe.updates)),
                (SKIPPED.to_owned(), count(self.skipped)),
            ])
            .chain(processes)
            .collect()
    }

    /// Restores what [`Self::state`] gave, and returns how it was made, which may be otherwise.
    ///
    /// # Errors
    /// Names what is missing, unexpected, or of another shape or dtype, or says that it has more updates than the
    /// recipe; nothing is changed then.
    pub fn load_state(&mut self, state: &Parameters) -> Result<MadeBy> {
        let (warmed, update) = (count(state, WARMED)?, count(state, UPDATES)?);
        let or = |name, otherwise| {
            if state.contains_key(name) { count(state, name) } else { Ok(otherwise) }
        };
        let wanted = self.recipe.updates;
        let planned = or(PLANNED, wanted)?;
        ensure!(
            update <= wanted,
            "the run has made {update} updates, of {planned}, and {wanted} are asked for: it cannot go back"
        );
        let (processes, skipped) = (or(PROCESSES, 1)?, or(SKIPPED, 0)?);
        let without = |state: Parameters| -> Parameters {
            let is_kept = |name: &str| ![PROCESSES, PLANNED, SKIPPED].contains(&name);
            state.into_iter().filter(|(name, _)| is_kept(name)).collect()
        };
        let copy = state.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone()));
        restore(&without(self.state()), &without(copy.collect()))?;
        (self.warmed, self.update, self.skipped) = (warmed, update, skipped);
        self.fault = None;
        Ok(MadeBy { processes, updates: planned })
    }

    /// Replaces all that training changes by what the first process has. All must call it.
    ///
    /// # Errors
    /// If a process is lost, or trains something else.
    pub fn share(&mut self) -> Result<()> {
        let state = self.state();
        self.processes.share(state.values())?;
        (self.warmed, self.update) = (count(&state, WARMED)?, count(&state, UPDATES)?);
        self.skipped = count(&state, SKIPPED)?;
        Ok(())
    }
}

/// A count in a state.
fn count(state: &Parameters, name: &str) -> Result<u64> {
    let value = state.get(name).with_context(|| format!("{name} is missing"))?;
    let value = i64::try_from(value).with_context(|| format!("reading {name}"))?;
    u64::try_from(value).with_context(|| format!("{name} is {value}"))
}
