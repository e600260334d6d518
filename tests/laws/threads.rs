//! Which types go to another thread, checked by the compiler.
//!
//! Tensors do, and so does what owns tensors and numbers: samples are made by one thread and trained on by another. A
//! batch borrows its samples, and a reference to a tensor stays in its thread. Terms and denoisers hold closures of the
//! caller, which may borrow and need not be `Send`: an objective is built in the thread that uses it.

use decoupled_dmd::{
    Augmentation, Batch, Condition, CriticDraw, Diagnostics, Draw, Edm, Error, Evaluation,
    FewStepGrid, Guidance, Kernel, Normalizer, PerSample, PostShift, PreShift, Prediction,
    RectifiedFlow, Schedule, Shift, Simulation, Steps, Times, Trajectory, Transition, TrigFlow,
    Uniform, VariancePreserving, Weighting,
};

const fn goes_to_another_thread<T: Send>() {}

macro_rules! all_go {
    ($($type:ty),+ $(,)?) => {
        $(const _: () = goes_to_another_thread::<$type>();)+
    };
}

// What an update passes around.
all_go!(
    Condition,
    CriticDraw,
    Diagnostics,
    Draw,
    Evaluation,
    PerSample,
    PostShift,
    PreShift,
    Simulation,
    Steps,
    Trajectory,
);
// Settings, and what goes wrong.
all_go!(
    Augmentation,
    Edm,
    Error,
    FewStepGrid,
    Guidance,
    Kernel,
    Normalizer,
    Prediction,
    RectifiedFlow,
    Schedule,
    Shift,
    Times,
    Transition,
    TrigFlow,
    Uniform,
    VariancePreserving,
    Weighting,
);

/// An update whose samples come from another thread gives the numbers of one thread.
#[test]
fn samples_may_come_from_another_thread() -> decoupled_dmd::Result<()> {
    use decoupled_dmd::{DistributionMatching, Objective};
    use tch::{Kind, Tensor};

    use super::common::{gaussian_teacher, value, wave};

    let loss = |x: &Tensor, cond: &Condition| -> decoupled_dmd::Result<f64> {
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let objective: Objective<'_> =
            Schedule::DecoupledHybrid.objective(gaussian_teacher(0.5), Guidance::new(3.0)?, &dm);
        let times = PreShift::new(Tensor::from_slice(&[0.0, 0.5]))?;
        let batch = Batch::new(x, cond)?.with_null(cond);
        let batch = batch.with_student_time(&times)?;
        let draw =
            || Draw { u: Tensor::from_slice(&[0.3, 0.7]), noise: wave(&[2, 3], 1.0, Kind::Double) };
        Ok(value(&objective.evaluate_at(&batch, vec![draw(), draw()])?.loss))
    };
    let made =
        || (wave(&[2, 3], 0.1, Kind::Double), Condition::from(wave(&[2, 3], 0.6, Kind::Double)));
    let (x, cond) = std::thread::spawn(made).join().expect("no panic");
    let (here, cond_here) = made();
    assert_eq!(loss(&x, &cond)?, loss(&here, &cond_here)?);
    Ok(())
}
