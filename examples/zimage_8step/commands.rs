//! The work that the command line of `zimage_8step` asks for.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Error, Result, bail, ensure};
use decoupled_dmd::{Guidance, Shift};
use tch::Device;
use tch_c10d::{Launch, ProcessGroup};
use tch_training::run::INTERRUPTED;
use zimage::autoencoder::AutoencoderConfig;
use zimage::device::set_threads;
use zimage::distil::run as released;
use zimage::distil::{
    ADAPTER, Ending, FinishedRun, Preset, Recipe, Start, exchanged, export_comfyui, memory_plan,
    own_device,
};
use zimage::emoji::run as embedded;
use zimage::failure::{is_other_run, is_out_of_memory};
use zimage::model::{Checkpoint, read_config};
use zimage::text::MAX_TOKENS;

use super::options::{Options, TEACHER};

/// Does the work, training with the processes that were launched together.
///
/// # Errors
/// Says what is wrong with an option or a file, or what broke down.
pub fn run(options: &Options, launch: &Launch) -> Result<ExitCode> {
    if options.sample.is_none() {
        options.refuse_sampling()?;
    }
    if options.export.is_some() {
        return export(options).map(|()| ExitCode::SUCCESS);
    }
    let processes = launch.world_size();
    ensure!(
        processes == 1 || (options.sample.is_none() && !options.plan),
        "{processes} processes were started: pictures and --plan are made by one"
    );
    // A student of the embedded model is sampled without its teacher.
    let is_needed = options.sample.is_none() || options.checkpoint != Path::new(TEACHER);
    if is_needed {
        check_folder(&options.checkpoint)?;
    }
    let is_released = Checkpoint::is_released(&options.checkpoint);
    if options.plan {
        return plan(options).map(|()| ExitCode::SUCCESS);
    }
    // Several processes on one machine would take each other's cores.
    set_threads(options.threads.or((processes > 1).then_some(1)))?;
    let device = options.device.resolve()?;
    match &options.sample {
        Some(prompt) if is_released => sample_released(options, device, prompt)?,
        Some(caption) => sample_embedded(options, device, caption)?,
        None if is_released => return train_released(options, device, launch),
        None => return train_embedded(options, device, launch),
    }
    Ok(ExitCode::SUCCESS)
}

/// Refuses a teacher that is not there, and says where it comes from.
fn check_folder(checkpoint: &Path) -> Result<()> {
    if checkpoint.is_dir() {
        return Ok(());
    }
    let folder = checkpoint.display();
    if checkpoint == Path::new(TEACHER) {
        bail!(
            "there is no {folder} here, the teacher unless --checkpoint names another: run in the root of the \
             repository, or name one"
        );
    }
    // As in Tongyi-MAI/Z-Image.
    let is_of_hub = checkpoint.is_relative() && checkpoint.iter().count() == 2;
    let hint = if is_of_hub {
        format!(
            ". A model of the Hugging Face Hub is downloaded first: hf download {folder} --local-dir {folder}"
        )
    } else {
        String::new()
    };
    bail!("--checkpoint {folder}: there is no such folder{hint}")
}

/// What the user can do about an error, where that is known.
pub fn advice(error: &Error) -> Option<&'static str> {
    if is_out_of_memory(error) {
        return Some(
            "A smaller --batch needs less memory; with a released model a smaller --size or --rank too, \
             and --plan says what each takes",
        );
    }
    if is_other_run(error) {
        return Some("Use its options, another --out, or --fresh, which forgets it");
    }
    error.is::<FinishedRun>().then_some(
        "Sample from it with --sample, train it further with more --updates, name another --out, or write over \
         it with --fresh",
    )
}

/// Writes a student for another program.
fn export(options: &Options) -> Result<()> {
    for path in export_comfyui(&options.student_folder()?)? {
        println!("{}", path.display());
    }
    Ok(())
}

/// Prints the memory that a training would take, and what its processes would exchange.
fn plan(options: &Options) -> Result<()> {
    let config = read_config(&options.checkpoint)?;
    let channels = AutoencoderConfig::released().latent_channels;
    ensure!(
        Checkpoint::is_released(&options.checkpoint) || config.in_channels == channels,
        "--plan is for released models, whose transformer takes {channels} channels; that of {} takes {}: \
         name another with --checkpoint",
        options.checkpoint.display(),
        config.in_channels
    );
    options.refuse_embedded()?;
    // No shift changes what is kept.
    let mut recipe = options.recipe(Preset::ZImage8Step, Shift::NONE)?;
    let processes = options.processes.unwrap_or(1);
    let whole = recipe.batch;
    ensure!(
        processes > 0 && recipe.part()?.is_multiple_of(processes),
        "--batch {whole} cannot be parted among --processes {processes}{}",
        match recipe.accumulate {
            1 => String::new(),
            parts => format!(" in {parts} parts each"),
        }
    );
    recipe.batch = whole / processes;
    let sizes = options.sizes();
    let kept = (options.kind(), options.base);
    let plan = memory_plan(&options.checkpoint, &config, &recipe, &sizes, kept)?;
    println!(
        "Training at {} pixels, {} samples at once, prompts of up to {MAX_TOKENS} tokens:\n{plan}",
        sizes.iter().map(ToString::to_string).collect::<Vec<_>>().join(" or "),
        recipe.part()?
    );
    if let Some(path) = &options.teacher_lora {
        let size = path.metadata().with_context(|| format!("reading {}", path.display()))?.len();
        println!("On top, {}: at most {:.3} GB", path.display(), size as f64 / 1e9);
    }
    if processes > 1 {
        let bytes = exchanged(&plan, &config, &recipe);
        let sent = 2.0 * (processes - 1) as f64 / processes as f64 * bytes as f64;
        println!(
            "That is one of {processes} processes, {whole} samples in all. Each averages gradients of {:.3} GB in an \
             update, at most; in a ring it sends and receives {:.3} GB for that",
            bytes as f64 / 1e9,
            sent / 1e9
        );
    }
    Ok(())
}

fn train_released(options: &Options, device: Device, launch: &Launch) -> Result<ExitCode> {
    options.refuse_embedded()?;
    let Some(prompt_file) = options.prompt_file.clone() else {
        bail!(
            "{} is a whole pipeline: name prompts to train on with --prompt-file",
            options.checkpoint.display()
        );
    };
    let checkpoint = options.teacher()?;
    let recipe = options.recipe(Preset::ZImage8Step, checkpoint.shift())?;
    let default = Guidance::new(released::TEACHER_GUIDANCE)?;
    let group = ProcessGroup::new(launch, &tch_c10d::Options::default())?;
    let device = own_device(&group, device)?;
    let training = released::Training {
        prompt_file,
        negative_prompt: options.negative_prompt.clone().unwrap_or_default(),
        preview_prompts: options.preview_prompts.clone(),
        out: options.out.clone(),
        features: options.features.clone().unwrap_or_else(|| options.out.join("features")),
        sizes: options.sizes(),
        kind: options.kind(),
        device,
        teacher_guidance: options.teacher_guidance.unwrap_or(default),
        merge: options.merge,
        intervals: options.intervals(),
        start: start(options, launch),
    };
    let ending = released::train(&checkpoint, &recipe, &training, &group)?;
    Ok(ended(ending, options, &recipe, &group))
}

fn train_embedded(options: &Options, device: Device, launch: &Launch) -> Result<ExitCode> {
    options.refuse_released()?;
    let checkpoint = options.teacher()?;
    let recipe = options.recipe(Preset::Embedded, checkpoint.shift())?;
    let default = Guidance::new(embedded::TEACHER_GUIDANCE)?;
    let group = ProcessGroup::new(launch, &tch_c10d::Options::default())?;
    let device = own_device(&group, device)?;
    let training = embedded::Training {
        data: options.data().to_owned(),
        classifier: options.classifier().to_owned(),
        out: options.out.clone(),
        device,
        captions: options.prompts.unwrap_or(embedded::CAPTIONS),
        teacher_guidance: options.teacher_guidance.unwrap_or(default),
        intervals: options.intervals(),
        start: start(options, launch),
    };
    let ending = embedded::train(&checkpoint, &recipe, &training, &group)?;
    Ok(ended(ending, options, &recipe, &group))
}

/// What becomes of a run in OUT. Processes that a launcher restarts go on, though their command says --fresh.
fn start(options: &Options, launch: &Launch) -> Start {
    if launch.restarts() > 0 { Start::Resume } else { options.start() }
}

/// The exit status of a training. Says where an interrupted one is, and how to go on.
fn ended(ending: Ending, options: &Options, recipe: &Recipe, group: &ProcessGroup) -> ExitCode {
    let Ending::Interrupted(updates) = ending else { return ExitCode::SUCCESS };
    if group.rank() > 0 {
        return ExitCode::from(INTERRUPTED);
    }
    println!("\nStopped after update {updates} of {}; {}", recipe.updates, way_on(options));
    ExitCode::from(INTERRUPTED)
}

/// How a run that was stopped goes on.
pub fn way_on(options: &Options) -> String {
    // Its own command may say --fresh, which would forget it.
    let without = if options.fresh { " without --fresh" } else { "" };
    let out = options.out.display();
    format!("the state is in {out}. The same command{without} goes on from there")
}

fn sample_released(options: &Options, device: Device, prompt: &str) -> Result<()> {
    options.refuse_embedded()?;
    let student = options.student_folder()?;
    let base = options.teacher()?;
    let saved = options.saved_recipe(&student, Preset::ZImage8Step, base.shift())?;
    let pictures = released::Pictures {
        prompt: prompt.to_owned(),
        count: options.pictures()? as usize,
        seed: options.seed,
        kind: options.kind(),
        device,
        out: options.out.clone(),
        tensors: options.tensors,
    };
    released::sample(&base, &student, &saved, &pictures)
}

fn sample_embedded(options: &Options, device: Device, caption: &str) -> Result<()> {
    options.refuse_released()?;
    let folder = options.student_folder()?;
    ensure!(
        folder.join("transformer").exists() || !folder.join(ADAPTER).exists(),
        "{} is the adapter of a released model: name that with --checkpoint",
        folder.display()
    );
    let student = Checkpoint::open(&folder)?.stored(options.base);
    let saved = options.saved_recipe(&folder, Preset::Embedded, student.shift())?;
    let pictures = embedded::Pictures {
        caption: caption.to_owned(),
        count: options.pictures()?,
        seed: options.seed,
        device,
        data: options.data().to_owned(),
        out: options.out.clone(),
    };
    embedded::sample(&student, &saved.recipe, &pictures)
}
