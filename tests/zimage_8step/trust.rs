//! What a run promises: it keeps what it has, and it does not end well when something is broken.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use decoupled_dmd::Guidance;
use tch::Tensor;
use tch_training::Parameters;
use tch_training::safetensors::{read_tensors, write_tensors};
use zimage::distil::{ADAPTER, Preset, Start, open_states};
use zimage::model::Storage;

use super::commands::way_on;
use super::common::small_pipeline::Workplace;
use super::common::{max_difference, reference, seeded};
use super::parsed;
use super::released::{images, message, recipe, training_options};
use super::run;

/// Rewrites a file of tensors.
fn change(path: &Path, change: impl FnOnce(&mut Parameters)) -> Result<()> {
    let mut tensors = read_tensors(path)?;
    change(&mut tensors);
    Ok(write_tensors(path, &tensors)?)
}

/// The trained adapter of the reference as the student of a place.
fn with_student(place: &Workplace) -> Result<std::path::PathBuf> {
    let student = place.out().join("student");
    fs::create_dir_all(&student)?;
    let adapter = student.join(ADAPTER);
    fs::copy(reference("lora").join(ADAPTER), &adapter)?;
    Ok(adapter)
}

#[test]
fn a_command_that_began_anew_is_not_told_to_begin_anew_again() -> Result<()> {
    let place = Workplace::new()?;
    assert!(way_on(&parsed(&place, &[])?).ends_with("The same command goes on from there"));
    assert!(way_on(&parsed(&place, &["--fresh"])?).contains("without --fresh goes on"));
    Ok(())
}

#[test]
fn what_begins_anew_leaves_no_student_of_the_run_before() -> Result<()> {
    let place = Workplace::new()?;
    let out = place.out();
    let made = ["student", "student-000004", "tensorboard"];
    for folder in made.into_iter().chain(["features", "student-of-mine"]) {
        fs::create_dir_all(out.join(folder))?;
    }
    let files = ["preview-000004.png", "samples.png", "curves.svg", "report.json"];
    for file in files.into_iter().chain(["notes.txt"]) {
        fs::write(out.join(file), "")?;
    }
    let recipe = recipe(&parsed(&place, &[])?)?;
    let _ = open_states(&out, (&recipe, &serde_json::json!({})), Start::Fresh)?;
    for name in made.into_iter().chain(files) {
        assert!(!out.join(name).exists(), "{name}");
    }
    for name in ["features", "student-of-mine", "notes.txt"] {
        assert!(out.join(name).exists(), "{name}");
    }
    Ok(())
}

#[test]
fn a_student_is_drawn_on_the_grid_of_its_training() -> Result<()> {
    let place = Workplace::new()?;
    with_student(&place)?;
    let recipe =
        parsed(&place, &[])?.recipe(Preset::ZImage8Step, decoupled_dmd::Shift::new(6.0)?)?;
    let path = place.out().join("student/recipe.json");
    fs::write(&path, serde_json::to_string(&recipe)?)?;
    let own = images(&place, &["--size", "24"])?;
    let scheduler = place.model().join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(&scheduler)?;
    let other = text.replace("\"shift\": 6.0", "\"shift\": 3.0");
    assert_ne!(other, text);
    fs::write(&scheduler, &other)?;
    assert_eq!(max_difference(&images(&place, &["--size", "24"])?, &own), 0.0);
    // Without the recipe the scheduler's shift is all there is.
    fs::remove_file(&path)?;
    assert!(max_difference(&images(&place, &["--size", "24"])?, &own) > 1e-2);
    Ok(())
}

#[test]
fn an_adapter_is_taken_whole() -> Result<()> {
    let place = Workplace::new()?;
    let adapter = with_student(&place)?;
    change(&adapter, |tensors| {
        for (name, tensor) in tensors.iter_mut() {
            *tensor = if name.contains("context_refiner") {
                tensor.ones_like()
            } else {
                tensor.zeros_like()
            };
        }
    })?;
    let with = images(&place, &["--size", "24"])?;
    change(&adapter, |tensors| {
        for tensor in tensors.values_mut() {
            *tensor = tensor.zeros_like();
        }
    })?;
    let without = images(&place, &["--size", "24"])?;
    assert!(max_difference(&with, &without) > 1e-3, "the caption side is left out");
    Ok(())
}

#[test]
fn what_is_not_finite_is_no_picture_and_no_student() -> Result<()> {
    let poke = |tensor: &mut Tensor| {
        *tensor = tensor.copy();
        let _ = tensor.flatten(0, -1).narrow(0, 0, 1).fill_(f64::NAN);
    };
    let place = Workplace::new()?;
    with_student(&place)?;
    let decoder = place.model().join("vae/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&decoder)?;
    change(&decoder, |tensors| poke(tensors.values_mut().next().expect("a weight")))?;
    let error = message(images(&place, &["--size", "24"]), "NaN in the autoencoder");
    assert!(error.contains("the autoencoder made pictures that are not finite"), "{error}");
    fs::write(&decoder, whole)?;

    let transformer = place.model().join("transformer/diffusion_pytorch_model.safetensors");
    let whole = fs::read(&transformer)?;
    let name = "layers.0.attention.to_q.weight";
    change(&transformer, |tensors| poke(tensors.get_mut(name).expect("a weight")))?;
    let error = message(images(&place, &["--size", "24"]), "NaN in the transformer");
    assert!(error.contains("the transformer made latents that are not finite"), "{error}");
    fs::write(&transformer, whole)?;

    // One update is enough, and the norm of its gradient is fine.
    let place = Workplace::new()?;
    let options = training_options(&place, &["--updates", "1", "--student-lr", "1e38"])?;
    let _guard = seeded(4);
    let error = message(run(&options), "a student beyond float32");
    assert!(error.contains("the student's") && error.contains("is not finite"), "{error}");
    assert!(!place.out().join("student").exists());
    Ok(())
}

#[test]
fn captions_without_effect_end_the_training() -> Result<()> {
    let place = Workplace::new()?;
    let transformer = place.model().join("transformer/diffusion_pytorch_model.safetensors");
    change(&transformer, |tensors| {
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.starts_with("cap_")) {
            *tensor = tensor.zeros_like();
        }
    })?;
    let _guard = seeded(5);
    let error = message(run(&training_options(&place, &[])?), "captions without effect");
    assert!(error.contains("CFG Augmentation is exactly zero"), "{error}");
    assert!(error.contains("update 1 of the student"), "{error}");
    // Where no guidance is asked for, there is none to miss.
    run(&training_options(&place, &["--guidance", "1", "--updates", "1"])?)?;
    Ok(())
}

#[test]
fn schedulers_of_other_grids_are_refused() -> Result<()> {
    let place = Workplace::new()?;
    let path = place.model().join("scheduler/scheduler_config.json");
    let text = fs::read_to_string(&path)?;
    let with = |name: &str, value: serde_json::Value| -> Result<String> {
        let mut settings: serde_json::Value = serde_json::from_str(&text)?;
        settings[name] = value;
        fs::write(&path, settings.to_string())?;
        let prompts = place.0.path().join("prompts.txt").display().to_string();
        Ok(message(run(&parsed(&place, &["--prompt-file", &prompts])?), name))
    };
    for name in ["use_dynamic_shifting", "invert_sigmas", "use_karras_sigmas", "use_beta_sigmas"] {
        let error = with(name, true.into())?;
        assert!(error.contains(&format!("{name} is true")), "{error}");
    }
    let error = with("shift_terminal", 0.1.into())?;
    assert!(error.contains("shift_terminal is 0.1"), "{error}");
    let error = with("_class_name", "UniPCMultistepScheduler".into())?;
    assert!(error.contains("the scheduler is UniPCMultistepScheduler"), "{error}");
    Ok(())
}

#[test]
fn a_recipe_that_trains_nothing_says_so() -> Result<()> {
    let place = Workplace::new()?;
    let cautions_on = |more: &[&str], storage, processes| -> Result<Vec<String>> {
        let recipe =
            parsed(&place, more)?.recipe(Preset::ZImage8Step, decoupled_dmd::Shift::NONE)?;
        Ok(recipe.cautions(storage, processes))
    };
    let cautions = |more: &[&str]| cautions_on(more, Storage::Full, 1);
    assert!(cautions(&[])?.is_empty() && cautions_on(&[], Storage::Int8, 2)?.is_empty());
    let whole = cautions_on(&["--checkpointing", "false"], Storage::Int8, 1)?;
    assert!(whole.len() == 1 && whole[0].contains("more than the base takes"), "{whole:?}");
    let alone = cautions_on(&["--batch", "8", "--accumulate", "2"], Storage::Full, 4)?;
    assert!(alone.len() == 1 && alone[0].contains("one sample"), "{alone:?}");
    for (option, value, expected) in [
        ("--updates", "100", "the student will hardly move"),
        ("--fake-updates", "0", "distribution matching stays zero"),
        ("--guidance", "1", "the engine, is zero"),
    ] {
        let cautions = cautions(&[option, value])?;
        let [caution] = &cautions[..] else { panic!("{option}: {cautions:?}") };
        assert!(caution.contains(expected), "{caution}");
    }
    assert!(Guidance::NEUTRAL.is_neutral());
    Ok(())
}

#[test]
fn a_teacher_that_is_not_there_says_where_it_comes_from() -> Result<()> {
    let place = Workplace::new()?;
    for (checkpoint, expected) in [
        ("Tongyi-MAI/Z-Image", "hf download Tongyi-MAI/Z-Image --local-dir Tongyi-MAI/Z-Image"),
        ("./nowhere/of/mine", "--checkpoint ./nowhere/of/mine: there is no such folder"),
    ] {
        let mut options = parsed(&place, &[])?;
        options.checkpoint = checkpoint.into();
        let error = message(run(&options), checkpoint);
        assert!(error.ends_with(expected), "{error}");
    }
    Ok(())
}

#[test]
fn options_of_pictures_are_no_options_of_training() -> Result<()> {
    let place = Workplace::new()?;
    for (option, value) in [("--student", Some("x")), ("--count", Some("3")), ("--tensors", None)] {
        let more: Vec<&str> = [option].into_iter().chain(value).chain(["--updates", "1"]).collect();
        let error = message(run(&parsed(&place, &more)?), option);
        assert!(error.contains(option) && error.contains("--sample"), "{error}");
    }
    let error = message(parsed(&place, &["--updates", "-1"]).map(|_| ()), "-1");
    assert!(error.contains("--updates"), "{error}");
    let error = zimage::device::set_threads(Some(100_000)).err().context("accepted")?;
    assert!(error.to_string().contains("threads must be from 1 to 1024"), "{error}");
    Ok(())
}
