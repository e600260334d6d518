//! Few-step grids: what they hold, where they may start and end, and which are refused.

use decoupled_dmd::{
    Condition, Denoiser, Error, FewStepGrid, Prediction, RectifiedFlow, Result, Sampler, Shift,
    Steps, Transition, VariancePreserving,
};
use tch::{Kind, Tensor};

use super::common::{gaussian_teacher, max_difference, seeded, wave};

fn noise() -> Tensor {
    wave(&[2, 1, 2, 2], 0.4, Kind::Double)
}

#[test]
fn bad_grids_and_steps_are_refused() -> Result<()> {
    let grid = |times: &[f64]| FewStepGrid::new(times.to_vec());
    assert!(grid(&[0.0, 0.3, 0.9]).is_ok());
    for times in [&[][..], &[-0.1, 0.5], &[1.0], &[0.0, 0.5, 0.5], &[0.0, 1.0], &[0.0, f64::NAN]] {
        assert!(matches!(grid(times), Err(Error::OutOfRange { .. })), "{times:?}");
    }
    for steps in [0, 1_000_001, usize::MAX] {
        for made in [FewStepGrid::even(steps), FewStepGrid::dynamic(steps)] {
            assert!(matches!(made, Err(Error::OutOfRange { what: "number of steps", .. })));
        }
    }
    // Shifted onto the clean end, as float32 has it.
    let denoiser = gaussian_teacher(0.5);
    let ends = [FewStepGrid::even(4)?.shifted(Shift::new(1e-9)?), grid(&[0.0, 1.0 - 1e-12])?];
    for at_the_end in ends {
        let sampler = Sampler::new(&denoiser, at_the_end, Transition::Ddim);
        let error = sampler.sample(&noise(), &Condition::from(noise())).unwrap_err();
        let what = "last time of the shifted grid";
        assert!(matches!(error, Error::OutOfRange { what: found, .. } if found == what));
    }
    let sampler = Sampler::new(&denoiser, grid(&[0.0, 0.5])?, Transition::Ddim);
    let cond = Condition::from(noise());
    let error = sampler.simulate(&noise(), &cond, 2).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { what: "step", value: 2.0, .. }));
    let error = sampler.simulate(&Tensor::from(1.0), &cond, 0).unwrap_err();
    assert!(matches!(error, Error::Shape { what: "noise", .. }));
    Ok(())
}

#[test]
fn a_grid_may_be_given_as_the_network_sees_it() -> Result<()> {
    // FastGen's noise levels: four even steps after a shift of 5, rounded.
    let levels = [0.999, 0.937, 0.833, 0.624];
    let shift = Shift::new(5.0)?;
    let grid = FewStepGrid::from_shifted(levels.iter().map(|level| 1.0 - level).collect(), shift)?;
    for (k, (&time, level)) in grid.times().iter().zip(levels).enumerate() {
        approx::assert_abs_diff_eq!(shift.of(time), 1.0 - level, epsilon = 1e-12);
        approx::assert_abs_diff_eq!(time, k as f64 / 4.0, epsilon = 6e-3);
    }
    for bad in [vec![], vec![-0.1], vec![0.0, 1.0], vec![0.0, f64::NAN], vec![0.5, 0.5]] {
        let made = FewStepGrid::from_shifted(bad.clone(), shift);
        assert!(matches!(made, Err(Error::OutOfRange { .. })), "{bad:?}");
    }
    Ok(())
}

#[test]
fn a_grid_may_start_off_the_noise_end() -> Result<()> {
    // DMD2's one-step SDXL model: pure noise, and n = 399.
    let path = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
    let told = std::cell::Cell::new(-1);
    let network = |x: &Tensor, t: &Tensor, _: &Condition| {
        told.set(path.timestep(t).unwrap().int64_value(&[0]));
        x * 0.5
    };
    let student = Denoiser::new(&path, Prediction::Sample, network);
    let grid = FewStepGrid::new(vec![path.time_of(399.0)?])?;
    let sampler = Sampler::new(&student, grid, Transition::Ddim);
    let sample = sampler.sample(&noise(), &Condition::none())?;
    assert_eq!(told.get(), 399);
    assert!(max_difference(&sample, &(noise() * 0.5)) < 1e-15);
    // A prediction that is singular at the noise end can be sampled from just above it.
    let eps =
        Denoiser::new(RectifiedFlow, Prediction::Noise, |x: &Tensor, _: &Tensor, _: &Condition| {
            x * 0.9
        });
    let sample = |first| {
        let grid = FewStepGrid::new(vec![first, 0.5])?;
        Sampler::new(&eps, grid, Transition::Ddim).sample(&noise(), &Condition::none())
    };
    assert!(matches!(sample(0.0), Err(Error::OutOfRange { .. })));
    assert!(sample(0.001)?.isfinite().all().int64_value(&[]) == 1);
    // So can one at a step that the rollout or real samples lead to: the grid tells how noisy it may be.
    let trained = |first| -> Result<()> {
        let grid = FewStepGrid::new(vec![first, 0.5])?;
        let (sampler, none) = (Sampler::new(&eps, grid, Transition::Ddim), Condition::none());
        let (x, at) = (noise(), Steps::new(Tensor::from_slice(&[0i64, 1]))?);
        let _from_real = sampler.simulate_from_real_at(&x, &none, &at, &x)?;
        let _kept = sampler.simulate_on(&sampler.trajectory(&x, &none)?, &none, &at)?;
        Ok(())
    };
    assert!(matches!(trained(0.0), Err(Error::OutOfRange { .. })));
    trained(0.001)?;
    Ok(())
}

#[test]
fn dynamic_grids_are_those_of_cdm() -> Result<()> {
    let _guard = seeded(5);
    let grid = FewStepGrid::dynamic_at(&[1.0, 0.0, 0.5])?;
    for (time, noise) in grid.times().iter().zip([1.0, 0.95, 0.6, 0.25]) {
        approx::assert_abs_diff_eq!(1.0 - time, noise, epsilon = 1e-15);
    }
    assert_eq!(FewStepGrid::dynamic_at(&[])?, FewStepGrid::even(1)?);
    let mut counts = [0; 5];
    for _ in 0..1000 {
        let grid = FewStepGrid::dynamic(4)?;
        counts[grid.steps()] += 1;
        assert!(grid.times().iter().skip(1).all(|t| (0.05..=0.75).contains(t)));
    }
    assert!(counts[0] == 0 && counts[1..].iter().all(|n| (200..300).contains(n)), "{counts:?}");
    for draws in [&[0.5, 0.5][..], &[-0.1], &[f64::NAN]] {
        assert!(matches!(FewStepGrid::dynamic_at(draws), Err(Error::OutOfRange { .. })));
    }
    assert!(matches!(FewStepGrid::dynamic(0), Err(Error::OutOfRange { .. })));
    Ok(())
}
