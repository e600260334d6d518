//! Checks of networks: a turned sign, a gradient that leaks into a network, and the start of a training.

use decoupled_dmd::testing::{Check, Failure, check_denoiser, check_regularizer};
use decoupled_dmd::{
    Adversarial, Batch, Condition, Denoiser, DistributionMatching, MaximumMeanDiscrepancy,
    NoisePath, PostShift, Prediction, Probe, RectifiedFlow, Result, Reward, gradient_only_in,
    regularizer_fn,
};
use tch::{Kind, Tensor};

use super::common::{gaussian_teacher, paths, wave};

const SHAPE: [i64; 4] = [3, 2, 4, 4];

fn broken(result: Result<(), Failure>) -> Option<Check> {
    match result {
        Ok(()) => None,
        Err(Failure::Broken { check, .. }) => Some(check),
        Err(other) => panic!("{other:?}"),
    }
}

fn rows(numbers: &Tensor, like: &Tensor) -> Tensor {
    numbers.to_kind(like.kind()).view([-1, 1, 1, 1])
}

/// What a network of the given type outputs for data that it knows, times `factor`.
fn knowing<'a>(
    path: &'a dyn NoisePath,
    prediction: Prediction,
    data: &'a Tensor,
    factor: f64,
) -> Denoiser<'a> {
    Denoiser::new(path, prediction, move |x: &Tensor, t: &Tensor, _: &Condition| {
        let time = PostShift::new(t.shallow_clone()).unwrap();
        let at = path.coefficients(&time).unwrap();
        let (a, s) = (rows(&at.data, x), rows(&at.noise, x));
        let noise = (x - &a * data) / &s;
        let output = match prediction {
            Prediction::Sample => data.shallow_clone(),
            Prediction::Noise => noise,
            Prediction::FlowVelocity => noise - data,
            Prediction::Velocity => &a * noise - &s * data,
            Prediction::Score => -noise / s,
            other => panic!("{other:?}"),
        };
        output * factor
    })
}

#[test]
fn a_turned_sign_is_named() {
    let (data, none) = (wave(&SHAPE, 0.3, Kind::Float), Condition::none());
    for path in paths() {
        for prediction in Prediction::ALL {
            let found = |factor| {
                broken(check_denoiser(&knowing(&path, prediction, &data, factor), &data, &none))
            };
            assert_eq!(found(1.0), None, "{prediction:?}");
            // A sample that is dimmed by as much is farther away than a little noise.
            let rough = if prediction == Prediction::Sample { 1.001 } else { 0.8 };
            assert_eq!(found(rough), None, "{prediction:?}");
            assert_eq!(found(-1.0), Some(Check::Sign), "{prediction:?}");
            assert_eq!(found(3.5), Some(Check::Denoises), "{prediction:?}");
        }
    }
    let zero = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.0;
    let blank = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, zero);
    assert_eq!(broken(check_denoiser(&blank, &data, &none)), Some(Check::Denoises));
    // A teacher of noisy data, in half precision too.
    for kind in [Kind::BFloat16, Kind::Double] {
        let (cond, data) = (wave(&SHAPE, 1.1, kind), wave(&SHAPE, 0.3, kind));
        let teacher = gaussian_teacher(0.5);
        assert_eq!(broken(check_denoiser(&teacher, &(&cond + data), &cond.into())), None);
    }
    let failing = check_denoiser(&blank, &Tensor::from(1i64), &none);
    assert!(matches!(failing, Err(Failure::Term(_))));
}

#[test]
fn a_gradient_that_leaks_into_a_network_is_found() -> Result<()> {
    let (x, real) = (wave(&SHAPE, 0.3, Kind::Double), wave(&SHAPE, 4.0, Kind::Double));
    let cond = wave(&SHAPE, 1.1, Kind::Double).into();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let teacher = gaussian_teacher(0.5);
    let weight = wave(&[2, 32], 0.9, Kind::Double).set_requires_grad(true);
    let logits = |x: &Tensor| x.sin().flatten(1, -1).linear(&weight, None::<&Tensor>);
    let leaking = regularizer_fn(|probe: &Probe<'_>| Ok(logits(probe.x()).mean(None)));
    let found = broken(check_regularizer(&leaking, &teacher, &batch));
    assert_eq!(found, Some(Check::SparesNetwork));
    let tight = regularizer_fn(|probe: &Probe<'_>| {
        gradient_only_in("logits", probe.x(), |x| Ok(logits(x).mean(None)))
    });
    assert_eq!(broken(check_regularizer(&tight, &teacher, &batch)), None);
    // The library's own.
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| logits(x);
    let gan = Adversarial::new(RectifiedFlow, critic);
    assert_eq!(broken(check_regularizer(&gan, &teacher, &batch)), None);
    let mmd = MaximumMeanDiscrepancy::new(decoupled_dmd::Kernel::Energy)?.features(logits);
    assert_eq!(broken(check_regularizer(&mmd, &teacher, &batch)), None);
    let reward = Reward::new(|x: &Tensor, _: &Condition| logits(x).mean_dim(1, false, None));
    assert_eq!(broken(check_regularizer(&reward, &teacher, &batch)), None);
    let fake = |x: &Tensor, _: &Tensor, _: &Condition| x * weight.mean(None);
    let dm = DistributionMatching::new(Denoiser::new(RectifiedFlow, Prediction::Sample, fake));
    assert_eq!(broken(check_regularizer(&dm, &teacher, &batch)), None);
    assert!(!weight.grad().defined(), "a check leaves no gradient behind");
    Ok(())
}

#[test]
fn a_fake_score_that_is_still_the_teacher_passes() -> Result<()> {
    let (x, cond) = (wave(&SHAPE, 0.3, Kind::Float), wave(&SHAPE, 1.1, Kind::Float).into());
    let (batch, teacher) = (Batch::new(&x, &cond)?, gaussian_teacher(0.5));
    let dm = DistributionMatching::new(gaussian_teacher(0.5));
    assert_eq!(broken(check_regularizer(&dm, &teacher, &batch)), None);
    Ok(())
}
