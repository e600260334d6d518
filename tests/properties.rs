//! Laws that hold for all inputs, tried on random ones.

mod common;

use common::{gaussian_teacher, gradient, max_difference, seeded, wave};
use decoupled_dmd::{
    AboveStudent, Batch, Condition, DistributionMatching, Draw, Engine, Guidance, PostShift,
    PreShift, Probe, Regularizer, Result, Schedule, Shift, TimeSampler, Uniform, engine_fn,
    surrogate,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

fn times(values: &[f64]) -> Tensor {
    Tensor::from_slice(values)
}

/// The gradient of an objective in x, for given draws.
fn slope(schedule: Schedule, alpha: f64, order: &[i64], u: &[f64]) -> Result<Tensor> {
    let pick = |t: &Tensor| t.index_select(0, &Tensor::from_slice(order));
    let shape = [3, 2, 4];
    let x = pick(&wave(&shape, 0.1, Kind::Double)).set_requires_grad(true);
    let (cond, null) = (wave(&shape, 1.0, Kind::Double), wave(&shape, 2.0, Kind::Double));
    let (cond, null): (Condition, Condition) = (pick(&cond).into(), pick(&null).into());
    let time = PreShift::new(pick(&times(&[0.0, 0.25, 0.5])))?;
    let dm = DistributionMatching::new(gaussian_teacher(0.8), Shift::NONE);
    let objective =
        schedule.objective(gaussian_teacher(0.5), Guidance::new(alpha)?, &dm, Shift::new(3.0)?);
    let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
    let draw = |_| Draw { u: pick(&times(u)), noise: pick(&wave(&shape, 3.0, Kind::Double)) };
    let batch = Batch::new(&x, &cond)?.null(&null).student_time(&time)?;
    let evaluation = objective.evaluate_at(&batch, (0..groups).map(draw).collect())?;
    Ok(gradient(&evaluation.loss, &x))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn permuting_the_batch_permutes_the_gradient(
        alpha in 1.0..9.0f64,
        u in prop::array::uniform3(0.0..1.0f64),
        schedule in prop::sample::select(&Schedule::ALL[..]),
    ) {
        let straight = slope(schedule, alpha, &[0, 1, 2], &u).unwrap();
        let turned = slope(schedule, alpha, &[2, 0, 1], &u).unwrap();
        let expected = straight.index_select(0, &Tensor::from_slice(&[2i64, 0, 1]));
        prop_assert!(max_difference(&turned, &expected) < 1e-14);
        prop_assert!(turned.isfinite().all().int64_value(&[]) == 1);
    }

    #[test]
    fn the_engine_is_linear_in_the_weight_of_guidance(alpha in 1.0..20.0f64, tau in 0.05..0.95f64) {
        let (x, cond, null) = (
            wave(&[2, 6], 0.1, Kind::Double),
            Condition::from(wave(&[2, 6], 1.0, Kind::Double)),
            Condition::from(wave(&[2, 6], 2.0, Kind::Double)),
        );
        let teacher = gaussian_teacher(0.5);
        let batch = Batch::new(&x, &cond).unwrap().null(&null);
        let direction = |alpha: f64| {
            let tau = PostShift::all(tau, 2, (Kind::Double, Device::Cpu)).unwrap();
            let probe = Probe::at(&teacher, &batch, tau, wave(&[2, 6], 4.0, Kind::Double)).unwrap();
            let guidance = Guidance::new(alpha).unwrap();
            decoupled_dmd::CfgAugmentation::new(guidance).direction(&probe).unwrap()
        };
        let expected = direction(2.0) * (alpha - 1.0);
        prop_assert!(max_difference(&direction(alpha), &expected) < 1e-11);
    }

    #[test]
    fn the_surrogate_descends_along_the_direction(
        scale in -10.0..10.0f64,
        shape in prop::collection::vec(1..5i64, 2..5),
    ) {
        let x = wave(&shape, 0.2, Kind::Double).set_requires_grad(true);
        let direction = wave(&shape, 1.7, Kind::Double) * scale;
        let loss = surrogate(&x, &direction).unwrap();
        let expected = &direction / -(x.numel() as f64);
        prop_assert!(max_difference(&gradient(&loss, &x), &expected) < 1e-14);
        let moved = (&x - gradient(&loss, &x) * x.numel() as f64).detach();
        prop_assert!(max_difference(&moved, &(&x + &direction)) < 1e-13);
    }

    #[test]
    fn sampled_times_stay_in_their_range(
        u in prop::array::uniform4(0.0..1.0f64),
        student in prop::array::uniform4(0.0..1.0f64),
        gap in 0.0..0.5f64,
        high in 0.5..1.0f64,
        k in 0.1..10.0f64,
    ) {
        let time = PreShift::new(times(&student)).unwrap();
        let above = AboveStudent::new(gap, high).unwrap().times(&times(&u), Some(&time)).unwrap();
        let tau = Shift::new(k).unwrap().apply(&above).unwrap();
        prop_assert!(PostShift::new(tau.tensor().shallow_clone()).is_ok());
        for (tau, t) in common::values(above.tensor()).into_iter().zip(student) {
            prop_assert!(tau <= high + 1e-12);
            prop_assert!(tau >= (t + gap).min(high) - 1e-12);
        }
        let uniform = Uniform::new(gap, high).unwrap().times(&times(&u), None).unwrap();
        for tau in common::values(uniform.tensor()) {
            prop_assert!((gap..=high).contains(&tau));
        }
    }
}

#[test]
fn draws_repeat_under_a_seed() -> Result<()> {
    let x = wave(&[2, 6], 0.1, Kind::Float).set_requires_grad(true);
    let cond = Condition::from(wave(&[2, 6], 1.0, Kind::Float));
    let dm = DistributionMatching::new(gaussian_teacher(0.8), Shift::NONE);
    let objective = Schedule::DecoupledFull.objective(
        gaussian_teacher(0.5),
        Guidance::NEUTRAL,
        &dm,
        Shift::NONE,
    );
    let batch = Batch::new(&x, &cond)?;
    let losses = |seed| -> Result<[f64; 2]> {
        let _guard = seeded(seed);
        let own = dm.own_loss(&batch)?.map_or(f64::NAN, |loss| common::value(&loss));
        Ok([common::value(&objective.evaluate(&batch)?.loss), own])
    };
    assert_eq!(losses(3)?, losses(3)?);
    assert_ne!(losses(3)?, losses(4)?);
    Ok(())
}

#[test]
fn closures_are_terms() -> Result<()> {
    let _guard = seeded(5);
    let x = wave(&[2, 6], 0.1, Kind::Double);
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?;
    let teacher = gaussian_teacher(0.5);
    let tau = PostShift::all(0.5, 2, (Kind::Double, Device::Cpu))?;
    let probe = Probe::at(&teacher, &batch, tau, x.shallow_clone())?;
    let engine = engine_fn(|probe| Ok(probe.x().f_neg()?));
    let boxed: Box<dyn Engine> = Box::new(&engine);
    assert_eq!(max_difference(&boxed.direction(&probe)?, &x.neg()), 0.0);
    Ok(())
}
