//! Twenty thousand updates of each preset on a model of a few thousand parameters.

use std::fs;

use anyhow::{Context as _, Result, ensure};
use decoupled_dmd::Shift;
use tch_training::lora::LoraSettings;
use zimage::distil::{Distillation, Preset};
use zimage::model::BLOCK_LINEARS;

use super::common::{seeded, tiny};
use super::live_bytes::live_bytes;

const UPDATES: u64 = 20_000;
/// Updates between two looks at memory and time.
const PART: u64 = 1000;

/// Seconds of the processor that this process has used.
fn seconds() -> Result<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let text = fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = text.rsplit_once(')').context("no name in /proc/self/stat")?;
    let mut fields = fields.split_whitespace().skip(11);
    let mut ticks = || Ok::<f64, anyhow::Error>(fields.next().context("too short")?.parse()?);
    Ok((ticks()? + ticks()?) / TICKS_PER_SECOND)
}

/// Nothing becomes NaN, and memory stays within a hundredth of what it is after the first thousand updates; the time
/// of an update is printed. Nothing is learnt here: the rates are the presets' own, on a model that is no model.
#[test]
#[ignore = "takes one to two hours: cargo test --release --workspace --test training long_run -- --ignored --nocapture"]
fn presets_run_for_long() -> Result<()> {
    let _guard = seeded(0);
    tch::set_num_threads(1);
    let teacher = tiny::teacher()?;
    let prompts = tiny::prompts(&teacher)?;
    for preset in Preset::ALL {
        let mut recipe = preset.recipe(Shift::new(3.0)?)?;
        (recipe.updates, recipe.batch) = (UPDATES, 2);
        recipe.adapter = recipe.adapter.map(|settings| LoraSettings {
            rank: 2,
            alpha: 2.0,
            ..LoraSettings { targets: LoraSettings::on(BLOCK_LINEARS).targets, ..settings }
        });
        let mut distillation =
            Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], [3, 8, 8])?;
        while !distillation.is_warm() {
            distillation.warm_up()?;
        }
        let (mut bytes, mut times) = (Vec::new(), Vec::new());
        while distillation.updates() < UPDATES {
            let start = seconds()?;
            for _ in 0..PART {
                let record = distillation.step(distillation.updates() % 10 == 9)?;
                distillation.check_finite()?;
                let broken = record.iter().find(|(_, value)| !value.is_finite());
                ensure!(broken.is_none(), "update {}: {broken:?}", distillation.updates());
            }
            times.push((seconds()? - start) / PART as f64 * 1e3);
            bytes.push(live_bytes());
        }
        let largest = bytes.iter().copied().fold(0.0, f64::max);
        let (least, most) =
            times.iter().fold((f64::MAX, 0.0_f64), |(a, b), time| (a.min(*time), b.max(*time)));
        println!(
            "{preset:?}: {:.3} MB after {PART} updates, at most {:.3} MB; {:.2} ms an update, then {least:.2} to {most:.2}, at last {:.2}",
            bytes[0] / 1e6,
            largest / 1e6,
            times[0],
            times[times.len() - 1]
        );
        assert!(largest < 1.01 * bytes[0], "{bytes:?}");
    }
    Ok(())
}
