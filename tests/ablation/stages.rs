//! Pairs as a setting of an arm, the stage on pairs before ADM, augmented regression, and draws inside the segments of
//! a rollout.

use std::collections::BTreeSet;

use anyhow::Result;
use decoupled_dmd::{
    Augmentation, Condition, FewStepGrid, NoisePath, PostShift, RectifiedFlow, Sampler, Shift,
    Steps, Transition,
};
use tch::{Device, Kind, Tensor};
use zimage::distil::denoiser;

use super::ablation::arm::{Arm, OnData, RegressionDistance};
use super::ablation::experiments;
use super::ablation::on_rollout::segment_draw;
use super::ablation::pairs::PairSource;
use super::ablation::prior::{GaussianPrior, small};
use super::ablation::training::{named, training};
use super::common::tiny::{prompts, teacher};
use super::common::{max_difference, seeded, wave, worse};
use super::{classifier, material, train};

fn regression() -> Arm {
    let loss = OnData::Regression(RegressionDistance::Perceptual);
    Arm::new("regression", 1).on_data(loss)
}

#[test]
fn pairs_are_a_setting_of_the_arms_that_have_them() -> Result<()> {
    let arms = experiments::all()?.into_iter().flat_map(|experiment| experiment.arms);
    let (with, without): (Vec<Arm>, Vec<Arm>) =
        arms.partition(|arm| arm.on_data.is_some_and(OnData::has_pairs));
    assert!(with.iter().all(|arm| arm.pairs == Some(PairSource::ALL_ARMS)));
    assert!(without.iter().all(|arm| arm.pairs.is_none()));
    let names: BTreeSet<&str> = with.iter().map(|arm| arm.name.as_str()).collect();
    assert!(names.contains("regression") && names.contains("adm-after-adp"), "{names:?}");

    let _guard = seeded(0);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    // Pairs of another arm do not serve.
    let other = regression().quick().with(|arm| arm.pairs = Some(PairSource::ALL_ARMS));
    let error = format!("{:#}", training(&other, 0, &material)?.step(true).unwrap_err());
    assert!(error.contains("were not made"), "{error}");
    let none = regression().quick().with(|arm| arm.pairs = None);
    let error = format!("{:#}", training(&none, 0, &material)?.step(true).unwrap_err());
    assert!(error.contains("arm regression has no pairs"), "{error}");
    Ok(())
}

#[test]
fn pairs_are_of_captions_at_even_distances() -> Result<()> {
    let items: Vec<i64> = (0..9).collect();
    let source = PairSource { count: 4, ..PairSource::QUICK };
    let settings = source.settings(&items, [3, 16, 16], Shift::NONE)?;
    assert_eq!(settings.items, [0, 2, 4, 6]);
    assert_eq!((settings.sampling.steps, settings.sampling.guidance.get()), (2, 3.0));
    Ok(())
}

#[test]
fn an_augmentation_changes_what_a_regression_learns() -> Result<()> {
    let _guard = seeded(1);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    let student = |augmentation: Option<Augmentation>| {
        let arm = regression().quick().with(|arm| arm.augmentation = augmentation);
        train(&arm, &material)
    };
    let largest = |one: &[Tensor], other: &[Tensor]| {
        one.iter().zip(other).map(|(a, b)| max_difference(a, b)).fold(0.0, worse)
    };
    let (_, plain) = student(None)?;
    let (record, augmented) = student(Some(Augmentation::new().geometric().cutout(0.5)?))?;
    assert!(record.iter().any(|(name, value)| name == "regression_loss" && *value > 0.0));
    assert!(largest(&plain, &augmented) > 1e-6);
    Ok(())
}

#[test]
fn the_stage_before_adm_trains_student_and_critic_on_pairs() -> Result<()> {
    let _guard = seeded(2);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    let arms = experiments::all()?.into_iter().flat_map(|experiment| experiment.arms);
    let arm = arms.into_iter().find(|arm| arm.name == "adm-after-adp").expect("the arm").quick();
    let mut training = training(&arm, 0, &material)?;
    let mut changed = Vec::new();
    let mut seen = Vec::new();
    for _ in 0..2 {
        let before: Vec<Tensor> = training.state().values().map(Tensor::copy).collect();
        while !training.is_warm() {
            training.warm_up()?;
        }
        let record = named(training.step(true)?);
        seen.push(record.into_iter().map(|(name, _)| name).collect::<BTreeSet<_>>());
        let state = training.state();
        let moved = |role: &str| {
            let mut pairs = state.iter().zip(&before);
            pairs.any(|((name, now), was)| name.starts_with(role) && max_difference(now, was) > 0.0)
        };
        changed.push([moved("student."), moved("terms."), moved("fake.")]);
    }
    assert_eq!(changed, [[true, true, false], [true, true, true]]);
    let has = |update: usize, name: &str| seen[update].contains(name);
    assert!(has(0, "adp_loss") && has(0, "critic_loss") && !has(0, "adm_loss"), "{seen:?}");
    assert!(has(1, "adm_loss") && has(1, "critic_loss") && !has(1, "adp_loss"), "{seen:?}");
    Ok(())
}

/// TDM's x_tau is the rollout's own next input, noised further by the forward process.
#[test]
fn a_draw_inside_a_segment_starts_from_the_next_input_of_the_rollout() -> Result<()> {
    let _guard = seeded(3);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let shift = Shift::new(3.0)?;
    let student = denoiser(&teacher, shift);
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Ddim);
    let (cond, _): (Condition, _) = prompts.conditions(&[0, 1, 2])?;
    let trajectory = sampler.trajectory(&wave(&[3, 3, 16, 16], 0.4, Kind::Float), &cond)?;
    let steps = |step: i64| Steps::new(Tensor::full([3], step, (Kind::Int64, Device::Cpu)));
    for step in 0..4 {
        tch::manual_seed(7 + step);
        let draw = segment_draw(shift, &trajectory, &steps(step)?)?;
        let start = step as f64 / 4.0;
        let (low, high) = (draw.u.min().double_value(&[]), draw.u.max().double_value(&[]));
        assert!(start <= low && high <= start + 0.25 && high < 0.981, "{start}: {low} to {high}");
        // The numbers of the draw, in their order.
        tch::manual_seed(7 + step);
        let _share = Tensor::f_rand([3], (Kind::Float, Device::Cpu))?;
        let fresh = Tensor::f_randn([3, 3, 16, 16], (Kind::Float, Device::Cpu))?;
        let tau = shift.of(draw.u.double_value(&[0]));
        let x = trajectory.samples_at(&steps(step)?)?.narrow(0, 0, 1);
        let time = PostShift::all(tau, 1, (Kind::Float, Device::Cpu))?;
        let found = RectifiedFlow.renoise(&x, &time, &draw.noise.narrow(0, 0, 1))?;
        let mid = shift.of(start + 0.25);
        let at_mid = match step {
            3 => x,
            _ => trajectory.inputs_at(&steps(step + 1)?)?.0.narrow(0, 0, 1),
        };
        let kept = tau / mid;
        let added = ((1.0 - tau).powi(2) - (kept * (1.0 - mid)).powi(2)).sqrt();
        let expected = at_mid * kept + fresh.narrow(0, 0, 1) * added;
        assert!(max_difference(&found, &expected) < 1e-4, "step {step}");
    }
    Ok(())
}

/// Of the real pictures the prior knows the moments, and nothing else.
#[test]
fn a_prior_has_the_moments_of_the_pictures() -> Result<()> {
    let _guard = seeded(4);
    let images = wave(&[40, 3, 16, 16], 0.3, Kind::Float) + wave(&[40, 1, 1, 1], 1.0, Kind::Float);
    let rows = small(&images)?.flatten(1, -1).to_kind(Kind::Double);
    let samples = GaussianPrior::of(&images)?
        .sample(&Tensor::zeros([20_000, 192], (Kind::Double, Device::Cpu)))?;
    let moments = |rows: &Tensor| {
        let mean = rows.mean_dim(0i64, false, None::<Kind>);
        let centred = rows - &mean;
        (mean, centred.tr().matmul(&centred) / (rows.size()[0] - 1) as f64)
    };
    let ((mean, covariance), (found_mean, found_covariance)) = (moments(&rows), moments(&samples));
    let scale = covariance.diagonal(0, 0, 1).max().double_value(&[]);
    // Five standard errors of 20,000 samples.
    assert!(max_difference(&mean, &found_mean) < 5.0 * (scale / 20_000.0).sqrt());
    assert!(
        max_difference(&covariance, &found_covariance) < 5.0 * scale * (2.0f64 / 20_000.0).sqrt()
    );
    Ok(())
}
