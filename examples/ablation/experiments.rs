//! The experiments by name, and their arms. An arm that serves several experiments is run once.

use anyhow::Result;
use decoupled_dmd::{
    Augmentation, Divergence, FlowRule, Shift, Tangent, Times, Transition, Uniform,
};

use super::arm::{
    Arm, ConsistencyForm, OnData, RegressionDistance, Regularization, RenoisingTimes,
};

/// Arms that are compared with one another.
#[derive(Debug)]
pub struct Experiment {
    pub name: &'static str,
    /// Seeds unless the command line says otherwise.
    pub seeds: u64,
    pub arms: Vec<Arm>,
}

// Weights of the regularizers that no normaliser scales, such that at the start their gradient in x is about
// as long as that of distribution matching, a root mean square of 0.6 to 0.9 over B N.
const MEAN_VARIANCE: f64 = 1.0;
const DISCREPANCY: f64 = 4.0;
const ADVERSARIAL: f64 = 0.3;
/// Weight of consistency beside distribution matching: rCM's 100 : 1 for losses that are sums, with the 3072 numbers
/// of a picture.
const CONSISTENCY: f64 = 1.8;
/// Weight of the classifier's log-likelihood, a mean over samples.
const REWARD: f64 = 1e-3;
/// Step of the differences along the teacher's ODE, for networks that embed 1000 t.
const CONSISTENCY_STEP: f64 = 2e-4;

/// All, the most telling first: the order in which they are run.
///
/// # Errors
/// If a range of times is none.
pub fn all() -> Result<Vec<Experiment>> {
    let experiment = |name, seeds, arms| Experiment { name, seeds, arms };
    Ok(vec![
        experiment("schedules", 5, schedules()),
        experiment("engine", 3, engine_against_regularizer()),
        experiment("regularizers", 2, regularizers()),
        experiment("tau", 1, tau_of_the_engine()?),
        experiment("observer", 1, vec![ca_only(1).observer()]),
        experiment("dose", 1, dose()),
        experiment("adversarial", 1, adversarial()),
        experiment("engine-8", 1, vec![ca_only(8), dm_only(8), hybrid(8)]),
        experiment("trajectories", 3, trajectories()),
        experiment("terms", 3, terms()?),
    ])
}

const DM: Regularization = Regularization::DistributionMatching(RenoisingTimes::FULL);

fn suffix(steps: usize) -> String {
    if steps == 4 { String::new() } else { format!("-{steps}step") }
}

fn hybrid(steps: usize) -> Arm {
    Arm::new(&format!("hybrid{}", suffix(steps)), steps)
        .engine(RenoisingTimes::ABOVE_STUDENT)
        .regularizer(DM)
}

fn coupled() -> Arm {
    Arm::new("coupled", 4).engine(RenoisingTimes::FULL).regularizer(DM).coupled()
}

fn ca_only(steps: usize) -> Arm {
    let arm =
        Arm::new(&format!("ca{}", suffix(steps)), steps).engine(RenoisingTimes::ABOVE_STUDENT);
    // The observer of the one-step run serves its own experiment; the student does not feel it.
    if steps == 1 { arm.observer() } else { arm }
}

fn dm_only(steps: usize) -> Arm {
    Arm::new(&format!("dm{}", suffix(steps)), steps).regularizer(DM)
}

fn schedules() -> Vec<Arm> {
    let above = Regularization::DistributionMatching(RenoisingTimes::ABOVE_STUDENT);
    vec![
        coupled(),
        Arm::new("full", 4).engine(RenoisingTimes::FULL).regularizer(DM),
        Arm::new("constrained", 4).engine(RenoisingTimes::ABOVE_STUDENT).regularizer(above),
        hybrid(4),
    ]
}

fn engine_against_regularizer() -> Vec<Arm> {
    [4, 1].into_iter().flat_map(|steps| [ca_only(steps), dm_only(steps), hybrid(steps)]).collect()
}

fn regularizers() -> Vec<Arm> {
    let ca = |name: &str| Arm::new(name, 4).engine(RenoisingTimes::ABOVE_STUDENT);
    let mean_variance = Regularization::MeanVariance { weight: MEAN_VARIANCE };
    let channels = Regularization::ChannelMeanVariance { weight: MEAN_VARIANCE };
    vec![
        ca_only(4),
        ca("ca-mean-variance").regularizer(mean_variance),
        ca("ca-channel-mean-variance").regularizer(channels),
        ca("ca-mmd").regularizer(Regularization::MaximumMeanDiscrepancy { weight: DISCREPANCY }),
        ca("ca-gan").regularizer(Regularization::Adversarial { weight: ADVERSARIAL }),
        hybrid(4),
        ca("hybrid-mean-variance").regularizer(DM).regularizer(mean_variance),
    ]
}

fn tau_of_the_engine() -> Result<Vec<Arm>> {
    let between = |low: f64, high: f64| -> Result<Arm> {
        // As the network sees them: no shift follows.
        let times = Times::Uniform(Uniform::new(low, high)?);
        let renoising = RenoisingTimes { times, shift: Some(Shift::NONE) };
        Ok(Arm::new(&format!("tau-{low:.2}-{high:.2}"), 1).engine(renoising))
    };
    let ranges = [(0.0, 0.05), (0.0, 0.3), (0.0, 0.7), (0.0, 1.0), (0.7, 1.0)];
    // As long updates near the data as near noise: is it the place or the size that matters?
    let strong = between(0.7, 1.0)?.with(|arm| {
        arm.name += "-strong";
        arm.guidance = 41.0;
    });
    // Does it collapse later?
    let long = between(0.7, 1.0)?.with(|arm| {
        arm.name += "-long";
        (arm.updates, arm.measure_every) = (200, 20);
    });
    let plain = ranges.into_iter().map(|(low, high)| between(low, high));
    plain.chain([Ok(strong), Ok(long)]).collect()
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
    let gan = Regularization::Adversarial { weight: ADVERSARIAL };
    let named = |arm: Arm, name: &str| arm.with(|arm| arm.name = name.to_owned()).regularizer(gan);
    vec![named(coupled(), "coupled-gan"), named(hybrid(4), "hybrid-gan")]
}

/// Along the teacher's ODE, by its distribution, or both: students of one, two and four steps at once.
fn trajectories() -> Vec<Arm> {
    let arm = |name: &str| {
        Arm::new(name, 4).with(|arm| {
            arm.steps = vec![4, 2, 1];
            arm.measured_at = vec![4, 2, 1];
            (arm.updates, arm.measure_every) = (60, 30);
        })
    };
    let renoised = |arm: Arm| arm.with(|arm| arm.transition = Transition::Renoise);
    let consistency = |form| OnData::Consistency { form, weight: CONSISTENCY };
    let continuous =
        consistency(ConsistencyForm::Continuous(Tangent::Central { step: CONSISTENCY_STEP }));
    let discrete = consistency(ConsistencyForm::Discrete { step: 1.0 / 48.0 });
    let tangent = Tangent::Central { step: CONSISTENCY_STEP };
    let mean_flow = OnData::MeanFlow { rule: FlowRule::Eulerian(tangent) };
    let hybrid = |arm: Arm| arm.engine(RenoisingTimes::ABOVE_STUDENT).regularizer(DM);
    vec![
        renoised(arm("consistency")).on_data(continuous),
        renoised(arm("discrete-consistency")).on_data(discrete),
        arm("mean-flow").on_data(mean_flow),
        arm("dm-any").regularizer(DM),
        hybrid(arm("hybrid-any")),
        renoised(arm("rcm"))
            .on_data(continuous)
            .engine(RenoisingTimes::FULL)
            .regularizer(DM)
            .coupled(),
        hybrid(renoised(arm("hierarchical")).on_data(mean_flow))
            .with(|arm| arm.first_stage = Some(30)),
    ]
}

/// Terms of other papers, each as its own student of one and four steps.
fn terms() -> Result<Vec<Arm>> {
    use Regularization as R;
    let arm = |name: &str| {
        Arm::new(name, 4).with(|arm| {
            arm.steps = vec![4, 1];
            arm.measured_at = vec![4, 1];
            arm.measure_every = 20;
        })
    };
    let one_step = |name: &str| {
        Arm::new(name, 1).with(|arm| (arm.measured_at, arm.measure_every) = (vec![1], 20))
    };
    let ca = |name: &str| arm(name).engine(RenoisingTimes::ABOVE_STUDENT);
    let gan = R::Adversarial { weight: ADVERSARIAL };
    let perceptual = OnData::Regression(RegressionDistance::Perceptual);
    let augmentation = Augmentation::new().geometric().cutout(0.5)?;
    let adm =
        |name: &str| arm(name).regularizer(R::AdversarialDistributionMatching { weight: 1.0 });
    let coupled = |name: &str| arm(name).engine(RenoisingTimes::FULL).regularizer(DM).coupled();
    Ok(vec![
        one_step("regression").on_data(OnData::Regression(RegressionDistance::Squared)),
        one_step("regression-perceptual").on_data(perceptual),
        one_step("regression-augmented")
            .on_data(perceptual)
            .with(|arm| arm.augmentation = Some(augmentation)),
        one_step("diffusion2gan").on_data(perceptual).regularizer(gan),
        arm("d2o").regularizer(gan).with(|arm| {
            // A sixth of the parameters, by count.
            arm.trained = ["norm", "to_q", "to_k", "to_v", "all_final", "all_x_embedder"]
                .map(str::to_owned)
                .to_vec();
        }),
        adm("adm"),
        // As many updates as give about the forwards of `adm` in all.
        adm("adm-after-adp").on_data(OnData::AdversarialPairs).with(|arm| {
            (arm.updates, arm.first_stage) = (51, Some(20));
        }),
        ca("f-distill").regularizer(R::Divergence(Divergence::JensenShannon)),
        arm("sid").regularizer(R::ScoreIdentity { alpha: 1.0 }),
        ca("ca-reward").regularizer(R::Reward { weight: REWARD }),
        ca("ca-mmd-prior").regularizer(R::DiscrepancyToPrior { weight: DISCREPANCY }),
        ca("hybrid-four-one").regularizer(DM),
        ca("cdm").regularizer(DM).with(|arm| arm.off_trajectory = true),
        coupled("coupled-four-one"),
        coupled("tdm").with(|arm| arm.in_segments = true),
    ])
}
