//! f-divergences as weights on Distribution Matching, and priors for the maximum mean discrepancy.

use std::cell::Cell;

use decoupled_dmd::{
    Adversarial, Bandwidth, Batch, Condition, Denoiser, DistributionMatching, Divergence, Error,
    GanLoss, Kernel, MaximumMeanDiscrepancy, Normalizer, PostShift, Prediction, Probe,
    RectifiedFlow, Regularizer, Result, testing,
};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, max_difference, seeded, value, values, wave};
use super::loss_of;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn f(divergence: Divergence, r: f64) -> f64 {
    match divergence {
        Divergence::ReverseKl => -r.ln(),
        Divergence::ForwardKl => r * r.ln(),
        Divergence::JensenShannon => r * r.ln() - (r + 1.0) * ((r + 1.0) / 2.0).ln(),
        Divergence::SoftenedReverseKl => (r + 1.0) * (1.0 + 1.0 / r).ln(),
        Divergence::Neyman => (1.0 - r).powi(2) / r,
        Divergence::SquaredHellinger => (1.0 - r.sqrt()).powi(2),
        Divergence::Jeffreys => (r - 1.0) * r.ln(),
        _ => unreachable!("no other"),
    }
}

#[test]
fn weights_are_the_second_derivatives_of_f() -> Result<()> {
    for divergence in Divergence::ALL {
        for r in [0.2, 1.0, 3.7] {
            let h = 1e-4 * r;
            let bend =
                (f(divergence, r + h) - 2.0 * f(divergence, r) + f(divergence, r - h)) / (h * h);
            let weight = divergence.weight(&Tensor::from_slice(&[r]))?;
            let found = weight.map_or(1.0, |weight| weight.double_value(&[0]));
            approx::assert_relative_eq!(found, bend * r * r, max_relative = 1e-5);
        }
    }
    Ok(())
}

/// Teacher N(0, 1) and student N(0.3, 0.8) at a = 0.6, s = 0.4: the gradient of the term in the student's
/// mean is the gradient of D_f between the noised laws, times s^2 / a^2.
#[test]
fn the_direction_descends_the_divergence() -> Result<()> {
    let (a, s) = (0.6, 0.4);
    let (mean, variance): (f64, f64) = (0.3, 0.8);
    let gaussian = |mean: f64, variance: f64| {
        let network = move |x: &Tensor, t: &Tensor, _: &Condition| {
            let a = t.view([-1, 1]);
            let s = a.neg() + 1.0;
            mean + &a * variance / (a.square() * variance + s.square()) * (x - a * mean)
        };
        Denoiser::new(RectifiedFlow, Prediction::Sample, network)
    };
    // ln of the densities of the noised laws.
    let (p, q) = (a * a + s * s, a * a * variance + s * s);
    let log_ratio = |x: f64, mean: f64| {
        -0.5 * (x * x / p + p.ln()) + 0.5 * ((x - a * mean).powi(2) / q + q.ln())
    };
    let line: Vec<f64> = (0..161).map(|i| -6.0 + 12.0 * f64::from(i) / 160.0).collect();
    let density = |z: f64| (-0.5 * z * z).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let cell = 12.0 / 160.0;
    let divergence_at = |divergence: Divergence, mean: f64| -> f64 {
        line.iter()
            .map(|z| {
                let x = a * mean + q.sqrt() * z;
                f(divergence, log_ratio(x, mean).exp()) * density(*z) * cell
            })
            .sum()
    };
    let teacher = gaussian(0.0, 1.0);
    let (mut x, mut noise, mut weight) = (Vec::new(), Vec::new(), Vec::new());
    for z in line.iter().step_by(2) {
        for e in line.iter().step_by(2) {
            x.push(mean + variance.sqrt() * z);
            noise.push(*e);
            weight.push(density(*z) * density(*e) * 4.0 * cell * cell);
        }
    }
    let column = |values: &[f64]| Tensor::from_slice(values).view([-1, 1]);
    let (noise, weight) = (column(&noise), column(&weight));
    let cond = Condition::none();
    for divergence in Divergence::ALL {
        let samples = column(&x).set_requires_grad(true);
        let batch = Batch::new(&samples, &cond)?;
        let exact = |probe: &Probe<'_>| {
            let ratios: Vec<f64> =
                values(probe.noised()).into_iter().map(|x| log_ratio(x, mean)).collect();
            Tensor::from_slice(&ratios)
        };
        let dm = DistributionMatching::new(gaussian(mean, variance)).divergence(divergence, exact);
        let tau = PostShift::all(a, samples.size()[0], DOUBLE)?;
        let probe =
            Probe::at(&teacher, &batch, tau, noise.shallow_clone())?.normalizer(Normalizer::OFF);
        dm.loss(&probe)?.backward();
        let found = value(&(samples.grad() * samples.numel() as f64 * &weight).sum(None));
        let h = 1e-4;
        let slope =
            (divergence_at(divergence, mean + h) - divergence_at(divergence, mean - h)) / (2.0 * h);
        approx::assert_relative_eq!(found * (a * a) / (s * s), slope, max_relative = 2e-4);
    }
    Ok(())
}

#[test]
fn the_reverse_divergence_is_distribution_matching_bit_for_bit_and_asks_nobody() -> Result<()> {
    let asked = Cell::new(0);
    let x = wave(&[4, 3], 0.4, Kind::Float).set_requires_grad(true);
    let cond = Condition::from(wave(&[4, 3], 1.0, Kind::Float));
    let batch = Batch::new(&x, &cond)?;
    let gradient = |dm: DistributionMatching<'_>| -> Result<Tensor> {
        let loss = loss_of(&dm, &batch)?;
        Ok(Tensor::run_backward(&[&loss], &[&x], false, false).remove(0))
    };
    let plain = gradient(DistributionMatching::new(gaussian_teacher(0.8)))?;
    let log_ratio = |probe: &Probe<'_>| {
        asked.set(asked.get() + 1);
        Tensor::from_slice(&[0.0f32, 1e6, f32::NAN, -1e6]).to_device(probe.x().device())
    };
    let dm = |divergence| {
        DistributionMatching::new(gaussian_teacher(0.8)).divergence(divergence, log_ratio)
    };
    assert!(gradient(dm(Divergence::ReverseKl))?.equal(&plain));
    assert_eq!(asked.get(), 0);
    // Ratios are kept in [0.1, 20]; one that is not a number stays with its own sample.
    let forward = gradient(dm(Divergence::ForwardKl))?;
    assert_eq!(asked.get(), 1);
    for (row, factor) in [(0, 1.0), (1, 20.0), (3, 0.1)] {
        assert!(max_difference(&forward.get(row), &(plain.get(row) * factor)) < 1e-6);
    }
    assert!(value(&forward.get(2).isnan().to_kind(Kind::Float).min()) > 0.5);
    let wrong = DistributionMatching::new(gaussian_teacher(0.8))
        .divergence(Divergence::Neyman, |probe: &Probe<'_>| probe.x().shallow_clone());
    assert!(matches!(loss_of(&wrong, &batch), Err(Error::Shape { what: "log ratio", .. })));
    Ok(())
}

#[test]
fn a_log_ratio_is_a_non_saturating_critics_mean_logit() -> Result<()> {
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| x + t.view([-1, 1]);
    let gan = || Adversarial::new(RectifiedFlow, critic);
    let (x, cond) = (wave(&[4, 3], 0.4, Kind::Double), Condition::none());
    let (batch, teacher) = (Batch::new(&x, &cond)?, gaussian_teacher(1.0));
    let probe = Probe::at(&teacher, &batch, PostShift::all(0.5, 4, DOUBLE)?, x.copy())?;
    let found = gan().log_ratio(&probe)?;
    let expected = (probe.noised() + 0.5).mean_dim([1i64].as_slice(), false, None);
    assert!(max_difference(&found, &expected) < 1e-15 && !found.requires_grad());
    let refused = gan().gan_loss(GanLoss::Hinge).log_ratio(&probe).unwrap_err();
    assert!(matches!(refused, Error::OutOfRange { what: "non-saturating form", .. }));
    Ok(())
}

#[test]
fn a_prior_is_compared_as_real_samples_are() -> Result<()> {
    let kernel = || Kernel::Gaussian { bandwidth: Bandwidth::Fixed(2.5), scales: vec![1.0] };
    let (x, y) = (wave(&[6, 3], 0.4, Kind::Double), wave(&[5, 3], 2.0, Kind::Double));
    let cond = Condition::none();
    let against_real =
        loss_of(&MaximumMeanDiscrepancy::new(kernel())?, &Batch::new(&x, &cond)?.with_real(&y)?)?;
    let prior = MaximumMeanDiscrepancy::new(kernel())?.prior(|_: &Tensor| y.shallow_clone());
    let batch = Batch::new(&x, &cond)?;
    assert!(loss_of(&prior, &batch)?.equal(&against_real));
    testing::check_regularizer(&prior, &gaussian_teacher(1.0), &batch).expect("the contract");
    testing::check_gradient(&prior, &gaussian_teacher(1.0), &batch).expect("its gradient");
    let wrong =
        MaximumMeanDiscrepancy::new(kernel())?.prior(|_: &Tensor| Tensor::zeros([5, 2], DOUBLE));
    assert!(matches!(loss_of(&wrong, &batch), Err(Error::Shape { .. })));
    let alone = Batch::new(&x, &cond)?;
    let one = wave(&[1, 3], 0.4, Kind::Double);
    let single = Batch::new(&one, &cond)?;
    assert!(loss_of(&prior, &alone).is_ok());
    assert!(matches!(
        loss_of(&prior, &single),
        Err(Error::OutOfRange { what: "number of samples", .. })
    ));
    Ok(())
}

/// What a term would draw is given to it, and nothing is drawn then.
#[test]
fn a_prior_and_orders_may_be_given() -> Result<()> {
    let _guard = seeded(7);
    let pooled = |x: &Tensor| x.flatten(1, -1).narrow(1, 0, 2).tanh();
    let term = || -> Result<_> {
        let kernel = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(2.5), scales: vec![1.0] };
        MaximumMeanDiscrepancy::new(kernel)
    };
    let (x, drawn) = (wave(&[6, 3], 0.4, Kind::Double), wave(&[5, 2], 2.0, Kind::Double));
    let expected = term()?.between(&pooled(&x), &drawn)?;
    let prior = term()?.features(pooled).prior(|_: &Tensor| -> Tensor { unreachable!("given") });
    let independent = term()?.features(pooled).independence();
    for term in [prior, independent] {
        assert!(term.between(&x, &drawn)?.equal(&expected));
        let refused = term.between(&x, &wave(&[5, 3], 2.0, Kind::Double)).unwrap_err();
        assert!(matches!(refused, Error::Shape { .. }), "{refused}");
    }
    Ok(())
}

/// Gaussian closed forms with k = exp(-d^2 / b): a prior N(0, I), and dependence of two coordinates.
#[test]
fn gaussians_have_their_closed_forms() -> Result<()> {
    let _guard = seeded(6);
    let b = 2.5;
    let kernel = || Kernel::Gaussian { bandwidth: Bandwidth::Fixed(b), scales: vec![1.0] };
    let (mean, variance, count) = (0.8, 0.5, 3000);
    let x = Tensor::f_randn([count, 2], DOUBLE)? * f64::sqrt(variance) + mean;
    let prior =
        MaximumMeanDiscrepancy::new(kernel())?.prior(|like: &Tensor| like.f_randn_like().unwrap());
    let cond = Condition::none();
    let found = value(&loss_of(&prior, &Batch::new(&x, &cond)?)?);
    let power = |v: f64| b / (b + v);
    let distance: f64 = 2.0 * mean * mean;
    let expected = power(4.0 * variance) + power(4.0)
        - 2.0 * power(2.0 * variance + 2.0) * (-distance / (b + 2.0 * variance + 2.0)).exp();
    assert!((found - expected).abs() < 0.01, "{found} {expected}");
    for (correlation, expected) in [(0.0, 0.0), (0.3, 0.003_428_6), (0.8, 0.032_837_3)] {
        let z = Tensor::f_randn([count, 2], DOUBLE)?;
        let (one, two) = (z.select(1, 0), z.select(1, 1));
        let other = &one * correlation + two * f64::sqrt(1.0 - correlation * correlation);
        let x = Tensor::stack(&[one, other], 1).set_requires_grad(true);
        let term = MaximumMeanDiscrepancy::new(kernel())?.independence();
        let loss = loss_of(&term, &Batch::new(&x, &cond)?)?;
        assert!(
            (value(&loss) - expected).abs() < 0.003,
            "{correlation}: {} {expected}",
            value(&loss)
        );
        loss.backward();
        assert!(value(&x.grad().abs().max()) > 0.0);
    }
    Ok(())
}
