//! Distillation of a released checkpoint: text encoder, transformer and autoencoder of a diffusers
//! folder, student and fake score as adapters over one frozen transformer.

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Result, bail, ensure};
use decoupled_dmd::{Guidance, Shift, Transition};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::files::{create_folder, write_json};
use tch_training::lora::Lora;
use tch_training::run::{INTERRUPTED, fingerprint};
use tch_training::safetensors::write_tensors;

use crate::autoencoder::{AutoencoderConfig, Decoder};
use crate::distil::curves::write_curves;
use crate::distil::distillation::Distillation;
use crate::distil::model_card::write_model_card;
use crate::distil::prompts::Prompts;
use crate::distil::recipe::{Preset, Recipe};
use crate::distil::renderer::{Renderer, draw_noise, latent_size};
use crate::distil::sampling::Sampling;
use crate::distil::saved_student::{
    ADAPTER, REPORT, SavedRecipe, open_states, save_student, student_folder,
};
use crate::distil::training_loop::{Outcome, Preview, report_interruption, train_student};
use crate::distil::weights::{Network, RoleWeights};
use crate::model::{
    ADAPTER_PREFIXES, MemoryPlan, Pipeline, Role, TrainingSetup, ZImageTransformer,
    fingerprint_model, loading_bar, read_config, read_shift,
};
use crate::options::Options;
use crate::picture::{Sheet, write_comparison, write_grid};
use crate::text::{FeatureCache, MAX_TOKENS, TextEncoder, read_prompts};

/// Prompts in samples.png.
const PICTURED: usize = 4;
/// Steps of the teacher beside the student in samples.png.
const TEACHER_STEPS: usize = 50;
/// Its guidance scale: the least that the base model's card recommends, in this form.
const TEACHER_GUIDANCE: f64 = 4.0;
/// Shift of the guidance-distilled Z-Image-Turbo; the base model's is 6.
const TURBO_SHIFT: f64 = 3.0;
/// Where options start from.
const PRESET: Preset = Preset::ZImage8Step;
/// Side of the pictures in pixels where nothing else is said.
const SIZE: i64 = 1024;

/// Whether a folder is a whole pipeline, with a text encoder and an autoencoder of its own. One of them
/// is enough, so that an incomplete folder is not taken for a small model.
pub fn is_released(checkpoint: &Path) -> bool {
    ["text_encoder", "vae"].iter().any(|part| checkpoint.join(part).exists())
}

/// Prints the memory that a training would take, from the configuration alone: `transformer/config.json`
/// must be there, the rest of the folder need not.
///
/// # Errors
/// If the configuration cannot be read, or an option does not fit.
pub fn plan(options: &Options) -> Result<()> {
    let config = read_config(&options.checkpoint)?;
    let channels = AutoencoderConfig::released().latent_channels;
    ensure!(
        is_released(&options.checkpoint) || config.in_channels == channels,
        "--plan is for released models, whose transformer takes {channels} channels; that of {} takes {}: \
         name another with --checkpoint",
        options.checkpoint.display(),
        config.in_channels
    );
    options.refuse_embedded()?;
    // No shift changes what is kept.
    let recipe = options.recipe(PRESET, Shift::NONE)?;
    recipe.check_adapter(&config)?;
    let size = options.size.unwrap_or(SIZE);
    let [_, height, width] = latent_size(&options.checkpoint, &config, size)?;
    check_kind(options, &recipe)?;
    let plan = MemoryPlan::new(&TrainingSetup {
        config: &config,
        size: (height, width),
        caption: MAX_TOKENS as i64,
        batch: recipe.batch as i64,
        kind: kind(options),
        lora: recipe.adapter.as_ref(),
        checkpointing: recipe.checkpointing,
        encodes_captions: false,
        ema: true,
    })?;
    println!(
        "Training at {size}x{size} pixels, {} samples an update, prompts of up to {MAX_TOKENS} tokens:\n{plan}",
        recipe.batch
    );
    Ok(())
}

fn kind(options: &Options) -> Kind {
    if options.float32 { Kind::Float } else { Kind::BFloat16 }
}

fn check_kind(options: &Options, recipe: &Recipe) -> Result<()> {
    ensure!(
        options.float32 || recipe.adapter.is_some(),
        "whole copies (--rank 0, --preset embedded) are trained in float32: add --float32, or give \
         adapters a --rank"
    );
    Ok(())
}

/// Trains a student on the prompts of a file.
///
/// # Errors
/// If something cannot be read or written, or training breaks down.
pub fn train(options: &Options, device: Device, threads: i32) -> Result<ExitCode> {
    options.refuse_embedded()?;
    let Some(prompt_file) = &options.prompt_file else {
        bail!(
            "{} is a whole pipeline: name prompts to train on with --prompt-file",
            options.checkpoint.display()
        );
    };
    // Whatever is wrong with options or files, before encoding and loading take their time.
    let config = read_config(&options.checkpoint)?;
    let shift = read_shift(&options.checkpoint)?;
    let recipe = options.recipe(PRESET, shift)?;
    check_kind(options, &recipe)?;
    recipe.check_adapter(&config)?;
    let side = options.size.unwrap_or(SIZE);
    let size = latent_size(&options.checkpoint, &config, side)?;
    ZImageTransformer::check(&options.checkpoint)?;
    // Needed at the end, and not kept until then.
    drop(Decoder::load(&options.checkpoint, Kind::Float, Device::Cpu)?);
    let prompts = read_prompts(prompt_file)?;
    if shift.get() == TURBO_SHIFT {
        eprintln!(
            "warning: the scheduler's shift is {TURBO_SHIFT}, that of Z-Image-Turbo, whose guidance is \
             distilled away already: distil the base model, or there is nothing left to learn from"
        );
    }
    create_folder(&options.out)?;
    let identity = json!({
        "recipe": recipe,
        "size": side,
        "float32": options.float32,
        "teacher": fingerprint_model(&options.checkpoint)?,
        "data": fingerprint(prompt_file)?,
    });
    let (mut states, _lock) = open_states(options, &identity)?;
    println!(
        "Distilling {} on {device:?}, {threads} threads, {} prompts",
        options.checkpoint.display(),
        prompts.len()
    );

    let cache = encode(options, device, &prompts)?;
    let teacher =
        Pipeline::load_observed(&options.checkpoint, kind(options), device, &loading_bar()?)?;
    let features = prompts.iter().map(|prompt| cache.get(prompt));
    let encoded = Prompts::from_features(&teacher.transformer, features, &cache.get("")?)?;
    let captions: Vec<&str> = prompts.iter().take(PICTURED).map(String::as_str).collect();
    let noise = draw_noise(options.seed, captions.len(), size)?;
    let renderer = Renderer::new(&options.checkpoint, &teacher, &encoded, options.seed, noise);

    let items: Vec<i64> = (0..prompts.len() as i64).collect();
    let base = &teacher.transformer;
    let mut distillation = Distillation::new(recipe.clone(), base, &encoded, &items, size)?;
    let saved = SavedRecipe { recipe: recipe.clone(), size: Some(side) };
    let keep = |folder: &Path, weights: &RoleWeights, merged: bool| -> Result<()> {
        save_student(folder, &teacher, weights, merged, &saved)?;
        write_model_card(folder, &options.checkpoint, side, &recipe)
    };
    let outcome = train_student(options, &mut distillation, &mut states, |distillation| {
        // The best student need not be the last, and the machine may be gone before that one.
        let update = distillation.updates();
        keep(
            &options.out.join(format!("student-{update:06}")),
            distillation.student_weights(),
            false,
        )?;
        let path = options.out.join(format!("preview-{update:06}.png"));
        let images = renderer.render(distillation.student(), few_steps(&recipe))?;
        let heading = format!("student {}", recipe.steps);
        write_comparison(&path, &[&heading], &[images], &captions, Sheet::LARGE)?;
        let message = format!("{}", path.display());
        Ok(Preview { entry: json!({ "preview": message }), message })
    })?;
    let Outcome::Finished { history, seconds } = outcome else {
        report_interruption(options, &distillation);
        return Ok(ExitCode::from(INTERRUPTED));
    };

    let folder = options.out.join("student");
    keep(&folder, distillation.student_weights(), options.merge)?;
    write_curves(&options.out.join("curves.svg"), &history)?;
    let report = json!({ "recipe": recipe, "training_seconds": seconds, "prompts": prompts.len() });
    write_json(&options.out.join(REPORT), &report)?;
    println!("\nTraining {seconds:.0} s; the student is in {}", folder.display());
    let many_steps = Sampling {
        steps: TEACHER_STEPS,
        guidance: options.teacher_guidance.unwrap_or(Guidance::new(TEACHER_GUIDANCE)?),
        transition: Transition::Ddim,
    };
    let columns = [
        renderer.render(base, many_steps)?,
        renderer.render(distillation.student(), few_steps(&recipe))?,
    ];
    let (many, few) = (format!("teacher {TEACHER_STEPS}"), format!("student {}", recipe.steps));
    let path = options.out.join("samples.png");
    write_comparison(&path, &[&many, &few], &columns, &captions, Sheet::LARGE)?;
    println!("Teacher and student side by side in {}", path.display());
    states.remove()?;
    Ok(ExitCode::SUCCESS)
}

/// How a student is run: as it was trained.
fn few_steps(recipe: &Recipe) -> Sampling {
    let Recipe { steps, transition, .. } = *recipe;
    Sampling { steps, guidance: Guidance::NEUTRAL, transition }
}

/// Makes pictures of one prompt with a trained student.
///
/// # Errors
/// If there is no student, or a file cannot be read or written.
pub fn sample(options: &Options, device: Device, prompt: &str) -> Result<()> {
    options.refuse_embedded()?;
    let folder = student_folder(options)?;
    let adapter = folder.join(ADAPTER);
    let is_adapter = adapter.exists();
    ensure!(
        is_adapter || folder.join("transformer").exists(),
        "{} is no student: it holds neither {ADAPTER} nor transformer/",
        folder.display()
    );
    // A whole student takes the place of the base.
    let source = if is_adapter { &options.checkpoint } else { &folder };
    let config = read_config(source)?;
    ZImageTransformer::check(source)?;
    let saved = SavedRecipe::load(&folder, options, PRESET, read_shift(&options.checkpoint)?)?;
    let size = latent_size(&options.checkpoint, &config, saved.size.unwrap_or(SIZE))?;
    let lora = is_adapter
        .then(|| Lora::load(&adapter, &config.linears(), &ADAPTER_PREFIXES, device))
        .transpose()?;
    let features = {
        // Gone before the transformer comes, as both do not fit on every device.
        let encoder = TextEncoder::load(&options.checkpoint, kind(options), device)?;
        encoder.encode(&[prompt, ""])?
    };
    let base = Pipeline::load_observed(source, kind(options), device, &loading_bar()?)?;
    let count = options.count as usize;
    let copies = (0..count).map(|_| Ok(features[0].shallow_clone()));
    let encoded = Prompts::from_features(&base.transformer, copies, &features[1])?;
    let noise = draw_noise(options.seed, count, size)?;
    let renderer = Renderer::new(&options.checkpoint, &base, &encoded, options.seed, noise);
    let role = lora.as_ref().map_or(Role::BASE, Role::adapted);
    let images =
        renderer.render(Network { model: &base.transformer, role }, few_steps(&saved.recipe))?;
    create_folder(&options.out)?;
    let path = options.out.join("sample.png");
    write_grid(&path, &images, options.count.min(4), 1)?;
    println!("{count} pictures of \"{prompt}\" in {}", path.display());
    if options.tensors {
        let tensors = Parameters::from([
            ("prompt".to_owned(), Tensor::f_from_slice(prompt.as_bytes())?),
            ("noise".to_owned(), renderer.noise().shallow_clone()),
            ("images".to_owned(), images),
        ]);
        let path = path.with_extension("safetensors");
        write_tensors(&path, &tensors)?;
        println!("Their noise and pixels in {}", path.display());
    }
    Ok(())
}

/// Features of all prompts and of the empty one; what is not there yet is encoded.
fn encode(options: &Options, device: Device, prompts: &[String]) -> Result<FeatureCache> {
    let folder = options.features.clone().unwrap_or_else(|| options.out.join("features"));
    FeatureCache::encode_observed(&folder, &options.checkpoint, (kind(options), device), prompts)
}
