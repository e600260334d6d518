//! What a training of a released model takes, before it is begun.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::Kind;

use crate::distil::picture_size::PictureSize;
use crate::distil::recipe::Recipe;
use crate::model::{Config, MemoryPlan, Storage, TrainingSetup};
use crate::text::MAX_TOKENS;

/// The memory that a training would take, from the shape of the transformer alone: nothing else of the
/// `checkpoint` need be there.
///
/// # Errors
/// If the recipe, a size of the pictures or the dtype does not fit, or there is no size.
pub fn memory_plan(
    checkpoint: &Path,
    config: &Config,
    recipe: &Recipe,
    sizes: &[PictureSize],
    (kind, storage): (Kind, Storage),
) -> Result<MemoryPlan> {
    recipe.check_adapter(config)?;
    recipe.check_storage(storage)?;
    let batch = i64::try_from(recipe.part()?).context("the batch")?;
    let (first, all) = latents(sizes, checkpoint, config)?;
    // What is drawn in the largest takes the most.
    let area = |[_, height, width]: &[i64; 3]| height * width;
    let [_, height, width] = all.into_iter().max_by_key(area).unwrap_or(first);
    check_kind(kind, recipe)?;
    MemoryPlan::new(&TrainingSetup {
        config,
        size: (height, width),
        caption: MAX_TOKENS as i64,
        batch,
        kind,
        storage,
        lora: recipe.adapter.as_ref(),
        fake_lora: recipe.fake_adapter.as_ref(),
        checkpointing: recipe.checkpointing,
        encodes_captions: false,
        ema: true,
    })
}

/// The sizes of the latents of pictures: of the first, and of all.
pub(super) fn latents(
    sizes: &[PictureSize],
    checkpoint: &Path,
    config: &Config,
) -> Result<([i64; 3], Vec<[i64; 3]>)> {
    let all = sizes.iter().map(|size| size.latents(checkpoint, config));
    let all = all.collect::<Result<Vec<_>>>()?;
    Ok((*all.first().context("there is no size of pictures")?, all))
}

/// The bytes of the gradients that a process gives away in an update of the student, with those of the fake score
/// that go with it: at most, for what has no gradient is not exchanged.
pub fn exchanged(plan: &MemoryPlan, config: &Config, recipe: &Recipe) -> u64 {
    let steps = recipe.steps as u64 * config.dim as u64 * 4;
    let [student, fake] = plan.gradients;
    student.saturating_add((fake + steps).saturating_mul(recipe.fake_updates))
}

/// Refuses whole copies in another dtype than float32.
pub(super) fn check_kind(kind: Kind, recipe: &Recipe) -> Result<()> {
    ensure!(
        kind == Kind::Float || recipe.adapter.is_some(),
        "whole copies are trained in float32, found {kind:?}: give --float32, or a --rank for adapters"
    );
    Ok(())
}
