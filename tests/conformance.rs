//! Every built-in term keeps the contract of its trait, and the checks find terms that do not.

mod common;

use std::cell::Cell;

use common::{gaussian_teacher, wave};
use decoupled_dmd::testing::{
    Check, Failure, check_engine, check_gradient, check_independence, check_regularizer,
};
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, DistributionMatching, Guidance, MeanVariance, Probe, Result,
    Shift, engine_fn, regularizer_fn,
};
use tch::{Kind, Tensor};

struct Setting {
    x: Tensor,
    cond: Condition,
    null: Condition,
}

fn setting(kind: Kind) -> Setting {
    let condition = |phase| wave(&[3, 2, 4, 4], phase, kind).into();
    Setting { x: wave(&[3, 2, 4, 4], 0.3, kind), cond: condition(1.1), null: condition(2.9) }
}

impl Setting {
    fn batch(&self) -> Batch<'_> {
        Batch::new(&self.x, &self.cond).unwrap().null(&self.null)
    }
}

const KINDS: [Kind; 3] = [Kind::Float, Kind::Double, Kind::BFloat16];

#[test]
fn cfg_augmentation() -> Result<(), Failure> {
    for kind in KINDS {
        let (s, teacher) = (setting(kind), gaussian_teacher(0.5));
        check_engine(&CfgAugmentation::new(Guidance::new(4.0)?), &teacher, &s.batch())?;
        let mask = Tensor::from_slice(&[true, false, true]);
        let masked = s.batch().mask(&mask)?;
        check_engine(&CfgAugmentation::new(Guidance::new(4.0)?), &teacher, &masked)?;
    }
    Ok(())
}

#[test]
fn distribution_matching() -> Result<(), Failure> {
    for kind in KINDS {
        let (s, teacher) = (setting(kind), gaussian_teacher(0.5));
        let dm = DistributionMatching::new(gaussian_teacher(0.8), Shift::NONE);
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
        for term in
            [MeanVariance::per_sample(0.1, 0.8)?, MeanVariance::per_channel(&mean, &variance)?]
        {
            check_regularizer(&term, &teacher, &s.batch())?;
            check_independence(&term, &teacher, &s.batch())?;
            if kind == Kind::Double {
                check_gradient(&term, &teacher, &s.batch())?;
            }
        }
    }
    Ok(())
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
        (Check::ReachesSamples, |p| Ok(p.x().f_mul_scalar(0.0)?.f_mean(None)?)),
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
    let dm = DistributionMatching::new(gaussian_teacher(0.8), Shift::NONE);
    assert_eq!(broken(check_gradient(&dm, &teacher, &s.batch())), Some(Check::Gradient));
    let narrow = setting(Kind::Float);
    assert_eq!(broken(check_gradient(&dm, &teacher, &narrow.batch())), Some(Check::SetUp));
    let failing = CfgAugmentation::new(Guidance::new(4.0).unwrap());
    let no_null = Batch::new(&s.x, &s.cond).unwrap();
    assert!(matches!(check_engine(&failing, &teacher, &no_null), Err(Failure::Term(_))));
}
