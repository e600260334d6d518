//! The distillation of the example on a model of a few thousand parameters.

use anyhow::Result;
use decoupled_dmd::{Condition, PostShift, Shift};
use tch::{Device, Kind, Tensor};
use tch_training::lora::LoraSettings;
use tempfile::tempdir;
use zimage::distil::{Distillation, Preset, Processes, Recipe, Record, RoleTrainer, denoiser};
use zimage::emoji::Vocabulary;
use zimage::failure::{described, is_out_of_memory};
use zimage::model::{BLOCK_LINEARS, Pipeline, is_caption_side};
use zimage::{Role, ZImageTransformer};

use super::common::tiny::{prompts, teacher, waves};
use super::common::{assert_float64, max_difference, seeded, wave, workspace};

/// Of one sample.
const SIZE: [i64; 3] = [3, 16, 16];

fn recipe() -> Recipe {
    let mut recipe = Preset::Embedded.recipe(Shift::new(3.0).unwrap()).unwrap();
    recipe.steps = 4;
    recipe.updates = 3;
    (recipe.fake_updates, recipe.fake_warmup, recipe.warmup) = (2, 1, 1);
    recipe.batch = 4;
    recipe.student.learning_rate = 1e-3;
    recipe.fake.learning_rate = 1e-3;
    (recipe.ema, recipe.seed) = (0.5, 7);
    recipe
}

type Parameters = Vec<(String, Tensor)>;

fn parameters(model: &ZImageTransformer) -> Result<Parameters> {
    Ok(model.duplicate()?.named_parameters())
}

/// Three updates; the records and the student.
fn train(teacher: &ZImageTransformer) -> Result<(Vec<Record>, Parameters)> {
    let prompts = prompts(teacher)?;
    let mut distillation =
        Distillation::new(recipe(), teacher, &prompts, &[0, 1, 2], SIZE)?.with_data_variance(0.3);
    while !distillation.is_warm() {
        distillation.warm_up()?;
    }
    let records = (0..3).map(|_| distillation.step(true)).collect::<Result<_>>()?;
    Ok((records, parameters(distillation.student().model)?))
}

#[test]
fn updates_move_the_student_alone_and_repeat_under_a_seed() -> Result<()> {
    let _guard = seeded(0);
    let teacher = teacher()?;
    let before = parameters(&teacher)?;
    let (records, student) = train(&teacher)?;
    for ((name, start), (_, now)) in before.iter().zip(teacher.named_parameters()) {
        assert_eq!(max_difference(start, &now), 0.0, "the teacher's {name} moved");
    }
    let mut moved = 0;
    for ((name, start), (_, end)) in before.iter().zip(&student) {
        let changed = max_difference(start, end) > 0.0;
        assert!(!(changed && is_caption_side(name)), "the caption side's {name} moved");
        moved += usize::from(changed);
    }
    assert!(moved > 20, "only {moved} parameters moved");
    for name in ["loss", "ca", "dm", "fake", "dm_cos", "dm_rel_gap", "dm_to_ca", "variance_drift"] {
        let found = records[2].iter().find(|(n, _)| n == name);
        assert!(found.is_some_and(|(_, value)| value.is_finite()), "{name}: {found:?}");
    }

    let (again, same_student) = train(&teacher)?;
    assert_eq!(records, again);
    for ((name, one), (_, two)) in student.iter().zip(&same_student) {
        assert_eq!(max_difference(one, two), 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn adapters_are_trained_over_one_base_and_the_same_with_checkpointing() -> Result<()> {
    let _guard = seeded(0);
    let (teacher, size) = (teacher()?, SIZE);
    let before = parameters(&teacher)?;
    let prompts = prompts(&teacher)?;
    let run = |checkpointing: bool, dropout: f64| -> Result<(Vec<Record>, Parameters)> {
        let settings =
            LoraSettings { rank: 2, alpha: 4.0, dropout, ..LoraSettings::on(BLOCK_LINEARS) };
        let recipe = Recipe { adapter: Some(settings), checkpointing, ..recipe() };
        let mut distillation = Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], size)?;
        distillation.warm_up()?;
        let records = (0..2).map(|_| distillation.step(true)).collect::<Result<_>>()?;
        assert!(std::ptr::eq(distillation.student().model, &teacher));
        Ok((records, distillation.student_weights().role.duplicate()?.parameters()))
    };
    let (records, student) = run(false, 0.0)?;
    for ((name, start), (_, now)) in before.iter().zip(teacher.named_parameters()) {
        assert_eq!(max_difference(start, &now), 0.0, "the base's {name} moved");
        assert!(!now.requires_grad(), "the base's {name} wants a gradient");
    }
    let trained = student.iter().filter(|(name, _)| name.ends_with("lora_B.weight"));
    assert!(trained.clone().count() > 0);
    for (name, up) in trained.filter(|(name, _)| !name.contains("context_refiner")) {
        assert!(up.abs().max().double_value(&[]) > 0.0, "{name} is still zero");
    }
    let (same_records, same_student) = run(true, 0.0)?;
    assert_eq!(records, same_records);
    for ((name, one), (_, two)) in student.iter().zip(&same_student) {
        assert_eq!(max_difference(one, two), 0.0, "{name}");
    }
    let (dropped, student) = run(false, 0.5)?;
    assert_ne!(records, dropped);
    // What is dropped does not depend on it either.
    let (same_dropped, same_student) = run(true, 0.5)?;
    assert_eq!(dropped, same_dropped);
    for ((name, one), (_, two)) in student.iter().zip(&same_student) {
        assert_eq!(max_difference(one, two), 0.0, "{name}");
    }
    Ok(())
}

/// The gradients of two parts add up to that of their mean.
#[test]
fn parts_of_a_batch_are_one_step() -> Result<()> {
    let _guard = seeded(0);
    let teacher = teacher()?;
    let settings = LoraSettings { rank: 2, ..LoraSettings::on(BLOCK_LINEARS) };
    let new = || -> Result<RoleTrainer> {
        tch::manual_seed(3);
        RoleTrainer::new(&teacher, Some(&settings), recipe().student, None)
    };
    let (mut whole, mut parts) = (new()?, new()?);
    let prompts = prompts(&teacher)?;
    let x = wave(&[2, 3, 16, 16], 0.2, Kind::Float);
    let t = Tensor::from_slice(&[0.3f32, 0.8]);
    let (cond, _) = prompts.conditions(&[0, 0])?;
    let loss = |trainer: &RoleTrainer, rows: std::ops::Range<i64>| -> Result<Tensor> {
        let network = trainer.weights.training(&teacher, None);
        let rows = |tensor: &Tensor| tensor.narrow(0, rows.start, rows.end - rows.start);
        let role = network.role;
        let output = network.model.forward_encoded(&rows(&x), &rows(&t), &rows(&cond[0]), role)?;
        Ok(output.f_square()?.f_mean(Kind::Float)?)
    };
    for _ in 0..2 {
        let expected = whole.descend(&loss(&whole, 0..2)?, None, Processes::default())?;
        parts.optimizer.zero_grad()?;
        for rows in [0..1, 1..2] {
            parts.accumulate(&loss(&parts, rows)?.f_div_scalar(2.0)?, None)?;
        }
        let found = parts.step(Processes::default())?;
        assert!(max_difference(&found, &expected) <= 1e-5 * expected.double_value(&[]));
    }
    for ((name, one), (_, two)) in whole.weights.parameters().iter().zip(parts.weights.parameters())
    {
        assert!(max_difference(one, &two) < 1e-5, "{name}");
    }
    Ok(())
}

#[test]
fn captions_of_several_lengths_are_trained_on() -> Result<()> {
    let _guard = seeded(0);
    let teacher = teacher()?;
    let vocabulary = Vocabulary::load(&workspace("assets/emoji"))?;
    let long = "google cat face ".repeat(12);
    let captions = ["google cat face", long.as_str()];
    let prompts = vocabulary.encode_prompts(&teacher, captions.into_iter())?;
    assert!(prompts.conditions(&[0, 1]).is_err(), "the captions are of one length");
    // The null caption is short: once as long as the caption, once not.
    for items in [[0, 0], [1, 1], [0, 1]] {
        let mut distillation = Distillation::new(recipe(), &teacher, &prompts, &items, SIZE)?;
        distillation.warm_up()?;
        let record = distillation.step(true)?;
        assert!(record.iter().all(|(_, value)| value.is_finite()), "{record:?}");
    }
    let none = Distillation::new(recipe(), &teacher, &prompts, &[], SIZE);
    assert!(none.err().expect("a refusal").to_string().contains("no captions to draw from"));
    Ok(())
}

#[test]
fn the_adapter_turns_the_sign_and_pairs_conditions() -> Result<()> {
    let _guard = seeded(1);
    let teacher = teacher()?.cast(Kind::Double)?;
    let (one, two) = prompts(&teacher)?.conditions(&[0, 1])?;
    let noised = wave(&[2, 3, 16, 16], 0.7, Kind::Double);
    let time = PostShift::new(Tensor::from_slice(&[0.25f32, 0.75]))?;
    let captions: &Condition = &one;
    let raw = teacher.forward_encoded(&noised, time.tensor(), &captions[0], Role::BASE)?;
    // raw = x0 - eps, so x0 = x_t + (1 - t) raw.
    let level: Tensor = 1.0 - time.tensor().view([2, 1, 1, 1]);
    let expected = &noised + level * raw;
    let denoiser = denoiser(&teacher, Shift::NONE);
    assert_float64("alone", &denoiser.denoise(&noised, &time, &one)?, &expected);
    let (cond, null) = denoiser.denoise_pair(&noised, &time, &one, &two)?;
    assert_float64("in a pair", &cond, &expected);
    assert_float64("the other", &null, &denoiser.denoise(&noised, &time, &two)?);
    assert!(max_difference(&cond, &null) > 1e-3, "the condition must matter");
    Ok(())
}

#[test]
fn a_pipeline_folder_keeps_weights_and_shift() -> Result<()> {
    let _guard = seeded(2);
    let place = tempdir()?;
    let folder = place.path().join("pipeline");
    let pipeline = Pipeline { transformer: teacher()?, shift: Shift::new(6.0)? };
    pipeline.save(&folder)?;
    let loaded = Pipeline::load(&folder, Kind::Float, Device::Cpu)?;
    assert_eq!(loaded.shift, pipeline.shift);
    for ((name, one), (_, two)) in
        parameters(&pipeline.transformer)?.iter().zip(loaded.transformer.named_parameters())
    {
        assert_eq!(max_difference(one, &two), 0.0, "{name}");
    }
    let scheduler = folder.join("scheduler/scheduler_config.json");
    for (text, complaint) in [
        ("{", "parsing"),
        (
            r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": -1.0}"#,
            "shift: must be",
        ),
        (
            r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": true}"#,
            "use_dynamic_shifting",
        ),
    ] {
        std::fs::write(&scheduler, text)?;
        let error = Pipeline::load(&folder, Kind::Float, Device::Cpu).unwrap_err();
        assert!(format!("{error:#}").contains(complaint), "{error:#}");
    }
    std::fs::remove_dir_all(&folder)?;
    let error = Pipeline::load(&folder, Kind::Float, Device::Cpu).unwrap_err();
    assert!(format!("{error:#}").contains("scheduler_config.json"), "{error:#}");
    Ok(())
}

#[test]
fn errors_are_a_line_without_the_stack_of_libtorch() {
    let zeros = || Tensor::f_zeros([1 << 50], (Kind::Float, Device::Cpu)).unwrap_err();
    let ours = anyhow::Error::new(decoupled_dmd::Error::from(zeros())).context("making zeros");
    let text = format!("{ours:#}");
    assert!(text.starts_with("making zeros: libtorch: ") && text.lines().count() == 1, "{text}");
    assert_eq!(described(&ours), text);
    let error = anyhow::Error::new(zeros()).context("making zeros");
    assert!(format!("{error:#}").lines().count() > 3, "{error:#}");
    let text = described(&error);
    assert!(text.starts_with("making zeros: "), "{text}");
    assert!(
        text.lines().count() == 1 && text.matches("you tried to allocate").count() == 1,
        "{text}"
    );
    assert!(is_out_of_memory(&error), "{text}");
    assert!(!is_out_of_memory(&anyhow::anyhow!("--batch must be at least 1")));
}

/// One caption of three is not a number. Updates that draw it are left out, as many as are allowed; the others train,
/// and a run that is restored counts on.
#[test]
fn updates_that_are_not_finite_are_left_out_up_to_a_bound() -> Result<()> {
    let _guard = seeded(11);
    let teacher = teacher()?;
    let prompts = waves(&teacher, true)?;
    let with = |skip_nonfinite| {
        let recipe = Recipe { batch: 1, fake_warmup: 0, updates: 12, skip_nonfinite, ..recipe() };
        Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], SIZE)
    };
    let run = |distillation: &mut Distillation<'_>, updates: u64| -> Result<u64> {
        let mut left_out = 0;
        for _ in 0..updates {
            let record = distillation.step(true)?;
            distillation.check_finite()?;
            let is_finite = record.iter().all(|(_, value)| value.is_finite());
            assert_eq!(distillation.skipped_for().is_none(), is_finite, "{record:?}");
            left_out += u64::from(!is_finite);
        }
        Ok(left_out)
    };
    let mut straight = with(100)?;
    let left_out = run(&mut straight, 12)?;
    println!("{left_out} of 12 updates were left out");
    assert!((1..12).contains(&left_out) && straight.skipped() == left_out);
    let student = parameters(straight.student().model)?;
    let mut moved = 0;
    for ((name, now), (_, then)) in student.iter().zip(parameters(&teacher)?) {
        let moves = max_difference(now, &then);
        assert!(moves.is_finite(), "{name}");
        moved += usize::from(moves > 0.0);
    }
    assert!(moved > 0);

    let (mut first, mut second) = (with(100)?, with(100)?);
    let before = run(&mut first, 7)?;
    let _ = second.load_state(&first.state())?;
    assert_eq!(second.skipped(), before);
    assert_eq!(run(&mut second, 5)? + before, left_out);
    for ((name, one), (_, other)) in student.iter().zip(parameters(second.student().model)?) {
        assert_eq!(max_difference(one, &other), 0.0, "{name}");
    }

    for most in 0..left_out {
        let error = run(&mut with(most)?, 12).expect_err("more than are allowed").to_string();
        assert!(error.contains("training broke down: the norm of the gradient"), "{error}");
        let counted = format!("left out before: {most}");
        assert!(most == 0 || error.contains(&counted), "{error}");
    }
    Ok(())
}

#[test]
fn a_training_that_breaks_down_says_so() -> Result<()> {
    let _guard = seeded(9);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let mut recipe = recipe();
    recipe.student.learning_rate = 1e30;
    let mut distillation = Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], SIZE)?;
    let mut update = || distillation.step(false).and_then(|_| distillation.check_finite());
    let error = (0..3).find_map(|_| update().err()).expect("weights beyond bounds");
    assert!(error.to_string().contains("training broke down"), "{error:#}");
    Ok(())
}
