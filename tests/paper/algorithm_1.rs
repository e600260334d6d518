//! Algorithm 1 and the schedules of the paper, each against a computation of its own.

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Engine, Group,
    Guidance, Normalizer, Objective, PostShift, Prediction, Probe, RectifiedFlow, Regularizer,
    Renoising, Result, Schedule, Shift, Shifts, Uniform, surrogate,
};
use tch::{Kind, Tensor};

use super::common::paper::{
    ALPHA, FAKE_VARIANCE, SHAPE, Setting, TEACHER_VARIANCE, mean_abs, setting,
};
use super::common::{
    BFLOAT16, Calls, FLOAT64, counting_teacher, float32_bound, gaussian_teacher, gradient,
    max_difference, relative, value, values, wave,
};

#[test]
fn algorithm_1_the_surrogate_is_half_the_mean_square_with_gradient_minus_direction() -> Result<()> {
    for kind in [Kind::Double, Kind::Float, Kind::BFloat16] {
        let x = wave(&SHAPE, 0.3, kind).set_requires_grad(true);
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let direction = wave(&SHAPE, 2.0, wide) * 0.01;
        let loss = surrogate(&x, &direction)?;
        assert_eq!(loss.size(), [0i64; 0]);
        let expected = 0.5 * value(&direction.square().mean(Kind::Double));
        approx::assert_relative_eq!(value(&loss), expected, max_relative = float32_bound(0.0));
        let expected = -direction / x.numel() as f64;
        let bound = match kind {
            Kind::Double => FLOAT64,
            Kind::Float => float32_bound(0.0),
            _ => BFLOAT16,
        };
        let error = relative("slope", &gradient(&loss, &x), &expected);
        assert!(error <= bound, "{kind:?}: {error}");
    }
    Ok(())
}

#[test]
fn algorithm_1_the_generator_step_without_a_normaliser() -> Result<()> {
    // L = || x - sg(x + lambda (Delta_DM + Delta_CA)) ||^2, each at its own tau and noise.
    const LAMBDA: f64 = 0.3;
    let ca_draw = setting(Kind::Double);
    let dm_draw = Setting {
        u: Tensor::from_slice(&[0.9, 0.1, 0.3]),
        noise: wave(&SHAPE, 9.0, Kind::Double),
        ..setting(Kind::Double)
    };
    let [_, cond, null, _] = ca_draw.predictions();
    let ca = (ALPHA - 1.0) * (cond - null);
    let [_, cond, _, fake] = dm_draw.predictions();
    let update = LAMBDA * (ca + cond - fake);
    let x = &ca_draw.x;
    let literal = (x - (x + update).detach()).square().sum(Kind::Double);

    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let group = || Group::new(Renoising::new(Uniform::FULL)).normalizer(Normalizer::OFF);
    let objective = Objective::new(gaussian_teacher(TEACHER_VARIANCE))
        .with(group().engine("ca", LAMBDA, CfgAugmentation::new(Guidance::new(ALPHA)?)))
        .with(group().regularizer("dm", LAMBDA, &dm));
    let draws = vec![ca_draw.draw(), dm_draw.draw()];
    let evaluation = objective.evaluate_at(&ca_draw.batch(), draws)?;
    // A sum without the half, against half the mean.
    let ours = gradient(&evaluation.loss, x) * (2.0 * x.numel() as f64);
    assert!(max_difference(&ours, &gradient(&literal, x)) < 1e-13);
    Ok(())
}

#[test]
fn algorithm_1_the_gradients_of_ca_and_dm_match_central_differences() -> Result<()> {
    // Central differences of 0.5 mean (x - T)^2 with the target T = x + d held.
    let s = setting(Kind::Double);
    let (teacher, batch) = (gaussian_teacher(TEACHER_VARIANCE), s.batch());
    let tau = PostShift::new(s.u.shallow_clone())?;
    let probe = Probe::at(&teacher, &batch, tau, s.noise.shallow_clone())?;
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let ca = CfgAugmentation::new(Guidance::new(ALPHA)?).direction(&probe)?;
    for (direction, loss) in
        [(dm.direction(&probe)?, dm.loss(&probe)?), (ca.copy(), surrogate(&s.x, &ca)?)]
    {
        let target = s.x.detach() + direction;
        let slope = gradient(&loss, &s.x).flatten(0, -1);
        for element in [0, 17, 40, 95] {
            let at = |offset: f64| {
                let x = s.x.detach().copy();
                let _ = x.view([-1]).narrow(0, element, 1).f_add_scalar_(offset).unwrap();
                value(&(0.5 * (x - &target).square().mean(None)))
            };
            let difference = (at(1e-4) - at(-1e-4)) / 2e-4;
            approx::assert_relative_eq!(
                slope.double_value(&[element]),
                difference,
                max_relative = 1e-7
            );
        }
    }
    Ok(())
}

#[test]
fn algorithm_1_the_fake_score_learns_the_sample_in_its_own_prediction_type() -> Result<()> {
    let s = setting(Kind::Double);
    let t = s.u.view([3, 1, 1, 1]);
    let x = s.x.detach();
    let scale = Tensor::from(0.7).set_requires_grad(true);
    let level: Tensor = 1.0 - &t;
    let noised = &t * &x + &level * &s.noise;
    for (prediction, target) in [
        (Prediction::Sample, x.shallow_clone()),
        (Prediction::Noise, s.noise.shallow_clone()),
        (Prediction::FlowVelocity, &s.noise - &x),
        (Prediction::Velocity, &t * &s.noise - &level * &x),
        (Prediction::Score, -&s.noise / &level),
    ] {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &scale;
        let dm = DistributionMatching::new(Denoiser::new(RectifiedFlow, prediction, network));
        let time = PostShift::new(s.u.shallow_clone())?;
        let loss = dm.denoising_loss_at(&s.batch(), &time, &s.noise)?;
        let expected = (target - &noised * &scale).square().mean(None);
        assert!(max_difference(&loss, &expected) < 1e-13, "{prediction:?}");
        let gradients = Tensor::run_backward(&[&loss], &[&s.x, &scale], true, false);
        assert!(!gradients[0].defined(), "the student must receive nothing");
        assert!(value(&gradients[1]).abs() > 1e-3);
    }
    Ok(())
}

#[test]
fn equation_8_the_terms_of_decoupled_groups_use_their_own_tau_and_noise() -> Result<()> {
    let ca_draw = setting(Kind::Double);
    let dm_draw = Setting {
        u: Tensor::from_slice(&[0.9, 0.1, 0.3]),
        noise: wave(&SHAPE, 9.0, Kind::Double),
        ..setting(Kind::Double)
    };
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let (teacher, guidance) = (gaussian_teacher(TEACHER_VARIANCE), Guidance::new(ALPHA)?);
    let objective = Schedule::DecoupledFull.objective(teacher, guidance, &dm);
    let batch = ca_draw.batch();
    let evaluation = objective.evaluate_at(&batch, vec![ca_draw.draw(), dm_draw.draw()])?;
    let normalise = |difference: Tensor, cond: &Tensor| {
        difference / mean_abs(&(&ca_draw.x - cond)).clamp_min(0.1)
    };
    let [_, cond, null, _] = ca_draw.predictions();
    let ca = normalise((ALPHA - 1.0) * (&cond - null), &cond);
    let [_, cond, _, fake] = dm_draw.predictions();
    let dm = normalise(&cond - fake, &cond);
    let expected = -(ca + dm) / ca_draw.x.numel() as f64;
    let slope = gradient(&evaluation.loss, &ca_draw.x);
    let error = max_difference(&slope, &expected) / value(&expected.abs().max());
    assert!(error < 1e-15, "{error}");
    Ok(())
}

#[test]
fn engine_and_regularizer_may_have_shifts_of_their_own() -> Result<()> {
    let (ca_draw, dm_draw) = (setting(Kind::Double), setting(Kind::Double));
    let [engine, regularizer] = [3.0, 0.5].map(Shift::new);
    let shifts = Shifts { engine: Some(engine?), regularizer: Some(regularizer?) };
    let calls = Calls::default();
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let teacher = counting_teacher(&calls, TEACHER_VARIANCE);
    let objective =
        Schedule::DecoupledFull.objective_with_shifts(teacher, Guidance::new(ALPHA)?, &dm, shifts);
    let batch = ca_draw.batch();
    let _ = objective.evaluate_at(&batch, vec![ca_draw.draw(), dm_draw.draw()])?;
    let u = values(&ca_draw.u);
    let shifted = |k: f64| u.iter().map(|u| k * u / (1.0 + (k - 1.0) * u)).collect::<Vec<_>>();
    let times = calls.times.borrow();
    // The clock of the shift runs from noise to data here: the shift enlarges sigma = 1 - t.
    let expected = [3.0, 3.0, 0.5].map(|k| shifted(1.0 / k));
    for (found, expected) in times.iter().zip(&expected) {
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-15, "{found} {expected}");
        }
    }
    assert_eq!(times.len(), 3);
    Ok(())
}

#[test]
fn gradients_of_micro_batches_add_up_to_the_gradient_of_the_batch() -> Result<()> {
    let double = |phase| wave(&[4, 2, 4, 4], phase, Kind::Double);
    let (z, cond, null, noise) =
        (double(0.3), double(1.1), double(2.9), [double(5.0), double(9.0)]);
    let u = [[0.2, 0.5, 0.7, 0.4], [0.9, 0.1, 0.3, 0.6]].map(|u| Tensor::from_slice(&u));
    let weight = wave(&[2, 4, 4], 0.9, Kind::Double).set_requires_grad(true);
    let gain = Tensor::from(0.7).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, c: &Condition| x * &gain + &c[0] * 0.1;
    let fake = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
    let dm = DistributionMatching::new(fake);
    let teacher = gaussian_teacher(TEACHER_VARIANCE);
    let objective = Schedule::DecoupledFull.objective(teacher, Guidance::new(ALPHA)?, &dm);
    let mask = Tensor::from_slice(&[true, false, true, true]);

    // Gradients of student and fake score, from parts of the batch, each weighted by its share.
    let gradients = |sizes: &[i64], is_masked: bool| -> Result<[Tensor; 2]> {
        let mut start = 0;
        for &size in sizes {
            let part = |tensor: &Tensor| tensor.narrow(0, start, size);
            let x = &part(&z) * &weight;
            let (cond, null) = (part(&cond).into(), part(&null).into());
            let mut batch = Batch::new(&x, &cond)?.with_null(&null);
            if is_masked {
                batch = batch.with_mask(&part(&mask))?;
            }
            let draw = |group: usize| Draw { u: part(&u[group]), noise: part(&noise[group]) };
            let share = size as f64 / 4.0;
            let evaluation = objective.evaluate_at(&batch, vec![draw(0), draw(1)])?;
            (evaluation.loss * share).backward();
            let time = PostShift::new(part(&u[0]))?;
            let own = dm.denoising_loss_at(&batch, &time, &part(&noise[1]))?;
            (own * share).backward();
            start += size;
        }
        Ok([&weight, &gain].map(|parameter| {
            let gradient = parameter.grad().copy();
            let _ = parameter.grad().zero_();
            gradient
        }))
    };
    // A gradient is a sum of at most 128 products, each with some tens of roundings, of numbers that are
    // at most a hundred times the sum.
    let tolerance = 128.0 * f64::EPSILON * 100.0;
    for is_masked in [false, true] {
        let whole = gradients(&[4], is_masked)?;
        for sizes in [&[2, 2][..], &[3, 1], &[1, 1, 1, 1]] {
            for (found, expected) in gradients(sizes, is_masked)?.iter().zip(&whole) {
                let error = max_difference(found, expected) / value(&expected.abs().max());
                assert!(error < tolerance, "{sizes:?}, masked {is_masked}: {error:e}");
            }
        }
        // The first two samples alone are something else.
        for (found, expected) in gradients(&[2], is_masked)?.iter().zip(&whole) {
            assert!(max_difference(found, expected) > 1e-2 * value(&expected.abs().max()));
        }
    }
    Ok(())
}
