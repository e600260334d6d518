//! Where the samples of a rollout are judged otherwise than at all times: inside its segments, and off it.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Batch, Draw, FewStepGrid, Group, NoisePath, Objective, PreShift, RectifiedFlow, Renoising,
    Sampler, Shift, Steps, TimeDistribution, Trajectory, Uniform,
};
use tch::{Kind, Tensor};
use zimage::distil::{Networks, Readings, Rollout};

use super::arm::Arm;

/// The times before the shift of CDM's points off the rollout. TDM's draws end at the last of them too, short of clean
/// samples, which have no noise to mix.
const OFF_TRAJECTORY: (f64, f64) = (0.02, 0.98);

/// A draw for each sample inside the segment of the rollout that its step has made, as in TDM: tau is even between the
/// time of the step and that of the next, and the noise leads to tau from the segment's end by the forward process.
///
/// # Errors
/// If libtorch fails.
pub fn segment_draw(shift: Shift, trajectory: &Trajectory, steps: &Steps) -> Result<Draw> {
    let path = RectifiedFlow.shifted(shift);
    let x = trajectory.samples_at(steps)?;
    let (input, start) = trajectory.inputs_at(steps)?;
    let end = start.tensor().f_add_scalar((trajectory.steps() as f64).recip())?;
    let last = end.f_clamp_max(OFF_TRAJECTORY.1)?;
    let share = start.tensor().f_rand_like()?;
    let u = start.tensor().f_add(&last.f_sub(start.tensor())?.f_mul(&share)?)?;
    let implied = path.implied_noise(&input, &x, &shift.apply(&start)?)?;
    let mid = shift.apply(&PreShift::new(end)?)?;
    let tau = shift.apply(&PreShift::new(u.shallow_clone())?)?;
    let noise = path.segment_noise(&mid, &tau, &implied, &x.f_randn_like()?)?;
    Ok(Draw { u, noise })
}

/// Distribution matching without the engine off the student's rollout, as in CDM: one more evaluation of the student at
/// a point of the line that a prediction of its rollout draws through its input.
///
/// # Errors
/// If there is no fake score, or a network fails.
pub fn off_trajectory(
    arm: &Arm,
    networks: &Networks<'_>,
    rollout: &Rollout<'_>,
) -> Result<(Tensor, Readings)> {
    let dm = networks.dm.context("distribution matching off the rollout needs a fake score")?;
    let Rollout { trajectory, captions, .. } = rollout;
    let grid = FewStepGrid::even(trajectory.steps() as usize)?;
    let sampler = Sampler::new(&networks.student, grid, arm.transition);
    let steps = trajectory.draw_steps()?;
    let from = {
        let _guard = tch::no_grad_guard();
        sampler.simulate_on(trajectory, &captions.cond, &steps)?
    };
    let (low, high) = OFF_TRAJECTORY;
    let options = (Kind::Float, from.x.device());
    let times =
        Uniform::new(low, high)?.times(&Tensor::f_rand([arm.batch as i64], options)?, None)?;
    let made = sampler.simulate_off_trajectory(&from, &captions.cond, &times)?;
    let cond = rollout.cond_at(&steps)?;
    let batch = Batch::of(&made, &cond)?;
    let group = Group::new(Renoising::new(Uniform::FULL)).regularizer("dm", 1.0, dm);
    let evaluation = Objective::new(networks.teacher.clone()).with(group).evaluate(&batch)?;
    let mut readings = Readings::default();
    readings.push("off_trajectory_loss", &evaluation.loss)?;
    Ok((evaluation.loss, readings))
}
