//! Paths, sampling, and rollouts.

use decoupled_dmd::{
    FewStepGrid, Guidance, NoisePath, PostShift, PreShift, Sampler, Steps, Transition,
};
use tch::{Kind, Tensor};

use crate::common::paths;
use crate::setting::{World, compare, drawn, waits};

#[test]
fn samples_and_rollouts() {
    for transition in [Transition::Renoise, Transition::Ddim] {
        compare(&format!("{transition:?}"), |device| {
            let world = World::new(device);
            let World { cond, noise, real, .. } = &world;
            let student = world.student.denoiser();
            let sampler = Sampler::new(&student, FewStepGrid::even(4)?, transition);
            let quiet = "sampling waits for nothing";
            let mut results = waits(device, quiet, 0, || {
                sampler.draw_step()?;
                let trajectory = sampler.trajectory(noise, cond)?;
                let steps = trajectory.draw_steps()?;
                let made = sampler.simulate_on(&trajectory, cond, &steps)?;
                Ok::<_, decoupled_dmd::Error>(vec![
                    sampler.sample(noise, cond)?,
                    sampler.simulate_from_real(real, cond)?.x.detach(),
                    steps.tensor().to_kind(Kind::Float),
                    trajectory.samples_at(&steps.narrow(0, 3)?)?,
                    made.x.detach(),
                    made.student_time.tensor().shallow_clone(),
                ])
            })?;
            if transition == Transition::Renoise {
                results = drawn(results);
            } else {
                // Of these, a sample alone draws nothing.
                let others = results.split_off(1);
                results.extend(drawn(others));
            }
            let index = Tensor::from_slice(&[0i64, 3, 1]).to_device(device);
            let steps = waits(device, "steps of one's own", 1, || Steps::new(index))?;
            let made = waits(device, "a given step", 0, || {
                sampler.simulate_from_real_at(real, cond, &steps, noise)
            })?;
            let later = PreShift::all(0.6, 3, (Kind::Float, device))?;
            let off = waits(device, "off the trajectory", 0, || {
                sampler.simulate_off_trajectory(&made, cond, &later)
            })?;
            results.extend([made.x.detach(), off.x.detach()]);
            let grid = FewStepGrid::new(vec![0.0, 0.2, 0.7])?;
            let guided = Sampler::new(&student, grid, transition);
            let guided = guided.guided(Guidance::new(2.0)?, &world.null);
            let sample = waits(device, quiet, 0, || guided.sample(noise, cond))?;
            let draws = transition == Transition::Renoise;
            results.extend(if draws { drawn(vec![sample]) } else { vec![sample] });
            Ok(results)
        });
    }
}

#[test]
fn every_path() {
    for (index, path) in paths().into_iter().enumerate() {
        compare(&format!("path {index}"), |device| {
            let World { noise, real, .. } = World::new(device);
            let times = Tensor::from_slice(&[0.1f32, 0.5, 0.9]).to_device(device);
            let time = waits(device, "times of one's own", 1, || PostShift::new(times))?;
            let mut results = Vec::new();
            // Twice: the table of a path is where the times are from then on.
            for _ in 0..2 {
                waits(device, "a path", 0, || {
                    let noised = path.renoise(&real, &time, &noise)?;
                    let coefficients = path.coefficients(&time)?;
                    let implied = path.implied_noise(&noised, &real, &time)?;
                    results.extend([noised, implied, coefficients.data, coefficients.noise]);
                    Ok::<_, decoupled_dmd::Error>(())
                })?;
            }
            Ok(results)
        });
    }
}
