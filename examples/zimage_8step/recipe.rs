//! The recipe that the options make of a preset, or of that of a student.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::{Schedule, Shift};
use tch_training::lora::LoraSettings;
use zimage::distil::{Preset, Recipe, SavedRecipe};
use zimage::model::BLOCK_LINEARS;

use super::Options;

/// Beyond any use, and small enough that no count overflows.
const MOST: u64 = 100_000_000;

impl Options {
    /// The recipe in the folder of a student, with what the command line says otherwise; that of `default`
    /// where there is none.
    ///
    /// # Errors
    /// If the file or an option is not valid.
    pub fn saved_recipe(
        &self,
        folder: &Path,
        default: Preset,
        shift: Shift,
    ) -> Result<SavedRecipe> {
        let mut saved = match SavedRecipe::read(folder)? {
            Some(saved) => {
                let folder = folder.display();
                ensure!(self.preset.is_none(), "--preset: {folder} says how its student was made");
                saved
            }
            None => SavedRecipe { recipe: self.recipe(default, shift)?, size: None, teacher: None },
        };
        let Recipe { steps, transition, .. } = &mut saved.recipe;
        *steps = self.steps.unwrap_or(*steps);
        *transition = self.transition.unwrap_or(*transition);
        check_count("steps", 1, *steps as u64)?;
        if let Some(sizes) = &self.size {
            ensure!(sizes.len() == 1, "--size: pictures of a prompt are of one size");
            saved.size = Some(sizes[0]);
        }
        Ok(saved)
    }

    /// The recipe, with the shift of the teacher's scheduler.
    ///
    /// # Errors
    /// Names the option that is out of range.
    pub fn recipe(&self, default: Preset, shift: Shift) -> Result<Recipe> {
        let mut recipe = self.preset.unwrap_or(default).recipe(shift)?;
        set(&mut recipe.schedule, &self.schedule);
        set(&mut recipe.guidance, &self.guidance);
        if self.guidance_rescale {
            recipe.guidance = recipe.guidance.rescaled();
        }
        if let Some((low, high)) = self.guidance_interval {
            recipe.guidance = recipe.guidance.within(low, high)?;
        }
        set(&mut recipe.dm_shift, &self.dm_shift);
        set(&mut recipe.transition, &self.transition);
        set(&mut recipe.steps, &self.steps);
        set(&mut recipe.updates, &self.updates);
        set(&mut recipe.fake_updates, &self.fake_updates);
        set(&mut recipe.fake_warmup, &self.fake_warmup);
        set(&mut recipe.batch, &self.batch);
        set(&mut recipe.accumulate, &self.accumulate);
        set(&mut recipe.student.learning_rate, &self.student_lr);
        set(&mut recipe.fake.learning_rate, &self.fake_lr);
        set(&mut recipe.warmup, &self.warmup);
        set(&mut recipe.decay, &self.decay);
        set(&mut recipe.ema, &self.ema);
        set(&mut recipe.checkpointing, &self.checkpointing);
        set(&mut recipe.skip_nonfinite, &self.skip_nonfinite);
        if let Some(rank) = self.rank {
            ensure!(rank >= 0, "--rank must not be negative, found {rank}");
            let default = || LoraSettings::on(BLOCK_LINEARS);
            let settings = recipe.adapter.take().unwrap_or_else(default);
            let adapter = LoraSettings { rank, alpha: rank as f64, ..settings };
            recipe.adapter = (rank > 0).then_some(adapter);
        }
        match &mut recipe.adapter {
            Some(adapter) => {
                set(&mut adapter.alpha, &self.alpha);
                set(&mut adapter.targets, &self.targets);
                set(&mut adapter.dropout, &self.dropout);
                recipe.fake_adapter = self.fake_rank.map(|rank| LoraSettings {
                    rank,
                    alpha: rank as f64,
                    ..adapter.clone()
                });
            }
            None => ensure!(
                self.alpha.is_none()
                    && self.targets.is_none()
                    && self.dropout.is_none()
                    && self.fake_rank.is_none(),
                "--alpha, --targets, --dropout and --fake-rank are about adapters: give their --rank"
            ),
        }
        recipe.seed = self.seed;
        ensure!(
            recipe.schedule != Schedule::CoupledShared || self.dm_shift.is_none(),
            "--dm-shift is for schedules in which distribution matching has times of its own"
        );
        for (option, least, value) in [
            ("updates", 1, recipe.updates),
            ("fake-updates", 0, recipe.fake_updates),
            ("fake-warmup", 0, recipe.fake_warmup),
            ("warmup", 0, recipe.warmup),
            ("batch", 1, recipe.batch as u64),
            ("steps", 1, recipe.steps as u64),
            ("skip-nonfinite", 0, recipe.skip_nonfinite),
        ] {
            check_count(option, least, value)?;
        }
        recipe.part().context("--accumulate")?;
        for (option, value) in
            [("student-lr", recipe.student.learning_rate), ("fake-lr", recipe.fake.learning_rate)]
        {
            ensure!(value.is_finite() && value > 0.0, "--{option} must be positive, found {value}");
        }
        ensure!((0.0..1.0).contains(&recipe.ema), "--ema must be in [0, 1), found {}", recipe.ema);
        Ok(recipe)
    }
}

/// Refuses what counts nothing or overflows.
fn check_count(option: &str, least: u64, value: u64) -> Result<()> {
    ensure!(
        (least..=MOST).contains(&value),
        "--{option} must be from {least} to {MOST}, found {value}"
    );
    Ok(())
}

/// Replaces `value` by what the command line says, if it says something.
fn set<T: Clone>(value: &mut T, option: &Option<T>) {
    if let Some(option) = option {
        value.clone_from(option);
    }
}
