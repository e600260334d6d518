//! Backward simulation and few-step sampling against closed forms.

use decoupled_dmd::{
    Condition, Denoiser, Edm, Error, FewStepGrid, Guidance, NoisePath, PostShift, Prediction,
    RectifiedFlow, Result, Sampler, Shift, Steps, Transition, TrigFlow, VariancePreserving,
};
use tch::{Kind, Tensor};

use super::common::{
    self, Calls, counting_teacher, gaussian_teacher, gradient, max_difference, value, wave,
};

const SHAPE: [i64; 4] = [2, 1, 2, 2];

fn noise() -> Tensor {
    wave(&SHAPE, 0.4, Kind::Double)
}

#[test]
fn the_euler_transition_is_the_euler_step_of_rectified_flow() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let denoiser = gaussian_teacher(0.5);
    let shift = Shift::new(3.0)?;
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(8)?.shifted(shift), Transition::Ddim);
    let sample = sampler.sample(&noise(), &cond)?;

    // x' = x + (sigma' - sigma) u with u = eps - x0, as diffusers' scheduler does it.
    let sigmas: Vec<f64> = (0..=8).map(|k| 1.0 - shift.of(f64::from(k) / 8.0)).collect();
    let mut x = noise();
    for pair in sigmas.windows(2) {
        let t = Tensor::full([2], 1.0 - pair[0], (Kind::Double, tch::Device::Cpu));
        let x0 = common::gaussian_denoiser(&x, &t, &cond[0], 0.5);
        let u = (&x - &x0) / pair[0];
        x += u * (pair[1] - pair[0]);
    }
    assert!(max_difference(&sample, &x) < 1e-6, "{}", max_difference(&sample, &x));
    Ok(())
}

#[test]
fn the_renoise_transition_mixes_the_prediction_with_fresh_noise() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let denoiser = gaussian_teacher(0.5);
    let grid = FewStepGrid::even(2)?;
    let sampler = Sampler::new(&denoiser, grid, Transition::Renoise);
    let fresh = wave(&SHAPE, 7.0, Kind::Double);
    let simulation = sampler.simulate_with(&noise(), &cond, 1, |step, like| {
        assert_eq!((step, like.size()), (1, SHAPE.to_vec()));
        Ok(fresh.shallow_clone())
    })?;
    let at = |t: f64| Tensor::full([2], t, (Kind::Double, tch::Device::Cpu));
    let first = common::gaussian_denoiser(&noise(), &at(0.0), &cond[0], 0.5);
    let second = first * 0.5 + &fresh * 0.5;
    let expected = common::gaussian_denoiser(&second, &at(0.5), &cond[0], 0.5);
    assert!(max_difference(&simulation.x, &expected) < 1e-14);
    assert_eq!(common::values(simulation.student_time.tensor()), [0.5, 0.5]);
    Ok(())
}

#[test]
fn fresh_noise_that_is_not_like_the_sample_is_refused() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let denoiser = gaussian_teacher(0.5);
    let grid = FewStepGrid::even(2)?;
    let sampler = Sampler::new(&denoiser, grid, Transition::Renoise);
    let with = |fresh: Tensor| {
        sampler.simulate_with(&noise(), &cond, 1, |_, _| Ok(fresh.shallow_clone())).unwrap_err()
    };
    // It would spread over the sample without a word.
    let one_for_all = wave(&[1, 1, 2, 2], 0.0, Kind::Double);
    assert!(matches!(with(one_for_all), Error::Shape { what: "fresh noise", .. }));
    let integers = noise().to_kind(Kind::Int64);
    assert!(matches!(with(integers), Error::Kind { what: "fresh noise", .. }));
    Ok(())
}

#[test]
fn the_times_of_drawn_steps_have_the_range_of_the_grid() -> Result<()> {
    // The range is known without reading the times: a grid from pure noise is refused for all draws.
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
    let student = Denoiser::new(RectifiedFlow, Prediction::Noise, network);
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Ddim);
    let made =
        sampler.simulate_from_real_at(&noise(), &Condition::none(), &steps(&[1, 2]), &noise());
    let what = "share of data at the noisiest time";
    assert!(matches!(made, Err(Error::OutOfRange { what: found, .. }) if found == what));
    Ok(())
}

#[test]
fn simulation_has_the_gradient_of_its_last_step_alone() -> Result<()> {
    let gain = Tensor::from(0.5f64).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &gain;
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let grid = FewStepGrid::even(4)?;
    let sampler = Sampler::new(&student, grid, Transition::Ddim);
    let simulation = sampler.simulate(&noise(), &Condition::none(), 2)?;
    let slope = gradient(&simulation.x.sum(None), &gain);
    // x0 = gain * x_2 with x_2 constant: the derivative is the sum of x_2 = x / gain.
    let expected = value(&simulation.x.detach().sum(None)) / 0.5;
    approx::assert_relative_eq!(value(&slope), expected, max_relative = 1e-12);
    Ok(())
}

#[test]
fn sampling_counts_one_evaluation_a_step_and_two_with_guidance() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let null = Condition::from(wave(&SHAPE, 3.0, Kind::Double));
    let calls = Calls::default();
    let denoiser = counting_teacher(&calls, 0.5);
    let sampler = |guidance: f64| -> Result<Sampler<'_>> {
        let grid = FewStepGrid::even(5)?;
        let sampler = Sampler::new(&denoiser, grid, Transition::Ddim);
        Ok(sampler.guided(Guidance::new(guidance)?, &null))
    };
    let plain = sampler(1.0)?.sample(&noise(), &cond)?;
    assert_eq!(calls.count(), 5);
    let guided = sampler(3.0)?.sample(&noise(), &cond)?;
    assert_eq!(calls.count(), 15);
    // The denoiser is affine in its mean: guidance acts as the mean null + 3 (cond - null).
    let mean: Tensor = &null[0] + 3.0 * (&cond[0] - &null[0]);
    let expected = sampler(1.0)?.sample(&noise(), &mean.into())?;
    assert!(max_difference(&guided, &expected) < 1e-12);
    assert!(max_difference(&guided, &plain) > 0.1);
    assert!(!guided.requires_grad());
    Ok(())
}

#[test]
fn steps_are_drawn_evenly_from_the_grid() -> Result<()> {
    let _guard = common::seeded(2);
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(4)?, Transition::Ddim);
    let mut counts = [0; 4];
    for _ in 0..4000 {
        counts[sampler.draw_step()?] += 1;
    }
    assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    Ok(())
}

/// E[x0 | x_t] of data N(0.3, 0.5 I) where the path has the shares a and s.
fn posterior(x: &Tensor, a: f64, s: f64) -> Tensor {
    0.3 + a * 0.5 / (a * a * 0.5 + s * s) * (x - a * 0.3)
}

fn at(path: &dyn NoisePath, t: f64) -> (f64, f64) {
    let time = PostShift::all(t, 1, (Kind::Double, tch::Device::Cpu)).unwrap();
    let c = path.coefficients(&time).unwrap();
    (value(&c.data), value(&c.noise))
}

#[test]
fn every_path_starts_from_its_noise_and_follows_its_own_ode_step() -> Result<()> {
    let sdxl = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
    let paths: [(&dyn NoisePath, f64); 5] = [
        (&RectifiedFlow, 1.0),
        (&VariancePreserving::linear(0.1, 20.0)?, 1.0),
        (&sdxl, 1.0),
        (&Edm::default(), 80.0),
        (&TrigFlow, 1.0),
    ];
    for (which, (path, start)) in paths.into_iter().enumerate() {
        let inputs = std::cell::RefCell::new(Vec::new());
        let network = |x: &Tensor, t: &Tensor, _: &Condition| {
            inputs.borrow_mut().push(x.shallow_clone());
            let (a, s) = at(path, value(&t.get(0)));
            posterior(x, a, s)
        };
        let denoiser = Denoiser::new(path, Prediction::Sample, network);
        let grid = FewStepGrid::even(4)?;
        let sample =
            Sampler::new(&denoiser, grid, Transition::Ddim).sample(&noise(), &Condition::none())?;
        let inputs = inputs.borrow();
        assert!(max_difference(&inputs[0], &(noise() * start)) < 1e-12, "path {which}");
        for step in 0..3usize {
            let t = step as f64 / 4.0;
            let ((a, s), (next_a, next_s)) = (at(path, t), at(path, t + 0.25));
            let x = &inputs[step];
            let x0 = posterior(x, a, s);
            let eps = (x - a * &x0) / s;
            let expected = match which {
                // EDM: the Euler step of dx/dsigma = (x - D) / sigma.
                3 => x + (next_s - s) * (x - &x0) / s,
                // TrigFlow: a rotation by the difference of the angles, with F = dx/dangle.
                4 => {
                    let turn = std::f64::consts::FRAC_PI_2 * 0.25;
                    turn.cos() * x - turn.sin() * (a * eps - s * x0)
                }
                _ => next_a * x0 + next_s * eps,
            };
            assert!(max_difference(&inputs[step + 1], &expected) < 1e-12, "path {which}, {step}");
        }
        let (a, s) = at(path, 0.75);
        assert!(max_difference(&sample, &posterior(&inputs[3], a, s)) < 1e-12);
    }
    Ok(())
}

fn steps(steps: &[i64]) -> Steps {
    Steps::new(Tensor::from_slice(steps)).unwrap()
}

#[test]
fn real_samples_are_noised_to_the_times_of_their_steps() -> Result<()> {
    let real = wave(&[3, 1, 2, 2], 1.0, Kind::Double).set_requires_grad(true);
    let noise = wave(&[3, 1, 2, 2], 4.0, Kind::Double);
    let shift = Shift::new(3.0)?;
    let edm = Edm::default();
    let gain = Tensor::from(0.5f64).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &gain;
    let student = Denoiser::new(edm, Prediction::Sample, network);
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?.shifted(shift), Transition::Renoise);
    let simulation =
        sampler.simulate_from_real_at(&real, &Condition::none(), &steps(&[0, 3, 1]), &noise)?;
    assert_eq!(common::values(simulation.student_time.tensor()), [0.0, 0.75, 0.25]);
    for (row, t) in [(0, None), (1, Some(0.75)), (2, Some(0.25))] {
        let (x0, eps) = (real.detach().get(row), noise.get(row));
        // The first step sees pure noise, as in sampling, not data under noise.
        let input = t.map_or(80.0 * &eps, |t| x0 + at(&edm, shift.of(t)).1 * &eps);
        assert!(max_difference(&simulation.x.get(row), &(input * 0.5)) < 1e-12, "row {row}");
    }
    let gradients = Tensor::run_backward(&[simulation.x.sum(None)], &[&real, &gain], true, false);
    assert!(!gradients[0].defined(), "real samples must receive nothing");
    assert!(value(&gradients[1]).abs() > 1e-3);

    let bad = |steps: &[i64], noise: &Tensor| {
        sampler
            .simulate_from_real_at(&real, &Condition::none(), &self::steps(steps), noise)
            .unwrap_err()
    };
    assert!(matches!(bad(&[0, 1], &noise), Error::Shape { what: "steps", .. }));
    assert!(matches!(bad(&[0, 4, 1], &noise), Error::OutOfRange { what: "step", .. }));
    assert!(matches!(bad(&[0, 3, 1], &noise.get(0)), Error::Shape { what: "noise", .. }));
    let scalar = sampler.simulate_from_real(&Tensor::from(1.0), &Condition::none()).unwrap_err();
    assert!(matches!(scalar, Error::Shape { what: "real samples", .. }));
    Ok(())
}

#[test]
fn the_steps_of_real_samples_are_drawn_for_each() -> Result<()> {
    let _guard = common::seeded(4);
    let real = wave(&[64, 2], 1.0, Kind::Float);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Ddim);
    let times = sampler.simulate_from_real(&real, &Condition::none())?.student_time;
    let times = common::values(times.tensor());
    for time in [0.0, 0.25, 0.5, 0.75] {
        assert!(times.iter().filter(|&&t| t == time).count() == 16, "{times:?}");
    }
    Ok(())
}

#[test]
fn without_a_gradient_nothing_builds_a_graph() -> Result<()> {
    let gain = Tensor::from(0.5f64).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &gain;
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let sampler = Sampler::new(&student, FewStepGrid::even(3)?, Transition::Ddim);
    let none = Condition::none();
    assert!(!sampler.sample(&noise(), &none)?.requires_grad());
    assert!(sampler.simulate(&noise(), &none, 2)?.x.requires_grad());
    let _no_grad = tch::no_grad_guard();
    assert!(!sampler.simulate(&noise(), &none, 2)?.x.requires_grad());
    assert!(
        !sampler
            .simulate_from_real_at(&noise(), &none, &steps(&[0, 2]), &noise())?
            .x
            .requires_grad()
    );
    Ok(())
}

#[test]
fn a_kept_rollout_holds_what_every_simulation_sees() -> Result<()> {
    let cond = Condition::none();
    let (edm, sdxl) = (Edm::default(), VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?);
    for path in [&edm as &dyn NoisePath, &sdxl, &RectifiedFlow] {
        let network = |x: &Tensor, t: &Tensor, _: &Condition| {
            let c = path.coefficients(&PostShift::new(t.shallow_clone()).unwrap()).unwrap();
            let (a, s) = (c.data.view([-1, 1, 1, 1]), c.noise.view([-1, 1, 1, 1]));
            0.3 + &a * 0.5 / (a.square() * 0.5 + s.square()) * (x - a * 0.3)
        };
        let denoiser = Denoiser::new(path, Prediction::Sample, network);
        let grid = FewStepGrid::even(3)?.shifted(Shift::new(3.0)?);
        let sampler = Sampler::new(&denoiser, grid, Transition::Ddim);
        let trajectory = sampler.trajectory(&noise(), &cond)?;
        let each = steps(&[2, 0]);
        let kept = sampler.simulate_on(&trajectory, &cond, &each)?;
        assert!(max_difference(&trajectory.samples_at(&each)?, &kept.x) < 1e-14);
        for (row, step) in [(0, 2), (1, 0)] {
            let alone = sampler.simulate(&noise(), &cond, step)?;
            assert!(max_difference(&alone.x.get(row), &kept.x.get(row)) < 1e-12);
            let times = (alone.student_time, &kept.student_time);
            assert!(max_difference(&times.0.tensor().get(row), &times.1.tensor().get(row)) < 1e-15);
        }
    }
    Ok(())
}
