//! Identities of the paper that join several terms, each against a computation of its own.

use decoupled_dmd::{
    CfgAugmentation, Condition, Denoiser, DistributionMatching, Engine, Group, Guidance,
    Normalizer, Objective, PostShift, Prediction, Probe, RectifiedFlow, Renoising, Result,
    Schedule, Uniform,
};
use tch::{Kind, Tensor};

use super::common::paper::{ALPHA, FAKE_VARIANCE, TEACHER_VARIANCE, mean_abs, setting};
use super::common::{
    assert_float64, assert_rounding, gaussian_teacher, gradient, max_difference, value,
};

/// DMD2's loss (`guidance/sd_guidance.py`), written from its formula.
fn dmd2(x: &Tensor, guided: &Tensor, fake: &Tensor) -> Tensor {
    let factor = mean_abs(&(x - guided));
    let step = ((fake - guided) / factor).detach();
    0.5 * (x - (x - step).detach()).square().mean(None)
}

#[test]
fn equations_3_and_4_guidance_may_be_applied_to_any_prediction() -> Result<()> {
    let s = setting(Kind::Double);
    let time = PostShift::new(s.u.shallow_clone())?;
    let guide = |cond: &Tensor, null: &Tensor| null + ALPHA * (cond - null);
    let net = |x: &Tensor, c: &Tensor| (x + c).sin();
    for prediction in Prediction::ALL {
        let plain = |x: &Tensor, _: &Tensor, c: &Condition| net(x, &c[0]);
        let plain = Denoiser::new(RectifiedFlow, prediction, plain);
        let guided =
            |x: &Tensor, _: &Tensor, c: &Condition| guide(&net(x, &c[0]), &net(x, &s.null[0]));
        let guided = Denoiser::new(RectifiedFlow, prediction, guided);
        let (cond, null) = plain.denoise_pair(&s.noise, &time, &s.cond, &s.null)?;
        let after = guide(&cond, &null);
        let before = guided.denoise(&s.noise, &time, &s.cond)?;
        assert!(max_difference(&before, &after) < 1e-13, "{prediction:?}");
    }
    Ok(())
}

#[test]
fn equation_5_the_update_of_dmd_splits_into_dm_and_ca() -> Result<()> {
    let s = setting(Kind::Double);
    let (teacher, batch) = (gaussian_teacher(TEACHER_VARIANCE), s.batch());
    let tau = PostShift::new(s.u.shallow_clone())?;
    let probe = Probe::at(&teacher, &batch, tau, s.noise.shallow_clone())?;
    let probe = probe.normalizer(Normalizer::OFF);
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let ca = CfgAugmentation::new(Guidance::new(ALPHA)?);
    let [_, cond, null, fake] = s.predictions();
    let whole = (&null + ALPHA * (cond - &null)) - fake;
    let sum = dm.direction(&probe)? + ca.direction(&probe)?;
    assert!(max_difference(&sum, &whole) < 1e-14);
    Ok(())
}

#[test]
fn equations_4_to_6_coupled_ca_and_dm_with_the_common_normaliser_are_dmd2() -> Result<()> {
    let mut exact = None;
    for kind in [Kind::Double, Kind::Float] {
        let s = setting(kind);
        let guidance = Guidance::new(ALPHA)?;
        let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
        let teacher = gaussian_teacher(TEACHER_VARIANCE);
        let objective = Schedule::CoupledShared.objective(teacher, guidance, &dm);
        let evaluation = objective.evaluate_at(&s.batch(), vec![s.draw()])?;
        let [_, cond, null, fake] = s.predictions();
        let guided = &null + ALPHA * (&cond - &null);
        let reference = gradient(&dmd2(&s.x, &guided, &fake), &s.x);
        let found = gradient(&evaluation.loss, &s.x);
        match &exact {
            None => assert_float64("DMD2", &found, &reference),
            Some(exact) => assert_rounding("DMD2", &reference, &found, exact),
        }
        assert!(value(&reference.abs().max()) > 1e-3);
        exact.get_or_insert(reference);
    }
    Ok(())
}

#[test]
fn with_separate_normalisers_the_coupled_sum_is_not_dmd2() -> Result<()> {
    let s = setting(Kind::Double);
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let objective = Objective::new(gaussian_teacher(TEACHER_VARIANCE)).with(
        Group::new(Renoising::new(Uniform::FULL))
            .engine("ca", 1.0, CfgAugmentation::new(Guidance::new(ALPHA)?))
            .regularizer("dm", 1.0, &dm),
    );
    let evaluation = objective.evaluate_at(&s.batch(), vec![s.draw()])?;
    let [_, cond, null, fake] = s.predictions();
    let guided = &null + ALPHA * (&cond - &null);
    let reference = gradient(&dmd2(&s.x, &guided, &fake), &s.x);
    assert!(max_difference(&gradient(&evaluation.loss, &s.x), &reference) > 1e-3);
    Ok(())
}
