//! Distils a text-to-image model of the Z-Image architecture into an 8-step generator without
//! guidance, by Decoupled DMD.
//!
//! ```sh
//! ./with-libtorch cargo run --release --example zimage_8step                  # about ten minutes
//! cargo run --release --example zimage_8step -- --sample "google cat" --steps 8
//! ```

mod zimage;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Transition};
use tch::{Device, Kind, Tensor};
use zimage::Role;
use zimage::adapter::denoiser;
use zimage::classifier::Classifier;
use zimage::data::{EmojiData, Item};
use zimage::distillation::{Distillation, Recipe};
use zimage::evaluation::{Evaluator, Row, Run};
use zimage::fingerprint::fingerprint;
use zimage::interrupt::INTERRUPTED;
use zimage::metrics::Judge;
use zimage::options::Options;
use zimage::picture::{write_comparison, write_grid};
use zimage::pipeline::{Pipeline, write_json};
use zimage::prompts::Prompts;
use zimage::report::{Report, Summary, table, write_curves};
use zimage::training::{Outcome, train_student};
use zimage::training_state::StateFolder;

/// Steps of the teacher that the student is measured against.
const TEACHER_STEPS: usize = 50;
/// Captions in samples.png.
const PICTURED: usize = 36;

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match &options.sample {
        Some(caption) => sample(&options, caption).map(|()| ExitCode::SUCCESS),
        None => distil(&options),
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Chooses device and threads.
fn set_up(options: &Options) -> Result<(Device, i32)> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as i32);
    let threads = options.threads.unwrap_or(cores);
    ensure!(threads > 0, "--threads must be at least 1");
    tch::set_num_threads(threads);
    Ok((options.device.resolve()?, threads))
}

/// Makes pictures of one caption with a trained student.
fn sample(options: &Options, caption: &str) -> Result<()> {
    ensure!(options.count > 0, "--count must be at least 1");
    let (device, _) = set_up(options)?;
    let folder = options.student.clone().unwrap_or_else(|| options.out.join("student"));
    ensure!(
        folder.exists(),
        "there is no student in {}: run without --sample first, or name one with --student",
        folder.display()
    );
    let data = EmojiData::load(&options.data)?;
    let student = Pipeline::load_observed(&folder, Kind::Float, device, &loading_bar()?)?;
    let captions = std::iter::repeat_n(caption, options.count as usize);
    let prompts = Prompts::encode(&student.transformer, &data.vocabulary, captions)?;
    let items: Vec<i64> = (0..options.count).collect();
    let (cond, _) = prompts.conditions(&items)?;
    let (_, channels, height, width) = data.images.size4()?;
    tch::manual_seed(options.seed as i64);
    let noise = Tensor::f_randn([options.count, channels, height, width], (Kind::Float, device))?;
    let denoiser = denoiser(&student.transformer, Role::BASE);
    let grid = FewStepGrid::even(options.steps, student.shift)?;
    let images = Sampler::new(&denoiser, grid, options.transition).sample(&noise, &cond)?;
    let path = options.out.join("sample.png");
    fs::create_dir_all(&options.out)
        .with_context(|| format!("creating {}", options.out.display()))?;
    write_grid(&path, &images, options.count.min(8), 4)?;
    println!("{} pictures of \"{caption}\" in {}", options.count, path.display());
    Ok(())
}

/// Progress of reading weights, which takes a while for a large model.
fn loading_bar() -> Result<ProgressBar> {
    let style =
        ProgressStyle::with_template("{bar:30} {bytes}/{total_bytes} of weights, {eta} left")?;
    Ok(ProgressBar::no_length().with_style(style))
}

/// Trains a student and compares it with its teacher.
fn distil(options: &Options) -> Result<ExitCode> {
    let (device, threads) = set_up(options)?;
    let progress = loading_bar()?;
    let teacher = Pipeline::load_observed(&options.checkpoint, Kind::Float, device, &progress)?;
    let recipe = options.recipe(teacher.shift)?;
    let data = EmojiData::load(&options.data)?;
    check_model(&teacher, &data)?;
    let captions = || data.items.iter().map(|item| item.caption.as_str());
    let prompts = Prompts::encode(&teacher.transformer, &data.vocabulary, captions())?;
    let judge = Judge::new(Classifier::load(&options.classifier, Kind::Float, device)?, &data)?;
    let evaluator = Evaluator::new(judge, &prompts, &data, teacher.shift, options.prompts)?;
    fs::create_dir_all(&options.out)
        .with_context(|| format!("creating {}", options.out.display()))?;
    let mut states = open_states(options, &recipe)?;

    println!("Distilling {} on {device:?}, {threads} threads", options.checkpoint.display());
    let start = Instant::now();
    let run = |steps, guidance, transition| Run { steps, guidance, transition };
    let guided = run(TEACHER_STEPS, options.teacher_guidance, Transition::Euler);
    let reference = evaluator.generate(&teacher.transformer, guided)?;
    let mut evaluation_seconds = start.elapsed().as_secs_f64();

    let train = data.indices(false);
    let mut distillation =
        Distillation::new(recipe.clone(), &teacher.transformer, &prompts, &train, &data.images)?;
    let few = run(recipe.steps, Guidance::NEUTRAL, recipe.transition);
    let outcome = train_student(options, &mut distillation, &mut states, |distillation| {
        let samples = evaluator.generate(distillation.student(), few)?;
        evaluator.row("student", few, &samples, &reference)
    })?;
    let Outcome::Finished { history, seconds: training_seconds } = outcome else {
        println!(
            "\nStopped after update {} of {}; the state is in {}. The same command goes on from \
             there, and starts anew with --fresh",
            distillation.updates(),
            recipe.updates,
            options.out.display()
        );
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
    let mut add = |name: &str, model: &_, run: Run| -> Result<(Row, Tensor)> {
        let samples = evaluator.generate(model, run)?;
        let row = evaluator.row(
            &format!("{name}, {} {}{}", run.steps, plural(run.steps), guided_suffix(run)),
            run,
            &samples,
            &reference,
        )?;
        rows.push(row.clone());
        Ok((row, samples))
    };
    let teacher_few = run(recipe.steps, Guidance::NEUTRAL, Transition::Euler);
    let _ = add(
        "teacher",
        &teacher.transformer,
        run(recipe.steps, options.teacher_guidance, Transition::Euler),
    )?;
    let (unguided, unguided_samples) = add("teacher", &teacher.transformer, teacher_few)?;
    let (student, student_samples) = add("student", distillation.student(), few)?;
    for steps in [4, 2, 1] {
        if steps < recipe.steps {
            let _ = add("student", distillation.student(), Run { steps, ..few })?;
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
    let result = Pipeline { transformer: distillation.student().duplicate()?, shift: recipe.shift };
    result.save(&options.out.join("student"))?;
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
        captions: evaluator.items.len(),
        rows,
        summary,
    };
    write_json(&options.out.join("report.json"), &report)?;
    states.remove()?;
    Ok(ExitCode::SUCCESS)
}

/// Where the run's state is kept; finds an unfinished run of the same recipe and data.
fn open_states(options: &Options, recipe: &Recipe) -> Result<StateFolder> {
    let identity = serde_json::json!({
        "recipe": recipe,
        "data": {
            "teacher": fingerprint(&options.checkpoint)?,
            "captions and pictures": fingerprint(&options.data)?,
        },
    });
    StateFolder::open(&options.out.join("state"), &identity, options.fresh)
}

fn guided_suffix(run: Run) -> &'static str {
    if run.guidance.is_neutral() { "" } else { ", guided" }
}

/// The text encoder and the decoder of the released model are not there yet.
fn check_model(teacher: &Pipeline, data: &EmojiData) -> Result<()> {
    let config = teacher.transformer.config();
    let (_, channels, _, _) = data.images.size4()?;
    ensure!(
        config.in_channels == channels && config.cap_feat_dim == data.vocabulary.width(),
        "the checkpoint takes {} channels and captions of width {}, the data have {channels} and \
         {}: only models of pixels and word vectors can be distilled so far",
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
    let count = evaluator.items.len();
    let shown = PICTURED.min(count);
    let picks: Vec<i64> = (0..shown).map(|i| (i * count / shown) as i64).collect();
    let index = Tensor::f_from_slice(&picks)?;
    let columns = samples
        .iter()
        .map(|images| Ok(images.f_index_select(0, &index)?))
        .collect::<Result<Vec<_>>>()?;
    let captions: Vec<&str> = picks
        .iter()
        .map(|pick| items[evaluator.items[*pick as usize] as usize].caption.as_str())
        .collect();
    let (teacher, few) = (format!("teacher {TEACHER_STEPS}"), format!("teacher {}", recipe.steps));
    let student = format!("student {}", recipe.steps);
    write_comparison(
        &options.out.join("samples.png"),
        &[&teacher, &few, &student],
        &columns,
        &captions,
    )
}
