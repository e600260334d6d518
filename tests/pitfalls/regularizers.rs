//! Of the regularizers with statistics, a kernel or a critic.

use std::cell::RefCell;

use decoupled_dmd::{
    Adversarial, Bandwidth, Batch, Condition, CriticPenalty, Error, Estimator, GanLoss, Kernel,
    MaximumMeanDiscrepancy, MeanVariance, PostShift, RectifiedFlow, Result, Statistics,
};
use tch::{Kind, Tensor};

use super::common::{DOUBLE, gradient, loss_of, max_difference, seeded, value, wave};

fn leaf(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double).set_requires_grad(true)
}

fn half(batch: i64) -> PostShift {
    PostShift::all(0.5, batch, DOUBLE).unwrap()
}

fn loss_and_gradient(term: &MeanVariance, x: &Tensor) -> Result<(f64, Tensor)> {
    let (x, cond) = (x.detach().set_requires_grad(true), Condition::none());
    let loss = loss_of(term, &Batch::new(&x, &cond)?)?;
    Ok((value(&loss), gradient(&loss, &x)))
}

#[test]
fn pitfall_9_at_its_target_mean_variance_vanishes_with_its_gradient() -> Result<()> {
    for batch in [1, 3] {
        let x = wave(&[1, 2, 4, 4], 0.3, Kind::Double).expand([batch, 2, 4, 4], false);
        for statistics in [Statistics::PerSample, Statistics::PerChannel] {
            let (loss, slope) = loss_and_gradient(&MeanVariance::measured(&x, statistics)?, &x)?;
            assert!(loss.abs() < 1e-15, "{loss}");
            assert!(value(&slope.abs().max()) < 1e-16);
        }
    }
    Ok(())
}

#[test]
fn pitfall_9_one_channel_is_the_sample_and_equal_samples_are_one() -> Result<()> {
    let x = wave(&[3, 1, 4, 4], 0.3, Kind::Double);
    let (mean, variance) = (Tensor::from_slice(&[0.1]), Tensor::from_slice(&[0.7]));
    let by_channel = loss_and_gradient(&MeanVariance::per_channel(&mean, &variance)?, &x)?;
    let by_sample = loss_and_gradient(&MeanVariance::per_sample(0.1, 0.7)?, &x)?;
    assert!((by_channel.0 - by_sample.0).abs() < 1e-15);
    assert!(max_difference(&by_channel.1, &by_sample.1) < 1e-17);

    let one = x.narrow(0, 0, 1);
    let term = MeanVariance::per_sample(0.1, 0.7)?;
    let (single, repeated) =
        (loss_and_gradient(&term, &one)?, loss_and_gradient(&term, &one.repeat([4, 1, 1, 1]))?);
    assert!((single.0 - repeated.0).abs() < 1e-15);
    assert!(max_difference(&(single.1 / 4.0), &repeated.1.narrow(0, 0, 1)) < 1e-17);
    Ok(())
}

#[test]
fn pitfall_9_a_collapsing_sample_is_pushed_apart_with_bounded_force() -> Result<()> {
    let pattern = wave(&[1, 64], 0.3, Kind::Double);
    let pattern = (&pattern - pattern.mean(None)) / pattern.std(false);
    let term = MeanVariance::per_sample(0.0, 1.0)?;
    let mut previous = 0.0;
    for spread in [1e-2, 1e-3, 1e-4, 1e-6, 1e-9, 0.0] {
        let (loss, slope) = loss_and_gradient(&term, &(&pattern * spread))?;
        assert!(loss.is_finite() && loss > previous, "value falls at {spread}");
        previous = loss;
        // Below the floor 1e-6 of the variance: x / var - x / floor.
        let factor: f64 = 1.0 - 1.0 / (spread * spread).max(1e-6);
        let expected = &pattern * (spread * factor / 64.0);
        assert!(max_difference(&slope, &expected) < 1e-10, "{spread}");
        let rms = value(&slope.square().mean(None).sqrt());
        assert!(rms <= 1e3 / 64.0 * 1.001, "{spread} {rms}");
    }
    Ok(())
}

#[test]
fn pitfall_10_estimates_of_the_discrepancy_keep_what_they_promise() -> Result<()> {
    let _guard = seeded(21);
    for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
        let term =
            |estimator| MaximumMeanDiscrepancy::new(kernel.clone()).unwrap().estimator(estimator);
        let (unbiased, biased) = (term(Estimator::Unbiased), term(Estimator::Biased));
        // Equal distributions: the U-statistic is 0 on average, the V-statistic never below.
        let draws = 400;
        let estimates: Vec<f64> = (0..draws)
            .map(|_| {
                let (x, y) = (Tensor::randn([5, 3], DOUBLE), Tensor::randn([5, 3], DOUBLE));
                assert!(value(&biased.between(&x, &y)?) > -1e-14, "{kernel:?}");
                Ok(value(&unbiased.between(&x, &y)?))
            })
            .collect::<Result<_>>()?;
        let mean = estimates.iter().sum::<f64>() / f64::from(draws);
        let squares = estimates.iter().map(|e| (e - mean).powi(2)).sum::<f64>();
        let error = (squares / f64::from(draws * (draws - 1))).sqrt();
        // With a measured bandwidth the kernel depends on the sample, a little.
        assert!(mean.abs() < 4.0 * error, "{kernel:?}: {mean} +- {error}");
        assert!(estimates.iter().any(|estimate| *estimate < 0.0));
        // One sample has no pair.
        let (one, many) = (Tensor::randn([1, 3], DOUBLE), Tensor::randn([5, 3], DOUBLE));
        for (x, y) in [(&one, &many), (&many, &one)] {
            assert!(matches!(unbiased.between(x, y), Err(Error::OutOfRange { .. })));
            assert!(biased.between(x, y).is_ok());
        }
    }
    // A measured bandwidth has no gradient: it is as good as the same number given.
    let (x, y) = (leaf(&[4, 3], 0.3), wave(&[5, 3], 1.3, Kind::Double) * 1.5);
    let pairs = Tensor::cat(&[&x, &y], 0).detach().pdist(2.0).square();
    for (measured, unit) in
        [(Bandwidth::Median, value(&pairs.median())), (Bandwidth::Mean, value(&pairs.mean(None)))]
    {
        let slope = |bandwidth| -> Result<Tensor> {
            let term =
                MaximumMeanDiscrepancy::new(Kernel::Gaussian { bandwidth, scales: vec![1.0] })?;
            Ok(gradient(&term.between(&x, &y)?, &x))
        };
        let difference = max_difference(&slope(measured)?, &slope(Bandwidth::Fixed(unit))?);
        assert!(difference < 1e-15, "{measured:?}: {difference}");
    }
    Ok(())
}

#[test]
fn pitfall_11_each_step_leaves_the_other_player_alone() -> Result<()> {
    let cond = Condition::none();
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        let (x, real) = (leaf(&[3, 4], 0.3), wave(&[3, 4], 1.3, Kind::Double));
        // A trunk that is not even frozen by the user, and a head.
        let (trunk, head) = (leaf(&[4, 5], 2.0), leaf(&[5, 2], 3.0));
        let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&trunk).tanh().matmul(&head);
        let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
        let gan = gan.penalty(CriticPenalty::R1 { gamma: 0.1 })?;
        let batch = Batch::new(&x, &cond)?.with_real(&real)?;

        loss_of(&gan, &batch)?.backward();
        assert!(value(&x.grad().abs().max()) > 1e-3, "{gan_loss:?}");
        assert!(!trunk.grad().defined() && !head.grad().defined(), "{gan_loss:?}");
        // The gradient is that of the chain through the trunk.
        let logits = |t: &Tensor| {
            let noised: Tensor = 0.5 * t + 0.5 * wave(&[3, 4], 5.0, Kind::Double);
            noised.matmul(&trunk).tanh().matmul(&head)
        };
        let (fake, judged) = (logits(&x), logits(&real));
        let plain = match gan_loss {
            GanLoss::NonSaturating => (-fake).softplus().mean(None),
            GanLoss::Hinge => -fake.mean(None),
            _ => (judged - fake).softplus().mean(None),
        };
        assert!(max_difference(&x.grad(), &gradient(&plain, &x)) < 1e-16, "{gan_loss:?}");

        let before = x.grad().copy();
        let noise = wave(&[3, 4], 5.0, Kind::Double);
        gan.critic_loss_at(&batch, &half(3), &noise, &noise)?.backward();
        assert!(trunk.grad().defined() && head.grad().defined());
        assert!(x.grad().equal(&before) && !real.requires_grad());
    }
    Ok(())
}

#[test]
fn pitfall_11_approximate_r1_moves_the_noised_sample_and_tends_to_r1() -> Result<()> {
    // Four samples at one place, moved along +- sqrt(2) e_i: the mean over n is exact for a plane.
    let x = leaf(&[4, 2], 0.3);
    let real = Tensor::from_slice(&[0.3, -0.8]).expand([4, 2], false);
    let noise = Tensor::from_slice(&[0.5, 1.0]).expand([4, 2], false);
    let root = 2f64.sqrt();
    let perturbation =
        Tensor::from_slice(&[root, 0.0, -root, 0.0, 0.0, root, 0.0, -root]).view([4, 2]);
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let seen = RefCell::new(Vec::new());
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| {
        seen.borrow_mut().push(x.detach());
        (x * Tensor::from_slice(&[1.0, -2.0])).sin().sum_dim_intlist(&[1i64][..], true, None)
    };
    let loss = |penalty: CriticPenalty| -> Result<f64> {
        let gan = Adversarial::new(RectifiedFlow, critic).penalty(penalty)?;
        Ok(value(&gan.critic_loss_at(&batch, &half(4), &noise, &perturbation)?))
    };
    let none = loss(CriticPenalty::R1 { gamma: 0.0 })?;
    let exact = loss(CriticPenalty::R1 { gamma: 2.0 })? - none;
    let mut errors = Vec::new();
    for sigma in [0.1, 0.01, 0.001] {
        seen.borrow_mut().clear();
        // gamma = 2 weight sigma^2
        let weight = 1.0 / (sigma * sigma);
        let approximate = loss(CriticPenalty::ApproximateR1 { weight, sigma })? - none;
        errors.push((approximate / exact - 1.0).abs());
        let seen = seen.borrow();
        let noised: Tensor = 0.5 * &real + 0.5 * &noise;
        assert_eq!(seen.len(), 3);
        assert!(max_difference(&seen[1], &noised) < 1e-15);
        assert!(max_difference(&seen[2], &(noised + sigma * &perturbation)) < 1e-15);
    }
    assert!(errors[0] < 0.1 && errors[1] < 1e-3 && errors[2] < 1e-5, "{errors:?}");
    Ok(())
}
