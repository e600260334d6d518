//! Finetunes the embedded model with an adapter (LoRA), and asks whether a student of `zimage_8step --teacher-lora`
//! follows the finetuned model or the base.
//!
//! The pictures to learn have red and blue exchanged, which no caption says: only the adapter knows.
//!
//! ```sh
//! cargo run --release --example finetune_teacher -- --out runs/blue
//! cargo run --release --example zimage_8step -- --teacher-lora runs/blue/lora.safetensors --out runs/blue-student
//! cargo run --release --example finetune_teacher -- --out runs/blue --student runs/blue-student/student
//! ```

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Parser;
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Shift, Transition};
use tch::{Device, Kind, Tensor};
use tch_training::AdamWSettings;
use tch_training::files::create_folder;
use tch_training::lora::LoraSettings;
use tch_training::parameters::is_finite;
use tch_training::seed::begin;
use zimage::device::set_threads;
use zimage::distil::{
    Network, Processes, Prompts, RoleTrainer, RoleWeights, SHIFT, denoiser, flow_matching_loss,
};
use zimage::emoji::EmojiData;
use zimage::model::{ADAPTER_PREFIX, BLOCK_LINEARS, Checkpoint, Pipeline};
use zimage::picture::{Sheet, write_comparison};

const TEACHER: &str = "assets/teacher";
const BATCH: i64 = 24;
/// Chance that an item is shown with the empty caption, which guidance needs.
const EMPTY_CAPTION: f64 = 0.1;
/// Captions to compare on, of which some are drawn.
const COMPARED: usize = 40;
const PICTURED: i64 = 8;

/// Finetunes the embedded model with an adapter, or compares a student with the finetuned model and the base.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Where lora.safetensors goes, and students.png
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Student of a finished run to compare
    #[arg(long, value_name = "DIR")]
    student: Option<PathBuf>,
    /// Steps of the finetuning
    #[arg(long, default_value_t = 300)]
    steps: u64,
    /// CPU threads of libtorch; all cores by default
    #[arg(long)]
    threads: Option<i32>,
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    set_threads(arguments.threads)?;
    let data = EmojiData::load("assets/emoji".as_ref())?;
    let adapter = arguments.out.join("lora.safetensors");
    match &arguments.student {
        Some(student) => compare(&data, &adapter, student, &arguments),
        None => finetune(&data, &adapter, &arguments),
    }
}

/// Pictures `[B, 3, H, W]` with red and blue exchanged.
fn exchanged(images: &Tensor) -> Result<Tensor> {
    Ok(images.f_flip([1])?)
}

fn finetune(data: &EmojiData, path: &Path, arguments: &Arguments) -> Result<()> {
    let base = Pipeline::load(TEACHER.as_ref(), Kind::Float, Device::Cpu)?.transformer;
    begin(arguments.seed, u64::MAX);
    let settings = LoraSettings { rank: 16, alpha: 16.0, ..LoraSettings::on(BLOCK_LINEARS) };
    let rates = AdamWSettings {
        learning_rate: 1e-3,
        max_gradient_norm: Some(1.0),
        ..AdamWSettings::default()
    };
    let mut trainer = RoleTrainer::new(&base, Some(&settings), rates, None)?;
    let (items, empty) = (data.indices(false), data.vocabulary.encode_caption("")?);
    let mut sum = 0.0;
    for step in 0..arguments.steps {
        begin(arguments.seed, step);
        let options = (Kind::Int64, Device::Cpu);
        let picks = Tensor::f_randint(items.len() as i64, [BATCH], options)?;
        let picks: Vec<i64> =
            Vec::<i64>::try_from(&picks)?.into_iter().map(|pick| items[pick as usize]).collect();
        let chances = Vec::<f64>::try_from(&Tensor::f_rand([BATCH], (Kind::Double, Device::Cpu))?)?;
        let caption = |(item, chance): (&i64, f64)| {
            if chance < EMPTY_CAPTION {
                return Ok(empty.shallow_clone());
            }
            data.vocabulary.encode_caption(&data.items[*item as usize].caption)
        };
        let captions = picks.iter().zip(chances).map(caption).collect::<Result<Vec<_>>>()?;
        let images = exchanged(&data.images.f_index_select(0, &Tensor::f_from_slice(&picks)?)?)?;
        let loss = flow_matching_loss(trainer.weights.training(&base, None), &images, &captions)?;
        let norm = trainer.descend(&loss, None, Processes::default())?;
        ensure!(is_finite(&norm)?, "the gradient is not finite at step {step}");
        sum += f64::try_from(&loss.f_detach()?)?;
        if (step + 1).is_multiple_of(25) {
            println!("step {}  loss {:.4}", step + 1, sum / 25.0);
            sum = 0.0;
        }
    }
    let RoleWeights::Adapter(lora) = &trainer.weights else { unreachable!("an adapter") };
    create_folder(&arguments.out)?;
    lora.save(path, ADAPTER_PREFIX)?;
    println!("The adapter is in {}", path.display());
    let rounded = base.cast(Kind::BFloat16)?;
    for strength in [1.0, 0.1, 0.01, 0.001] {
        let lora = lora.frozen(strength, Kind::Float, Device::Cpu)?;
        let merged = rounded.merged(&lora, Device::Cpu)?;
        let kept = 100.0 * lora.kept_by_merge(rounded.parameters(), merged.parameters())?;
        println!("Merged into bfloat16 at strength {strength}, {kept:.1} % of its update is kept");
    }
    Ok(())
}

/// Pictures of held-out captions, of the same noise for all networks.
fn draw(
    network: Network<'_>,
    prompts: &Prompts,
    noise: &Tensor,
    (steps, guidance): (usize, f64),
) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let items: Vec<i64> = (0..noise.size()[0]).collect();
    let (cond, null) = prompts.conditions(&items)?;
    let denoiser = denoiser(network, Shift::new(SHIFT)?);
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(steps)?, Transition::Ddim);
    Ok(sampler.guided(Guidance::new(guidance)?, &null).sample(noise, &cond)?)
}

fn compare(data: &EmojiData, adapter: &Path, student: &Path, arguments: &Arguments) -> Result<()> {
    let load = |checkpoint: Checkpoint| checkpoint.load(Kind::Float, Device::Cpu);
    let base = Checkpoint::open(TEACHER.as_ref())?;
    let models = [
        load(base.clone())?,
        load(base.with_adapter(adapter, 1.0)?)?,
        load(Checkpoint::open(student)?)?,
    ];
    let held_out = data.indices(true);
    ensure!(held_out.len() >= COMPARED, "fewer than {COMPARED} captions are held out");
    let captions: Vec<&str> = held_out
        .iter()
        .take(COMPARED)
        .map(|item| data.items[*item as usize].caption.as_str())
        .collect();
    let (_, channels, height, width) = data.images.size4()?;
    begin(arguments.seed, u64::MAX - 1);
    let size = [COMPARED as i64, channels, height, width];
    let noise = Tensor::f_randn(size, (Kind::Float, Device::Cpu))?;
    let images = models
        .iter()
        .zip([(50, 3.0), (50, 3.0), (8, 1.0)])
        .map(|(model, run)| {
            let model = &model.transformer;
            let prompts = data.vocabulary.encode_prompts(model, captions.iter().copied())?;
            draw(model.into(), &prompts, &noise, run)
        })
        .collect::<Result<Vec<_>>>()?;
    let apart = |one: &Tensor, two: &Tensor| -> Result<f64> {
        Ok(f64::try_from(&one.f_sub(two)?.f_square()?.f_mean(Kind::Double)?)?.sqrt())
    };
    let [plain, finetuned, student] = &images[..] else { unreachable!("three models") };
    println!("Root of the mean squared distance on {COMPARED} held-out captions, the same noise:");
    println!("finetuned teacher to base             {:.3}", apart(finetuned, plain)?);
    println!("finetuned teacher to base, exchanged  {:.3}", apart(finetuned, &exchanged(plain)?)?);
    println!("student to finetuned teacher          {:.3}", apart(student, finetuned)?);
    println!("student to base                       {:.3}", apart(student, plain)?);
    let picks: Vec<&str> = captions.into_iter().take(PICTURED as usize).collect();
    let columns = images
        .iter()
        .map(|images| Ok(images.f_narrow(0, 0, PICTURED)?))
        .collect::<Result<Vec<_>>>()?;
    let headings = ["base 50", "finetuned 50", "student 8"];
    let path = arguments.out.join("students.png");
    write_comparison(&path, &headings, &columns, &picks, Sheet::SMALL)?;
    println!("Pictures in {}", path.display());
    Ok(())
}
