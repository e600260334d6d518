//! Parts of a rollout and of a path: the noise of a segment (TDM), points off the rollout (CDM), phases with
//! noisy samples as data (Phased DMD), and targets that a teacher reached in several steps.

use std::cell::RefCell;

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, Distance, DistributionMatching, Draw, Error,
    FewStepGrid, Group, Guidance, NoisePath, Normalizer, Objective, PairedRegression, PostShift,
    Power, PreShift, Prediction, RectifiedFlow, Renoising, Result, Sampler, Shift, Steps,
    Subinterval, TimeDistribution, Times, Transition, Uniform,
};
use tch::{Device, Kind, Tensor};

use super::common::{
    DOUBLE, gaussian_denoiser, gaussian_teacher, gradient, max_difference, paths, value, values,
    wave,
};

fn double(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double)
}

fn post(values: &[f64]) -> PostShift {
    PostShift::new(Tensor::from_slice(values)).unwrap()
}

/// a and s at given times, as columns.
fn shares(path: &dyn NoisePath, time: &PostShift) -> (Tensor, Tensor) {
    let found = path.coefficients(time).unwrap();
    (
        found.data.to_kind(Kind::Double).view([-1, 1]),
        found.noise.to_kind(Kind::Double).view([-1, 1]),
    )
}

#[test]
fn powers_of_even_numbers_gather_at_the_noise() -> Result<()> {
    let u = Tensor::from_slice(&[0.0, 0.3, 0.5, 1.0]);
    let cubic = Power::new(3.0)?;
    assert!(max_difference(cubic.times(&u, None)?.tensor(), &(&u * &u * &u)) < 1e-15);
    assert!(Power::new(1.0)?.times(&u, None)?.tensor().equal(&u));
    let through = Renoising::new(Times::from(cubic)).at(
        &RectifiedFlow.shifted(Shift::new(3.0)?),
        &u,
        None,
    )?;
    assert!((values(through.tensor())[2] - Shift::new(3.0)?.of(0.125)).abs() < 1e-15);
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert!(matches!(
            Power::new(bad),
            Err(Error::OutOfRange { what: "power of the times", .. })
        ));
    }
    Ok(())
}

#[test]
fn the_noise_of_a_segment_is_the_forward_process_from_its_end() -> Result<()> {
    let (x0, implied, fresh) = (double(&[3, 4], 0.3), double(&[3, 4], 1.1), double(&[3, 4], 2.5));
    let (mid, tau) = (post(&[0.8, 0.5, 0.6]), post(&[0.3, 0.2, 0.59]));
    for path in paths() {
        let mix = path.segment_noise(&mid, &tau, &implied, &fresh)?;
        let ((a_mid, s_mid), (a, s)) = (shares(&*path, &mid), shares(&*path, &tau));
        let kept = &a / &a_mid;
        let added = (s.square() - (&kept * &s_mid).square()).sqrt();
        let from_end = &kept * (&a_mid * &x0 + &s_mid * &implied) + added * &fresh;
        let found = path.renoise(&x0, &tau, &mix)?;
        let size = value(&from_end.abs().max());
        assert!(max_difference(&found, &from_end) < 1e-13 * size);
        // At the end of the segment nothing is added.
        let same = path.segment_noise(&mid, &mid, &implied, &fresh)?;
        assert!(max_difference(&same, &implied) < 1e-7);
        let rough = path.segment_noise(&mid, &tau, &implied.to_kind(Kind::BFloat16), &fresh)?;
        assert_eq!(rough.kind(), Kind::Float);
        assert!(max_difference(&rough, &mix) < 0.02);
    }
    // A segment that ends in clean data has plain noise.
    let clean = post(&[1.0, 1.0, 1.0]);
    assert!(
        max_difference(&RectifiedFlow.segment_noise(&clean, &tau, &implied, &fresh)?, &fresh)
            < 1e-15
    );
    // Float32 times that are equal are no error.
    let float = PostShift::new(tau.tensor().to_kind(Kind::Float))?;
    assert!(RectifiedFlow.segment_noise(&float, &float, &implied, &fresh).is_ok());

    let refused = |mid: &PostShift, tau: &PostShift, name: &str| {
        let found = RectifiedFlow.segment_noise(mid, tau, &implied, &fresh);
        matches!(found, Err(Error::OutOfRange { what, .. } | Error::Shape { what, .. }) if what == name)
    };
    assert!(refused(&post(&[0.5, 0.0, 0.5]), &tau, "share of data at the middle time"));
    assert!(refused(&clean, &clean, "share of noise at the cleanest time"));
    assert!(refused(&tau, &mid, "share of fresh noise"));
    assert!(refused(&post(&[0.5]), &tau, "middle time"));
    assert!(refused(&mid, &post(&[0.5]), "time"));
    let short = RectifiedFlow.segment_noise(&mid, &tau, &implied, &double(&[3, 5], 0.1));
    assert!(matches!(short, Err(Error::Shape { what: "fresh noise", .. })));
    Ok(())
}

/// TDM's target is x + (cond - fake) + (w - 1)(cond - null) at the mixed noise: with a squared distance, twice
/// the gradient of Distribution Matching and CFG Augmentation in one group, whose surrogate has 1/2.
#[test]
fn the_update_of_tdm_is_one_group_at_the_mixed_noise() -> Result<()> {
    let (w, shape) = (4.5, [3i64, 4]);
    let (cond, null) = (Condition::from(double(&[3, 4], 0.9)), Condition::from(Tensor::from(0.2)));
    let path = RectifiedFlow;
    let (input, time) = (double(&shape, 1.7), post(&[0.2, 0.2, 0.2]));
    let x = double(&shape, 0.3).set_requires_grad(true);
    let (mid, tau) = (post(&[0.7, 0.7, 0.7]), post(&[0.3, 0.5, 0.6]));
    let implied = path.implied_noise(&input, &x.detach(), &time)?;
    let mix = path.segment_noise(&mid, &tau, &implied, &double(&shape, 5.0))?;
    assert!(!mix.requires_grad());
    let (teacher, fake) = (gaussian_teacher(1.0), gaussian_teacher(0.6));
    let noised = path.renoise(&x.detach(), &tau, &mix)?;
    let (of_cond, of_null) = teacher.denoise_pair(&noised, &tau, &cond, &null)?;
    let of_fake = fake.denoise(&noised, &tau, &cond)?;
    let target = x.detach() + (&of_cond - of_fake) + (&of_cond - of_null) * (w - 1.0);
    let squared = PairedRegression::new(Distance::Squared).between(&x, &target)?;

    let dm = DistributionMatching::new(fake);
    let objective = Objective::new(teacher).with(
        Group::new(Renoising::new(Uniform::FULL))
            .normalizer(Normalizer::OFF)
            .engine("ca", 1.0, CfgAugmentation::new(Guidance::new(w)?))
            .regularizer("dm", 1.0, &dm),
    );
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    let draws = vec![Draw { u: tau.tensor().shallow_clone(), noise: mix.shallow_clone() }];
    let loss = objective.evaluate_at(&batch, draws)?.loss;
    let found = gradient(&loss, &x) * 2.0;
    assert!(max_difference(&found, &gradient(&squared, &x)) < 1e-14);
    // The fake score is trained at the same noise.
    assert!(value(&dm.denoising_loss_at(&batch, &tau, &mix)?) > 0.0);
    Ok(())
}

fn linear_student(weight: &Tensor) -> Denoiser<'_> {
    let network =
        move |x: &Tensor, t: &Tensor, _: &Condition| (x * weight + t.view([-1, 1])).tanh();
    Denoiser::new(
        RectifiedFlow.shifted(Shift::new(3.0).unwrap()),
        Prediction::FlowVelocity,
        network,
    )
}

#[test]
fn a_point_off_the_rollout_lies_on_the_line_of_the_prediction() -> Result<()> {
    let weight = Tensor::from(0.8).set_requires_grad(true);
    let student = linear_student(&weight);
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Ddim);
    let (noise, cond) = (double(&[3, 4], 0.3), Condition::none());
    let from = sampler.simulate(&noise, &cond, 2)?;
    // At its own time a point is the input, and the student predicts the same.
    let again = sampler.simulate_off_trajectory(&from, &cond, &from.student_time)?;
    assert!(max_difference(&again.input, &from.input) < 1e-14);
    assert!(max_difference(&again.x, &from.x) < 1e-14);
    // Elsewhere it is Euler's step, also toward the noise, and only the new prediction has a graph.
    let times = PreShift::new(Tensor::from_slice(&[0.1, 0.9, 0.5]))?;
    let off = sampler.simulate_off_trajectory(&from, &cond, &times)?;
    let shift = Shift::new(3.0)?;
    assert!(max_difference(off.time.tensor(), shift.apply(&times)?.tensor()) < 1e-15);
    let level = |t: &PostShift| (t.tensor() * -1.0 + 1.0).view([-1, 1]);
    let velocity = (&from.input - from.x.detach()) / level(&from.time);
    let euler = &from.input + (level(&off.time) - level(&from.time)) * velocity;
    assert!(max_difference(&off.input, &euler) < 1e-14);
    assert!(!off.input.requires_grad() && off.x.requires_grad());
    assert!(value(&gradient(&off.x.square().mean(None), &weight).abs()) > 0.0);
    let batch = Batch::of(&off, &cond)?;
    assert!(batch.student_time().is_some() && batch.student_input().is_ok());

    // A student whose ODE is straight predicts one sample wherever it is asked.
    let end = double(&[3, 4], 2.2);
    let straight = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |_: &Tensor, _: &Tensor, _: &Condition| end.shallow_clone(),
    );
    let sampler = Sampler::new(&straight, FewStepGrid::even(4)?, Transition::Ddim);
    let from = sampler.simulate(&noise, &cond, 1)?;
    let off = sampler.simulate_off_trajectory(&from, &cond, &times)?;
    let ahead = straight.path().implied_noise(&off.input, &off.x, &off.time)?;
    assert!(max_difference(&ahead, &noise) < 1e-14 && off.x.equal(&end));

    let few = PreShift::new(Tensor::from_slice(&[0.1, 0.9]))?;
    let refused = sampler.simulate_off_trajectory(&from, &cond, &few);
    assert!(matches!(refused, Err(Error::Shape { what: "time", .. })));
    let last = sampler.simulate_from_real_at(
        &end,
        &cond,
        &Steps::new(Tensor::zeros([3], (Kind::Int64, Device::Cpu)))?,
        &noise,
    )?;
    assert!(sampler.simulate_off_trajectory(&last, &cond, &times).is_ok(), "from pure noise");
    let clean = sampler.simulate_off_trajectory(&from, &cond, &PreShift::all(1.0, 3, DOUBLE)?)?;
    let refused = sampler.simulate_off_trajectory(&clean, &cond, &times);
    assert!(matches!(refused, Err(Error::OutOfRange { what, .. })
        if what == "share of noise at the cleanest time"));
    Ok(())
}

#[test]
fn a_phase_is_a_path_whose_data_are_noisy() -> Result<()> {
    let time = post(&[0.0, 0.3, 0.8, 1.0]);
    for path in paths() {
        // Where the path ends clean, the whole of it is the path itself.
        let (whole, ends) = (Subinterval::new(&path, 1.0)?, shares(&*path, &post(&[1.0])).1);
        if value(&ends.max()) <= 0.0 {
            let (found, expected) = (whole.coefficients(&time)?, path.coefficients(&time)?);
            assert!(found.data.equal(&expected.data) && found.noise.equal(&expected.noise));
        }
        // Data to x_end to x_t has the law of data to x_t.
        let end = 0.7;
        let phase = Subinterval::new(&path, end)?;
        let ((a, s), (a_end, s_end)) = (shares(&phase, &time), shares(&*path, &post(&[end])));
        let (a_t, s_t) = shares(&*path, &phase.base_time(&time)?);
        assert!(max_difference(&(&a * &a_end), &a_t) < 1e-13);
        let variance = (&a * &s_end).square() + s.square();
        let most = value(&s_t.square().max());
        assert!(max_difference(&variance, &s_t.square()) < 1e-12 * most);
        // Clean here is x_end.
        assert!(
            (a.double_value(&[3, 0]) - 1.0).abs() < 1e-14 && s.double_value(&[3, 0]) < 1e-6 * most
        );
    }
    // A phase starts where its path starts.
    for path in paths() {
        let noise = double(&[2, 3], 0.7);
        let phase = Subinterval::new(&path, 0.4)?;
        assert!(phase.start(&noise)?.equal(&path.start(&noise)?));
    }
    let straight = Subinterval::new(RectifiedFlow, 1.0)?;
    assert!(straight.is_straight() && !Subinterval::new(RectifiedFlow, 0.7)?.is_straight());
    for bad in [0.0, -0.1, 1.1, f64::NAN] {
        let made = Subinterval::new(RectifiedFlow, bad);
        assert!(matches!(made, Err(Error::OutOfRange { what: "end of the subinterval", .. })));
        assert!(gaussian_teacher(1.0).on_subinterval(bad).is_err());
    }
    Ok(())
}

/// Data N(0, v) have x_end ~ N(0, a^2 v + s^2): the teacher of a phase, converted, is the exact denoiser of
/// that law on the phase's path. So Distribution Matching rests there.
#[test]
fn the_teacher_of_a_phase_is_the_denoiser_of_its_noisy_samples() -> Result<()> {
    let (v, end) = (1.3, 0.7);
    let of_end = end * end * v + (1.0 - end) * (1.0 - end);
    let phase = Subinterval::new(RectifiedFlow, end)?;
    let asked = RefCell::new(Vec::new());
    let velocity = |x: &Tensor, t: &Tensor, c: &Condition| {
        asked.borrow_mut().push(t.copy());
        // eps - x0 by the clean prediction.
        let sample = gaussian_denoiser(x, t, &c[0], v);
        (x - sample) / (t * -1.0 + 1.0).view([-1, 1])
    };
    let base = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, velocity);
    let teacher = base.clone().on_subinterval(end)?;
    let (noised, time) = (double(&[4, 3], 0.3), post(&[0.0, 0.25, 0.9, 1.0]));
    let cond = Condition::from(Tensor::from(0.0));
    let found = teacher.denoise(&noised, &time, &cond)?;
    let (a, s) = shares(&phase, &time);
    let gain = &a * of_end / (a.square() * of_end + s.square());
    assert!(max_difference(&found, &(gain * &noised)) < 1e-13);
    assert!(max_difference(&asked.borrow()[0], &(time.tensor() * end)) < 1e-15);
    // Two conditions still take one forward where the network has one for both.
    asked.take();
    let pair = base.paired(|x: &Tensor, t: &Tensor, one: &Condition, _: &Condition| {
        let output = velocity(x, t, one);
        (output.shallow_clone(), output)
    });
    let (one, two) = pair.on_subinterval(end)?.denoise_pair(&noised, &time, &cond, &cond)?;
    assert!(one.equal(&found) && two.equal(&found));
    assert_eq!(asked.borrow().len(), 1);

    let fake = Denoiser::new(phase, Prediction::Sample, |x: &Tensor, t: &Tensor, _: &Condition| {
        let (a, s) = shares(&phase, &PostShift::new(t.shallow_clone()).unwrap());
        &a * of_end / (a.square() * of_end + s.square()) * x
    });
    let dm = DistributionMatching::new(fake);
    let group = Group::new(Renoising::new(Uniform::FULL)).normalizer(Normalizer::OFF);
    let x = double(&[4, 3], 2.0).set_requires_grad(true);
    let batch = Batch::new(&x, &cond)?;
    let draws = vec![Draw { u: time.tensor().copy(), noise: double(&[4, 3], 5.0) }];
    let loss = Objective::new(teacher)
        .with(group.regularizer("dm", 1.0, &dm))
        .evaluate_at(&batch, draws)?;
    assert!(value(&gradient(&loss.loss, &x).abs().max()) < 1e-13);
    Ok(())
}

/// Phased DMD trains its fake score at u whose implied x_end is x_end: for Gaussian data the best linear u of
/// x_t is the flow of the data, (s_t - a_t v) / V = 0.78035, and dx_end/du is as published.
#[test]
fn the_fake_score_of_a_phase_learns_the_flow_of_the_data() -> Result<()> {
    let (v, end, t): (f64, f64, f64) = (1.3, 0.7, 0.2);
    let (a_t, s_t, a_end, s_end) = (t, 1.0 - t, end, 1.0 - end);
    let flow = (s_t - a_t * v) / (a_t * a_t * v + s_t * s_t);
    approx::assert_abs_diff_eq!(flow, 0.78035, epsilon = 1e-5);
    let slope = Tensor::from(flow).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &slope;
    let base = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
    let fake = base.on_subinterval(end)?;
    // Two points each for x_end and the noise have the second moments of the Gaussians.
    let std = (a_end * a_end * v + s_end * s_end).sqrt();
    let x = Tensor::from_slice(&[std, std, -std, -std]).view([4, 1]);
    let noise = Tensor::from_slice(&[1.0, -1.0, 1.0, -1.0]).view([4, 1]);
    let time = PostShift::all(t / end, 4, DOUBLE)?;
    let loss = fake.denoising_loss(&x, &time, &noise, &Condition::none())?;
    assert!(value(&gradient(&loss, &slope).abs()) < 1e-14);
    let one = Tensor::ones([1, 1], DOUBLE);
    let single = PostShift::all(t / end, 1, DOUBLE)?;
    let found = gradient(&fake.denoise(&one, &single, &Condition::none())?.sum(None), &slope);
    let (a, added) = (a_t / a_end, s_t * s_t - (a_t * s_end / a_end).powi(2));
    approx::assert_relative_eq!(
        value(&found),
        -(added / a) * a_t / (s_t * (a_t + s_t)),
        max_relative = 1e-13
    );
    Ok(())
}

#[test]
fn the_sample_that_a_teacher_reached_is_a_target() -> Result<()> {
    let (x, time, later) = (double(&[3, 4], 0.3), post(&[0.1, 0.4, 0.5]), post(&[0.3, 0.9, 0.98]));
    for path in paths() {
        // A step with a prediction leads back to the prediction.
        let sample = double(&[3, 4], 1.9);
        let noise = path.implied_noise(&x, &sample, &time)?;
        let reached = path.renoise(&sample, &later, &noise)?;
        let found = path.implied_sample(&x, &time, &reached, &later)?;
        assert!(max_difference(&found, &sample) < 1e-11, "{}", max_difference(&found, &sample));
    }
    // DP-DMD's anchor: at pure noise the squared error of the sample is that of the velocity
    // (eps - z) / (1 - noise level of z).
    let (eps, z) = (double(&[3, 4], 0.7), double(&[3, 4], 2.4));
    let (start, level) = (post(&[0.0; 3]), 0.8);
    let reached_at = PostShift::all(1.0 - level, 3, DOUBLE)?;
    let target = RectifiedFlow.implied_sample(&eps, &start, &z, &reached_at)?;
    let velocity = double(&[3, 4], 4.1);
    let student = &eps - &velocity;
    let anchor = PairedRegression::new(Distance::Squared).between(&student, &target)?;
    let expected = (velocity - (&eps - &z) / (1.0 - level)).square().mean(None);
    approx::assert_relative_eq!(value(&anchor), value(&expected), max_relative = 1e-13);

    let refused = |time: &PostShift, later: &PostShift, name: &str| {
        let found = RectifiedFlow.implied_sample(&x, time, &eps, later);
        matches!(found, Err(Error::OutOfRange { what, .. } | Error::Shape { what, .. }) if what == name)
    };
    let clean = post(&[1.0; 3]);
    assert!(refused(&clean, &clean, "share of noise at the time of the step"));
    assert!(refused(&later, &time, "share of the prediction in the step"));
    assert!(refused(&time, &time, "share of the prediction in the step"));
    assert!(refused(&time, &post(&[0.5]), "later time"));
    assert!(refused(&post(&[0.5]), &later, "time"));
    let short = RectifiedFlow.implied_sample(&x, &time, &double(&[3, 5], 0.1), &later);
    assert!(matches!(short, Err(Error::Shape { what: "reached", .. })));
    Ok(())
}
