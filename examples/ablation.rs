//! The paper's claims, put to the test on the embedded text-to-image model.
//!
//! ```sh
//! ./with-libtorch cargo run --release --example ablation                      # all runs: hours
//! ./with-libtorch cargo run --release --example ablation -- --experiment schedules --seeds 5
//! ./with-libtorch cargo run --release --example ablation -- --quick           # does it work?
//! ```
//!
//! Every run writes one file when it is done and is skipped once that file is there, so the program
//! can be stopped at any time and started again. A file of a run with other settings is refused.

#[path = "ablation/mod.rs"]
mod ablation;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ablation::arm::Arm;
use ablation::bench::Bench;
use ablation::experiments::{self, Experiment};
use ablation::pairs::{PairSets, PairSource};
use ablation::report;
use ablation::results::{MOST_SEEDS, Results};
use ablation::run::{run, write_reference};
use ablation::training::Material;
use anyhow::{Context, Result, ensure};
use clap::Parser;
use tch::Kind;
use zimage::emoji::{Classifier, EmojiData, Judge};
use zimage::failure::described;
use zimage::model::Pipeline;

/// The documents with placeholders in place of numbers.
const REPRODUCTION: &str = include_str!("ablation/reproduction.md");
const TERMS: &str = include_str!("ablation/terms.md");

/// Runs experiments on the paper's claims.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// Experiment to run, may be repeated; all by default
    #[arg(long, value_name = "NAME")]
    experiment: Vec<String>,
    /// Arm to run, may be repeated; all of the experiment by default
    #[arg(long, value_name = "NAME")]
    arm: Vec<String>,
    /// Seeds of each experiment, from 0; by default as many as are reported
    #[arg(long)]
    seeds: Option<u64>,
    /// Run nothing: write the document, its tables and plots from the result files
    #[arg(long)]
    report: bool,
    /// Every experiment for two updates on a few captions, and its report
    #[arg(long)]
    quick: bool,
    /// Where result files and pictures go
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Captions that students are measured on
    #[arg(long, default_value_t = 96)]
    captions: usize,
    /// Measure on other captions, for choosing hyper-parameters
    #[arg(long)]
    selection: bool,
    /// Learning rate of the student, in place of that of the arms
    #[arg(long, requires = "selection")]
    student_lr: Option<f64>,
    /// Threads of libtorch
    #[arg(long, default_value_t = 1)]
    threads: i32,
}

fn main() -> ExitCode {
    match work(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", described(&error));
            ExitCode::FAILURE
        }
    }
}

/// The experiments that were asked for.
fn chosen(options: &Options) -> Result<Vec<Experiment>> {
    let mut experiments = experiments::all()?;
    let names: Vec<_> = experiments.iter().map(|experiment| experiment.name).collect();
    for name in &options.experiment {
        ensure!(
            names.contains(&name.as_str()),
            "--experiment {name}: expected one of {}",
            names.join(", ")
        );
    }
    if !options.experiment.is_empty() {
        experiments.retain(|experiment| options.experiment.iter().any(|n| n == experiment.name));
    }
    for name in &options.arm {
        let mut arms = experiments.iter().flat_map(|experiment| &experiment.arms);
        ensure!(arms.any(|arm| arm.name == *name), "--arm {name}: no such arm was asked for");
    }
    if !options.arm.is_empty() {
        for experiment in &mut experiments {
            experiment.arms.retain(|arm| options.arm.contains(&arm.name));
        }
    }
    Ok(experiments)
}

fn work(options: &Options) -> Result<()> {
    ensure!(options.threads > 0, "--threads must be at least 1");
    ensure!(
        options.seeds.is_none_or(|seeds| seeds <= MOST_SEEDS),
        "--seeds must be at most {MOST_SEEDS}"
    );
    tch::set_num_threads(options.threads);
    let experiments = chosen(options)?;
    // Captions that hyper-parameters are chosen on are not reported.
    let default = match (options.quick, options.selection) {
        (true, _) => "runs/ablation-quick",
        (false, true) => "runs/ablation-selection",
        (false, false) => "docs/reproduction",
    };
    let out = options.out.clone().unwrap_or_else(|| default.into());
    let results = out.join("results");
    let document = out.with_extension("md");
    if options.report {
        return write_report(options, &results, &document, &out);
    }
    fs::create_dir_all(&results).with_context(|| format!("creating {}", results.display()))?;

    let device = decoupled_dmd::default_device();
    let teacher = Pipeline::load("assets/teacher".as_ref(), Kind::Float, device)?;
    let data = EmojiData::load("assets/emoji".as_ref())?;
    let captions = data.items.iter().map(|item| item.caption.as_str());
    let prompts = data.vocabulary.encode_prompts(&teacher.transformer, captions)?;
    let classifier = Classifier::load("assets/classifier".as_ref(), Kind::Float, device)?;
    let items = data.indices(false);
    let size = {
        let (_, channels, height, width) = data.images.size4()?;
        [channels, height, width]
    };
    let experiments = adapted_experiments(experiments, options);
    let arms = experiments.iter().flat_map(|experiment| &experiment.arms);
    let settings = |source: PairSource| source.settings(&items, size, teacher.shift);
    let pairs = PairSets::make(arms, "runs".as_ref(), &teacher.transformer, &prompts, settings)?;
    let material = Material {
        classifier: &classifier,
        pairs,
        teacher: &teacher.transformer,
        shift: teacher.shift,
        prompts: &prompts,
        items: items.clone(),
        images: data.images.f_to_device(device)?,
    };
    let judge =
        Judge::new(Classifier::load("assets/classifier".as_ref(), Kind::Float, device)?, &data)?;
    let count = if options.quick { 8 } else { options.captions };
    let bench = Bench::new(judge, &material, &data, count, options.selection)?;
    write_reference(&results, &material, &bench)?;
    // Seed by seed, so that the runs are comparable when the program is stopped.
    let seeds = |experiment: &Experiment| match (options.seeds, options.quick) {
        (Some(seeds), _) => seeds,
        (None, true) => 1,
        (None, false) => experiment.seeds,
    };
    let most = experiments.iter().map(seeds).max().unwrap_or(0);
    for seed in 0..most {
        for experiment in experiments.iter().filter(|experiment| seed < seeds(experiment)) {
            for arm in &experiment.arms {
                run(&results, &out, arm, seed, &material, &bench)?;
            }
        }
    }
    if options.quick {
        write_report(options, &results, &document, &out)?;
    }
    Ok(())
}

/// The document from all result files that are there.
fn write_report(options: &Options, results: &Path, document: &Path, figures: &Path) -> Result<()> {
    let results = Results::load(results, adapted_experiments(experiments::all()?, options))?;
    report::write(REPRODUCTION, document, figures, &results)?;
    report::write(TERMS, &document.with_file_name("terms.md"), figures, &results)
}

fn adapted_experiments(mut experiments: Vec<Experiment>, options: &Options) -> Vec<Experiment> {
    for experiment in &mut experiments {
        experiment.arms = experiment.arms.drain(..).map(|arm| adapted(arm, options)).collect();
    }
    experiments
}

fn adapted(arm: Arm, options: &Options) -> Arm {
    let arm = if options.quick { arm.quick() } else { arm };
    arm.with(|arm| {
        if let Some(rate) = options.student_lr {
            arm.student_learning_rate = rate;
        }
    })
}
