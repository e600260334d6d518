//! The terms that a student is trained with.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Denoiser, DistributionMatching, Draw, FlowMap, Guidance, Objective, Schedule, Shift, Shifts,
    Steps,
};
use tch::Tensor;
use tch_training::Parameters;

use crate::distil::readings::Readings;
use crate::distil::recipe::Recipe;
use crate::distil::rollout::{Captions, Rollout};

/// The networks of an update, for losses beside the objective on rollouts.
#[derive(Debug)]
pub struct Networks<'n> {
    pub teacher: Denoiser<'n>,
    /// The student with its graph.
    pub student: Denoiser<'n>,
    /// The student with its graph, where it is a flow map.
    pub flow_map: Option<FlowMap<'n>>,
    /// Distribution matching with the fake score, where one is trained.
    pub dm: Option<&'n DistributionMatching<'n>>,
}

/// The objective of a [`Distillation`](super::Distillation), and the networks that its terms own.
pub trait Terms {
    /// The objective of the student's rollouts over `teacher`. `dm` is distribution matching with the fake score,
    /// where one is trained.
    ///
    /// # Errors
    /// If a term lacks its network, or a setting is out of range.
    fn objective<'o>(
        &'o self,
        teacher: Denoiser<'o>,
        dm: Option<&'o DistributionMatching<'o>>,
    ) -> Result<Objective<'o>>;

    /// The draw at which samples of a rollout, each at its step of `steps`, are noised again: by the one group of the
    /// objective in an update of the student, and anew in each update of the fake score. `u` are times before the
    /// shift: that group draws from all times ([`Uniform::FULL`](decoupled_dmd::Uniform::FULL)), with the shift of the
    /// path, or the two would be looked at at other times. A device is waited for once for each draw, whose numbers are
    /// checked. `None` by default: every group of the objective draws for itself, and the fake score at all times.
    ///
    /// # Errors
    /// If libtorch fails. An update fails where a draw meets an objective of several groups.
    fn draw(&self, rollout: &Rollout<'_>, steps: &Steps) -> Result<Option<Draw>> {
        let _ = (rollout, steps);
        Ok(None)
    }

    /// Steps of the student's rollout at an update, a divisor of `most`, those of the recipe; `None` where the
    /// student is trained on data alone.
    fn rollout_steps(&self, update: u64, most: usize) -> Option<usize> {
        let _ = update;
        Some(most)
    }

    /// Whether the student is a network of two times.
    fn is_flow_map(&self) -> bool {
        false
    }

    /// Losses of the student that are added to the objective on its rollout, and what they show: on data of the
    /// captions, or off the rollout, where there is one.
    ///
    /// # Errors
    /// If libtorch fails.
    fn more_losses(
        &self,
        update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Vec<(Tensor, Readings)>> {
        let _ = (update, networks, captions, rollout);
        Ok(Vec::new())
    }

    /// Whether a fake score is trained beside the student.
    fn has_fake_score(&self) -> bool {
        true
    }

    /// Real samples of the captions at `items`, for terms that compare with them.
    ///
    /// # Errors
    /// If libtorch fails.
    fn real(&self, items: &[i64]) -> Result<Option<Tensor>> {
        let _ = items;
        Ok(None)
    }

    /// Whether a parameter of the student is trained.
    fn is_trained(&self, name: &str) -> bool {
        let _ = name;
        true
    }

    /// One update of the networks of the terms, at the end of an update of the student; names and losses. The
    /// arguments are those of [`Self::more_losses`], after what the update has changed but for the rollout.
    ///
    /// # Errors
    /// If libtorch fails.
    fn train(
        &mut self,
        update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Readings> {
        let _ = (update, networks, captions, rollout);
        Ok(Readings::default())
    }

    /// All that training changes in the networks of the terms, by name; storage is shared.
    fn state(&self) -> Parameters {
        Parameters::new()
    }
}

/// CFG Augmentation and distribution matching, arranged by one of the paper's schedules.
#[derive(Clone, Copy, Debug)]
pub struct ScheduledTerms {
    schedule: Schedule,
    guidance: Guidance,
    dm_shift: Shift,
}

impl From<&Recipe> for ScheduledTerms {
    fn from(recipe: &Recipe) -> Self {
        let Recipe { schedule, guidance, dm_shift, .. } = *recipe;
        Self { schedule, guidance, dm_shift }
    }
}

impl Terms for ScheduledTerms {
    fn objective<'o>(
        &'o self,
        teacher: Denoiser<'o>,
        dm: Option<&'o DistributionMatching<'o>>,
    ) -> Result<Objective<'o>> {
        let dm = dm.context("a schedule needs a fake score")?;
        let shifts = Shifts { regularizer: Some(self.dm_shift), ..Shifts::default() };
        Ok(self.schedule.objective_with_shifts(teacher, self.guidance, dm, shifts))
    }
}
