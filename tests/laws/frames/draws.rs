//! Times drawn for each frame, and for each chunk of frames.

use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, Condition, DistributionMatching, Group, Guidance,
    LogNormal, LogitNormal, Objective, Power, PreShift, RectifiedFlow, Renoising, Result, Times,
    Uniform,
};
use tch::{Kind, Tensor};

use super::*;
use crate::common::seeded;

#[test]
fn a_time_a_frame_and_a_time_a_chunk() -> Result<()> {
    let _guard = seeded(5);
    let draw = |renoising: Renoising<'_>, shape: &[i64]| -> Result<Tensor> {
        let x = Tensor::zeros(shape, (Kind::Float, tch::Device::Cpu));
        let drawn = renoising.draw(&RectifiedFlow, &x, None)?;
        assert_eq!(drawn.range(), (0.25, 0.75));
        Ok(drawn.tensor().shallow_clone())
    };
    let uniform = || Renoising::new(Uniform::new(0.25, 0.75).unwrap());
    assert_eq!(draw(uniform(), &[64, 7, 3])?.size(), [64]);
    let frames = draw(uniform().per_frame(1)?, &[64, 7, 3])?;
    assert_eq!(frames.size(), [64, 7]);
    let mut sorted = values(&frames);
    sorted.sort_by(f64::total_cmp);
    sorted.dedup();
    assert_eq!(sorted.len(), 64 * 7, "independent draws");
    assert!(sorted[0] >= 0.25 && sorted[64 * 7 - 1] <= 0.75);
    approx::assert_abs_diff_eq!(value(&frames.mean(Kind::Double)), 0.5, epsilon = 0.03);
    // Where the frames are not a multiple, the first chunk is the short one.
    for (count, chunks) in [(6, vec![3, 3]), (7, vec![1, 3, 3]), (8, vec![2, 3, 3]), (2, vec![2])] {
        let drawn = draw(uniform().per_chunk(2, 3)?, &[4, 3, count, 2])?;
        assert_eq!(drawn.size(), [4, 1, count]);
        let mut first = 0;
        let mut of_chunks = Vec::new();
        for chunk in chunks {
            let part = drawn.narrow(2, first, chunk);
            assert!(part.equal(&part.narrow(2, 0, 1).expand_as(&part)), "{count}");
            of_chunks.push(part.narrow(2, 0, 1));
            first += chunk;
        }
        for (one, two) in of_chunks.iter().zip(of_chunks.iter().skip(1)) {
            assert_eq!(one.eq_tensor(two).any().int64_value(&[]), 0, "{count}");
        }
    }
    let whole = draw(uniform().per_chunk(1, usize::MAX)?, &[4, 5, 2])?;
    assert!(whole.equal(&whole.narrow(1, 0, 1).expand([4, 5], false)));
    Ok(())
}

#[test]
fn every_distribution_maps_frames_one_by_one() -> Result<()> {
    let u = Tensor::linspace(0.0, 0.99, 10, (Kind::Double, tch::Device::Cpu)).view([2, 5]);
    let student = PreShift::new(double(&[2, 5], 1.0) * 0.3 + 0.4)?;
    let flat = PreShift::new(student.tensor().flatten(0, 1))?;
    let distributions: [Times; 5] = [
        Uniform::new(0.1, 0.8)?.into(),
        AboveStudent::new(0.05, 0.98)?.into(),
        LogitNormal::MEAN_FLOW.into(),
        LogNormal::default().into(),
        Power::new(3.0)?.into(),
    ];
    for times in distributions {
        let renoising = Renoising::new(times).shifted(Shift::new(3.0)?);
        let found = renoising.at(&RectifiedFlow, &u, Some(&student))?;
        let expected = renoising.at(&RectifiedFlow, &u.flatten(0, 1), Some(&flat))?;
        assert_eq!((found.tensor().size(), found.range()), (vec![2, 5], expected.range()));
        assert!(max_difference(&found.tensor().flatten(0, 1), expected.tensor()) < 1e-15);
    }
    Ok(())
}

#[test]
fn an_objective_and_its_fake_score_train_at_times_per_frame() -> Result<()> {
    let _guard = seeded(3);
    let shapes = std::cell::RefCell::new(Vec::new());
    let network = network(0.6);
    let model = || {
        Denoiser::new(
            RectifiedFlow,
            Prediction::FlowVelocity,
            |x: &Tensor, t: &Tensor, c: &Condition| {
                shapes.borrow_mut().push(t.size());
                network(x, t, c)
            },
        )
    };
    let causal = || Renoising::new(Uniform::FULL).per_chunk(1, 3);
    let dm = DistributionMatching::new(model()).renoising(causal()?);
    let above = Renoising::new(AboveStudent::FULL).per_frame(1)?;
    let ca = CfgAugmentation::new(Guidance::new(3.0)?);
    let objective = Objective::new(model())
        .with(Group::new(above).engine("ca", 1.0, ca))
        .with(Group::new(causal()?).regularizer("dm", 1.0, &dm));
    let x = double(&FRAMES_FIRST, 0.3).set_requires_grad(true);
    let [cond, null] = [1.1, 2.2].map(|phase| Condition::from(double(&FRAMES_FIRST, phase)));
    let time = PreShift::new(Tensor::from_slice(&[0.0, 0.5]))?;
    let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
    let evaluation = objective.evaluate(&batch)?;
    let slope = gradient(&evaluation.loss, &x);
    assert!(slope.isfinite().all().int64_value(&[]) == 1 && value(&slope.abs().max()) > 0.0);
    assert!(value(&dm.denoising_loss(&batch)?).is_finite());
    assert!(shapes.borrow().iter().all(|size| size == &[2, 5]) && shapes.borrow().len() == 5);
    Ok(())
}
