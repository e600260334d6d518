//! Backward simulation and few-step sampling against closed forms.

mod common;

use common::{Calls, counting_teacher, gaussian_teacher, gradient, max_difference, value, wave};
use decoupled_dmd::{
    Condition, Denoiser, Error, FewStepGrid, Guidance, Prediction, RectifiedFlow, Result, Sampler,
    Shift, Transition,
};
use tch::{Kind, Tensor};

const SHAPE: [i64; 4] = [2, 1, 2, 2];

fn noise() -> Tensor {
    wave(&SHAPE, 0.4, Kind::Double)
}

#[test]
fn the_euler_transition_is_the_euler_step_of_rectified_flow() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let denoiser = gaussian_teacher(0.5);
    let shift = Shift::new(3.0)?;
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(8, shift)?, Transition::Euler);
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
    let grid = FewStepGrid::even(2, Shift::NONE)?;
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
fn simulation_has_the_gradient_of_its_last_step_alone() -> Result<()> {
    let gain = Tensor::from(0.5f64).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &gain;
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let grid = FewStepGrid::even(4, Shift::NONE)?;
    let sampler = Sampler::new(&student, grid, Transition::Euler);
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
        let grid = FewStepGrid::even(5, Shift::NONE)?;
        let sampler = Sampler::new(&denoiser, grid, Transition::Euler);
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
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(4, Shift::NONE)?, Transition::Euler);
    let mut counts = [0; 4];
    for _ in 0..4000 {
        counts[sampler.draw_step()?] += 1;
    }
    assert!(counts.iter().all(|count| (900..1100).contains(count)), "{counts:?}");
    Ok(())
}

#[test]
fn bad_grids_and_steps_are_refused() -> Result<()> {
    let grid = |times: &[f64]| FewStepGrid::new(times.to_vec(), Shift::NONE);
    assert!(grid(&[0.0, 0.3, 0.9]).is_ok());
    for times in [&[][..], &[0.1, 0.5], &[0.0, 0.5, 0.5], &[0.0, 1.0], &[0.0, f64::NAN]] {
        assert!(matches!(grid(times), Err(Error::OutOfRange { .. })), "{times:?}");
    }
    assert!(matches!(FewStepGrid::even(0, Shift::NONE), Err(Error::OutOfRange { .. })));
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, grid(&[0.0, 0.5])?, Transition::Euler);
    let cond = Condition::from(noise());
    let error = sampler.simulate(&noise(), &cond, 2).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { what: "step", value: 2.0, .. }));
    let error = sampler.simulate(&Tensor::from(1.0), &cond, 0).unwrap_err();
    assert!(matches!(error, Error::Shape { what: "noise", .. }));
    Ok(())
}
