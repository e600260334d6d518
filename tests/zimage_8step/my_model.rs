//! Distilling a finetuned model, on a base in 8 bits.

use std::path::Path;

use anyhow::{Result, ensure};
use decoupled_dmd::Shift;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::{Lora, LoraSettings};
use tch_training::safetensors::write_tensors;
use zimage::Config;
use zimage::distil::Preset;
use zimage::model::{Checkpoint, Storage};

use super::common::small_pipeline::Workplace;
use super::common::{max_difference, seeded};
use super::parsed;
use super::released::{first_picture, images, student, train, training, wait_for};

/// Writes an adapter of rank 3 on keys and on the caption side, as kohya does, that moves the model.
pub fn finetuning(place: &Workplace, name: &str) -> Result<String> {
    let _guard = seeded(5);
    let config = Config::load(&place.model().join("transformer/config.json"))?;
    let targets = LoraSettings { rank: 3, ..LoraSettings::on(["to_k", "cap_embedder.1"]) };
    let lora = Lora::new(&config.linears(), &targets, Device::Cpu)?;
    let mut tensors = Parameters::new();
    for (layer, pair) in lora.pairs() {
        let layer = format!("lora_unet_{}", layer.replace('.', "_"));
        let up = Tensor::f_randn(pair.up.size(), (Kind::Float, Device::Cpu))? * 0.5;
        drop(tensors.insert(format!("{layer}.lora_down.weight"), pair.down.detach()));
        drop(tensors.insert(format!("{layer}.lora_up.weight"), up));
        drop(tensors.insert(format!("{layer}.alpha"), Tensor::from(3f32)));
    }
    let path = place.0.path().join(name);
    write_tensors(&path, &tensors)?;
    Ok(path.display().to_string())
}

/// The student's one adapter holds the finetuning and what was distilled, and draws on the plain base what the
/// student drew in the training.
#[test]
fn a_student_of_a_finetuned_model_is_one_adapter_of_the_base() -> Result<()> {
    let files = Workplace::new()?;
    let path = finetuning(&files, "mine.safetensors")?;
    for base in ["full", "int8"] {
        let place = Workplace::new()?;
        let options = ["--teacher-lora", &path, "--base", base, "--evaluate-every", "4"];
        train(&place, &options)?;
        let found = student(&place)?;
        let rank = |layer: &str| found[&format!("transformer.{layer}.lora_A.weight")].size()[0];
        assert_eq!(rank("layers.0.attention.to_q"), 2);
        assert_eq!(rank("layers.0.attention.to_k"), 5);
        assert_eq!(rank("cap_embedder.1"), 3);

        let _ = images(&place, &["--size", "24", "--base", base])?;
        let drawn = first_picture(&place.out().join("sample.png"), 0)?;
        let preview = first_picture(&place.out().join("preview-000004.png"), 16)?;
        let apart = drawn.iter().zip(&preview).map(|(one, other)| one.abs_diff(*other)).max();
        println!("{base}: {apart:?} of 255 steps");
        // The sum of two products is taken in another order, of numbers of which one model is sensitive to each.
        assert!(apart <= Some(4), "{apart:?} steps");
    }
    Ok(())
}

/// The finetuning moves what is drawn, and 8 bits move it less.
#[test]
fn an_adapter_moves_the_teacher_more_than_8_bits_do() -> Result<()> {
    let finetuned = Workplace::new()?;
    let path = finetuning(&finetuned, "mine.safetensors")?;
    // A student of no updates that matter is its teacher.
    let still = ["--student-lr", "1e-9"];
    let drawn = |place: &Workplace, more: &[&str]| -> Result<Tensor> {
        train(place, &[&still[..], more].concat())?;
        images(place, &["--size", "24"])
    };
    let plain = drawn(&Workplace::new()?, &[])?;
    let small = drawn(&Workplace::new()?, &["--base", "int8"])?;
    let mine = drawn(&finetuned, &["--teacher-lora", &path])?;
    // Both are drawn on the full base, so that 8 bits are seen through the student alone.
    let (by_adapter, by_bits) = (max_difference(&mine, &plain), max_difference(&small, &plain));
    println!(
        "the adapter moves pictures by {by_adapter:.3}, a still student of 8 bits by {by_bits:.1e}"
    );
    assert!(by_adapter > 0.05 && by_bits < 1e-3);
    Ok(())
}

#[test]
fn what_does_not_go_with_a_finetuned_model_is_refused() -> Result<()> {
    let place = Workplace::new()?;
    let refused = |place: &Workplace, options: &[&str], part: &str| -> Result<()> {
        let output = training(place, options)?.output()?;
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && message.contains(part), "{options:?}: {message}");
        Ok(())
    };
    let path = finetuning(&place, "mine.safetensors")?;
    let absent = place.0.path().join("absent.safetensors").display().to_string();
    refused(&place, &["--teacher-lora", &path, "--teacher-lora-scale", "0"], "strength")?;
    refused(&place, &["--teacher-lora", &absent], "absent.safetensors")?;
    for (scale, part) in [("1e-300", "it changes nothing"), ("1e300", "beyond what float32 holds")]
    {
        let checkpoint = Checkpoint::open(&place.model())?;
        let checkpoint = checkpoint.with_adapter(Path::new(&path), scale.parse()?)?;
        let error = checkpoint.check().expect_err(part).to_string();
        ensure!(error.contains(part) && error.contains(scale), "{error}");
    }
    let error = parsed(&place, &["--rank", "0"])?
        .recipe(Preset::ZImage8Step, Shift::NONE)?
        .check_storage(Storage::Int8)
        .expect_err("whole copies of 8 bits");
    ensure!(error.to_string().contains("adapters of some rank"), "{error}");

    // A run that was stopped is of one adapter at one strength, and of one base.
    let mut child = training(&place, &["--teacher-lora", &path])?.spawn()?;
    wait_for(&mut child, &place.out().join("state/000001"))?;
    child.kill()?;
    ensure!(!child.wait()?.success(), "it was not stopped");
    refused(&place, &[], "teacher_adapter")?;
    let half = ["--teacher-lora", &path, "--teacher-lora-scale", "0.5"];
    refused(&place, &half, "teacher_adapter")?;
    refused(&place, &["--teacher-lora", &path, "--base", "int8"], "base is \"full\" there")
}
