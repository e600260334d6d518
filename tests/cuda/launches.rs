//! Operators that compute on the device in one evaluation: launches of kernels, some microseconds each on CUDA.

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Group, Guidance, Objective,
    PreShift, Prediction, Renoising, Result, Schedule, Uniform,
};
use pretend_cuda::watch;
use tch::{Kind, Tensor};

use crate::common::seeded;
use crate::setting::{SHAPE, World, device, on, path};

/// Prints the numbers of docs/performance.md:
/// `./with-libtorch cargo test --test cuda launches -- --ignored --nocapture`.
#[test]
#[ignore = "prints a table"]
fn launches() -> Result<()> {
    let Some(device) = device() else { return Ok(()) };
    let _guard = seeded(0);
    let world = World::new(device);
    // Networks that return a tensor that is there: what is left is the library's own.
    let [teacher, fake] = [0.1, 0.9].map(|phase| {
        let output = on(device, &SHAPE, phase);
        Denoiser::new(
            path(),
            Prediction::FlowVelocity,
            move |_: &Tensor, _: &Tensor, _: &Condition| output.shallow_clone(),
        )
    });
    let guidance = Guidance::new(4.0)?;
    let dm = DistributionMatching::new(fake);
    let x = world.x();
    let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
    let time = PreShift::all(0.25, 3, (Kind::Float, device))?;
    let batch = batch.with_student_time(&time)?;
    println!("| | loss | gradient |\n|---|---|---|");
    let show = |what: &str, objective: &Objective<'_>| -> Result<()> {
        let (evaluation, forward) = watch(|| objective.evaluate(&batch));
        let evaluation = evaluation?;
        let ((), backward) = watch(|| evaluation.loss.backward());
        println!("| {what} | {} | {} |", forward.launches(), backward.launches());
        if std::env::var_os("OPERATORS").is_some() {
            println!("{:?}\n{:?}", forward.operators, backward.operators);
        }
        Ok(())
    };
    for schedule in Schedule::ALL {
        let objective = schedule.objective(teacher.clone(), guidance, &dm);
        show(&format!("{schedule:?}"), &objective)?;
        show(&format!("{schedule:?}, observed"), &objective.observed())?;
    }
    let group = Group::new(Renoising::new(Uniform::FULL));
    let engine = group.engine("ca", 1.0, CfgAugmentation::new(guidance));
    show("CFG Augmentation alone", &Objective::new(teacher).with(engine))?;
    let (loss, seen) = watch(|| dm.denoising_loss(&batch));
    let _loss = loss?;
    println!("| fake score's loss | {} | |", seen.launches());
    Ok(())
}
