//! Times per frame, and given frames.

use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Group,
    Guidance, Normalizer, Objective, PreShift, Prediction, Renoising, Uniform,
};
use tch::{Kind, Tensor};

use crate::setting::{SHAPE, World, compare, drawn, on, path, waits};

/// A network that takes times of samples or frames, `[B, F]` of `[B, F, H, W]`.
fn network(x: &Tensor, t: &Tensor, cond: &Condition) -> Tensor {
    let mut shape = t.size();
    shape.resize(x.dim(), 1);
    (x + t.view(shape.as_slice())).sin() * 0.5 + &cond[0]
}

#[test]
fn an_objective_over_frames() {
    compare("frames", |device| {
        let world = World::new(device);
        let model = || Denoiser::new(path(), Prediction::FlowVelocity, network);
        let causal = || Renoising::new(Uniform::FULL).per_chunk(1, 3);
        let dm = DistributionMatching::new(model()).renoising(causal()?);
        let normalizer = Normalizer::conditional().over_frame();
        let above = Group::new(Renoising::new(AboveStudent::FULL).per_frame(1)?);
        let ca = CfgAugmentation::new(Guidance::new(3.0)?);
        let objective = Objective::new(model())
            .observed()
            .with(above.normalizer(normalizer).engine("ca", 1.0, ca))
            .with(Group::new(causal()?).normalizer(normalizer).regularizer("dm", 1.0, &dm));
        let x = world.x();
        let time = PreShift::all(0.25, SHAPE[0], (Kind::Float, device))?;
        let given = on(device, &SHAPE[..2], 0.0).gt(0.5);
        let batch = waits(device, "a batch", 0, || {
            Batch::new(&x, &world.cond)?
                .with_null(&world.null)
                .with_student_time(&time)?
                .with_given_frames(&given)
        })?;
        let evaluation = waits(device, "an evaluation", 0, || objective.evaluate(&batch))?;
        let loss = waits(device, "the fake score's loss", 0, || dm.denoising_loss(&batch))?;
        let mut results = drawn(vec![evaluation.loss.detach(), loss.detach()]);
        let draw = |_| Draw {
            u: on(device, &SHAPE[..2], 3.0) * 0.4 + 0.5,
            noise: on(device, &SHAPE, 7.0),
        };
        let draws = [0, 1].map(draw).into();
        let evaluation = waits(device, "given draws", 2, || objective.evaluate_at(&batch, draws))?;
        waits(device, "backward", 0, || evaluation.loss.backward());
        waits(device, "a report", 1, || evaluation.report())?;
        results.extend([x.grad(), evaluation.loss.detach()]);
        Ok(results)
    });
}
