//! Distillation of the small model of this repository, with everything measured against its teacher.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail, ensure};
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Transition};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_c10d::ProcessGroup;
use tch_training::files::{create_folder, write_json};
use tch_training::parameters::is_finite;
use tch_training::run::fingerprint;

use crate::distil::{
    Distillation, Ending, Intervals, Network, Outcome, Preview, Processes, REPORT, Recipe,
    Sampling, SavedRecipe, Start, denoiser, open_states, save_student, states_stay, train_student,
    write_curves,
};
use crate::emoji::classifier::Classifier;
use crate::emoji::evaluation::{Evaluator, Row};
use crate::emoji::pictures::{EmojiData, Item};
use crate::emoji::report::{Report, Summary, table};
use crate::emoji::scores::{Judge, Scores, mean_variance};
use crate::model::Checkpoint;
use crate::picture::{Sheet, write_comparison, write_grid};

/// Guidance scale of the teacher that a student is measured against where nothing else is said. It is not that
/// of the recipe: students of several scales have one yardstick.
pub const TEACHER_GUIDANCE: f64 = 3.0;
/// Captions on which teacher and student are compared where nothing else is said.
pub const CAPTIONS: usize = 256;

/// Steps of the teacher that the student is measured against.
const TEACHER_STEPS: usize = 50;
/// Captions in samples.png.
const PICTURED: usize = 36;

/// Pictures of one caption by a trained student.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// The caption.
    pub caption: String,
    /// How many pictures.
    pub count: i64,
    /// Of the noise that they start from.
    pub seed: u64,
    /// Where to compute.
    pub device: Device,
    /// The folder with captions and vocabulary.
    pub data: PathBuf,
    /// Where sample.png goes.
    pub out: PathBuf,
}

/// Makes pictures of one caption with a trained student, run as the recipe says.
///
/// # Errors
/// If a word is unknown, or a file cannot be read or written.
pub fn sample(student: &Checkpoint, recipe: &Recipe, pictures: &Pictures) -> Result<()> {
    let Pictures { caption, count, seed, device, data, out } = pictures;
    let (count, device) = (*count, *device);
    let data = EmojiData::load(data)?;
    check_model(student, &data)?;
    let student = student.load_observed(Kind::Float, device)?;
    let captions = std::iter::repeat_n(caption.as_str(), count as usize);
    let prompts = data.vocabulary.encode_prompts(&student.transformer, captions)?;
    let items: Vec<i64> = (0..count).collect();
    let (cond, _) = prompts.conditions(&items)?;
    let (_, channels, height, width) = data.images.size4()?;
    tch::manual_seed(*seed as i64);
    let noise = Tensor::f_randn([count, channels, height, width], (Kind::Float, device))?;
    let denoiser = denoiser(&student.transformer, student.shift);
    let grid = FewStepGrid::even(recipe.steps)?;
    let images = Sampler::new(&denoiser, grid, recipe.transition).sample(&noise, &cond)?;
    ensure!(is_finite(&images)?, "the student made pictures that are not finite");
    let path = out.join("sample.png");
    create_folder(out)?;
    write_grid(&path, &images, count.min(8), 4)?;
    println!("{count} pictures of \"{caption}\" in {}", path.display());
    Ok(())
}

/// A training of the small model, beside its recipe.
#[derive(Clone, Debug)]
pub struct Training {
    /// The folder with pictures, captions and vocabulary.
    pub data: PathBuf,
    /// The folder of the classifier that judges the samples.
    pub classifier: PathBuf,
    /// Where results go.
    pub out: PathBuf,
    /// Where to compute.
    pub device: Device,
    /// Captions on which teacher and student are compared, at least two.
    pub captions: usize,
    /// Guidance scale of the teacher that the student is compared with.
    pub teacher_guidance: Guidance,
    /// How often the state is saved, and the student scored.
    pub intervals: Intervals,
    /// What becomes of a run that `out` holds already.
    pub start: Start,
}

/// Trains a student with the processes of a group, each of which calls this; the first compares it with its teacher,
/// and writes all files.
///
/// # Errors
/// If something cannot be read or written, training breaks down, or a process is lost.
pub fn train(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    training: &Training,
    group: &ProcessGroup,
) -> Result<Ending> {
    let processes = Processes::from(group);
    processes.part(recipe.part()?)?;
    let Training { out, device, captions: count, .. } = training;
    let (device, count) = (*device, *count);
    recipe.check_adapter(checkpoint.config())?;
    recipe.check_storage(checkpoint.storage())?;
    // Scores compare covariances, which one sample has not.
    ensure!(count >= 2, "at least 2 captions are needed to compare on, found {count}");
    let data = EmojiData::load(&training.data)?;
    check_model(checkpoint, &data)?;
    let teacher = checkpoint.load_observed(Kind::Float, device)?;
    let captions = data.items.iter().map(|item| item.caption.as_str());
    let prompts = data.vocabulary.encode_prompts(&teacher.transformer, captions)?;
    let classifier = Classifier::load(&training.classifier, Kind::Float, device)?;
    let judge = Judge::new(classifier, &data)?;
    let evaluator = Evaluator::new(judge, &prompts, &data, teacher.shift, count, 0)?;
    let train = data.indices(false);
    let (_, channels, height, width) = data.images.size4()?;
    let new = || -> Result<_> {
        Ok(Distillation::new(
            recipe.clone(),
            &teacher.transformer,
            &prompts,
            &train,
            [channels, height, width],
        )?
        .with_data_variance(mean_variance(&data.images)?))
    };
    if !processes.is_first() {
        let evaluate = |_: &Distillation<'_>| bail!("the first process evaluates");
        let mut distillation = new()?.among(processes)?;
        let outcome = train_student(out, training.intervals, &mut distillation, None, evaluate)?;
        return Ok(match outcome {
            Outcome::Finished { .. } => Ending::Finished,
            Outcome::Interrupted => Ending::Interrupted(distillation.updates()),
        });
    }
    recipe.print_cautions(checkpoint.storage(), processes.count());
    create_folder(out)?;
    let fingerprint_of_teacher = checkpoint.fingerprint()?;
    let beside = json!({
        "teacher": fingerprint_of_teacher,
        "teacher_adapter": checkpoint.fingerprint_of_adapter()?,
        "base": checkpoint.storage(),
        "data": fingerprint(&training.data)?,
    });
    let (mut states, _lock) = open_states(out, (recipe, &beside), training.start)?;

    let threads = tch::get_num_threads();
    println!(
        "Distilling {}{} on {device:?}, {threads} threads{}",
        checkpoint.folder().display(),
        checkpoint.described_finetuning(),
        processes.described()
    );
    println!("{}", recipe.described_learning_rate());
    let run = |steps, guidance, transition| Sampling { steps, guidance, transition };
    let teacher_guidance = training.teacher_guidance;
    let guided = run(TEACHER_STEPS, teacher_guidance, Transition::Ddim);
    // The longest part of an evaluation: made when it is first compared with, not whenever a run goes on.
    let sampled = OnceCell::new();
    let reference = || -> Result<&Tensor> {
        if let Some(samples) = sampled.get() {
            return Ok(samples);
        }
        let samples = evaluator.generate(&teacher.transformer, guided)?;
        Ok(sampled.get_or_init(|| samples))
    };

    let mut distillation = new()?.among(processes)?;
    let few = run(recipe.steps, Guidance::NEUTRAL, recipe.transition);
    let teacher_heading = format!("teacher {TEACHER_STEPS}");
    let student_heading = format!("student {}", recipe.steps);
    let preview = |distillation: &Distillation<'_>| {
        let samples = evaluator.generate(distillation.student(), few)?;
        let reference = reference()?;
        let row = evaluator.row("student", few, &samples, reference)?;
        let Scores { alignment, frechet_distance, variance_drift, .. } = row.scores;
        let message = format!(
            "alignment {:.1}%, Fréchet {frechet_distance:.3}, drift {variance_drift:+.3}",
            100.0 * alignment
        );
        let path = out.join(format!("preview-{:06}.png", distillation.updates()));
        let columns = [(teacher_heading.as_str(), reference), (student_heading.as_str(), &samples)];
        write_pictures(&path, &evaluator, &data.items, columns)?;
        let scores = row.scores.named();
        Ok(Preview { message, entry: serde_json::to_value(row)?, scores, picture: Some(path) })
    };
    let outcome = train_student(out, training.intervals, &mut distillation, &mut states, preview)?;
    let Outcome::Finished { history, seconds: training_seconds } = outcome else {
        return Ok(Ending::Interrupted(distillation.updates()));
    };

    let start = Instant::now();
    println!("Sampling teacher and student on {} captions", evaluator.items().len());
    let reference = reference()?;
    let plural = |steps| if steps == 1 { "step" } else { "steps" };
    let mut rows = vec![evaluator.row(
        &format!("teacher, {TEACHER_STEPS} steps, guided"),
        guided,
        reference,
        reference,
    )?];
    let mut add = |name: &str, network: Network<'_>, run: Sampling| -> Result<(Row, Tensor)> {
        let samples = evaluator.generate(network, run)?;
        let row = evaluator.row(
            &format!("{name}, {} {}{}", run.steps, plural(run.steps), guided_suffix(run)),
            run,
            &samples,
            reference,
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
    let evaluation_seconds = start.elapsed().as_secs_f64();

    let summary = Summary::new(&rows[0].scores, &unguided.scores, &student.scores);
    let unguided_heading = format!("teacher {}", recipe.steps);
    let columns = [
        (teacher_heading.as_str(), reference),
        (unguided_heading.as_str(), &unguided_samples),
        (student_heading.as_str(), &student_samples),
    ];
    write_pictures(&out.join("samples.png"), &evaluator, &data.items, columns)?;
    write_curves(&out.join("curves.svg"), &history)?;
    let student_folder = out.join("student");
    let saved =
        SavedRecipe { recipe: recipe.clone(), size: None, teacher: Some(fingerprint_of_teacher) };
    let weights = &distillation.student_weights().role;
    save_student(&student_folder, &teacher, weights, Some(checkpoint), &saved)?;
    println!("\n{}", table(&rows));
    println!("Student against the guided teacher: {summary}");
    println!("Training {training_seconds:.0} s, evaluation {evaluation_seconds:.0} s");
    println!("Pictures, curves, report and student are in {}", out.display());
    let report = Report {
        recipe: recipe.clone(),
        device: format!("{device:?}"),
        threads,
        skipped: distillation.skipped(),
        training_seconds,
        evaluation_seconds,
        captions: evaluator.items().len(),
        rows,
        summary,
    };
    write_json(&out.join(REPORT), &report)?;
    println!("{}", states_stay(out));
    Ok(Ending::Finished)
}

fn guided_suffix(run: Sampling) -> &'static str {
    if run.guidance.is_neutral() { "" } else { ", guided" }
}

/// Refuses a model that the data are not for, before its weights are read.
fn check_model(checkpoint: &Checkpoint, data: &EmojiData) -> Result<()> {
    let config = checkpoint.config();
    let (_, channels, _, _) = data.images.size4()?;
    ensure!(
        config.in_channels == channels && config.cap_feat_dim == data.vocabulary.width(),
        "{} takes {} channels and captions of width {}, the data have {channels} and {}: it is not a \
         model of pixels and word vectors. A released one needs its text_encoder/ and vae/ beside it",
        checkpoint.folder().display(),
        config.in_channels,
        config.cap_feat_dim,
        data.vocabulary.width()
    );
    Ok(())
}

/// Pictures of the same captions from the same noise side by side, a column for each heading.
fn write_pictures<const N: usize>(
    path: &Path,
    evaluator: &Evaluator<'_>,
    items: &[Item],
    columns: [(&str, &Tensor); N],
) -> Result<()> {
    let count = evaluator.items().len();
    let shown = PICTURED.min(count);
    let picks: Vec<i64> = (0..shown).map(|i| (i * count / shown) as i64).collect();
    let index = Tensor::f_from_slice(&picks)?;
    let headings = columns.map(|(heading, _)| heading);
    let columns = columns
        .iter()
        .map(|(_, images)| Ok(images.f_index_select(0, &index)?))
        .collect::<Result<Vec<_>>>()?;
    let captions: Vec<&str> = picks
        .iter()
        .map(|pick| items[evaluator.items()[*pick as usize] as usize].caption.as_str())
        .collect();
    write_comparison(path, &headings, &columns, &captions, Sheet::SMALL)
}
