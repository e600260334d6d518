//! Distillation of a released checkpoint: text encoder, transformer and autoencoder of a diffusers
//! folder, student and fake score as adapters over one frozen transformer.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Transition};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use tch::{Device, Kind, Tensor};

use super::adapter::denoiser;
use super::autoencoder::Decoder;
use super::config::Config;
use super::distillation::Distillation;
use super::features::{FeatureCache, read_prompts};
use super::interrupt::INTERRUPTED;
use super::lora::{Lora, Role};
use super::model_card::write_model_card;
use super::options::Options;
use super::picture::write_grid;
use super::pipeline::{Pipeline, loading_bar, read_shift, write_json};
use super::plan::{Plan, Setup};
use super::prompts::Prompts;
use super::recipe::{Preset, Recipe};
use super::report::write_curves;
use super::student::{ADAPTER, create_folder, open_states, save_student, student_folder};
use super::text::{MAX_TOKENS, TextEncoder};
use super::trained::{Network, Trained};
use super::training::{Look, Outcome, report_interruption, train_student};

/// Prompts in samples.png.
const PICTURED: usize = 4;
/// Steps of the teacher beside the student in samples.png.
const TEACHER_STEPS: usize = 50;
/// Shift of the guidance-distilled Z-Image-Turbo; the base model's is 6.
const TURBO_SHIFT: f64 = 3.0;

/// Whether a folder is a whole pipeline, with its own text encoder.
pub fn is_released(checkpoint: &Path) -> bool {
    checkpoint.join("text_encoder").exists()
}

/// Prints the memory that a training would take, from the configuration alone.
///
/// # Errors
/// If the configuration cannot be read, or an option does not fit.
pub fn plan(options: &Options) -> Result<()> {
    let config = Config::load(&options.checkpoint.join("transformer/config.json"))?;
    let recipe = options.recipe(Preset::ZImage8Step, read_shift(&options.checkpoint)?)?;
    let side = latent_side(options, &config, AUTOENCODER_FACTOR)?;
    let plan = Plan::new(&Setup {
        config: &config,
        size: (side, side),
        caption: MAX_TOKENS as i64,
        batch: recipe.batch as i64,
        kind: kind(options),
        lora: recipe.adapter.as_ref(),
        checkpointing: recipe.checkpointing,
        encodes_captions: false,
        ema: true,
    })?;
    println!(
        "Training at {0}x{0} pixels, {1} samples an update:\n{plan}",
        options.size, recipe.batch
    );
    Ok(())
}

/// Pixels to a latent pixel in the released autoencoder.
const AUTOENCODER_FACTOR: i64 = 8;

fn kind(options: &Options) -> Kind {
    if options.float32 { Kind::Float } else { Kind::BFloat16 }
}

/// Side of the latents of the pictures asked for.
fn latent_side(options: &Options, config: &Config, factor: i64) -> Result<i64> {
    let multiple = factor * config.patch_size();
    ensure!(
        options.size > 0 && options.size % multiple == 0,
        "--size must be a positive multiple of {multiple}, found {}",
        options.size
    );
    Ok(options.size / factor)
}

/// Trains a student on the prompts of a file.
///
/// # Errors
/// If something cannot be read or written, or training breaks down.
pub fn distil(options: &Options, device: Device, threads: i32) -> Result<ExitCode> {
    let Some(prompt_file) = &options.prompt_file else {
        bail!(
            "{} is a whole pipeline: name prompts to train on with --prompt-file",
            options.checkpoint.display()
        );
    };
    let prompts = read_prompts(prompt_file)?;
    create_folder(&options.out)?;
    let cache = encode(options, device, &prompts)?;
    let teacher =
        Pipeline::load_observed(&options.checkpoint, kind(options), device, &loading_bar()?)?;
    if teacher.shift.get() == TURBO_SHIFT {
        eprintln!(
            "warning: the scheduler's shift is {TURBO_SHIFT}, that of Z-Image-Turbo, whose guidance is \
             distilled away already: distil the base model, or there is nothing left to learn from"
        );
    }
    let recipe = options.recipe(Preset::ZImage8Step, teacher.shift)?;
    ensure!(
        options.float32 || recipe.adapter.is_some(),
        "whole copies (--rank 0) are trained in float32: add --float32"
    );
    let features = prompts.iter().map(|prompt| cache.get(prompt));
    let encoded = Prompts::from_features(&teacher.transformer, features, &cache.get("")?)?;
    let mut states = open_states(options, &recipe, prompt_file)?;
    let studio = Studio::new(options, &teacher, &encoded, prompts.len(), device)?;

    println!(
        "Distilling {} on {device:?}, {threads} threads, {} prompts",
        options.checkpoint.display(),
        prompts.len()
    );
    let items: Vec<i64> = (0..prompts.len() as i64).collect();
    let mut distillation = Distillation::new(
        recipe.clone(),
        &teacher.transformer,
        &encoded,
        &items,
        studio.size,
        None,
    )?;
    let outcome = train_student(options, &mut distillation, &mut states, |distillation| {
        let path = options.out.join(format!("preview-{:06}.png", distillation.updates()));
        studio.write(&path, &[studio.draw(distillation.student(), &recipe)?])?;
        let message = format!("{}", path.display());
        Ok(Look { entry: json!({ "preview": message }), message })
    })?;
    let Outcome::Finished { history, seconds } = outcome else {
        report_interruption(options, &distillation);
        return Ok(ExitCode::from(INTERRUPTED));
    };

    let folder = options.out.join("student");
    save_student(&folder, &teacher, distillation.student_weights(), options.merge)?;
    write_model_card(&folder, &options.checkpoint, &recipe)?;
    write_json(&folder.join(RECIPE), &recipe)?;
    write_curves(&options.out.join("curves.svg"), &history)?;
    let report = json!({ "recipe": recipe, "training_seconds": seconds, "prompts": prompts.len() });
    write_json(&options.out.join("report.json"), &report)?;
    println!("\nTraining {seconds:.0} s; the student is in {}", folder.display());
    let columns = [
        studio.draw_guided(
            (&teacher.transformer).into(),
            TEACHER_STEPS,
            options.teacher_guidance,
        )?,
        studio.draw(distillation.student(), &recipe)?,
    ];
    let path = options.out.join("samples.png");
    studio.write(&path, &columns)?;
    println!("Teacher and student side by side in {}", path.display());
    states.remove()?;
    Ok(ExitCode::SUCCESS)
}

/// The recipe of a student, beside it.
const RECIPE: &str = "recipe.json";

/// Makes pictures of one prompt with a trained student.
///
/// # Errors
/// If there is no student, or a file cannot be read or written.
pub fn sample(options: &Options, device: Device, prompt: &str) -> Result<()> {
    let folder = student_folder(options)?;
    let features = {
        // Gone before the transformer comes, as both do not fit on every device.
        let encoder = TextEncoder::load(&options.checkpoint, kind(options), device)?;
        encoder.encode(&[prompt, ""])?
    };
    let base =
        Pipeline::load_observed(&options.checkpoint, kind(options), device, &loading_bar()?)?;
    let adapter = folder.join(ADAPTER);
    let weights = if adapter.exists() {
        Trained::Adapter(Lora::load(&adapter, base.transformer.config(), device)?)
    } else {
        Trained::Copy(Box::new(Pipeline::load(&folder, kind(options), device)?.transformer))
    };
    let recipe = student_recipe(options, &folder, &base)?;
    let copies = std::iter::repeat_n(&features[0], options.count as usize);
    let copies = copies.map(|features| Ok(features.shallow_clone()));
    let encoded = Prompts::from_features(&base.transformer, copies, &features[1])?;
    let studio = Studio::new(options, &base, &encoded, options.count as usize, device)?;
    let images = studio.draw(weights.network(&base.transformer), &recipe)?;
    create_folder(&options.out)?;
    let path = options.out.join("sample.png");
    write_grid(&path, &images, options.count.min(4), 1)?;
    println!("{} pictures of \"{prompt}\" in {}", options.count, path.display());
    Ok(())
}

/// The recipe that lies beside a student, with what the command line says otherwise.
fn student_recipe(options: &Options, folder: &Path, base: &Pipeline) -> Result<Recipe> {
    let path: PathBuf = folder.join(RECIPE);
    if !path.exists() {
        return options.recipe(Preset::ZImage8Step, base.shift);
    }
    let mut recipe: Recipe = super::weights::read_json(&path)?;
    recipe.steps = options.steps.unwrap_or(recipe.steps);
    recipe.transition = options.transition.unwrap_or(recipe.transition);
    Ok(recipe)
}

/// Features of all prompts and of the empty one; what is not there yet is encoded.
fn encode(options: &Options, device: Device, prompts: &[String]) -> Result<FeatureCache> {
    let folder = options.features.clone().unwrap_or_else(|| options.out.join("features"));
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} prompts encoded, {eta} left")?;
    let bar = ProgressBar::new(prompts.len() as u64 + 1).with_style(style);
    let place = (kind(options), device);
    let cache =
        FeatureCache::encode(&folder, &options.checkpoint, place, prompts, &mut |done, _| {
            bar.set_position(done as u64);
        })?;
    bar.finish_and_clear();
    Ok(cache)
}

/// Draws the first prompts, always from the same noise.
struct Studio<'a> {
    checkpoint: &'a Path,
    prompts: &'a Prompts,
    shift: decoupled_dmd::Shift,
    /// Size of one sample in latent space, `[C, H, W]`.
    size: [i64; 3],
    noise: Tensor,
    device: Device,
}

impl<'a> Studio<'a> {
    fn new(
        options: &'a Options,
        teacher: &Pipeline,
        prompts: &'a Prompts,
        count: usize,
        device: Device,
    ) -> Result<Self> {
        let config = teacher.transformer.config();
        let decoder = Decoder::load(&options.checkpoint, Kind::Float, Device::Cpu)?;
        ensure!(
            decoder.config().latent_channels == config.in_channels,
            "the autoencoder has {} channels and the transformer {}",
            decoder.config().latent_channels,
            config.in_channels
        );
        let side = latent_side(options, config, decoder.config().spatial_factor())?;
        let size = [config.in_channels, side, side];
        let count = if options.sample.is_some() { count } else { count.min(PICTURED) };
        tch::manual_seed(options.seed as i64);
        let shape = [count as i64, size[0], size[1], size[2]];
        // Drawn on the CPU, so that pictures compare across devices.
        let noise = Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?;
        let checkpoint = &options.checkpoint;
        Ok(Self { checkpoint, prompts, shift: teacher.shift, size, noise, device })
    }

    /// The student's pictures `[N, 3, H, W]`.
    fn draw(&self, network: Network<'_>, recipe: &Recipe) -> Result<Tensor> {
        self.draw_with(network, recipe.steps, Guidance::NEUTRAL, recipe.transition)
    }

    /// The guided teacher's pictures.
    fn draw_guided(
        &self,
        network: Network<'_>,
        steps: usize,
        guidance: Guidance,
    ) -> Result<Tensor> {
        self.draw_with(network, steps, guidance, Transition::Euler)
    }

    fn draw_with(
        &self,
        network: Network<'_>,
        steps: usize,
        guidance: Guidance,
        transition: Transition,
    ) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let denoiser = denoiser(network);
        let grid = FewStepGrid::even(steps, self.shift)?;
        // One after the other: captions differ in length.
        let latents = (0..self.noise.size()[0])
            .map(|item| {
                let (cond, null) = self.prompts.conditions(&[item])?;
                let noise = self.noise.f_narrow(0, item, 1)?.f_to_device(self.device)?;
                let sampler = Sampler::new(&denoiser, grid.clone(), transition);
                Ok(sampler.guided(guidance, &null).sample(&noise, &cond)?)
            })
            .collect::<Result<Vec<_>>>()?;
        // Not kept while training, which needs the memory.
        let decoder = Decoder::load(self.checkpoint, Kind::Float, self.device)?;
        decoder.decode_in_parts(&Tensor::f_cat(&latents, 0)?, 1)
    }

    /// One row for each prompt, one column for each generator.
    fn write(&self, path: &Path, columns: &[Tensor]) -> Result<()> {
        let rows = Tensor::f_stack(columns, 1)?.f_flatten(0, 1)?;
        write_grid(path, &rows, columns.len() as i64, 1)
            .with_context(|| format!("writing {}", path.display()))
    }
}
