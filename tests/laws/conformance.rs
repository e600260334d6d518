//! Every built-in term keeps the contract of its trait, and the checks find terms that do not.

use std::cell::Cell;

use decoupled_dmd::testing::{
    Check, Failure, check_engine, check_gradient, check_independence, check_own_loss,
    check_regularizer,
};
use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, CriticPenalty, Denoiser, DistributionMatching,
    Estimator, GanLoss, Guidance, Kernel, MaximumMeanDiscrepancy, MeanVariance, PreShift,
    Prediction, Probe, RectifiedFlow, Regularizer, Renoising, Result, Statistics, Uniform,
    engine_fn, regularizer_fn,
};
use tch::{Kind, Tensor};

use super::common::{gaussian_teacher, seeded, wave};

struct Setting {
    x: Tensor,
    cond: Condition,
    null: Condition,
    real: Tensor,
    real_cond: Condition,
}

fn setting(kind: Kind) -> Setting {
    let condition = |phase| wave(&[3, 2, 4, 4], phase, kind).into();
    Setting {
        x: wave(&[3, 2, 4, 4], 0.3, kind),
        cond: condition(1.1),
        null: condition(2.9),
        real: wave(&[3, 2, 4, 4], 4.0, kind),
        real_cond: condition(3.7),
    }
}

impl Setting {
    fn batch(&self) -> Batch<'_> {
        Batch::new(&self.x, &self.cond).unwrap().with_null(&self.null)
    }

    fn batch_with_data(&self) -> Batch<'_> {
        self.batch().with_real(&self.real).unwrap().with_real_cond(&self.real_cond)
    }
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::Double, Kind::BFloat16];

#[test]
fn cfg_augmentation() -> Result<(), Failure> {
    for kind in KINDS {
        let (s, teacher) = (setting(kind), gaussian_teacher(0.5));
        check_engine(&CfgAugmentation::new(Guidance::new(4.0)?), &teacher, &s.batch())?;
        let mask = Tensor::from_slice(&[true, false, true]);
        let masked = s.batch().with_mask(&mask)?;
        check_engine(&CfgAugmentation::new(Guidance::new(4.0)?), &teacher, &masked)?;
    }
    Ok(())
}

#[test]
fn distribution_matching() -> Result<(), Failure> {
    for kind in KINDS {
        let (s, teacher) = (setting(kind), gaussian_teacher(0.5));
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        check_regularizer(&dm, &teacher, &s.batch())?;
        check_independence(&dm, &teacher, &s.batch())?;
    }
    Ok(())
}

#[test]
fn mean_variance() -> Result<(), Failure> {
    let teacher = gaussian_teacher(0.5);
    let (mean, variance) = (Tensor::from_slice(&[0.1, -0.2]), Tensor::from_slice(&[0.7, 1.2]));
    for kind in KINDS {
        let s = setting(kind);
        for term in [
            MeanVariance::per_sample(0.1, 0.8)?,
            MeanVariance::per_channel(&mean, &variance)?,
            MeanVariance::measured(&s.real, Statistics::PerSample)?,
            MeanVariance::measured(&s.real, Statistics::PerChannel)?.running(0.9, 1)?,
            // Above the variance of the samples, so that the tangent takes the logarithm's place.
            MeanVariance::per_sample(0.1, 0.8)?.floor(2.0)?,
        ] {
            check_regularizer(&term, &teacher, &s.batch())?;
            check_independence(&term, &teacher, &s.batch())?;
            if kind == Kind::Double {
                check_gradient(&term, &teacher, &s.batch())?;
            }
        }
    }
    Ok(())
}

#[test]
fn maximum_mean_discrepancy() -> Result<(), Failure> {
    let teacher = gaussian_teacher(0.5);
    for kind in KINDS {
        let s = setting(kind);
        // Fewer real samples than samples of the batch.
        let (few, pooled) =
            (s.real.narrow(0, 0, 2), |x: &Tensor| x.f_mean_dim(&[2, 3][..], false, None));
        let with_few = s.batch().with_real(&few)?;
        for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
            for estimator in [Estimator::Unbiased, Estimator::Biased] {
                let term = MaximumMeanDiscrepancy::new(kernel.clone())?.estimator(estimator);
                check_regularizer(&term, &teacher, &s.batch_with_data())?;
                check_regularizer(&term.features(pooled), &teacher, &with_few)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_gradient_of_the_energy_distance_is_that_of_its_value() -> Result<(), Failure> {
    // The other kernels hold their measured bandwidth, which a difference of values does not.
    let (s, teacher) = (setting(Kind::Double), gaussian_teacher(0.5));
    for estimator in [Estimator::Unbiased, Estimator::Biased] {
        let term = MaximumMeanDiscrepancy::new(Kernel::Energy)?.estimator(estimator);
        check_gradient(&term, &teacher, &s.batch_with_data())?;
    }
    Ok(())
}

#[test]
fn adversarial() -> Result<(), Failure> {
    let teacher = gaussian_teacher(0.5);
    for kind in KINDS {
        let (s, weight) = (setting(kind), wave(&[2, 32], 0.9, kind));
        // Looks at the condition, so that its order counts.
        let critic = |x: &Tensor, t: &Tensor, cond: &Condition| {
            let seen = (x.to_kind(kind) + &cond[0] * 0.5).tanh().flatten(1, -1);
            seen.linear(&weight, None::<&Tensor>) + t.unsqueeze(1)
        };
        for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
            let term = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
            check_regularizer(&term, &teacher, &s.batch_with_data())?;
            check_independence(&term, &teacher, &s.batch_with_data())?;
            if kind == Kind::Double {
                check_gradient(&term, &teacher, &s.batch_with_data())?;
            }
        }
    }
    Ok(())
}

#[test]
fn own_losses() -> Result<(), Failure> {
    let _guard = seeded(51);
    for kind in KINDS {
        let (s, weight) = (setting(kind), wave(&[2, 32], 0.9, kind).set_requires_grad(true));
        let fake = |x: &Tensor, _: &Tensor, c: &Condition| x * weight.get(0).mean(None) + &c[0];
        for prediction in Prediction::ALL {
            let fake = Denoiser::new(RectifiedFlow, prediction, fake);
            let dm = DistributionMatching::new(fake);
            let renoising = Renoising::new(Uniform::new(0.02, 0.98)?);
            check_own_loss(&dm.renoising(renoising), &s.batch())?;
        }
        let critic = |x: &Tensor, _: &Tensor, cond: &Condition| {
            let seen = (x.to_kind(kind) + &cond[0] * 0.5).tanh().flatten(1, -1);
            seen.linear(&weight, None::<&Tensor>)
        };
        let penalties = [
            None,
            Some(CriticPenalty::R1 { gamma: 0.1 }),
            Some(CriticPenalty::ApproximateR1 { weight: 100.0, sigma: 0.01 }),
        ];
        for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
            for penalty in penalties {
                let mut term = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
                if let Some(penalty) = penalty {
                    term = term.penalty(penalty)?;
                }
                // Passed on by a loan and by a box.
                let lent: Box<dyn Regularizer> = Box::new(&term);
                check_own_loss(&lent, &s.batch_with_data())?;
            }
        }
    }
    Ok(())
}

#[test]
fn what_belongs_to_the_samples_one_by_one_turns_with_them() -> Result<(), Failure> {
    let (s, teacher) = (setting(Kind::Double), gaussian_teacher(0.5));
    let times = PreShift::new(Tensor::from_slice(&[0.1, 0.4, 0.8]))?;
    let mask = Tensor::from_slice(&[true, true, false]);
    let batch = s.batch_with_data().with_student_time(&times)?.with_mask(&mask)?;
    let all = engine_fn(|probe| {
        let batch = probe.batch();
        let times = batch.student_time().expect("given").tensor().view([3, 1, 1, 1]);
        let null = &batch.null()?[0];
        let sum: Tensor = batch.real()? * 2.0 + &batch.real_cond()[0] * 3.0 + null;
        probe.masked(&(sum * times + probe.noised() + &batch.cond()[0]))
    });
    check_engine(&all, &teacher, &batch)?;
    // A tensor of another length is nobody's, and stays as it is.
    let shared = Condition::from(vec![s.cond[0].shallow_clone(), Tensor::from_slice(&[2.0, 5.0])]);
    let batch = Batch::new(&s.x, &shared)?;
    let first = engine_fn(|p| Ok(p.noised() * p.batch().cond()[1].get(0) + &p.batch().cond()[0]));
    check_engine(&first, &teacher, &batch)
}

#[test]
fn a_gradient_may_be_off_by_rounding_and_not_by_more() -> Result<(), Failure> {
    let (s, teacher) = (setting(Kind::Double), gaussian_teacher(0.5));
    let off_by = |error: f64, offset: f64| {
        let loss = regularizer_fn(move |probe| {
            let value = (probe.x().f_pow_tensor_scalar(4)?.f_mean(None)? * 0.5) + offset;
            let slope = &value - value.detach();
            Ok(value.detach() + slope * (1.0 + error))
        });
        broken(check_gradient(&loss, &teacher, &s.batch()))
    };
    assert_eq!(off_by(0.0, 0.0), None);
    assert_eq!(off_by(1e-7, 0.0), None);
    assert_eq!(off_by(1e-4, 0.0), Some(Check::Gradient));
    assert_eq!(off_by(-1e-4, 0.0), Some(Check::Gradient));
    // A large value leaves fewer digits to its differences.
    assert_eq!(off_by(0.0, 1e6), None);
    assert_eq!(off_by(1.0, 1e6), Some(Check::Gradient));
    Ok(())
}

#[test]
fn answers_may_differ_by_rounding_in_proportion_to_their_size() {
    let teacher = gaussian_teacher(0.5);
    for (kind, tolerance) in [(Kind::Double, 1e-10), (Kind::Float, 1e-4)] {
        for size in [1e4, 1e-4] {
            let mut s = setting(kind);
            s.x *= size;
            let off_by = |error: f64| {
                let calls = Cell::new(0);
                let engine = engine_fn(|probe| {
                    calls.set(calls.get() + 1);
                    // The first result is the reference for the others.
                    let factor = if calls.get() > 1 { 1.0 + error } else { 1.0 };
                    Ok(probe.x().detach() * factor)
                });
                broken(check_engine(&engine, &teacher, &s.batch()))
            };
            assert_eq!(off_by(0.9 * tolerance), None, "{kind:?} {size}");
            assert_eq!(off_by(1.1 * tolerance), Some(Check::Deterministic), "{kind:?} {size}");
        }
    }
}

#[test]
fn an_error_of_libtorch_is_that_of_the_term() {
    let check = || -> Result<(), Failure> {
        let _sum = wave(&[2], 0.0, Kind::Float).f_add(&wave(&[3], 0.0, Kind::Float))?;
        Ok(())
    };
    assert!(matches!(check(), Err(Failure::Term(decoupled_dmd::Error::Torch(_)))));
}

fn broken(result: Result<(), Failure>) -> Option<Check> {
    match result {
        Err(Failure::Broken { check, .. }) => Some(check),
        _ => None,
    }
}

#[test]
fn engines_that_break_the_contract_are_found() {
    let (s, teacher) = (setting(Kind::Float), gaussian_teacher(0.5));
    type Direction = fn(&Probe<'_>) -> Result<Tensor>;
    let cases: [(Check, Direction); 7] = [
        (Check::Shape, |p| Ok(p.noised().f_mean(None)?)),
        (Check::Kind, |p| Ok(p.noised().f_to_kind(Kind::BFloat16)?)),
        (Check::NoGraph, |p| Ok(p.x().shallow_clone())),
        (Check::Finite, |p| Ok(p.noised().f_log()?)),
        (Check::Unchanged, |p| Ok(p.x().f_detach()?.f_mul_scalar_(2.0)?.f_detach_copy()?)),
        (Check::Permutation, |p| Ok(p.noised().f_cumsum(0, None)?)),
        (Check::BadSample, |p| Ok(p.noised().f_sub(&p.noised().f_mean(None)?)?)),
    ];
    for (check, direction) in cases {
        let result = check_engine(&engine_fn(direction), &teacher, &s.batch());
        assert_eq!(broken(result), Some(check));
    }
    let calls = Cell::new(0.0);
    let counting = engine_fn(|probe| {
        calls.set(calls.get() + 1.0);
        Ok(probe.noised().f_mul_scalar(calls.get())?)
    });
    let result = check_engine(&counting, &teacher, &s.batch());
    assert_eq!(broken(result), Some(Check::Deterministic));
    let first = s.x.narrow(0, 0, 1);
    let one = Batch::new(&first, &s.cond).unwrap();
    let result = check_engine(&engine_fn(|p| Ok(p.noised().shallow_clone())), &teacher, &one);
    assert_eq!(broken(result), Some(Check::SetUp));
}

#[test]
fn regularizers_that_break_the_contract_are_found() {
    let (s, teacher) = (setting(Kind::Double), gaussian_teacher(0.5));
    type Loss = fn(&Probe<'_>) -> Result<Tensor>;
    let cases: [(Check, Loss); 5] = [
        (Check::Shape, |p| Ok(p.x().f_square()?)),
        (Check::ReachesSamples, |p| Ok(p.noised().f_mean(None)?)),
        (Check::ReachesSamples, |p| {
            Ok(p.x().f_mul_scalar(0.0)?.f_mean(None)?.f_add_scalar(1.0)?)
        }),
        (Check::Finite, |p| Ok(p.x().f_abs()?.f_sub(&p.x().f_abs()?)?.f_sqrt()?.f_mean(None)?)),
        (Check::Permutation, |p| Ok(p.x().f_square()?.f_cumsum(0, None)?.f_mean(None)?)),
    ];
    for (check, loss) in cases {
        let result = check_regularizer(&regularizer_fn(loss), &teacher, &s.batch());
        assert_eq!(broken(result), Some(check));
    }
    let pooled = regularizer_fn(|p| Ok(p.x().f_mean(None)?.f_square()?));
    assert!(check_regularizer(&pooled, &teacher, &s.batch()).is_ok());
    let result = check_independence(&pooled, &teacher, &s.batch());
    assert_eq!(broken(result), Some(Check::BadSample));
    let dm = DistributionMatching::new(gaussian_teacher(0.8));
    assert_eq!(broken(check_gradient(&dm, &teacher, &s.batch())), Some(Check::Gradient));
    let narrow = setting(Kind::Float);
    assert_eq!(broken(check_gradient(&dm, &teacher, &narrow.batch())), Some(Check::SetUp));
    let failing = CfgAugmentation::new(Guidance::new(4.0).unwrap());
    let no_null = Batch::new(&s.x, &s.cond).unwrap();
    assert!(matches!(check_engine(&failing, &teacher, &no_null), Err(Failure::Term(_))));
}

/// A regularizer with the given own loss.
struct Owning<F>(F);

impl<F: Fn(&Batch<'_>) -> Result<Option<Tensor>>> Regularizer for Owning<F> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        Ok(probe.x().f_mean(None)?)
    }
    fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
        (self.0)(batch)
    }
}

#[test]
fn own_losses_that_break_the_contract_are_found() {
    let _guard = seeded(52);
    let (s, weight) = (setting(Kind::Double), wave(&[32], 0.9, Kind::Double));
    let weight = weight.set_requires_grad(true);
    let outputs = |x: &Tensor| x.flatten(1, -1).matmul(&weight);
    let error = |x: &Tensor| (outputs(x) - 1.0).square();
    let scalar = Tensor::from(0.5).set_requires_grad(true);
    type OwnLoss<'a> = &'a dyn Fn(&Tensor) -> Option<Tensor>;
    let cases: [(Option<Check>, OwnLoss<'_>); 12] = [
        (None, &|x| Some(error(&x.detach()).mean(None))),
        // Unlike a loss of the student, it may be narrow.
        (None, &|x| Some(error(&x.detach()).mean(None).to_kind(Kind::BFloat16))),
        (None, &|_| Some(scalar.shallow_clone())),
        (Some(Check::Shape), &|x| Some(error(&x.detach()))),
        (Some(Check::Kind), &|x| Some(error(&x.detach()).mean(None).to_kind(Kind::Int64))),
        (Some(Check::Finite), &|x| Some((outputs(&x.detach()).sum(None) * 0.0 - 1.0).log())),
        (Some(Check::ReachesNetwork), &|_| None),
        (Some(Check::ReachesNetwork), &|x| Some(error(&x.detach()).mean(None).detach())),
        (Some(Check::SparesSamples), &|x| Some(error(x).mean(None))),
        (Some(Check::SparesSamples), &|x| Some(error(&x.detach()).mean(None) + x.sum(None) * 0.0)),
        (Some(Check::SparesSamples), &|x| Some(x.square().mean(None))),
        (Some(Check::Unchanged), &|x| {
            Some(error(&(x.detach().f_mul_scalar_(2.0).ok()?)).mean(None))
        }),
    ];
    for (index, (check, own)) in cases.into_iter().enumerate() {
        let term = Owning(|batch: &Batch<'_>| Ok(own(batch.x())));
        assert_eq!(broken(check_own_loss(&term, &s.batch())), check, "case {index}");
    }
    assert!(!weight.grad().defined(), "a check leaves no gradient behind");
    let result = check_own_loss(&MeanVariance::per_sample(0.1, 0.8).unwrap(), &s.batch());
    assert_eq!(broken(result), Some(Check::ReachesNetwork));
    // Without its real samples a critic fails, which breaks nothing.
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| outputs(x);
    let gan = Adversarial::new(RectifiedFlow, critic);
    assert!(matches!(check_own_loss(&gan, &s.batch()), Err(Failure::Term(_))));
}
