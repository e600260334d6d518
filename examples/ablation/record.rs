//! The result files: one for each run, and one for the teacher that all are compared with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch_training::files::read_json;

use super::arm::Arm;
use super::bench::{Measurement, Observation};

/// A measurement on the way, and the means of the diagnostics since the one before.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Point {
    pub update: u64,
    #[serde(flatten)]
    pub measurement: Measurement,
    /// By the number of steps, for students that are trained to take several.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub at_steps: BTreeMap<usize, Measurement>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub diagnostics: BTreeMap<String, f64>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub observations: Vec<Observation>,
    /// Of the change of the samples since the first point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub change_spectrum: Vec<f64>,
}

/// Everything that one run has shown.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunRecord {
    pub arm: Arm,
    pub seed: u64,
    /// Captions measured on.
    pub captions: usize,
    /// From update 0, the teacher's weights, to the last.
    pub points: Vec<Point>,
    /// How different the last samples of one caption are, by the number of steps.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub diversity: BTreeMap<usize, f64>,
    /// The update after which a number was not finite any more.
    pub broken_after: Option<u64>,
    pub seconds: f64,
}

impl RunRecord {
    /// Reads the file of a run of `arm`, measured on as many `captions`.
    ///
    /// # Errors
    /// If the file is missing or broken, or the run had other settings.
    pub fn load(path: &Path, arm: &Arm, captions: usize) -> Result<Self> {
        let record: Self = read_json(path)?;
        ensure!(
            record.arm == *arm && record.captions == captions,
            "{} was made with other settings: remove it, or name another --out",
            path.display()
        );
        Ok(record)
    }
}

/// The teacher on the same captions and noise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reference {
    pub captions: usize,
    /// Whether these are captions for choosing hyper-parameters, and not those of the report.
    #[serde(default)]
    pub selection: bool,
    pub guidance: f64,
    /// At 50 steps, with guidance.
    pub guided: Measurement,
    /// How different its samples of one caption are.
    pub diversity: f64,
    /// Without guidance, by the number of steps.
    pub unguided: BTreeMap<usize, Measurement>,
    pub real: Measurement,
}

/// File of one run.
pub fn run_path(folder: &Path, arm: &str, seed: u64) -> PathBuf {
    folder.join(format!("{arm}-seed{seed}.json"))
}

/// File of the teacher's scores.
pub fn reference_path(folder: &Path) -> PathBuf {
    folder.join("teacher.json")
}

/// Numbers at six digits: what a file keeps.
pub fn rounded(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}
