//! Trajectories against backward simulation, one step at a time.

use decoupled_dmd::{
    Condition, Denoiser, Error, FewStepGrid, Prediction, RectifiedFlow, Result, Sampler, Shift,
    Steps, Transition,
};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, max_difference, seeded, values, wave};

const SHAPE: [i64; 4] = [2, 1, 2, 2];
const STEPS: usize = 4;

fn grid() -> Result<FewStepGrid> {
    Ok(FewStepGrid::even(STEPS)?.shifted(Shift::new(3.0)?))
}

fn rows(x: &Tensor, row: i64) -> Tensor {
    x.narrow(0, row, 1)
}

#[test]
fn every_sample_has_the_prediction_of_its_own_step() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let noise = wave(&SHAPE, 0.4, Kind::Double);
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, grid()?, Transition::Ddim);
    let trajectory = sampler.trajectory(&noise, &cond)?;
    assert_eq!((trajectory.steps(), trajectory.batch_size()), (4, 2));
    for (first, second) in [(0, 3), (2, 1), (3, 3)] {
        let steps = Steps::new(Tensor::from_slice(&[first as i64, second as i64]))?;
        let kept = trajectory.samples_at(&steps)?;
        let again = sampler.simulate_on(&trajectory, &cond, &steps)?;
        assert!(max_difference(&kept, &again.x) < 1e-14);
        let times = [first as f64 / 4.0, second as f64 / 4.0];
        assert_eq!(values(again.student_time.tensor()), times);
        for (row, step) in [(0, first), (1, second)] {
            let expected = sampler.simulate(&noise, &cond, step)?;
            assert!(max_difference(&rows(&kept, row), &rows(&expected.x, row)) < 1e-14);
        }
    }
    Ok(())
}

#[test]
fn a_renoising_rollout_draws_its_noise_as_backward_simulation_does() -> Result<()> {
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let noise = wave(&SHAPE, 0.4, Kind::Double);
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, grid()?, Transition::Renoise);
    let kept = {
        let _guard = seeded(3);
        let steps = Steps::new(Tensor::from_slice(&[3i64, 3]))?;
        sampler.trajectory(&noise, &cond)?.samples_at(&steps)?
    };
    let _guard = seeded(3);
    assert!(max_difference(&kept, &sampler.sample(&noise, &cond)?) < 1e-14);
    Ok(())
}

#[test]
fn the_gradient_passes_one_forward_at_the_step_asked_for() -> Result<()> {
    let scale = Tensor::from_slice(&[0.7]).set_requires_grad(true);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &scale;
    let denoiser = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let sampler = Sampler::new(&denoiser, grid()?, Transition::Ddim);
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let trajectory = sampler.trajectory(&wave(&SHAPE, 0.4, Kind::Double), &cond)?;
    let steps = Steps::new(Tensor::from_slice(&[1i64, 2]))?;
    assert!(!trajectory.samples_at(&steps)?.requires_grad());
    let x = sampler.simulate_on(&trajectory, &cond, &steps)?.x;
    x.sum(Kind::Double).backward();
    // x = scale * input, so the slope in scale is the sum of the inputs: no earlier step has a share.
    let expected = x.sum(Kind::Double).double_value(&[]) / 0.7;
    approx::assert_relative_eq!(scale.grad().double_value(&[0]), expected, epsilon = 1e-12);
    Ok(())
}

#[test]
fn drawn_steps_cover_the_grid_evenly() -> Result<()> {
    let _guard = seeded(0);
    let shape = [12, 1, 2, 2];
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, grid()?, Transition::Ddim);
    let cond = Condition::from(wave(&shape, 2.0, Kind::Double));
    let trajectory = sampler.trajectory(&wave(&shape, 0.4, Kind::Double), &cond)?;
    let (one, two) = (trajectory.draw_steps()?, trajectory.draw_steps()?);
    for steps in [&one, &two] {
        let mut sorted = Vec::<i64>::try_from(steps.tensor()).unwrap();
        sorted.sort_unstable();
        assert_eq!(sorted, [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]);
    }
    assert_ne!(values(one.tensor()), values(two.tensor()));
    Ok(())
}

#[test]
fn drawn_steps_are_spread_whatever_the_numbers_of_samples_and_steps() -> Result<()> {
    let _guard = seeded(1);
    let denoiser = gaussian_teacher(0.5);
    for (batch, steps) in [(2, 4), (3, 8), (5, 7), (1, 3), (4, 4), (12, 4), (7, 3), (10, 4), (3, 1)]
    {
        let case = format!("{batch} samples, {steps} steps");
        let grid = FewStepGrid::even(steps)?;
        let sampler = Sampler::new(&denoiser, grid, Transition::Ddim);
        let noise = wave(&[batch, 1, 1, 1], 0.4, Kind::Double);
        let trajectory = sampler.trajectory(&noise, &Condition::from(noise.shallow_clone()))?;
        let mut of_the_first = vec![0; steps];
        for _ in 0..1000 {
            let drawn = Vec::<i64>::try_from(trajectory.draw_steps()?.tensor()).unwrap();
            of_the_first[drawn[0] as usize] += 1;
            let mut counts = vec![0; steps];
            for &step in &drawn {
                counts[step as usize] += 1;
            }
            let uneven = counts.iter().max().unwrap() - counts.iter().min().unwrap();
            assert!(uneven <= 1, "{case}: {drawn:?}");
            // The distances from each step taken to the next one on the circle are alike, up to one.
            let mut sorted = drawn.clone();
            sorted.sort_unstable();
            sorted.push(sorted[0] + steps as i64);
            let gaps: Vec<i64> = sorted.windows(2).map(|pair| pair[1] - pair[0]).collect();
            let uneven = gaps.iter().max().unwrap() - gaps.iter().min().unwrap();
            assert!(uneven <= 1, "{case}: {drawn:?}");
        }
        // Five standard deviations of a count.
        let share = 1.0 / steps as f64;
        let allowed = 5.0 * (1000.0 * share * (1.0 - share)).sqrt();
        for count in &of_the_first {
            let off = (f64::from(*count) - 1000.0 * share).abs();
            assert!(off <= allowed, "{case}: {of_the_first:?}");
        }
    }
    Ok(())
}

#[test]
fn steps_that_do_not_fit_are_refused() -> Result<()> {
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, grid()?, Transition::Ddim);
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let trajectory = sampler.trajectory(&wave(&SHAPE, 0.4, Kind::Double), &cond)?;
    let at = |steps: Tensor| trajectory.samples_at(&Steps::new(steps)?);
    for bad in [[0i64, 4], [-1, 0]] {
        let found = at(Tensor::from_slice(&bad));
        assert!(matches!(found, Err(Error::OutOfRange { what: "step", .. })), "{found:?}");
    }
    let found = at(Tensor::from_slice(&[0i64]));
    assert!(matches!(found, Err(Error::Shape { what: "steps", .. })), "{found:?}");
    let found = at(Tensor::zeros([2], (Kind::Float, Device::Cpu)));
    assert!(matches!(found, Err(Error::Kind { what: "steps", .. })), "{found:?}");
    Ok(())
}

#[test]
fn a_part_of_the_steps_keeps_their_bound() -> Result<()> {
    let steps = Steps::new(Tensor::from_slice(&[0i64, 4, 1, 2]))?;
    assert_eq!(values(steps.narrow(1, 2)?.tensor()), [4.0, 1.0]);
    assert!(matches!(steps.narrow(0, 0), Err(Error::OutOfRange { .. })));
    assert!(matches!(steps.narrow(3, 2), Err(Error::Torch(_))));
    // The bound is that of all: whether steps fit does not depend on what was drawn for a part.
    let denoiser = gaussian_teacher(0.5);
    let sampler = Sampler::new(&denoiser, grid()?, Transition::Ddim);
    let cond = Condition::from(wave(&SHAPE, 2.0, Kind::Double));
    let trajectory = sampler.trajectory(&wave(&SHAPE, 0.4, Kind::Double), &cond)?;
    let found = trajectory.samples_at(&steps.narrow(2, 2)?);
    assert!(matches!(found, Err(Error::OutOfRange { what: "step", .. })), "{found:?}");
    Ok(())
}
