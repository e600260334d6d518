//! Distillation of the small model of this repository, with everything measured against its teacher.

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Result, ensure};
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Transition};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_training::files::{create_folder, write_json};
use tch_training::run::{INTERRUPTED, fingerprint};

use crate::distil::{
    ADAPTER, Distillation, Network, Outcome, Preset, Preview, REPORT, Recipe, Sampling,
    SavedRecipe, denoiser, open_states, report_interruption, save_student, student_folder,
    train_student, write_curves,
};
use crate::emoji::classifier::Classifier;
use crate::emoji::evaluation::{Evaluator, Row};
use crate::emoji::pictures::{EmojiData, Item};
use crate::emoji::report::{Report, Summary, table};
use crate::emoji::scores::{Judge, Scores, mean_variance};
use crate::model::{Pipeline, fingerprint_model, loading_bar, read_config, read_shift};
use crate::options::Options;
use crate::picture::{Sheet, write_comparison, write_grid};

/// Steps of the teacher that the student is measured against.
const TEACHER_STEPS: usize = 50;
/// Guidance scale of that teacher, not of the recipe: students of several scales have one yardstick.
const TEACHER_GUIDANCE: f64 = 3.0;
/// Captions in samples.png.
const PICTURED: usize = 36;
/// Captions on which teacher and student are compared.
const PROMPTS: usize = 256;

/// Makes pictures of one caption with a trained student.
///
/// # Errors
/// If there is no student, a word is unknown, or a file cannot be read or written.
pub fn sample(options: &Options, device: Device, caption: &str) -> Result<()> {
    options.refuse_released()?;
    let folder = student_folder(options)?;
    ensure!(
        folder.join("transformer").exists() || !folder.join(ADAPTER).exists(),
        "{} is the adapter of a released model: name that with --checkpoint",
        folder.display()
    );
    let data = EmojiData::load(options.data())?;
    check_model(&folder, &data)?;
    let student = Pipeline::load_observed(&folder, Kind::Float, device, &loading_bar()?)?;
    let captions = std::iter::repeat_n(caption, options.count as usize);
    let prompts = data.vocabulary.encode_prompts(&student.transformer, captions)?;
    let items: Vec<i64> = (0..options.count).collect();
    let (cond, _) = prompts.conditions(&items)?;
    let (_, channels, height, width) = data.images.size4()?;
    tch::manual_seed(options.seed as i64);
    let noise = Tensor::f_randn([options.count, channels, height, width], (Kind::Float, device))?;
    let denoiser = denoiser(&student.transformer, student.shift);
    let SavedRecipe { recipe, .. } =
        SavedRecipe::load(&folder, options, Preset::Embedded, student.shift)?;
    let grid = FewStepGrid::even(recipe.steps)?;
    let images = Sampler::new(&denoiser, grid, recipe.transition).sample(&noise, &cond)?;
    let path = options.out.join("sample.png");
    create_folder(&options.out)?;
    write_grid(&path, &images, options.count.min(8), 4)?;
    println!("{} pictures of \"{caption}\" in {}", options.count, path.display());
    Ok(())
}

/// Trains a student and compares it with its teacher.
///
/// # Errors
/// If something cannot be read or written, or training breaks down.
pub fn train(options: &Options, device: Device, threads: i32) -> Result<ExitCode> {
    options.refuse_released()?;
    let recipe = options.recipe(Preset::Embedded, read_shift(&options.checkpoint)?)?;
    recipe.check_adapter(&read_config(&options.checkpoint)?)?;
    // Scores compare covariances, which one sample has not.
    let count = options.prompts.unwrap_or(PROMPTS);
    ensure!(count >= 2, "--prompts must be at least 2, found {count}");
    let data = EmojiData::load(options.data())?;
    check_model(&options.checkpoint, &data)?;
    let progress = loading_bar()?;
    let teacher = Pipeline::load_observed(&options.checkpoint, Kind::Float, device, &progress)?;
    let captions = || data.items.iter().map(|item| item.caption.as_str());
    let prompts = data.vocabulary.encode_prompts(&teacher.transformer, captions())?;
    let judge = Judge::new(Classifier::load(options.classifier(), Kind::Float, device)?, &data)?;
    let evaluator = Evaluator::new(judge, &prompts, &data, teacher.shift, count, 0)?;
    create_folder(&options.out)?;
    let identity = json!({
        "recipe": recipe,
        "teacher": fingerprint_model(&options.checkpoint)?,
        "data": fingerprint(options.data())?,
    });
    let (mut states, _lock) = open_states(options, &identity)?;

    println!("Distilling {} on {device:?}, {threads} threads", options.checkpoint.display());
    let start = Instant::now();
    let run = |steps, guidance, transition| Sampling { steps, guidance, transition };
    let teacher_guidance = options.teacher_guidance.unwrap_or(Guidance::new(TEACHER_GUIDANCE)?);
    let guided = run(TEACHER_STEPS, teacher_guidance, Transition::Ddim);
    let reference = evaluator.generate(&teacher.transformer, guided)?;
    let mut evaluation_seconds = start.elapsed().as_secs_f64();

    let train = data.indices(false);
    let (_, channels, height, width) = data.images.size4()?;
    let mut distillation = Distillation::new(
        recipe.clone(),
        &teacher.transformer,
        &prompts,
        &train,
        [channels, height, width],
    )?
    .with_data_variance(mean_variance(&data.images)?);
    let few = run(recipe.steps, Guidance::NEUTRAL, recipe.transition);
    let outcome = train_student(options, &mut distillation, &mut states, |distillation| {
        let samples = evaluator.generate(distillation.student(), few)?;
        let row = evaluator.row("student", few, &samples, &reference)?;
        let Scores { alignment, frechet_distance, variance_drift, .. } = row.scores;
        let message = format!(
            "alignment {:.1}%, Fréchet {frechet_distance:.3}, drift {variance_drift:+.3}",
            100.0 * alignment
        );
        Ok(Preview { message, entry: serde_json::to_value(row)? })
    })?;
    let Outcome::Finished { history, seconds: training_seconds } = outcome else {
        report_interruption(options, &distillation);
        return Ok(ExitCode::from(INTERRUPTED));
    };

    let start = Instant::now();
    let plural = |steps| if steps == 1 { "step" } else { "steps" };
    let mut rows = vec![evaluator.row(
        &format!("teacher, {TEACHER_STEPS} steps, guided"),
        guided,
        &reference,
        &reference,
    )?];
    let mut add = |name: &str, network: Network<'_>, run: Sampling| -> Result<(Row, Tensor)> {
        let samples = evaluator.generate(network, run)?;
        let row = evaluator.row(
            &format!("{name}, {} {}{}", run.steps, plural(run.steps), guided_suffix(run)),
            run,
            &samples,
            &reference,
        )?;
        rows.push(row.clone());
        Ok((row, samples))
    };
    let base = Network::from(&teacher.transformer);
    let teacher_few = run(recipe.steps, Guidance::NEUTRAL, Transition::Ddim);
    let _ = add("teacher", base, run(recipe.steps, teacher_guidance, Transition::Ddim))?;
    let (unguided, unguided_samples) = add("teacher", base, teacher_few)?;
    let (student, student_samples) = add("student", distillation.student(), few)?;
    for steps in [4, 2, 1] {
        if steps < recipe.steps {
            let _ = add("student", distillation.student(), Sampling { steps, ..few })?;
        }
    }
    evaluation_seconds += start.elapsed().as_secs_f64();

    let summary = Summary::new(&rows[0].scores, &unguided.scores, &student.scores);
    write_pictures(
        options,
        &evaluator,
        &data.items,
        &recipe,
        [&reference, &unguided_samples, &student_samples],
    )?;
    write_curves(&options.out.join("curves.svg"), &history)?;
    let student_folder = options.out.join("student");
    let saved = SavedRecipe { recipe: recipe.clone(), size: None };
    save_student(&student_folder, &teacher, distillation.student_weights(), true, &saved)?;
    println!("\n{}", table(&rows));
    println!(
        "Student against the guided teacher: {:.1}% of its alignment, {:.0}% of the gap closed, \
         {:.2} times its Fréchet distance, variance drift {:+.3}",
        100.0 * summary.alignment_ratio,
        100.0 * summary.gap_closed,
        summary.frechet_ratio,
        summary.variance_drift
    );
    println!("Training {training_seconds:.0} s, evaluation {evaluation_seconds:.0} s");
    println!("Pictures, curves, report and student are in {}", options.out.display());
    let report = Report {
        recipe,
        device: format!("{device:?}"),
        threads,
        training_seconds,
        evaluation_seconds,
        captions: evaluator.items().len(),
        rows,
        summary,
    };
    write_json(&options.out.join(REPORT), &report)?;
    states.remove()?;
    Ok(ExitCode::SUCCESS)
}

fn guided_suffix(run: Sampling) -> &'static str {
    if run.guidance.is_neutral() { "" } else { ", guided" }
}

/// Refuses a model that the data are not for, before its weights are read.
fn check_model(folder: &Path, data: &EmojiData) -> Result<()> {
    let config = read_config(folder)?;
    let (_, channels, _, _) = data.images.size4()?;
    ensure!(
        config.in_channels == channels && config.cap_feat_dim == data.vocabulary.width(),
        "{} takes {} channels and captions of width {}, the data have {channels} and {}: it is not a \
         model of pixels and word vectors. A released one needs its text_encoder/ and vae/, in --checkpoint",
        folder.display(),
        config.in_channels,
        config.cap_feat_dim,
        data.vocabulary.width()
    );
    Ok(())
}

/// The same captions and noise side by side: guided teacher, unguided few-step teacher, student.
fn write_pictures(
    options: &Options,
    evaluator: &Evaluator<'_>,
    items: &[Item],
    recipe: &Recipe,
    samples: [&Tensor; 3],
) -> Result<()> {
    let count = evaluator.items().len();
    let shown = PICTURED.min(count);
    let picks: Vec<i64> = (0..shown).map(|i| (i * count / shown) as i64).collect();
    let index = Tensor::f_from_slice(&picks)?;
    let columns = samples
        .iter()
        .map(|images| Ok(images.f_index_select(0, &index)?))
        .collect::<Result<Vec<_>>>()?;
    let captions: Vec<&str> = picks
        .iter()
        .map(|pick| items[evaluator.items()[*pick as usize] as usize].caption.as_str())
        .collect();
    let (teacher, few) = (format!("teacher {TEACHER_STEPS}"), format!("teacher {}", recipe.steps));
    let student = format!("student {}", recipe.steps);
    write_comparison(
        &options.out.join("samples.png"),
        &[&teacher, &few, &student],
        &columns,
        &captions,
        Sheet::SMALL,
    )
}
