//! One run: training, measurements on the way, the result file.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::Guidance;
use tch::Tensor;
use tch_training::files::{read_json, write_json};
use tch_training::parameters::is_finite;
use zimage::picture::write_grid;

use super::arm::Arm;
use super::bench::{Bench, Measurement, radial_spectrum};
use super::record::{Point, Reference, RunRecord, reference_path, rounded, run_path};
use super::training::{Material, named, training};

/// Steps and guidance of the teacher that students are compared with.
const TEACHER_STEPS: usize = 50;
const TEACHER_GUIDANCE: f64 = 3.0;
/// Steps of students, for which the unguided teacher is measured too.
const FEW_STEPS: [usize; 4] = [1, 2, 4, 8];

/// Measures the teacher unless its file is there.
///
/// # Errors
/// If the file is one of other captions, libtorch fails, or the file cannot be written.
pub fn write_reference(folder: &Path, material: &Material<'_>, bench: &Bench<'_>) -> Result<()> {
    let path = reference_path(folder);
    if path.exists() {
        let found: Reference = read_json(&path)?;
        ensure!(
            (found.captions, found.selection) == (bench.captions(), bench.is_selection()),
            "{} holds measurements on other captions: name another --out",
            folder.display()
        );
        return Ok(());
    }
    let guidance = Guidance::new(TEACHER_GUIDANCE)?;
    let measure = |samples: &Tensor| Ok::<_, anyhow::Error>(tidy(bench.measure(samples)?));
    let unguided = FEW_STEPS
        .into_iter()
        .map(|steps| Ok((steps, measure(&bench.unguided(material.teacher, steps)?)?)))
        .collect::<Result<_>>()?;
    let reference = Reference {
        captions: bench.captions(),
        selection: bench.is_selection(),
        guidance: TEACHER_GUIDANCE,
        guided: measure(&bench.guided(material.teacher, TEACHER_STEPS, guidance)?)?,
        diversity: rounded(bench.teacher_diversity(material, TEACHER_STEPS, guidance)?),
        unguided,
        real: measure(&bench.real(material)?)?,
    };
    Ok(write_json(&path, &reference)?)
}

/// Trains one arm with one seed unless its file is there. The strip of seed 0, rows of captions
/// over columns of measurements, goes to `pictures`.
///
/// # Errors
/// If the file there is that of a run with other settings, libtorch fails, or a file cannot be written.
/// Numbers that are not finite are a result.
pub fn run(
    folder: &Path,
    pictures: &Path,
    arm: &Arm,
    seed: u64,
    material: &Material<'_>,
    bench: &Bench<'_>,
) -> Result<()> {
    let path = run_path(folder, &arm.name, seed);
    if path.exists() {
        let _record = RunRecord::load(&path, arm, bench.captions())?;
        eprintln!("{} seed {seed}: skipped, its file is there", arm.name);
        return Ok(());
    }
    let start = Instant::now();
    let mut training = training(arm, seed, material)?;
    let mut strip = Vec::new();
    let mut points = Vec::new();
    let mut broken_after = None;
    let mut means = Means::default();
    let mut first: Option<Tensor> = None;
    let picks = Tensor::f_from_slice(&bench.pictured())?;
    loop {
        if training.updates().is_multiple_of(arm.measure_every) || training.updates() == arm.updates
        {
            let samples = bench.samples(&training, arm.most_steps())?;
            if !is_finite(&samples)? {
                broken_after = Some(training.updates());
                break;
            }
            let mut observations = Vec::new();
            if let Some(fake) = training.fake_score().filter(|_| arm.observer) {
                let (seen, rows) = bench.observe(material, fake, &samples, arm.most_steps() - 1)?;
                observations = seen;
                if seed == 0 && training.updates() == arm.updates {
                    let columns = rows.size()[1];
                    let rows = rows.f_flatten(0, 1)?;
                    write_grid(
                        &picture(pictures, &format!("{}-seen", arm.name))?,
                        &rows,
                        columns,
                        2,
                    )?;
                }
            }
            let measurement = tidy(bench.measure(&samples)?);
            eprintln!(
                "{} seed {seed} update {}: alignment {:.3}, Fréchet {:.4}, variance {:.4}, {:.0} s",
                arm.name,
                training.updates(),
                measurement.alignment,
                measurement.frechet_distance,
                measurement.variance,
                start.elapsed().as_secs_f64()
            );
            let change_spectrum = match &first {
                Some(first) => radial_spectrum(&samples.f_sub(first)?)?,
                None => Vec::new(),
            };
            let at_steps = arm
                .measured_at
                .iter()
                .map(|steps| Ok((*steps, tidy(bench.measure(&bench.samples(&training, *steps)?)?))))
                .collect::<Result<_>>()?;
            points.push(Point {
                update: training.updates(),
                measurement,
                at_steps,
                diagnostics: means.take(),
                observations,
                change_spectrum: change_spectrum.into_iter().map(rounded).collect(),
            });
            strip.push(samples.f_index_select(0, &picks)?);
            first.get_or_insert(samples);
        }
        if training.updates() == arm.updates {
            break;
        }
        while !training.is_warm() && training.check_finite().is_ok() {
            training.warm_up()?;
        }
        if training.check_finite().is_ok() {
            means.add(named(training.step(true)?));
        }
        if training.check_finite().is_err() {
            broken_after = Some(training.updates());
            break;
        }
    }
    if seed == 0 {
        let columns = strip.len() as i64;
        let strip = Tensor::f_stack(&strip, 1)?.f_flatten(0, 1)?;
        write_grid(&picture(pictures, &arm.name)?, &strip, columns, 2)?;
    }
    let diversity = arm
        .measured_at
        .iter()
        .filter(|_| broken_after.is_none())
        .map(|steps| Ok((*steps, rounded(bench.diversity(&training, *steps)?))))
        .collect::<Result<_>>()?;
    let record = RunRecord {
        arm: arm.clone(),
        seed,
        captions: bench.captions(),
        points,
        diversity,
        broken_after,
        seconds: start.elapsed().as_secs_f64().round(),
    };
    Ok(write_json(&path, &record)?)
}

fn picture(folder: &Path, name: &str) -> Result<std::path::PathBuf> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    Ok(folder.join(format!("{name}.png")))
}

/// Six digits of each number.
fn tidy(measurement: Measurement) -> Measurement {
    Measurement {
        alignment: rounded(measurement.alignment),
        alignment_at_16: rounded(measurement.alignment_at_16),
        frechet_distance: rounded(measurement.frechet_distance),
        variance: rounded(measurement.variance),
        saturation: rounded(measurement.saturation),
    }
}

/// Means of named numbers, each over the times that it was there.
#[derive(Default)]
struct Means(BTreeMap<String, (f64, u32)>);

impl Means {
    fn add(&mut self, record: Vec<(String, f64)>) {
        for (name, value) in record {
            let (sum, count) = self.0.entry(name).or_default();
            *sum += value;
            *count += 1;
        }
    }

    fn take(&mut self) -> BTreeMap<String, f64> {
        let sums = std::mem::take(&mut self.0);
        sums.into_iter()
            .map(|(name, (sum, count))| (name, rounded(sum / f64::from(count))))
            .collect()
    }
}
