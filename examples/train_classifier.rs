//! Trains the classifier that judges generated emoji.
//!
//! ```sh
//! cargo run --release --example train_classifier -- --out runs/classifier --bf16
//! ```
//! It learns every picture, those held out of the generators' training too: it compares, it does not
//! compete. It sees pictures moved, scaled, turned, recoloured, noisy and partly covered, but never
//! blurred, so that blurred drawings are not forgiven.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tch::{Device, Kind, Reduction, Tensor};
use tch_training::parameters::is_finite;
use tch_training::seed::begin;
use tch_training::{AdamW, AdamWSettings};
use zimage::device::set_threads;
use zimage::emoji::{Classifier, EmojiData, Judge};

/// Steps between two progress lines.
const REPORT_EVERY: u64 = 100;
/// Luminance of red, green and blue.
const LUMINANCE: [f32; 3] = [0.299, 0.587, 0.114];

/// Streams of random numbers; the stored classifier depends on their numbers.
enum Stream {
    /// All that is drawn at a step.
    Step(u64),
    /// The initial weights.
    Weights,
    /// The noise and the changes of the pictures that are judged at the end.
    Report,
}

impl From<Stream> for u64 {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Step(step) => step,
            Stream::Weights => u64::MAX - 1,
            Stream::Report => u64::MAX - 2,
        }
    }
}

/// Trains the classifier that judges generated emoji.
#[derive(Parser)]
struct Arguments {
    /// Folder for classifier.safetensors
    #[arg(long)]
    out: PathBuf,
    /// Folder with emoji.png, captions.json, vocabulary.txt and vectors.safetensors
    #[arg(long, default_value = "assets/emoji")]
    data: PathBuf,
    /// Optimizer steps
    #[arg(long, default_value_t = 3500)]
    steps: u64,
    /// Pictures in a step
    #[arg(long, default_value_t = 128)]
    batch: i64,
    /// Learning rate after warm-up; it then falls to zero along a cosine
    #[arg(long, default_value_t = 3e-3)]
    lr: f64,
    /// Steps of linear warm-up
    #[arg(long, default_value_t = 100)]
    warmup: u64,
    /// Weight decay
    #[arg(long, default_value_t = 0.05)]
    weight_decay: f64,
    /// Compute in bfloat16; weights and moments stay in float32
    #[arg(long)]
    bf16: bool,
    /// Threads of libtorch
    #[arg(long, default_value_t = 1)]
    threads: i32,
    /// Seed of weights, order and augmentation
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

impl Arguments {
    fn learning_rate(&self, step: u64) -> f64 {
        let warm = ((step + 1) as f64 / self.warmup.max(1) as f64).min(1.0);
        let progress = step as f64 / self.steps as f64;
        self.lr * warm * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.batch > 0 && arguments.steps > 0, "--batch and --steps must be positive");
    set_threads(Some(arguments.threads))?;
    let data = EmojiData::load(&arguments.data)?;
    let classifier = train(&arguments, &data)?;
    fs::create_dir_all(&arguments.out)
        .with_context(|| format!("creating {}", arguments.out.display()))?;
    classifier.save(&arguments.out)?;
    // The saved classifier is judged, rounding included.
    let classifier = Classifier::load(&arguments.out, Kind::Float, Device::Cpu)?;
    report(&arguments, classifier, &data)
}

fn train(arguments: &Arguments, data: &EmojiData) -> Result<Classifier> {
    begin(arguments.seed, Stream::Weights);
    let count = data.items.len() as i64;
    let classifier = Classifier::init(count, Device::Cpu)?;
    let parameters: Vec<(String, Tensor)> = classifier
        .parameters()
        .iter()
        .map(|(name, tensor)| (name.clone(), tensor.set_requires_grad(true)))
        .collect();
    let total: usize = parameters.iter().map(|(_, tensor)| tensor.numel()).sum();
    println!("{total} parameters, {count} pictures");
    let settings = AdamWSettings {
        betas: (0.9, 0.99),
        weight_decay: arguments.weight_decay,
        max_gradient_norm: Some(1.0),
        ..AdamWSettings::default()
    };
    let mut optimizer = AdamW::new(parameters, settings)?;

    let (mut start, mut sums) = (Instant::now(), [0.0, 0.0]);
    for step in 0..arguments.steps {
        begin(arguments.seed, Stream::Step(step));
        optimizer.settings.learning_rate = arguments.learning_rate(step);
        let targets = Tensor::f_randint(count, [arguments.batch], (Kind::Int64, Device::Cpu))?;
        let images = augment(&data.images.f_index_select(0, &targets)?)?;
        let logits = if arguments.bf16 {
            classifier.cast(Kind::BFloat16)?.logits(&images)?
        } else {
            classifier.logits(&images)?
        };
        let loss =
            logits.f_cross_entropy_loss(&targets, None::<&Tensor>, Reduction::Mean, -100, 0.0)?;
        optimizer.zero_grad()?;
        loss.f_backward()?;
        let norm = optimizer.step()?;
        ensure!(is_finite(&norm)?, "the gradient is not finite at step {step}");

        let right = logits.f_argmax(1, false)?.f_eq_tensor(&targets)?.f_mean(Kind::Double)?;
        sums[0] += f64::try_from(&loss.f_detach()?)?;
        sums[1] += f64::try_from(&right)?;
        let done = step + 1;
        if done.is_multiple_of(REPORT_EVERY) {
            let [loss, right] = sums.map(|sum| sum / REPORT_EVERY as f64);
            let pace = start.elapsed().as_secs_f64() / REPORT_EVERY as f64;
            println!(
                "step {done}  loss {loss:.3}  accuracy {right:.3}  {pace:.3} s/step  {:.1} min left",
                (arguments.steps - done) as f64 * pace / 60.0
            );
            ensure!(loss.is_finite(), "the loss is not finite at step {done}");
            (start, sums) = (Instant::now(), [0.0, 0.0]);
        }
    }
    Ok(classifier)
}

/// Prints how often degraded pictures are still recognised. Blurring must lower the scores, except
/// where it takes away noise stronger than any in training (0.4).
fn report(arguments: &Arguments, classifier: Classifier, data: &EmojiData) -> Result<()> {
    let _guard = tch::no_grad_guard();
    begin(arguments.seed, Stream::Report);
    let clean = &data.images;
    let noise = clean.f_randn_like()?;
    let noisy = |deviation: f64| -> Result<Tensor> {
        Ok(clean.f_add(&noise.f_mul_scalar(deviation)?)?.f_clamp(-1.0, 1.0)?)
    };
    let augmented = augment(clean)?;
    let small =
        clean.f_adaptive_avg_pool2d([8, 8])?.f_upsample_bilinear2d([32, 32], false, None, None)?;
    let rows = [
        ("clean", clean.shallow_clone()),
        ("augmented", augmented.shallow_clone()),
        ("augmented, box 3x3", blur(&augmented, 3)?),
        ("noise 0.1", noisy(0.1)?),
        ("noise 0.2", noisy(0.2)?),
        ("noise 0.2, box 3x3", blur(&noisy(0.2)?, 3)?),
        ("noise 0.4", noisy(0.4)?),
        ("noise 0.4, box 3x3", blur(&noisy(0.4)?, 3)?),
        ("box 3x3", blur(clean, 3)?),
        ("box 5x5", blur(clean, 5)?),
        ("8x8", small),
    ];
    let items: Vec<i64> = (0..data.items.len() as i64).collect();
    let all = Tensor::f_from_slice(&items)?;
    let right = |images: &Tensor| -> Result<f64> {
        let hits = classifier.logits(images)?.f_argmax(1, false)?.f_eq_tensor(&all)?;
        Ok(f64::try_from(hits.f_mean(Kind::Double)?)?)
    };
    let rights = rows.iter().map(|(_, images)| right(images)).collect::<Result<Vec<_>>>()?;
    let judge = Judge::new(classifier, data)?;
    println!("\n{:<20} accuracy  alignment  at 16x16  Fréchet  drift", "pictures");
    for ((name, images), right) in rows.iter().zip(rights) {
        let scores = judge.scores(images, &items, &data.images)?;
        println!(
            "{name:<20} {:8.3}  {:9.3}  {:8.3}  {:7.3}  {:5.2}",
            right,
            scores.alignment,
            scores.alignment_at_16,
            scores.frechet_distance,
            scores.variance_drift
        );
    }
    Ok(())
}

/// Mean over a square of `side` pixels, edges repeated.
fn blur(images: &Tensor, side: i64) -> Result<Tensor> {
    let margin = side / 2;
    Ok(images
        .f_replication_pad2d([margin, margin, margin, margin])?
        .f_avg_pool2d(side, 1, 0, false, true, None)?)
}

/// `[count]` values, uniform in [low, high].
fn uniform(count: i64, low: f64, high: f64) -> Result<Tensor> {
    Ok(Tensor::f_rand([count], (Kind::Float, Device::Cpu))?
        .f_mul_scalar(high - low)?
        .f_add_scalar(low)?)
}

/// Images `[B, 3, 32, 32]` moved, recoloured, covered and made noisy, each in its own way.
///
/// The noise stays weak: a network hardened against strong noise looks past fine detail, and so
/// forgives blur.
fn augment(images: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    let images = cover(&recolour(&transform(images)?)?)?;
    let deviation =
        uniform(images.size()[0], -0.2, 0.2)?.f_clamp_min(0.0)?.f_view([-1, 1, 1, 1])?;
    Ok(images.f_addcmul(&images.f_randn_like()?, &deviation)?.f_clamp(-1.0, 1.0)?)
}

/// Shift by up to 3 pixels, scale by 0.85 to 1.15, turn by up to 10 degrees; white comes in at the
/// edges. A third of the images moves by whole pixels only: resampling softens edges a little, and
/// sharp ones must stay the commonest.
fn transform(images: &Tensor) -> Result<Tensor> {
    let (count, _, height, width) = images.size4()?;
    let resampled = uniform(count, -0.5, 1.0)?.f_gt(0.0)?.f_to_kind(Kind::Float)?;
    let scale = uniform(count, -0.15, 0.15)?.f_mul(&resampled)?.f_add_scalar(1.0)?;
    let angle = uniform(count, -0.17, 0.17)?.f_mul(&resampled)?;
    let shift = || -> Result<Tensor> {
        let pixels = uniform(count, -3.0, 3.0)?;
        let whole = pixels.f_round()?;
        Ok(whole.f_lerp_tensor(&pixels, &resampled)?.f_mul_scalar(2.0 / width as f64)?)
    };
    let cosine = angle.f_cos()?.f_div(&scale)?;
    let sine = angle.f_sin()?.f_div(&scale)?;
    let rows = [&cosine, &sine.f_neg()?, &shift()?, &sine, &cosine, &shift()?];
    let matrices = Tensor::f_stack(&rows, 1)?.f_view([count, 2, 3])?;
    let grid = Tensor::f_affine_grid_generator(&matrices, [count, 3, height, width], false)?;
    // Bicubic (2), the sharpest there is; zeros (0) outside, where white is zero.
    Ok(images.f_sub_scalar(1.0)?.f_grid_sampler(&grid, 2, 0, false)?.f_add_scalar(1.0)?)
}

/// Contrast, saturation, hue and brightness, a little.
fn recolour(images: &Tensor) -> Result<Tensor> {
    let (count, channels, height, width) = images.size4()?;
    let options = (Kind::Float, Device::Cpu);
    let per_image =
        |low, high| -> Result<Tensor> { Ok(uniform(count, low, high)?.f_view([-1, 1, 1])?) };
    let identity = Tensor::f_eye(3, options)?;
    let luminance = Tensor::f_from_slice(&LUMINANCE)?.f_expand([3, 3], false)?;
    let saturate = luminance.f_lerp_tensor(&identity, &per_image(0.8, 1.25)?)?;
    // Rodrigues' formula about the axis of greys (1, 1, 1).
    let greys = Tensor::f_full([3, 3], 1.0 / 3.0, options)?;
    let s = 1.0 / 3f32.sqrt();
    let turn = Tensor::f_from_slice(&[0.0, -s, s, s, 0.0, -s, -s, s, 0.0])?.f_view([3, 3])?;
    let hue = per_image(-0.12, 0.12)?;
    let rotate =
        greys.f_lerp_tensor(&identity, &hue.f_cos()?)?.f_add(&turn.f_mul(&hue.f_sin()?)?)?;
    let matrices = rotate.f_matmul(&saturate)?.f_mul(&per_image(0.85, 1.15)?)?;
    let colours = matrices.f_matmul(&images.f_flatten(2, -1)?)?.f_add(&per_image(-0.1, 0.1)?)?;
    Ok(colours.f_view([count, channels, height, width])?.f_clamp(-1.0, 1.0)?)
}

/// Hides a rectangle of up to 10x10 pixels of half of the images behind one colour.
fn cover(images: &Tensor) -> Result<Tensor> {
    let (count, channels, height, width) = images.size4()?;
    let inside = |length: i64| -> Result<Tensor> {
        let positions = Tensor::f_arange(length, (Kind::Float, Device::Cpu))?;
        let centre = uniform(count, 0.0, length as f64)?.f_unsqueeze(1)?;
        let reach = uniform(count, -2.0, 5.0)?.f_unsqueeze(1)?;
        Ok(positions.f_sub(&centre)?.f_abs()?.f_le_tensor(&reach)?)
    };
    let mask = inside(height)?
        .f_view([count, 1, height, 1])?
        .f_logical_and(&inside(width)?.f_view([count, 1, 1, width])?)?;
    let colour = uniform(count * channels, -1.0, 1.0)?.f_view([count, channels, 1, 1])?;
    Ok(colour.f_where_self(&mask, images)?)
}
