//! Results of an experiment that was never run, for the tests of the report.

use std::collections::BTreeMap;

use anyhow::Result;
use tch_training::files::write_json;
use tempfile::{TempDir, tempdir};

use crate::ablation::arm::{Arm, RenoisingTimes};
use crate::ablation::bench::{Measurement, Observation};
use crate::ablation::experiments::Experiment;
use crate::ablation::record::{Point, Reference, RunRecord, reference_path, run_path};
use crate::ablation::results::Results;

fn measurement(alignment: f64, variance: f64) -> Measurement {
    Measurement {
        alignment,
        alignment_at_16: alignment,
        frechet_distance: 0.25 * alignment,
        variance,
        saturation: 0.5,
    }
}

/// Two arms with made-up runs: the second is better by 10 and by 12 points.
pub fn made_up() -> Result<(TempDir, Results)> {
    let folder = tempdir()?;
    let one = Arm::new("one", 4).engine(RenoisingTimes::FULL);
    let two = one.clone().with(|arm| arm.name = "two".to_owned());
    for (arm, alignments) in [(&one, [0.5, 0.6]), (&two, [0.6, 0.72])] {
        for (seed, alignment) in (0..).zip(alignments) {
            let point = |update, alignment| Point {
                update,
                measurement: measurement(alignment, 1.0),
                at_steps: [(2, measurement(0.5 * alignment, 1.0))].into(),
                diagnostics: BTreeMap::new(),
                observations: vec![Observation { time: 0.5, sample: 2.0, fake: 8.0, teacher: 1.0 }],
                change_spectrum: vec![1.0, 2.0, 1.0],
            };
            let run = RunRecord {
                arm: arm.clone(),
                seed,
                captions: 96,
                points: vec![point(0, 0.2), point(arm.updates, alignment)],
                diversity: BTreeMap::new(),
                broken_after: None,
                seconds: 1.0,
            };
            write_json(&run_path(folder.path(), &arm.name, seed), &run)?;
        }
    }
    let reference = Reference {
        captions: 96,
        selection: false,
        guidance: 3.0,
        guided: measurement(1.0, 2.0),
        diversity: 0.1,
        unguided: [(4, measurement(0.8, 1.0))].into(),
        real: measurement(1.0, 1.5),
    };
    write_json(&reference_path(folder.path()), &reference)?;
    let experiment = || Experiment { name: "pair", seeds: 3, arms: vec![one.clone(), two.clone()] };
    let results = Results::load(folder.path(), vec![experiment()])?;

    // Files of other settings are not mixed in.
    let other = Experiment { arms: vec![one.clone().with(|arm| arm.batch = 99)], ..experiment() };
    let error = Results::load(folder.path(), vec![other]).unwrap_err().to_string();
    assert!(error.contains("one-seed0.json was made with other settings"), "{error}");
    Ok((folder, results))
}
