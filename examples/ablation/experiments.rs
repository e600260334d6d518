//! The experiments by name, and their arms. An arm that serves several experiments is run once.

use super::arm::{Arm, Shield, Tau};

/// Arms that are compared with one another.
#[derive(Debug)]
pub struct Experiment {
    pub name: &'static str,
    /// Seeds unless the command line says otherwise.
    pub seeds: u64,
    pub arms: Vec<Arm>,
}

// Weights of the shields that no normaliser scales, such that at the start their gradient in x is about
// as long as that of distribution matching, a root mean square of 0.6 to 0.9 over B N.
const MEAN_VARIANCE: f64 = 1.0;
const DISCREPANCY: f64 = 4.0;
const ADVERSARIAL: f64 = 0.3;

/// All, the most telling first: the order in which they are run.
pub fn all() -> Vec<Experiment> {
    let experiment = |name, seeds, arms| Experiment { name, seeds, arms };
    vec![
        experiment("schedules", 5, schedules()),
        experiment("engine", 3, engine_against_regularizer()),
        experiment("regularizers", 2, regularizers()),
        experiment("tau", 1, tau_of_the_engine()),
        experiment("observer", 1, vec![ca_only(1).observer()]),
        experiment("dose", 1, dose()),
        experiment("adversarial", 1, adversarial()),
        experiment("engine-8", 1, vec![ca_only(8), dm_only(8), hybrid(8)]),
    ]
}

const DM: Shield = Shield::DistributionMatching(Tau::Full);

fn suffix(steps: usize) -> String {
    if steps == 4 { String::new() } else { format!("-{steps}step") }
}

fn hybrid(steps: usize) -> Arm {
    Arm::new(&format!("hybrid{}", suffix(steps)), steps).engine(Tau::AboveStudent).shield(DM)
}

fn coupled() -> Arm {
    Arm::new("coupled", 4).engine(Tau::Full).shield(DM).coupled()
}

fn ca_only(steps: usize) -> Arm {
    let arm = Arm::new(&format!("ca{}", suffix(steps)), steps).engine(Tau::AboveStudent);
    // The observer of the one-step run serves its own experiment; the student does not feel it.
    if steps == 1 { arm.observer() } else { arm }
}

fn dm_only(steps: usize) -> Arm {
    Arm::new(&format!("dm{}", suffix(steps)), steps).shield(DM)
}

fn schedules() -> Vec<Arm> {
    let above = Shield::DistributionMatching(Tau::AboveStudent);
    vec![
        coupled(),
        Arm::new("full", 4).engine(Tau::Full).shield(DM),
        Arm::new("constrained", 4).engine(Tau::AboveStudent).shield(above),
        hybrid(4),
    ]
}

fn engine_against_regularizer() -> Vec<Arm> {
    [4, 1].into_iter().flat_map(|steps| [ca_only(steps), dm_only(steps), hybrid(steps)]).collect()
}

fn regularizers() -> Vec<Arm> {
    let ca = |name: &str| Arm::new(name, 4).engine(Tau::AboveStudent);
    let mean_variance = Shield::MeanVariance { weight: MEAN_VARIANCE };
    let channels = Shield::ChannelMeanVariance { weight: MEAN_VARIANCE };
    vec![
        ca_only(4),
        ca("ca-mean-variance").shield(mean_variance),
        ca("ca-channel-mean-variance").shield(channels),
        ca("ca-mmd").shield(Shield::MaximumMeanDiscrepancy { weight: DISCREPANCY }),
        ca("ca-gan").shield(Shield::Adversarial { weight: ADVERSARIAL }),
        hybrid(4),
        ca("hybrid-mean-variance").shield(DM).shield(mean_variance),
    ]
}

fn tau_of_the_engine() -> Vec<Arm> {
    let between = |low: f64, high: f64| {
        Arm::new(&format!("tau-{low:.2}-{high:.2}"), 1).engine(Tau::Between(low, high))
    };
    let ranges = [(0.0, 0.05), (0.0, 0.3), (0.0, 0.7), (0.0, 1.0), (0.7, 1.0)];
    // As long updates near the data as near noise: is it the place or the size that matters?
    let strong = between(0.7, 1.0).with(|arm| {
        arm.name += "-strong";
        arm.guidance = 41.0;
    });
    // Does it collapse later?
    let long = between(0.7, 1.0).with(|arm| {
        arm.name += "-long";
        (arm.updates, arm.measure_every) = (200, 20);
    });
    ranges.into_iter().map(|(low, high)| between(low, high)).chain([strong, long]).collect()
}

fn dose() -> Vec<Arm> {
    let change = |name: &str, change: fn(&mut Arm)| {
        hybrid(4).with(|arm| arm.name = name.to_owned()).with(change)
    };
    vec![
        change("guidance-2", |arm| arm.guidance = 2.0),
        hybrid(4),
        change("guidance-6", |arm| arm.guidance = 6.0),
        change("guidance-12", |arm| arm.guidance = 12.0),
        change("fake-updates-1", |arm| arm.fake_updates = 1),
        change("fake-rate-low", |arm| arm.fake_learning_rate = 4e-5),
        change("fake-rate-high", |arm| arm.fake_learning_rate = 1.6e-3),
    ]
}

fn adversarial() -> Vec<Arm> {
    let gan = Shield::Adversarial { weight: ADVERSARIAL };
    let named = |arm: Arm, name: &str| arm.with(|arm| arm.name = name.to_owned()).shield(gan);
    vec![named(coupled(), "coupled-gan"), named(hybrid(4), "hybrid-gan")]
}
