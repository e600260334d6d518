//! Losses of a part of a batch: every term and schedule.

use decoupled_dmd::{
    Adversarial, AdversarialDistributionMatching, Batch, CfgAugmentation, Condition, Consistency,
    Denoiser, Distance, DistributionMatching, Divergence, Estimator, GanLoss, Group, Guidance,
    Kernel, MaximumMeanDiscrepancy, MeanVariance, Normalizer, Objective, PairedRegression,
    Prediction, Probe, RectifiedFlow, Regularizer, Renoising, Result, Reward, Schedule,
    ScoreIdentity, Statistics, Tangent, Uniform,
};
use tch::{Kind, Tensor};

use super::super::common::{gaussian_denoiser, gaussian_teacher, wave};
use super::{Case, Part, Processes, SHAPE};

fn fake<'a>() -> Denoiser<'a> {
    Denoiser::new(RectifiedFlow, Prediction::Sample, |x: &Tensor, t: &Tensor, c: &Condition| {
        gaussian_denoiser(x, t, &c[0], 0.8)
    })
}

/// Logits of each sample, curved in it.
pub fn critic(x: &Tensor, t: &Tensor, c: &Condition) -> Tensor {
    let bend = (x * 0.7 + &c[0]).tanh().flatten(1, -1).sum_dim_intlist(&[1i64][..], true, None);
    bend + x.flatten(1, -1).narrow(1, 0, 2) * t.view([-1, 1])
}

fn guidance() -> Guidance {
    Guidance::new(4.0).unwrap()
}

/// A term alone in an objective.
pub fn loss_of(term: impl Regularizer, part: &Part, processes: Processes<'_>) -> Result<Tensor> {
    let group =
        Group::new(Renoising::new(Uniform::new(0.05, 0.95)?)).regularizer("term", 1.3, term);
    let objective = Objective::new(gaussian_teacher(0.5)).with(group);
    evaluate(objective, 1, &part.batch()?, part, processes)
}

/// With the draw of the part for each of so many groups, since nothing may be drawn from the one generator here.
fn evaluate<'a>(
    mut objective: Objective<'a>,
    groups: usize,
    batch: &Batch<'_>,
    part: &Part,
    processes: Processes<'a>,
) -> Result<Tensor> {
    if let Some(processes) = processes {
        objective = objective.among(processes);
    }
    Ok(objective.evaluate_at(batch, (0..groups).map(|_| part.draw()).collect())?.loss)
}

/// What gathers.
pub fn gathering() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, kernel) in [
        ("gaussian", Kernel::gaussian()),
        ("inverse multiquadric", Kernel::inverse_multiquadric()),
        ("energy", Kernel::Energy),
    ] {
        for estimator in [Estimator::Unbiased, Estimator::Biased] {
            let kernel = kernel.clone();
            cases.push(Case::new(
                format!("MMD {name} {estimator:?}"),
                2,
                move |part, processes| {
                    let term = MaximumMeanDiscrepancy::new(kernel.clone())?.estimator(estimator);
                    loss_of(term.features(|x: &Tensor| x.tanh().narrow(1, 0, 1)), part, processes)
                },
            ));
        }
    }
    cases.push(Case::new("MMD of a prior", 2, |part, processes| {
        let prior = |like: &Tensor| like.cos() * 0.5;
        loss_of(MaximumMeanDiscrepancy::new(Kernel::Energy)?.prior(prior), part, processes)
    }));
    for masked in [false, true] {
        let name = format!("normaliser over the batch, mask {masked}");
        cases.push(Case::new(name, 1, move |part, processes| {
            let dm = DistributionMatching::new(fake());
            // One n for both terms.
            let group = Group::new(Renoising::new(Uniform::FULL))
                .normalizer(Normalizer::fastvideo(guidance()))
                .engine("ca", 1.0, CfgAugmentation::new(guidance()))
                .regularizer("dm", 1.0, &dm);
            let mut batch = part.batch()?;
            if masked {
                batch = batch.with_mask(&part.mask)?;
            }
            evaluate(Objective::new(gaussian_teacher(0.5)).with(group), 1, &batch, part, processes)
        }));
    }
    cases
}

/// What does not.
pub fn alone() -> Vec<Case> {
    let mut cases = Vec::new();
    for schedule in Schedule::ALL {
        cases.push(Case::new(format!("{schedule:?}"), 0, move |part, processes| {
            let dm = DistributionMatching::new(fake());
            let objective = schedule.objective(gaussian_teacher(0.5), guidance(), &dm);
            let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
            evaluate(objective, groups, &part.batch()?, part, processes)
        }));
    }
    for divergence in Divergence::ALL {
        cases.push(Case::new(format!("{divergence:?}"), 0, move |part, processes| {
            let ratio = |probe: &Probe<'_>| {
                probe.noised().flatten(1, -1).mean_dim(&[1i64][..], false, Kind::Double)
            };
            let dm = DistributionMatching::new(fake()).divergence(divergence, ratio);
            loss_of(&dm, part, processes)
        }));
    }
    for statistics in [Statistics::PerSample, Statistics::PerChannel] {
        cases.push(Case::new(format!("MeanVariance {statistics:?}"), 0, move |part, processes| {
            let whole = wave(&SHAPE, 4.2, Kind::Double);
            loss_of(MeanVariance::measured(&whole, statistics)?, part, processes)
        }));
    }
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        cases.push(Case::new(format!("generator {gan_loss:?}"), 0, move |part, processes| {
            let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
            loss_of(gan.weighted(|t: &Tensor| t.square()), part, processes)
        }));
        cases.push(Case::new(format!("ADM {gan_loss:?}"), 0, move |part, processes| {
            let dm = DistributionMatching::new(fake());
            let term = AdversarialDistributionMatching::new(&dm, gaussian_teacher(0.5), critic);
            loss_of(term.gan_loss(gan_loss), part, processes)
        }));
    }
    cases.push(Case::new("SiD", 0, |part, processes| {
        loss_of(ScoreIdentity::new(&DistributionMatching::new(fake()), 1.2)?, part, processes)
    }));
    cases.push(Case::new("SIM", 0, |part, processes| {
        let dm = DistributionMatching::new(fake());
        loss_of(ScoreIdentity::pseudo_huber(&dm, 0.1)?, part, processes)
    }));
    for place in 0..4 {
        cases.push(Case::new(format!("regression {place}"), 0, move |part, processes| {
            let distance = match place {
                0 => Distance::Squared,
                1 => Distance::Absolute,
                2 => Distance::pseudo_huber(0.1)?,
                _ => Distance::pseudo_huber_of_samples(0.1)?,
            };
            loss_of(PairedRegression::new(distance).with_absolute(0.5)?, part, processes)
        }));
    }
    cases.push(Case::new("reward", 0, |part, processes| {
        let score = |x: &Tensor, _: &Condition| {
            x.sin().flatten(1, -1).mean_dim(&[1i64][..], false, Kind::Double)
        };
        loss_of(Reward::new(score), part, processes)
    }));
    for is_discrete in [true, false] {
        let name = format!("consistency, discrete {is_discrete}");
        cases.push(Case::new(name, 0, move |part, processes| {
            let engine = if is_discrete {
                Consistency::discrete(fake(), 0.02)?.normalized(0.1)?
            } else {
                Consistency::continuous(fake(), Tangent::Central { step: 1e-3 })?
            };
            let group = Group::new(Renoising::new(Uniform::FULL)).engine("cm", 1.0, engine);
            let objective = Objective::new(gaussian_teacher(0.5)).with(group);
            evaluate(objective, 1, &part.batch()?, part, processes)
        }));
    }
    cases
}
