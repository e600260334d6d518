//! Distillation of a released checkpoint: text encoder, transformer and autoencoder of a diffusers
//! folder, student and fake score as adapters over one frozen transformer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use decoupled_dmd::{Guidance, Transition};
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_c10d::ProcessGroup;
use tch_training::Parameters;
use tch_training::files::{create_folder, write_json};
use tch_training::lora::Lora;
use tch_training::run::fingerprint;
use tch_training::safetensors::write_tensors;

use crate::autoencoder::Decoder;
use crate::distil::curves::write_curves;
use crate::distil::distillation::{Distillation, Record};
use crate::distil::model_card::write_model_card;
use crate::distil::picture_size::PictureSize;
use crate::distil::plan::{check_kind, latents};
use crate::distil::processes::Processes;
use crate::distil::prompts::Prompts;
use crate::distil::recipe::Recipe;
use crate::distil::renderer::{Renderer, draw_noise};
use crate::distil::sampling::Sampling;
use crate::distil::saved_student::{
    ADAPTER, REPORT, SavedRecipe, Start, open_states, save_student, states_stay,
};
use crate::distil::training_loop::{Ending, Intervals, Outcome, Preview, train_student};
use crate::distil::weights::{Network, RoleWeights};
use crate::model::{ADAPTER_NAMES, Checkpoint, Role, ZImageTransformer};
use crate::picture::{Sheet, write_comparison, write_grid};
use crate::text::{FeatureCache, Prompt, TextEncoder, read_prompts};

/// Size of the pictures where nothing else is said.
pub const SIZE: PictureSize = PictureSize::square(1024);
/// Guidance scale of the teacher that a student is compared with where nothing else is said: the least that
/// the base model's card recommends, in this form.
pub const TEACHER_GUIDANCE: f64 = 4.0;

/// Prompts in samples.png and previews where none are named for them.
const PICTURED: usize = 4;
/// The most that may be named: each costs a preview the time of a picture.
const MOST_PICTURED: usize = 16;
/// Steps of the teacher beside the student in samples.png.
const TEACHER_STEPS: usize = 50;
/// Shift of the guidance-distilled Z-Image-Turbo; the base model's is 6.
const TURBO_SHIFT: f64 = 3.0;

/// A training of a released model, beside its recipe.
#[derive(Clone, Debug)]
pub struct Training {
    /// A file with a prompt a line, see [`read_prompts`].
    pub prompt_file: PathBuf,
    /// The condition of the null branch for prompts without one of their own; empty for none.
    pub negative_prompt: String,
    /// Such a file with the prompts of previews and samples.png, which are not trained on; the first of `prompt_file`
    /// otherwise.
    pub preview_prompts: Option<PathBuf>,
    /// Where results go.
    pub out: PathBuf,
    /// Where the features of the prompts are kept.
    pub features: PathBuf,
    /// Sizes of the pictures, of which one is drawn for each batch; the first is that of the samples.
    pub sizes: Vec<PictureSize>,
    /// The dtype of frozen weights and of forward passes.
    pub kind: Kind,
    /// Where to compute.
    pub device: Device,
    /// Guidance scale of the teacher beside the student in samples.png.
    pub teacher_guidance: Guidance,
    /// Whether the student is written as a whole transformer too, with its adapter merged.
    pub merge: bool,
    /// How often the state is saved, and the student looked at.
    pub intervals: Intervals,
    /// What becomes of a run that `out` holds already.
    pub start: Start,
}

/// Trains a student on the prompts of a file, with the processes of a group, each of which calls this. The first
/// writes all files but the features, which the first that comes encodes for those that share the folder.
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
    // Whatever is wrong with settings or files, before encoding and loading take their time.
    let Training { out, kind, device, sizes, .. } = training;
    let (kind, device) = (*kind, *device);
    let (folder, shift) = (checkpoint.folder(), checkpoint.shift());
    check_kind(kind, recipe)?;
    recipe.check_adapter(checkpoint.config())?;
    recipe.check_storage(checkpoint.storage())?;
    let (size, all_sizes) = latents(sizes, folder, checkpoint.config())?;
    checkpoint.check()?;
    // Needed at the end, and not kept until then.
    drop(Decoder::load(folder, Kind::Float, Device::Cpu)?);
    let prompts = read_prompts(&training.prompt_file)?;
    let pictured = pictured_prompts(training.preview_prompts.as_deref(), &prompts)?;
    if shift.get() == TURBO_SHIFT && processes.is_first() {
        eprintln!(
            "warning: the scheduler's shift is {TURBO_SHIFT}, that of Z-Image-Turbo, whose guidance is \
             distilled away already: distil the base model, or there is nothing left to learn from"
        );
    }
    if processes.is_first() {
        recipe.print_cautions(checkpoint.storage(), processes.count());
        let trained =
            pictured.iter().filter(|shown| prompts.iter().any(|of| of.text == shown.text)).count();
        if training.preview_prompts.is_some() && trained > 0 {
            eprintln!("warning: {trained} of the prompts of --preview-prompts are trained on too");
        }
        create_folder(out)?;
    }
    let fingerprint_of_teacher = checkpoint.fingerprint()?;
    let beside = json!({
        "sizes": sizes,
        "float32": kind == Kind::Float,
        "teacher": fingerprint_of_teacher,
        "teacher_adapter": checkpoint.fingerprint_of_adapter()?,
        "base": checkpoint.storage(),
        "negative_prompt": training.negative_prompt,
        "data": fingerprint(&training.prompt_file)?,
    });
    let open = || open_states(out, (recipe, &beside), training.start);
    let mut states = processes.is_first().then(open).transpose()?;
    if processes.is_first() {
        println!(
            "Distilling {}{} on {device:?}, {} threads, {} prompts{}",
            folder.display(),
            checkpoint.described_finetuning(),
            tch::get_num_threads(),
            prompts.len(),
            processes.described()
        );
        println!("{}", recipe.described_learning_rate());
    }

    let negative = |prompt| negative_of(prompt, &training.negative_prompt);
    let named = || prompts.iter().chain(&pictured);
    let negatives: BTreeSet<&str> = named().map(negative).collect();
    let all: Vec<&str> = named().map(|prompt| prompt.text.as_str()).chain(negatives).collect();
    let cache = FeatureCache::encode_observed(&training.features, folder, (kind, device), &all)?;
    let teacher = checkpoint.load_observed(kind, device)?;
    let encode =
        |prompts| encode_prompts(&teacher.transformer, &cache, prompts, &training.negative_prompt);
    let (encoded, shown) = (encode(&prompts)?, encode(&pictured)?);
    let captions: Vec<&str> = pictured.iter().map(|prompt| prompt.text.as_str()).collect();
    let noise = draw_noise(recipe.seed, captions.len(), size)?;
    let renderer = Renderer::new(folder, &teacher, &shown, recipe.seed, noise);

    let items: Vec<i64> = (0..prompts.len() as i64).collect();
    let base = &teacher.transformer;
    let mut distillation = Distillation::new(recipe.clone(), base, &encoded, &items, size)?
        .with_sizes(all_sizes)?
        .among(processes)?;
    let saved = SavedRecipe {
        recipe: recipe.clone(),
        size: sizes.first().copied(),
        teacher: Some(fingerprint_of_teacher),
    };
    let keep = |student: &Path, weights: &RoleWeights, merged: bool| -> Result<()> {
        let base = merged.then_some(checkpoint);
        save_student(student, &teacher, weights, base, &saved)?;
        write_model_card(student, folder, sizes, recipe)
    };
    let preview = |distillation: &Distillation<'_>| {
        // The best student need not be the last, and the machine may be gone before that one.
        let update = distillation.updates();
        keep(
            &out.join(format!("student-{update:06}")),
            &distillation.student_weights().role,
            false,
        )?;
        let path = out.join(format!("preview-{update:06}.png"));
        let images = renderer.render(distillation.student(), few_steps(recipe))?;
        let heading = format!("student {}", recipe.steps);
        write_comparison(&path, &[&heading], &[images], &captions, Sheet::LARGE)?;
        let message = format!("{}", path.display());
        let entry = json!({ "preview": message });
        Ok(Preview { message, entry, scores: Record::new(), picture: Some(path) })
    };
    let writer = states.as_mut().map(|(states, _lock)| states);
    let outcome = train_student(out, training.intervals, &mut distillation, writer, preview)?;
    let Outcome::Finished { history, seconds } = outcome else {
        return Ok(Ending::Interrupted(distillation.updates()));
    };
    let Some((_states, _lock)) = states else { return Ok(Ending::Finished) };

    let student = out.join("student");
    keep(&student, &distillation.student_weights().role, training.merge)?;
    write_curves(&out.join("curves.svg"), &history)?;
    println!("\nTraining {seconds:.0} s; the student is in {}", student.display());
    let many_steps = Sampling {
        steps: TEACHER_STEPS,
        guidance: training.teacher_guidance,
        transition: Transition::Ddim,
    };
    let columns = [
        renderer.render(base, many_steps)?,
        renderer.render(distillation.student(), few_steps(recipe))?,
    ];
    let (many, few) = (format!("teacher {TEACHER_STEPS}"), format!("student {}", recipe.steps));
    let path = out.join("samples.png");
    write_comparison(&path, &[&many, &few], &columns, &captions, Sheet::LARGE)?;
    println!("Teacher and student side by side in {}", path.display());
    // Last, as it says that the run is finished.
    let report = json!({
        "recipe": recipe,
        "training_seconds": seconds,
        "skipped": distillation.skipped(),
        "prompts": prompts.len(),
    });
    write_json(&out.join(REPORT), &report)?;
    println!("{}", states_stay(out));
    Ok(Ending::Finished)
}

/// What the null branch of a prompt is conditioned on.
fn negative_of<'p>(prompt: &'p Prompt, others: &'p str) -> &'p str {
    prompt.negative.as_deref().unwrap_or(others)
}

/// Prompts encoded by the caption side of the teacher, with the negative prompt of each.
fn encode_prompts(
    teacher: &ZImageTransformer,
    cache: &FeatureCache,
    prompts: &[Prompt],
    negative: &str,
) -> Result<Prompts> {
    let negatives = || prompts.iter().map(|prompt| negative_of(prompt, negative));
    let distinct: Vec<&str> = BTreeSet::from_iter(negatives()).into_iter().collect();
    let null_of = negatives().filter_map(|null| distinct.binary_search(&null).ok()).collect();
    let nulls = distinct.iter().map(|null| cache.get(null)).collect::<Result<Vec<_>>>()?;
    let features = prompts.iter().map(|prompt| cache.get(&prompt.text));
    Prompts::from_features(teacher, features, &nulls[0])?.with_nulls(teacher, &nulls, null_of)
}

/// The prompts of previews and samples.png: those of a file, or the first that are trained on.
fn pictured_prompts(file: Option<&Path>, prompts: &[Prompt]) -> Result<Vec<Prompt>> {
    let Some(file) = file else {
        return Ok(prompts.iter().take(PICTURED).cloned().collect());
    };
    let pictured = read_prompts(file)?;
    ensure!(
        pictured.len() <= MOST_PICTURED,
        "{} holds {} prompts: a preview draws all of them, at most {MOST_PICTURED}",
        file.display(),
        pictured.len()
    );
    Ok(pictured)
}

/// How a student is run: as it was trained.
fn few_steps(recipe: &Recipe) -> Sampling {
    let Recipe { steps, transition, .. } = *recipe;
    Sampling { steps, guidance: Guidance::NEUTRAL, transition }
}

/// Pictures of one prompt by a trained student.
#[derive(Clone, Debug)]
pub struct Pictures {
    /// The prompt.
    pub prompt: String,
    /// How many pictures.
    pub count: usize,
    /// Of the noise that they start from.
    pub seed: u64,
    /// The dtype of the weights.
    pub kind: Kind,
    /// Where to compute.
    pub device: Device,
    /// Where sample.png goes.
    pub out: PathBuf,
    /// Whether prompt, noise and pixels are written too, to sample.safetensors.
    pub tensors: bool,
}

/// Makes pictures of one prompt with the student in a folder, an adapter of `base` or a whole model in its
/// place, as `saved` says.
///
/// # Errors
/// If there is no student, or a file cannot be read or written.
pub fn sample(
    base: &Checkpoint,
    student: &Path,
    saved: &SavedRecipe,
    pictures: &Pictures,
) -> Result<()> {
    let Pictures { prompt, count, seed, kind, device, out, tensors } = pictures;
    let adapter = student.join(ADAPTER);
    let is_adapter = adapter.exists();
    ensure!(
        is_adapter || student.join("transformer").exists(),
        "{} is no student: it holds neither {ADAPTER} nor transformer/",
        student.display()
    );
    // A whole student takes the place of the base.
    let source = if is_adapter { base.clone() } else { Checkpoint::open(student)? };
    let is_other = |teacher: &String| Ok::<_, anyhow::Error>(*teacher != base.fingerprint()?);
    if is_adapter && saved.teacher.as_ref().map(is_other).transpose()? == Some(true) {
        eprintln!(
            "warning: the student in {} was made from another model than {}",
            student.display(),
            base.folder().display()
        );
    }
    let config = source.config();
    source.check()?;
    let size = saved.size.unwrap_or(SIZE).latents(base.folder(), config)?;
    let lora = is_adapter
        .then(|| Lora::load(&adapter, &config.linears(), ADAPTER_NAMES, *device))
        .transpose()?;
    let features = {
        // Gone before the transformer comes, as both do not fit on every device.
        let encoder = TextEncoder::load(base.folder(), *kind, *device)?;
        encoder.encode(&[prompt, ""])?
    };
    let mut pipeline = source.load_observed(*kind, *device)?;
    // An adapter is run on the grid of its training, whatever the scheduler of its base says.
    if is_adapter {
        pipeline.shift = saved.recipe.shift;
    }
    let role = lora.as_ref().map_or(Role::BASE, Role::adapted);
    let network = Network { model: &pipeline.transformer, role };
    let copies = (0..*count).map(|_| Ok(features[0].shallow_clone()));
    let encoded = Prompts::from_features(network, copies, &features[1])?;
    let noise = draw_noise(*seed, *count, size)?;
    let renderer = Renderer::new(base.folder(), &pipeline, &encoded, *seed, noise);
    let images = renderer.render(network, few_steps(&saved.recipe))?;
    create_folder(out)?;
    let path = out.join("sample.png");
    write_grid(&path, &images, (*count as i64).min(4), 1)?;
    println!("{count} pictures of \"{prompt}\" in {}", path.display());
    if *tensors {
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
