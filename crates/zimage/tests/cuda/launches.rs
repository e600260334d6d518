//! Operators that compute on the device in one update of the embedded model: launches of kernels.

use std::collections::BTreeMap;

use anyhow::Result;
use pretend_cuda::watch;
use tch::Kind;
use zimage::Role;
use zimage::distil::{Distillation, Preset};
use zimage::emoji::Vocabulary;
use zimage::model::Pipeline;

use crate::common::{seeded, workspace};
use crate::device::device;

/// Prints numbers of docs/performance.md:
/// `./with-libtorch cargo test --test cuda launches -- --ignored --nocapture`.
#[test]
#[ignore = "prints a table"]
fn launches() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let _guard = seeded(0);
    let Pipeline { transformer: teacher, shift } =
        Pipeline::load(&workspace("assets/teacher"), Kind::Float, device)?;
    let vocabulary = Vocabulary::load(&workspace("assets/emoji"))?;
    let prompts = vocabulary.encode_prompts(&teacher, ["google cat face"].into_iter())?;
    let recipe = Preset::Embedded.recipe(shift)?;
    let (cond, _) = prompts.conditions(&[0])?;
    let size = [teacher.config().in_channels, 32, 32];
    let mut distillation = Distillation::new(recipe, &teacher, &prompts, &[0], size)?;
    while !distillation.is_warm() {
        distillation.warm_up()?;
    }
    let x = tch::Tensor::zeros([1, size[0], size[1], size[2]], (Kind::Float, device));
    let t = tch::Tensor::zeros([1], (Kind::Float, device));
    let (output, forward) = watch(|| teacher.forward_encoded(&x, &t, &cond[0], Role::BASE));
    let _output = output?;
    println!("| | operators |\n|---|---|\n| a forward pass | {} |", forward.launches());
    for (what, observe) in [("an update", false), ("an update, observed", true)] {
        let (record, seen) = watch(|| distillation.step(observe));
        let _record = record?;
        println!("| {what} | {} |", seen.launches());
        let mut most: Vec<_> = seen.operators.into_iter().collect();
        most.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        most.truncate(30);
        let most: BTreeMap<_, _> = most.into_iter().collect();
        println!("{most:?}");
    }
    Ok(())
}
