//! Laws that hold for all inputs, tried on random ones.

use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Engine,
    Group, Guidance, LogitNormal, NoisePath, Normalizer, Objective, PostShift, PreShift,
    Prediction, Probe, RectifiedFlow, Renoising, Result, Schedule, Shift, TimeDistribution,
    Uniform, VariancePreserving, engine_fn, surrogate,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::common::{
    self, float32_bound, gaussian_teacher, gradient, max_difference, seeded, wave,
};

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
    let dm = DistributionMatching::new(gaussian_teacher(0.8));
    let objective = schedule.objective_with_shifts(
        gaussian_teacher(0.5),
        Guidance::new(alpha)?,
        &dm,
        Shift::new(3.0)?,
    );
    let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
    let draw = |_| Draw { u: pick(&times(u)), noise: pick(&wave(&shape, 3.0, Kind::Double)) };
    let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
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
        prop_assert!(straight.equal(&slope(schedule, alpha, &[0, 1, 2], &u).unwrap()));
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
        let batch = Batch::new(&x, &cond).unwrap().with_null(&null);
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
    fn a_normaliser_takes_the_scale_of_the_data_out(
        scale in 1e-3..1e3f64,
        alpha in 1.5..9.0f64,
        choice in 0..3usize,
    ) {
        let at = |scale: f64, normalizer: Normalizer| {
            let teacher = Denoiser::new(RectifiedFlow, Prediction::Sample, |_: &Tensor, _: &Tensor, c: &Condition| c[0].shallow_clone());
            let data = |phase| wave(&[2, 6], phase, Kind::Double) * scale;
            let (cond, null) = (Condition::from(data(1.0)), Condition::from(data(2.0)));
            let x = data(0.1);
            let batch = Batch::new(&x, &cond).unwrap().with_null(&null);
            let tau = PostShift::all(0.5, 2, (Kind::Double, Device::Cpu)).unwrap();
            let probe = Probe::at(&teacher, &batch, tau, x.shallow_clone()).unwrap();
            CfgAugmentation::new(Guidance::new(alpha).unwrap()).direction(&probe.normalizer(normalizer)).unwrap()
        };
        let guidance = Guidance::new(alpha).unwrap();
        let relative = [Normalizer::dmd2(guidance), Normalizer::fastvideo(guidance), Normalizer::conditional().unguarded()][choice];
        prop_assert!(max_difference(&at(scale, relative), &at(1.0, relative)) < 1e-11);
        let plain = at(1.0, Normalizer::OFF);
        prop_assert!(max_difference(&(at(scale, Normalizer::OFF) / scale), &plain) < 1e-11);
        // A guard can only shorten a direction.
        let floored = at(scale, Normalizer::conditional());
        let free = at(scale, Normalizer::conditional().unguarded());
        prop_assert!(common::value(&(floored.abs() - free.abs()).max()) < 1e-11);
    }

    #[test]
    fn masks_and_bad_samples_touch_nothing_else(
        keep in prop::array::uniform3(any::<bool>()),
        bad in 0..3i64,
        alpha in 1.0..9.0f64,
        u in prop::array::uniform3(0.05..0.95f64),
    ) {
        let slope = |mask: &[bool], bad: Option<i64>| {
            let x = wave(&[3, 2, 4], 0.1, Kind::Double);
            if let Some(bad) = bad {
                let _ = x.get(bad).fill_(f64::NAN);
            }
            let x = x.set_requires_grad(true);
            let (cond, null) = (
                Condition::from(wave(&[3, 2, 4], 1.0, Kind::Double)),
                Condition::from(wave(&[3, 2, 4], 2.0, Kind::Double)),
            );
            let guidance = Guidance::new(alpha).unwrap();
            let normalizer = Normalizer::guided(guidance);
            let dm = DistributionMatching::new(gaussian_teacher(0.8));
            let objective = Objective::new(gaussian_teacher(0.5)).with(
                Group::new(Renoising::new(Uniform::FULL))
                    .normalizer(normalizer)
                    .engine("ca", 1.0, CfgAugmentation::new(guidance))
                    .regularizer("dm", 1.0, &dm),
            );
            let mask = Tensor::from_slice(mask);
            let batch = Batch::new(&x, &cond).unwrap().with_null(&null).with_mask(&mask).unwrap();
            let draw = Draw { u: times(&u), noise: wave(&[3, 2, 4], 3.0, Kind::Double) };
            let evaluation = objective.evaluate_at(&batch, vec![draw]).unwrap();
            (gradient(&evaluation.loss, &x), common::value(&evaluation.loss))
        };
        let (whole, _) = slope(&[true; 3], None);
        let (masked, _) = slope(&keep, None);
        let (spoilt, loss) = slope(&keep, Some(bad));
        for (index, kept) in (0i64..).zip(keep) {
            if !kept {
                prop_assert_eq!(common::value(&masked.get(index).abs().max()), 0.0);
                prop_assert_eq!(common::value(&spoilt.get(index).abs().max()), 0.0);
            } else {
                prop_assert_eq!(max_difference(&masked.get(index), &whole.get(index)), 0.0);
                if index != bad {
                    prop_assert_eq!(max_difference(&spoilt.get(index), &masked.get(index)), 0.0);
                }
            }
        }
        // A sample that is masked does not even spoil the value.
        prop_assert_eq!(loss.is_finite(), !keep[bad as usize]);
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
    fn the_value_of_the_surrogate_is_not_rounded_away(scale in 1e-9..1e-6f64) {
        let x = wave(&[4, 8], 0.2, Kind::Float).set_requires_grad(true);
        let direction = wave(&[4, 8], 1.7, Kind::Float) * scale;
        let value = common::value(&surrogate(&x, &direction).unwrap());
        let expected = 0.5 * common::value(&direction.to_kind(Kind::Double).square().mean(None));
        prop_assert!((value / expected - 1.0).abs() <= float32_bound(0.0), "{value} {expected}");
    }

    #[test]
    fn shifted_times_stay_on_the_clock_in_float32(k in 1e-3..20.0f64, t in 0.0..1.0f32) {
        let end = [1.0, 2.0, 3.0, 5.0, 17.0].map(|steps| 1.0 - steps * f32::EPSILON / 2.0);
        let all = Tensor::from_slice(&[&end[..], &[0.0, t, 1.0]].concat());
        let time = PreShift::new(all.shallow_clone()).unwrap();
        let shifted = Shift::new(k).unwrap().apply(&time).unwrap();
        for t in common::values(shifted.tensor()) {
            prop_assert!((0.0..=1.0).contains(&t), "{t}");
        }
        let path = VariancePreserving::linear(0.1, 20.0).unwrap();
        let coefficients = path.coefficients(&shifted).unwrap();
        prop_assert!(coefficients.noise.isfinite().all().int64_value(&[]) == 1);
        prop_assert!(Shift::NONE.apply(&time).unwrap().tensor().equal(&all));
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
fn logit_normal_times_come_as_close_to_the_ends_as_float32_tells_apart() -> Result<()> {
    let u = times(&[0.0, 0.5, 1.0]);
    let of = |mean: f64| -> Result<Vec<f64>> {
        Ok(common::values(LogitNormal::new(mean, 1.0)?.times(&u, None)?.tensor()))
    };
    let end = 2f64.powi(-24);
    assert_eq!(of(-40.0)?, [end; 3]);
    assert_eq!(of(40.0)?, [1.0 - end; 3]);
    // Normal numbers end at 5.5.
    let sigmoid = |z: f64| 1.0 / (1.0 + (-z).exp());
    for (t, z) in of(0.0)?.into_iter().zip([-5.5, 0.0, 5.5]) {
        approx::assert_relative_eq!(t, sigmoid(z), max_relative = 1e-14);
    }
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
