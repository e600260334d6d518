//! The identities of the paper, each against a computation of its own.

mod common;

use common::paper::{ALPHA, FAKE_VARIANCE, TEACHER_VARIANCE, mean_abs, setting};
use common::{
    gaussian_denoiser, gaussian_teacher, gradient, max_difference, seeded, value, values, wave,
};
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Engine, Group, Guidance,
    MeanVariance, Normalizer, Objective, PostShift, Prediction, Probe, RectifiedFlow, Regularizer,
    Renoising, Result, Schedule, Statistics, Uniform,
};
use tch::{Kind, Tensor};

/// DMD2's loss (`guidance/sd_guidance.py`), written from its formula.
fn dmd2(x: &Tensor, guided: &Tensor, fake: &Tensor) -> Tensor {
    let factor = mean_abs(&(x - guided));
    let step = ((fake - guided) / factor).detach();
    0.5 * (x - (x - step).detach()).square().mean(None)
}

#[test]
fn equation_2_dm_follows_teacher_minus_fake() -> Result<()> {
    let s = setting(Kind::Double);
    let teacher = gaussian_teacher(TEACHER_VARIANCE);
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let batch = s.batch();
    let tau = PostShift::new(s.u.shallow_clone())?;
    let probe = Probe::at(&teacher, &batch, tau, s.noise.shallow_clone())?;
    let [_, cond, _, fake] = s.predictions();
    let expected = (&cond - fake) / mean_abs(&(&s.x - &cond)).clamp_min(0.1);
    assert!(max_difference(&dm.direction(&probe)?, &expected) < 1e-14);
    let slope = gradient(&dm.loss(&probe)?, &s.x);
    assert!(max_difference(&slope, &(-expected / s.x.numel() as f64)) < 1e-16);
    Ok(())
}

#[test]
fn equations_1_and_2_the_mean_direction_is_the_slope_of_the_divergence() -> Result<()> {
    // Student N(m, v), teacher N(mu, r): KL(p_fake || p_real) at tau, differentiated in m.
    let (m, v, mu, r) = (0.7, FAKE_VARIANCE, -0.4, TEACHER_VARIANCE);
    for tau in [0.1, 0.5, 0.9] {
        let (a, s): (f64, f64) = (tau, 1.0 - tau);
        let (fake, real) = (a * a * v + s * s, a * a * r + s * s);
        let divergence =
            |m: f64| 0.5 * ((real / fake).ln() + (fake + (a * (m - mu)).powi(2)) / real - 1.0);
        let slope = (divergence(m + 1e-5) - divergence(m - 1e-5)) / 2e-5;
        // Scores are affine in x_tau, so two samples and noises about their means average exactly.
        let x = Tensor::from_slice(&[m - 1.0, m + 1.0]).view([2, 1]);
        let noise = Tensor::from_slice(&[-0.5, 0.5]).view([2, 1]);
        let cond = Condition::from(Tensor::from_slice(&[mu, m]));
        let of = |index: usize, variance| {
            Denoiser::new(
                RectifiedFlow,
                Prediction::Sample,
                move |x: &Tensor, t: &Tensor, c: &Condition| {
                    gaussian_denoiser(x, t, &c[0].get(index as i64), variance)
                },
            )
        };
        let dm = DistributionMatching::new(of(1, v));
        let (teacher, batch) = (of(0, r), Batch::new(&x, &cond)?);
        let tau = PostShift::new(Tensor::from_slice(&[tau, tau]))?;
        let probe = Probe::at(&teacher, &batch, tau, noise)?.normalizer(Normalizer::OFF);
        let direction = value(&dm.direction(&probe)?.mean(None));
        // d = (s^2 / a) (s_real - s_fake), and dx_tau/dm = a.
        approx::assert_relative_eq!(direction, -(s / a).powi(2) * slope, max_relative = 1e-8);
    }
    Ok(())
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
fn equation_6_ca_is_the_guidance_direction_times_alpha_minus_one() -> Result<()> {
    let s = setting(Kind::Double);
    let teacher = gaussian_teacher(TEACHER_VARIANCE);
    let batch = s.batch();
    let [_, cond, null, _] = s.predictions();
    for (normalizer, scale) in [
        (Normalizer::OFF, Tensor::from(1.0)),
        (Normalizer::conditional().floor(1e-8)?, mean_abs(&(&s.x - &cond))),
        (Normalizer::conditional().floor(1e3)?, Tensor::from(1e3)),
    ] {
        let tau = PostShift::new(s.u.shallow_clone())?;
        let probe = Probe::at(&teacher, &batch, tau, s.noise.shallow_clone())?;
        let probe = probe.normalizer(normalizer);
        let direction = CfgAugmentation::new(Guidance::new(ALPHA)?).direction(&probe)?;
        let expected = (ALPHA - 1.0) * (&cond - &null) / scale;
        assert!(max_difference(&direction, &expected) < 1e-14, "{normalizer:?}");
        // An engine of one's own scales the same difference by itself, which stays as it is.
        let difference = (ALPHA - 1.0) * (&cond - &null);
        let kept = difference.copy();
        assert!(max_difference(&probe.normalize(&difference)?, &expected) < 1e-14);
        assert!(difference.equal(&kept));
    }
    Ok(())
}

#[test]
fn equations_4_to_6_coupled_ca_and_dm_with_the_common_normaliser_are_dmd2() -> Result<()> {
    for (kind, tolerance) in [(Kind::Double, 1e-16), (Kind::Float, 2e-8)] {
        let s = setting(kind);
        let guidance = Guidance::new(ALPHA)?;
        let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
        let teacher = gaussian_teacher(TEACHER_VARIANCE);
        let objective = Schedule::CoupledShared.objective(teacher, guidance, &dm);
        let evaluation = objective.evaluate_at(&s.batch(), vec![s.draw()])?;
        let [_, cond, null, fake] = s.predictions();
        let guided = &null + ALPHA * (&cond - &null);
        let reference = gradient(&dmd2(&s.x, &guided, &fake), &s.x);
        let difference = max_difference(&gradient(&evaluation.loss, &s.x), &reference);
        assert!(difference < tolerance, "{kind:?}: {difference}");
        assert!(value(&reference.abs().max()) > 1e-3);
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

/// KL between Gaussians, Eq. 7, sample by sample in plain numbers.
fn equation_7(samples: &[Vec<f64>], mu: f64, var: f64) -> f64 {
    let divergence = |x: &Vec<f64>| {
        let n = x.len() as f64;
        let m = x.iter().sum::<f64>() / n;
        let v = x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / n;
        0.5 * ((v + (m - mu).powi(2)) / var - 1.0 - (v / var).ln())
    };
    samples.iter().map(divergence).sum::<f64>() / samples.len() as f64
}

#[test]
fn equation_7_mean_variance_is_the_divergence_of_the_statistics() -> Result<()> {
    let _guard = seeded(2);
    let s = setting(Kind::Double);
    let teacher = gaussian_teacher(1.0);
    let batch = s.batch();
    let probe = Probe::draw(&teacher, &batch, &Renoising::new(Uniform::FULL))?;
    let rows = |groups: i64| -> Vec<Vec<f64>> {
        (0..groups).map(|i| values(&s.x.detach().view([groups, -1]).get(i))).collect()
    };

    let loss = MeanVariance::per_sample(0.075, 0.81)?.loss(&probe)?;
    approx::assert_relative_eq!(value(&loss), equation_7(&rows(3), 0.075, 0.81), epsilon = 1e-12);

    let same = Tensor::from_slice(&[0.075, 0.075]);
    let loss =
        MeanVariance::per_channel(&same, &Tensor::from_slice(&[0.81, 0.81]))?.loss(&probe)?;
    approx::assert_relative_eq!(value(&loss), equation_7(&rows(6), 0.075, 0.81), epsilon = 1e-12);

    // dL/dx = 1/(B N) [ (x - mu)/var - (x - m)/v ]
    let term = MeanVariance::per_sample(0.075, 0.81)?;
    let slope = gradient(&term.loss(&probe)?, &s.x);
    let x = s.x.detach();
    let m = x.mean_dim(&[1i64, 2, 3][..], true, None);
    let v = (&x - &m).square().mean_dim(&[1i64, 2, 3][..], true, None);
    let expected = ((&x - 0.075) / 0.81 - (&x - m) / v) / x.numel() as f64;
    assert!(max_difference(&slope, &expected) < 1e-15);
    Ok(())
}

#[test]
fn equation_7_vanishes_with_its_gradient_at_the_target() -> Result<()> {
    let _guard = seeded(2);
    let teacher = gaussian_teacher(1.0);
    let cond = Condition::from(wave(&[1, 2, 4, 4], 1.0, Kind::Double));
    let x = wave(&[1, 2, 4, 4], 0.3, Kind::Double).set_requires_grad(true);
    let batch = Batch::new(&x, &cond)?;
    let probe = Probe::draw(&teacher, &batch, &Renoising::new(Uniform::FULL))?;
    for statistics in [Statistics::PerSample, Statistics::PerChannel] {
        let loss = MeanVariance::measured(&x, statistics)?.loss(&probe)?;
        assert!(value(&loss).abs() < 1e-15, "{statistics:?}");
        assert!(value(&gradient(&loss, &x).abs().max()) < 1e-16, "{statistics:?}");
    }
    Ok(())
}
