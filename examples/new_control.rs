//! A control that the teacher has never seen: a student that draws a picture from its thumbnail in one step, distilled
//! from a teacher that knows captions alone and is given an empty one, in the manner of JDM (docs/recipes.md).
//!
//! ```sh
//! ./with-libtorch cargo run --release --example new_control                # some minutes a student
//! ./with-libtorch cargo run --release --example new_control -- --quick     # does it work?
//! ```
//!
//! The control is the picture that is wanted, averaged to 2x2. The recogniser is that average and Gaussian noise, so
//! that log q(c given x) is a squared error of the student's own average. Three students are compared: one
//! without the control, one whose fake score sees it, and one whose fake score is blind to it.

#[path = "new_control/student.rs"]
mod student;

use std::path::Path;

use anyhow::Result;
use clap::Parser;
use student::{Arm, Material, Student, enlarged, thumbnails};
use tch::{Device, Kind, Tensor};
use zimage::emoji::{Classifier, EmojiData, Judge};
use zimage::model::Pipeline;
use zimage::picture::write_grid;

/// Noises from which the spread of the samples of one thumbnail is measured.
const NOISES: i64 = 4;
/// Pictures of the training that are measured on.
const KNOWN: usize = 96;
/// Thumbnails in the grid of pictures.
const PICTURED: i64 = 12;
const EVALUATION_SEED: i64 = 20_261_130;

/// Distils three students, with and without a control, and compares them.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Seeds
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first of the seeds
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
    /// Updates of each student
    #[arg(long, default_value_t = 100)]
    updates: u64,
    /// Student to train: without-control, joint or marginal; all by default
    #[arg(long)]
    student: Option<String>,
    /// Two updates of each student
    #[arg(long)]
    quick: bool,
    /// Threads of libtorch
    #[arg(long, default_value_t = 1)]
    threads: i32,
}

/// Pictures whose thumbnails are given, and noises to start from.
struct Wanted {
    items: Vec<i64>,
    images: Tensor,
    controls: Tensor,
    /// `[4, N, 3, 32, 32]`.
    noise: Tensor,
}

impl Wanted {
    fn new(items: Vec<i64>, images: &Tensor) -> Result<Self> {
        let images = images.f_index_select(0, &Tensor::f_from_slice(&items)?)?;
        tch::manual_seed(EVALUATION_SEED);
        let shape = [&[NOISES], &images.size()[..]].concat();
        let noise = Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?;
        Ok(Self { items, controls: thumbnails(&images)?, images, noise })
    }
}

fn main() -> Result<()> {
    let options = Options::parse();
    tch::set_num_threads(options.threads);
    let device = decoupled_dmd::default_device();
    let teacher = Pipeline::load("assets/teacher".as_ref(), Kind::Float, device)?;
    let data = EmojiData::load("assets/emoji".as_ref())?;
    let captions = data.items.iter().map(|item| item.caption.as_str());
    let prompts = data.vocabulary.encode_prompts(&teacher.transformer, captions)?;
    let classifier = Classifier::load("assets/classifier".as_ref(), Kind::Float, device)?;
    let judge = Judge::new(classifier, &data)?;
    let material = Material {
        teacher: &teacher.transformer,
        shift: teacher.shift,
        empty: prompts.conditions(&[0])?.1[0].shallow_clone(),
    };
    let (count, updates, seeds) =
        if options.quick { (8, 2, 1) } else { (KNOWN, options.updates, options.seeds) };
    let known = data.indices(false);
    let some = known.iter().copied().step_by(known.len() / count).take(count).collect();
    let known = Wanted::new(known, &data.images)?;
    let measured = [
        ("known", Wanted::new(some, &data.images)?),
        ("held out", Wanted::new(data.indices(true), &data.images)?),
    ];
    println!("seed  student          thumbnails  alignment  Fréchet  control error  spread");
    for seed in (options.first_seed..).take(seeds as usize) {
        let is_chosen = |arm: &Arm| options.student.as_ref().is_none_or(|name| name == arm.name());
        for arm in Arm::ALL.into_iter().filter(is_chosen) {
            let student = Student::train(&material, arm, seed, &known.controls, updates)?;
            for (name, wanted) in &measured {
                println!(
                    "{seed:>4}  {:<15}  {name:<10}  {}",
                    arm.name(),
                    measure(&student, &judge, wanted)?
                );
            }
            if seed == 0 {
                draw(&student, &measured[1].1, arm.name())?;
            }
        }
    }
    Ok(())
}

/// The scores of a student as a row of the table.
fn measure(student: &Student<'_>, judge: &Judge, wanted: &Wanted) -> Result<String> {
    let _guard = tch::no_grad_guard();
    let sample = |noise: Tensor| student.sample(&noise, &wanted.controls);
    let samples = wanted.noise.f_unbind(0)?.into_iter().map(sample).collect::<Result<Vec<_>>>()?;
    let spread = judge.diversity(&Tensor::f_stack(&samples, 0)?)?;
    Ok(format!(
        "{:>7.1} %  {:>7.4}  {:>13.3}  {spread:>6.3}",
        100.0 * judge.alignment(&samples[0], &wanted.items)?,
        judge.frechet_distance(&samples[0], &wanted.items)?,
        student::control_error(&samples[0], &wanted.controls)?,
    ))
}

/// Pictures held out, their thumbnails, and the student's pictures for these from two noises.
fn draw(student: &Student<'_>, wanted: &Wanted, name: &str) -> Result<()> {
    let _guard = tch::no_grad_guard();
    let first = |tensor: &Tensor| tensor.f_narrow(0, 0, PICTURED);
    let controls = first(&wanted.controls)?;
    let sample = |index: i64| student.sample(&first(&wanted.noise.f_select(0, index)?)?, &controls);
    let rows = [first(&wanted.images)?, enlarged(&controls)?, sample(0)?, sample(1)?];
    let folder = Path::new("runs/new_control");
    std::fs::create_dir_all(folder)?;
    let path = folder.join(name).with_extension("png");
    write_grid(&path, &Tensor::f_cat(&rows, 0)?, PICTURED, 3)
}
