//! All result files together, and the numbers that the report takes from them.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use tch_training::files::read_json;

use super::experiments::Experiment;
use super::record::{Reference, RunRecord, reference_path, run_path};
use super::statistics::Interval;

/// Seeds that are looked for.
pub const MOST_SEEDS: u64 = 20;

/// What a number of the report says about one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Field {
    /// In percent.
    Alignment,
    Frechet,
    /// Smallest on the way.
    BestFrechet,
    /// Mean over the second half of the measurements, which move from one to the next.
    LateFrechet,
    /// In percent, the same mean.
    LateAlignment,
    /// Log ratio of the mean variance of a sample to that of the guided teacher's.
    Drift,
    /// Largest on the way.
    HighestDrift,
    Saturation,
    /// A diagnostic, its mean before the last measurement.
    DmCos,
    DmRelativeGap,
    DmToCa,
    FakeLoss,
    /// Root mean square of CA's updates up to the first measurement after the start.
    FirstCaSize,
    /// Percent of the change's power in waves of more than 8 periods, at the first measurement after
    /// the start.
    FinePower,
    /// After the last update, of students that are trained to take several numbers of steps.
    AtSteps(usize, Score),
}

/// A score at one number of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Score {
    /// In percent.
    Alignment,
    Frechet,
    Drift,
    /// Distance between samples of one caption, over that of the guided teacher.
    Diversity,
}

impl Score {
    pub const ALL: [(&'static str, Self); 4] = [
        ("alignment", Self::Alignment),
        ("frechet", Self::Frechet),
        ("drift", Self::Drift),
        ("diversity", Self::Diversity),
    ];
}

impl Field {
    pub const ALL: [(&'static str, Self); 14] = [
        ("alignment", Self::Alignment),
        ("frechet", Self::Frechet),
        ("best-frechet", Self::BestFrechet),
        ("late-frechet", Self::LateFrechet),
        ("late-alignment", Self::LateAlignment),
        ("drift", Self::Drift),
        ("highest-drift", Self::HighestDrift),
        ("saturation", Self::Saturation),
        ("dm-cos", Self::DmCos),
        ("dm-gap", Self::DmRelativeGap),
        ("dm-to-ca", Self::DmToCa),
        ("fake-loss", Self::FakeLoss),
        ("first-ca-size", Self::FirstCaSize),
        ("fine-power", Self::FinePower),
    ];

    /// By the name that the template uses; `alignment@2` is one at two steps.
    ///
    /// # Errors
    /// If there is none of this name.
    pub fn named(name: &str) -> Result<Self> {
        if let Some((score, steps)) = name.split_once('@') {
            let found = Score::ALL.iter().find(|(known, _)| *known == score);
            let (_, score) = found.with_context(|| format!("score {score} is not known"))?;
            return Ok(Self::AtSteps(steps.parse()?, *score));
        }
        let found = Self::ALL.iter().find(|(known, _)| *known == name);
        let names = || Self::ALL.map(|(name, _)| name).join(", ");
        found
            .map(|(_, field)| *field)
            .with_context(|| format!("field {name}: not one of {}", names()))
    }

    /// Digits after the point.
    pub fn digits(self) -> usize {
        match self {
            Self::Alignment
            | Self::LateAlignment
            | Self::FinePower
            | Self::AtSteps(_, Score::Alignment) => 1,
            Self::Drift
            | Self::HighestDrift
            | Self::DmToCa
            | Self::FirstCaSize
            | Self::AtSteps(_, Score::Drift | Score::Diversity) => 2,
            _ => 3,
        }
    }

    pub fn is_signed(self) -> bool {
        matches!(self, Self::Drift | Self::HighestDrift | Self::AtSteps(_, Score::Drift))
    }
}

/// The runs by arm, in the order of seeds, and the teacher.
#[derive(Debug)]
pub struct Results {
    pub reference: Reference,
    pub experiments: Vec<Experiment>,
    runs: BTreeMap<String, Vec<RunRecord>>,
}

impl Results {
    /// Reads the files of all arms that are there.
    ///
    /// # Errors
    /// If the teacher's file is missing, a file is broken, or a run was made with other settings or
    /// captions than the arm has now.
    pub fn load(folder: &Path, experiments: Vec<Experiment>) -> Result<Self> {
        let reference: Reference = read_json(&reference_path(folder))?;
        let mut runs: BTreeMap<String, Vec<RunRecord>> = BTreeMap::new();
        for arm in experiments.iter().flat_map(|experiment| &experiment.arms) {
            if runs.contains_key(&arm.name) {
                continue;
            }
            let of_arm = runs.entry(arm.name.clone()).or_default();
            for path in (0..MOST_SEEDS).map(|seed| run_path(folder, &arm.name, seed)) {
                if path.exists() {
                    of_arm.push(RunRecord::load(&path, arm, reference.captions)?);
                }
            }
        }
        Ok(Self { reference, experiments, runs })
    }

    /// An experiment by name.
    ///
    /// # Errors
    /// If there is none.
    pub fn experiment(&self, name: &str) -> Result<&Experiment> {
        self.experiments
            .iter()
            .find(|experiment| experiment.name == name)
            .with_context(|| format!("there is no experiment {name}"))
    }

    /// The runs of an arm.
    ///
    /// # Errors
    /// If no experiment has it.
    pub fn runs(&self, arm: &str) -> Result<&[RunRecord]> {
        match self.runs.get(arm) {
            Some(runs) => Ok(runs),
            None => bail!("there is no arm {arm}"),
        }
    }

    /// Log ratio of a variance to that of the guided teacher.
    pub fn drift(&self, variance: f64) -> f64 {
        (variance / self.reference.guided.variance).ln()
    }

    /// A number of one run; `None` where the run does not have it.
    pub fn value(&self, run: &RunRecord, field: Field) -> Option<f64> {
        let last = run.points.last()?;
        let diagnostic = |name: &str| last.diagnostics.get(name).copied();
        let over = |of: fn(&super::record::Point) -> f64| run.points.iter().map(of);
        match field {
            Field::Alignment => Some(100.0 * last.measurement.alignment),
            Field::Frechet => Some(last.measurement.frechet_distance),
            Field::BestFrechet => over(|p| p.measurement.frechet_distance).reduce(f64::min),
            Field::LateFrechet => late(run, |p| p.measurement.frechet_distance),
            Field::LateAlignment => late(run, |p| 100.0 * p.measurement.alignment),
            Field::Drift => Some(self.drift(last.measurement.variance)),
            Field::HighestDrift => {
                over(|p| p.measurement.variance).reduce(f64::max).map(|v| self.drift(v))
            }
            Field::Saturation => Some(last.measurement.saturation),
            Field::DmCos => diagnostic("dm_cos"),
            Field::DmRelativeGap => diagnostic("dm_rel_gap"),
            Field::DmToCa => diagnostic("dm_to_ca"),
            Field::FakeLoss => diagnostic("fake_loss"),
            Field::FirstCaSize => run.points.get(1)?.diagnostics.get("ca_update_rms").copied(),
            Field::FinePower => fine_power(&run.points.get(1)?.change_spectrum),
            Field::AtSteps(steps, Score::Diversity) => {
                Some(run.diversity.get(&steps)? / self.reference.diversity)
            }
            Field::AtSteps(steps, score) => {
                let measurement = last.at_steps.get(&steps)?;
                Some(match score {
                    Score::Alignment => 100.0 * measurement.alignment,
                    Score::Frechet => measurement.frechet_distance,
                    _ => self.drift(measurement.variance),
                })
            }
        }
    }

    /// A number over all seeds of an arm; `None` without a run that has it.
    ///
    /// # Errors
    /// If no experiment has the arm.
    pub fn interval(&self, arm: &str, field: Field) -> Result<Option<Interval>> {
        let values: Vec<f64> =
            self.runs(arm)?.iter().filter_map(|run| self.value(run, field)).collect();
        Ok(Interval::of(&values))
    }

    /// The difference of two arms, `one - two`, over the seeds that both have: runs of one seed
    /// share captions and noise, so each seed is a pair.
    ///
    /// # Errors
    /// If no experiment has an arm.
    pub fn paired(&self, one: &str, two: &str, field: Field) -> Result<Option<Interval>> {
        let others = self.runs(two)?;
        let mut differences = Vec::new();
        for run in self.runs(one)? {
            let other = others.iter().find(|other| other.seed == run.seed);
            let pair = (self.value(run, field), other.and_then(|run| self.value(run, field)));
            if let (Some(a), Some(b)) = pair {
                differences.push(a - b);
            }
        }
        Ok(Interval::of(&differences))
    }
}

/// Mean over the measurements of the second half of the planned updates; `None` where a run has ended
/// before.
fn late(run: &RunRecord, of: fn(&super::record::Point) -> f64) -> Option<f64> {
    let values: Vec<f64> =
        run.points.iter().filter(|point| 2 * point.update >= run.arm.updates).map(of).collect();
    Interval::of(&values).map(|interval| interval.mean)
}

/// Percent of the power beyond half of the frequencies; `None` for a spectrum that was not taken.
fn fine_power(spectrum: &[f64]) -> Option<f64> {
    let fine = spectrum.get(spectrum.len() / 2 + 1..)?;
    Some(100.0 * fine.iter().sum::<f64>() / spectrum.iter().sum::<f64>())
}
