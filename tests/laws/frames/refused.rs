//! Times that fit no frames, and terms that look at whole samples: errors that name the argument.

use decoupled_dmd::{
    Adversarial, AdversarialDistributionMatching, Batch, Condition, Consistency, CriticPenalty,
    DistributionMatching, Error, FewStepGrid, FlowMap, MeanFlow, Objective, Renoising, Sampler,
    Tangent, Transition, Uniform,
};
use tch::{Device, Kind, Tensor};

use super::*;
use crate::common::seeded;

const SHAPE: [i64; 4] = FRAMES_FIRST;
const WHOLE: &str = "tau of a term over whole samples";

/// The name and the words of an error of a shape, also within a term.
#[track_caller]
fn named<T>(result: Result<T>) -> (&'static str, String) {
    match result.err().expect("an error") {
        Error::Shape { what, expected, .. } => (what, expected),
        Error::OutOfRange { what, requirement, .. } => (what, requirement.to_owned()),
        Error::Term { source, .. } => named::<T>(Err(*source)),
        other => panic!("{other}"),
    }
}

fn times(shape: &[i64]) -> PostShift {
    PostShift::new(Tensor::full(shape, 0.5, (Kind::Double, Device::Cpu))).unwrap()
}

fn model<'a>() -> Denoiser<'a> {
    Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network(0.5))
}

#[test]
fn times_that_fit_neither_samples_nor_frames() -> Result<()> {
    let (x, noise) = (double(&SHAPE, 0.3), double(&SHAPE, 5.0));
    let cond = Condition::from(double(&SHAPE, 1.1));
    let (teacher, dm) = (model(), DistributionMatching::new(model()));
    let batch = Batch::new(&x, &cond)?;
    let objective = Objective::new(model())
        .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("dm", 1.0, &dm));
    for shape in
        [&[3i64][..], &[5], &[2, 4], &[1, 5], &[2, 1, 5], &[2, 1, 1, 1, 4], &[5, 2], &[2, 1]]
    {
        let (time, steps) = (times(shape), PreShift::new(times(shape).tensor().copy())?);
        let draw = Draw { u: time.tensor().copy(), noise: noise.copy() };
        let calls = [
            ("time", named(RectifiedFlow.renoise(&x, &time, &noise))),
            ("time", named(RectifiedFlow.implied_noise(&x, &noise, &time))),
            ("later time", named(RectifiedFlow.implied_sample(&x, &times(&[2, 5]), &x, &time))),
            ("middle time", named(RectifiedFlow.segment_noise(&time, &times(&[2]), &x, &noise))),
            ("time", named(teacher.denoise(&x, &time, &cond))),
            ("time", named(teacher.denoising_loss(&x, &time, &noise, &cond))),
            ("time", named(dm.denoising_loss_at(&batch, &time, &noise))),
            ("tau", named(Probe::at(&teacher, &batch, time.shallow_clone(), noise.copy()))),
            ("draw", named(objective.evaluate_at(&batch, vec![draw]))),
            ("student time", named(Batch::new(&x, &cond)?.with_student_time(&steps))),
            (
                "time of the student input",
                named(Batch::new(&x, &cond)?.with_student_input(&x, &time)),
            ),
            ("time", named(batch.keep_given(&time))),
        ];
        let expected = "[2], or [2, F] or [2, 1, F] for the frames of [2, 5, 3, 4]";
        for (name, (what, words)) in calls {
            assert_eq!((what, words.as_str()), (name, expected), "{shape:?}");
        }
    }
    // The shapes that fit, the frames of either axis among them.
    for shape in [&[2i64][..], &[2, 5], &[2, 1, 3], &[2, 1, 1, 4]] {
        assert!(RectifiedFlow.renoise(&x, &times(shape), &noise).is_ok(), "{shape:?}");
    }
    assert_eq!(
        named(PostShift::new(Tensor::zeros([2, 5, 3], (Kind::Float, Device::Cpu)))).0,
        "post-shift time"
    );
    let vector = x.flatten(0, -1);
    assert_eq!(named(RectifiedFlow.renoise(&vector, &times(&[2]), &vector)).1, "[120]");
    Ok(())
}

#[test]
fn frames_of_draws_masks_and_students() -> Result<()> {
    let x = double(&SHAPE, 0.3);
    let cond = Condition::from(double(&SHAPE, 1.1));
    let uniform = || Renoising::new(Uniform::FULL);
    assert_eq!(named(uniform().per_frame(0)).0, "axis of the frames");
    assert_eq!(named(uniform().per_chunk(1, 0)).0, "frames of a chunk");
    let missing = uniform().per_frame(4)?;
    assert_eq!(named(missing.draw(&RectifiedFlow, &x, None)).0, "axis of the frames");
    let dm = DistributionMatching::new(model());
    let objective = Objective::new(model()).with(Group::new(missing).regularizer("dm", 1.0, &dm));
    assert_eq!(named(objective.evaluate(&Batch::new(&x, &cond)?)).0, "axis of the frames");
    let student = PreShift::new(times(&[2, 5]).tensor().copy())?;
    for (u, name) in [(&[2i64, 1, 3][..], "student time"), (&[3], "draw")] {
        let drawn = uniform().at(&RectifiedFlow, times(u).tensor(), Some(&student));
        assert_eq!(named(drawn).0, name);
    }
    let truth = |shape: &[i64]| Tensor::ones(shape, (Kind::Bool, Device::Cpu));
    for shape in [&[2i64, 4][..], &[5], &[2, 1, 5], &[2, 5, 3], &[2, 1], &[]] {
        let given = truth(shape);
        assert_eq!(named(Batch::new(&x, &cond)?.with_given_frames(&given)).0, "given frames");
    }
    let numbers = double(&[2, 5], 0.0);
    let refused = Batch::new(&x, &cond)?.with_given_frames(&numbers);
    assert!(matches!(refused, Err(Error::Kind { what: "given frames", .. })));
    // A norm over the channels, which are not axis 1.
    let teacher = model();
    let output = teacher.predict(&x, &times(&[2, 5]), &cond)?;
    let rescaled = Guidance::new(3.0)?.rescaled();
    assert_eq!(named(output.guided(&output, rescaled)).0, "axis of the frames");
    let output = teacher.predict(&x, &times(&[2, 1, 3]), &cond)?;
    assert!(output.guided(&output, rescaled).is_ok());
    // Times along another axis than the given frames.
    let given = truth(&[2, 5]);
    let batch = Batch::new(&x, &cond)?.with_given_frames(&given)?;
    assert_eq!(named(batch.keep_given(&times(&[2, 1, 3]))).0, "time of given frames");
    Ok(())
}

/// Terms over whole samples, each called with times per frame.
#[test]
fn terms_over_whole_samples_refuse_times_per_frame() -> Result<()> {
    let _guard = seeded(1);
    let (x, noise) = (double(&SHAPE, 0.3).set_requires_grad(true), double(&SHAPE, 5.0));
    let cond = Condition::from(double(&SHAPE, 1.1));
    let time = times(&[2, 5]);
    let batch = Batch::new(&x, &cond)?.with_real(&noise)?.with_student_input(&noise, &time)?;
    let (teacher, dm) = (model(), DistributionMatching::new(model()));
    let probe = Probe::at(&teacher, &batch, time.shallow_clone(), noise.copy())?;
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.flatten(1, -1);
    let gan = Adversarial::new(RectifiedFlow, critic);
    let adm = AdversarialDistributionMatching::new(&dm, model(), critic);
    assert_eq!(named(probe.tau_of_samples()).0, WHOLE);
    assert_eq!(named(gan.loss(&probe)).0, WHOLE);
    assert_eq!(named(gan.log_ratio(&probe)).0, WHOLE);
    assert_eq!(named(adm.loss(&probe)).0, WHOLE);
    assert_eq!(named(gan.critic_loss_at(&batch, &time, &noise, &noise)).0, "time");
    let penalty = CriticPenalty::R1 { gamma: 1.0 };
    assert_eq!(named(gan.penalty_loss_at(&batch, penalty, &time, &noise, &noise)).0, "time");
    assert_eq!(named(adm.critic_loss_at(&batch, &time, &noise)).0, "time");
    let drawn = Adversarial::new(RectifiedFlow, critic)
        .renoising(Renoising::new(Uniform::FULL).per_frame(1)?);
    assert_eq!(named(drawn.critic_loss(&batch)).0, "time");
    let consistencies = [
        Consistency::discrete(model(), 0.1)?,
        Consistency::continuous(model(), Tangent::Central { step: 1e-3 })?,
    ];
    for consistency in consistencies {
        assert_eq!(named(consistency.direction(&probe)).0, "time of the student input");
    }
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| x * 0.3);
    let mean_flow = MeanFlow::new(map.clone(), model())?;
    assert_eq!(named(mean_flow.evaluate_at(&batch, &noise, &time, &time)).0, "time to jump from");
    assert_eq!(named(map.jump(&noise, &time, &time, &cond)).0, "time to jump from");
    let student = model();
    let sampler = Sampler::new(&student, FewStepGrid::even(2)?, Transition::Ddim);
    let made = sampler.simulate(&noise, &cond, 1)?;
    let steps = PreShift::new(time.tensor().copy())?;
    assert_eq!(named(sampler.simulate_off_trajectory(&made, &cond, &steps)).0, "time");
    Ok(())
}

#[test]
fn terms_over_whole_samples_refuse_given_frames() -> Result<()> {
    let _guard = seeded(1);
    let (x, noise) = (double(&SHAPE, 0.3).set_requires_grad(true), double(&SHAPE, 5.0));
    let cond = Condition::from(double(&SHAPE, 1.1));
    let (time, given) = (times(&[2]), Tensor::ones([2, 5], (Kind::Bool, Device::Cpu)));
    let batch = Batch::new(&x, &cond)?
        .with_real(&noise)?
        .with_student_input(&noise, &time)?
        .with_given_frames(&given)?;
    let (teacher, dm) = (model(), DistributionMatching::new(model()));
    let probe = Probe::at(&teacher, &batch, time.shallow_clone(), noise.copy())?;
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.flatten(1, -1);
    let gan = Adversarial::new(RectifiedFlow, critic);
    let adm = AdversarialDistributionMatching::new(&dm, model(), critic);
    assert_eq!(named(gan.loss(&probe)).0, WHOLE);
    assert_eq!(named(adm.loss(&probe)).0, WHOLE);
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| x * 0.3);
    let consistency = Consistency::discrete(model(), 0.1)?;
    let found = [
        named(gan.critic_loss(&batch)),
        named(adm.critic_loss(&batch)),
        named(consistency.direction(&probe)),
        named(MeanFlow::new(map, model())?.evaluate(&batch)),
    ];
    for (what, words) in found {
        assert_eq!(
            (what, words.as_str()),
            ("given frames", "none for a term that noises whole samples")
        );
    }
    Ok(())
}
