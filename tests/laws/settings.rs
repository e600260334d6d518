//! Settings in a configuration file, and the debug output of settings and objects.

use decoupled_dmd::{
    Adversarial, Augmentation, Bandwidth, Batch, CfgAugmentation, Condition, CriticPenalty,
    Denoiser, Edm, Error, Estimator, FewStepGrid, GanLoss, Group, Guidance, Kernel, LogNormal,
    LogitNormal, MaximumMeanDiscrepancy, NoisePath, Normalizer, Objective, PostShift, Power,
    PreShift, Prediction, Probe, RectifiedFlow, Renoising, Result, Sampler, Schedule, Shift,
    Shifts, Statistics, Times, Transition, Uniform, UpdateRatio, VariancePreserving, Weighting,
    engine_fn, regularizer_fn,
};
use serde::{Serialize, de::DeserializeOwned};
use tch::{Kind, Tensor};

use super::common::{self, gaussian_teacher, values, wave};

#[track_caller]
fn spelled<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(setting: &T, text: &str) {
    assert_eq!(serde_json::to_string(setting).unwrap(), text);
    assert_eq!(&serde_json::from_str::<T>(text).unwrap(), setting);
}

#[test]
fn every_setting_has_its_spelling() -> Result<()> {
    let guidance = Guidance::new(4.0)?;
    spelled(&guidance, "4.0");
    spelled(&guidance.rescaled(), r#"{"scale":4.0,"rescaled":true}"#);
    spelled(&Shift::new(3.0)?, "3.0");
    spelled(&Shifts::default(), r#"{"engine":null,"regularizer":null}"#);
    spelled(&FewStepGrid::even(2)?, r#"{"times":[0.0,0.5]}"#);
    let shifted = FewStepGrid::even(2)?.shifted(Shift::new(3.0)?);
    spelled(&shifted, r#"{"times":[0.0,0.5],"shift":3.0}"#);
    assert_eq!(
        serde_json::from_str::<FewStepGrid>(r#"{"steps":2}"#).unwrap(),
        FewStepGrid::even(2)?
    );
    spelled(&RectifiedFlow.shifted(Shift::new(3.0)?), r#"{"path":null,"shift":3.0}"#);
    spelled(&Edm::default(), r#"{"sigma_min":0.002,"sigma_max":80.0,"rho":7.0}"#);
    let vp = VariancePreserving::linear(0.1, 20.0)?;
    spelled(&vp, r#"{"linear":{"beta_min":0.1,"beta_max":20.0}}"#);
    let table = r#"{"scaled_linear":{"beta_start":0.00085,"beta_end":0.012,"steps":1000}}"#;
    assert_eq!(serde_json::from_str::<VariancePreserving>(table).unwrap(), common::sdxl());
    spelled(&Times::from(Uniform::FULL), r#"{"uniform":{"low":0.0,"high":1.0}}"#);
    spelled(
        &Times::from(LogitNormal::new(0.4, 1.0)?),
        r#"{"logit_normal":{"mean":0.4,"std":1.0}}"#,
    );
    let log_normal = serde_json::from_str::<Times>(r#"{"log_normal":{"std":1.4}}"#).unwrap();
    assert_eq!(log_normal, LogNormal::new(Edm::default(), -1.2, 1.4)?.into());
    spelled(&Times::from(Power::new(3.0)?), r#"{"power":3.0}"#);
    spelled(&UpdateRatio::new(7)?, "7");
    spelled(&CfgAugmentation::new(guidance), r#"{"guidance":4.0}"#);
    spelled(
        &Normalizer::fastgen(guidance),
        r#"{"reference":{"guided":4.0},"guard":{"epsilon":1e-6},"scope":"sample"}"#,
    );
    spelled(
        &Normalizer::conditional().unguarded().over_frame(),
        r#"{"reference":"conditional","guard":"none","scope":"frame"}"#,
    );
    spelled(
        &Normalizer::fastvideo(guidance),
        r#"{"reference":{"guided":4.0},"guard":"none","scope":"batch"}"#,
    );
    spelled(
        &Normalizer::cdm(),
        r#"{"reference":"conditional","guard":{"floor":0.1},"scope":"sample"}"#,
    );
    spelled(&Schedule::DecoupledHybrid, r#""decoupled-hybrid""#);
    spelled(&Weighting::UNIFORM, r#""uniform""#);
    spelled(&Weighting::min_snr(5.0)?, r#"{"min_snr":5.0}"#);
    spelled(&Weighting::edm(0.5)?, r#"{"edm":0.5}"#);
    spelled(
        &Weighting::measured_as(Prediction::FlowVelocity),
        r#"{"measured_as":"flow_velocity"}"#,
    );
    spelled(&GanLoss::NonSaturating, r#""non_saturating""#);
    spelled(&CriticPenalty::R1 { gamma: 0.5 }, r#"{"r1":{"gamma":0.5}}"#);
    let augmentation = Augmentation::new().geometric().cutout(0.5)?;
    spelled(&augmentation, r#"{"blit":false,"geometric":true,"colour":false,"cutout":0.5}"#);
    assert_eq!(serde_json::from_str::<Augmentation>("{}").unwrap(), Augmentation::new());
    spelled(&Transition::Ddim, r#""ddim""#);
    spelled(&Statistics::PerChannel, r#""per_channel""#);
    spelled(&Estimator::Biased, r#""biased""#);
    let kernel = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(2.0), scales: vec![1.0] };
    spelled(&kernel, r#"{"gaussian":{"bandwidth":{"fixed":2.0},"scales":[1.0]}}"#);
    Ok(())
}

#[test]
fn settings_out_of_range_are_refused_where_they_are_read() {
    fn refused<T: DeserializeOwned>(text: &str) -> bool {
        serde_json::from_str::<T>(text).is_err()
    }
    assert!(
        refused::<Guidance>("0.9")
            && refused::<Normalizer>(r#"{"guard":{"floor":-0.1}}"#)
            && refused::<Shift>("0.0")
    );
    assert!(refused::<UpdateRatio>("0") && refused::<UpdateRatio>("-1"));
    assert!(refused::<CfgAugmentation>(r#"{"guidance":0.0}"#));
    assert!(refused::<Augmentation>(r#"{"cutout":1.5}"#));
    assert!(refused::<Augmentation>(r#"{"cut":0.5}"#) && refused::<Times>(r#"{"power":0.0}"#));
    assert!(refused::<Weighting>(r#"{"min_snr":0.0}"#) && refused::<Weighting>(r#""min_snr""#));
}

#[test]
fn objects_show_their_settings_and_hide_their_closures() -> Result<()> {
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    let renoising = || Renoising::new(Uniform::FULL).shifted(Shift::NONE);
    let engine = engine_fn(|probe| Ok(probe.noised().shallow_clone()));
    let plain = regularizer_fn(|probe| Ok(probe.x().f_mean(None::<Kind>)?));
    let denoiser = Denoiser::new(RectifiedFlow, Prediction::Noise, network);
    let (x, cond) = (wave(&[2, 3], 0.3, Kind::Float), Condition::none());
    let batch = Batch::new(&x, &cond)?;
    let half = PostShift::new(Tensor::from_slice(&[0.5f32, 0.5]))?;
    let probe = Probe::at(&denoiser, &batch, half, x.ones_like())?;
    let before = format!("{probe:?}");
    let _prediction = probe.teacher_cond()?;
    let cases = [
        (format!("{engine:?} {plain:?}"), "EngineFn RegularizerFn"),
        (format!("{:?}", renoising()), "Renoising { shift: Some(Shift(1.0)), frames: None, .. }"),
        (format!("{denoiser:?}"), "Denoiser { prediction: Noise, paired: false, .. }"),
        (before, "knows_cond: false, knows_null: false"),
        (format!("{probe:?}"), "knows_cond: true, knows_null: false"),
        (
            format!("{:?}", MaximumMeanDiscrepancy::new(Kernel::Energy)?),
            "MaximumMeanDiscrepancy { kernel: Energy, estimator: Unbiased, features: false }",
        ),
        (
            format!("{:?}", Adversarial::new(RectifiedFlow, network)),
            "Adversarial { gan_loss: NonSaturating, penalty: None, renoising: Renoising",
        ),
        (
            format!(
                "{:?}",
                Objective::new(gaussian_teacher(1.0)).with(
                    Group::new(renoising())
                        .engine("mine", 1.0, engine)
                        .regularizer("plain", 1.0, plain)
                )
            ),
            r#"groups: [Group { terms: ["mine", "plain"], normalizer: Normalizer"#,
        ),
    ];
    for (found, expected) in cases {
        assert!(found.contains(expected), "{found}");
    }
    Ok(())
}

#[test]
fn getters_give_what_was_set() -> Result<()> {
    let guidance = Guidance::new(4.0)?;
    assert_eq!(CfgAugmentation::new(guidance).guidance(), guidance);
    assert_eq!(guidance.get(), 4.0);
    let denoiser = gaussian_teacher(1.0);
    let grid = FewStepGrid::even(4)?.shifted(Shift::new(3.0)?);
    let sampler = Sampler::new(&denoiser, grid.clone(), Transition::Ddim);
    assert_eq!(sampler.grid(), &grid);
    let time = PreShift::new(Tensor::from_slice(&[0.25, 0.5]))?;
    assert_eq!(values(time.shallow_clone().tensor()), [0.25, 0.5]);
    assert_eq!(time.shallow_clone().tensor().data_ptr(), time.tensor().data_ptr());
    Ok(())
}

#[test]
fn another_handle_on_times_refuses_the_same_singular_end() -> Result<()> {
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    let denoiser = Denoiser::new(RectifiedFlow, Prediction::Noise, network);
    let x = wave(&[2, 3], 0.3, Kind::Double);
    for (first, refused) in [(0.0, true), (0.5, false)] {
        let time = PostShift::new(Tensor::from_slice(&[first, 0.9]))?.shallow_clone();
        let result = denoiser.denoise(&x, &time, &Condition::none());
        assert_eq!(matches!(result, Err(Error::OutOfRange { .. })), refused);
        assert_eq!(result.is_err(), refused);
    }
    Ok(())
}

#[test]
fn a_message_of_libtorch_is_cut_to_its_first_line() {
    let x = wave(&[2, 3], 0.3, Kind::Float);
    let error = Error::from(x.f_add(&wave(&[2, 2], 0.3, Kind::Float)).unwrap_err());
    let text = error.to_string();
    assert!(text.starts_with("libtorch: ") && text.contains("size of tensor a (3)"), "{text}");
    assert_eq!(text.lines().count(), 1);
}
