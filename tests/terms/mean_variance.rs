//! Mean-variance regularization: Eq. 7, its target, samples that collapse, and a training.

use decoupled_dmd::{
    Batch, Condition, Error, MeanVariance, Probe, Regularizer, Renoising, Result, Statistics,
    Uniform,
};
use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::common::paper::setting;
use super::common::{gaussian_teacher, gradient, max_difference, seeded, value, values, wave};
use super::loss_of;

fn loss_and_gradient(term: &MeanVariance, x: &Tensor) -> Result<(f64, Tensor)> {
    let (x, cond) = (x.detach().set_requires_grad(true), Condition::none());
    let loss = loss_of(term, &Batch::new(&x, &cond)?)?;
    Ok((value(&loss), gradient(&loss, &x)))
}

#[test]
fn a_running_target_is_a_bias_corrected_average() -> Result<()> {
    let batches =
        [0.0, 1.0, 2.0].map(|phase| wave(&[4, 2, 5], phase, Kind::Double) * (1.0 + phase));
    let averages: Vec<Vec<f64>> = batches
        .iter()
        .map(|batch| Ok(values(&MeanVariance::measured(batch, Statistics::PerChannel)?.target().1)))
        .collect::<Result<_>>()?;
    let decay = 0.9;
    let term = MeanVariance::measured(&batches[2], Statistics::PerChannel)?.running(decay, 0)?;
    // Adam's form: an average that starts at zero, divided by 1 - decay^k.
    let mut moment = [0.0; 2];
    for (k, (batch, average)) in (1..).zip(batches.iter().zip(&averages)) {
        term.update(batch)?;
        assert_eq!(term.updates(), k);
        let correction = 1.0 - decay.powf(k as f64);
        let target = values(&term.target().1);
        for channel in 0..2 {
            moment[channel] = decay * moment[channel] + (1.0 - decay) * average[channel];
            approx::assert_relative_eq!(
                target[channel],
                moment[channel] / correction,
                max_relative = 1e-13
            );
        }
    }
    // With decay 1 every batch counts the same.
    let term = MeanVariance::measured(&batches[2], Statistics::PerChannel)?.running(1.0, 0)?;
    for batch in &batches {
        term.update(batch)?;
    }
    for (channel, found) in values(&term.target().1).iter().enumerate() {
        let sum: f64 = averages.iter().map(|average| average[channel]).sum();
        approx::assert_relative_eq!(*found, sum / 3.0, max_relative = 1e-13);
    }
    // The average of v, not the variance of everything: shifting one sample changes nothing.
    let shifted = Tensor::cat(&[batches[0].narrow(0, 0, 1) + 5.0, batches[0].narrow(0, 1, 3)], 0);
    let shifted = MeanVariance::measured(&shifted, Statistics::PerChannel)?.target().1;
    let plain = MeanVariance::measured(&batches[0], Statistics::PerChannel)?.target().1;
    assert!(max_difference(&shifted, &plain) < 1e-13);
    Ok(())
}

#[test]
fn a_bad_update_is_refused_and_leaves_the_target() -> Result<()> {
    let x = wave(&[4, 2, 5], 0.0, Kind::Float);
    let fixed = MeanVariance::measured(&x, Statistics::PerChannel)?;
    let what = "decay of the running target";
    assert!(matches!(fixed.update(&x), Err(Error::OutOfRange { what: w, .. }) if w == what));
    for decay in [-0.1, 1.1, f64::NAN] {
        let term = MeanVariance::per_sample(0.0, 1.0)?.running(decay, 0);
        assert!(matches!(term, Err(Error::OutOfRange { what: w, .. }) if w == what));
    }
    let term = fixed.running(0.9, 1)?;
    let (mean, variance) = term.target();
    let broken = x.shallow_clone() * f64::NAN;
    assert!(matches!(term.update(&broken), Err(Error::OutOfRange { what: "target mean", .. })));
    assert!(matches!(
        term.update(&x.ones_like()),
        Err(Error::OutOfRange { what: "target variance", .. })
    ));
    let three = wave(&[4, 3, 5], 0.0, Kind::Float);
    assert!(matches!(
        term.update(&three),
        Err(Error::Shape { what: "channels of the real samples", .. })
    ));
    assert!(matches!(
        term.update(&wave(&[4, 2], 0.0, Kind::Float)),
        Err(Error::Shape { what: "real samples", .. })
    ));
    assert_eq!(term.updates(), 1);
    assert!(term.target().0.equal(&mean) && term.target().1.equal(&variance));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_unit_of_samples_and_target_does_not_matter(
        entries in prop::collection::vec(-3.0..3.0f64, 24),
        mean in prop::array::uniform2(-1.0..1.0f64),
        variance in prop::array::uniform2(0.1..2.0f64),
        // Below the variances, among them, and above.
        floor in prop::sample::select(&[1e-6, 2.0, 10.0][..]),
        scale in (-3.0..3.0f64).prop_map(|exponent| 10f64.powf(exponent)),
    ) {
        let x = Tensor::from_slice(&entries).view([3, 2, 4]);
        let of = |scale: f64, per_channel: bool| {
            let mean = Tensor::from_slice(&mean) * scale;
            let variance = Tensor::from_slice(&variance) * (scale * scale);
            let term = if per_channel {
                MeanVariance::per_channel(&mean, &variance)
            } else {
                MeanVariance::per_sample(mean.double_value(&[0]), variance.double_value(&[0]))
            };
            let term = term.unwrap().floor(floor * scale * scale).unwrap();
            loss_and_gradient(&term, &(&x * scale)).unwrap()
        };
        for per_channel in [false, true] {
            let ((one, slope), (scaled, scaled_slope)) = (of(1.0, per_channel), of(scale, per_channel));
            prop_assert!((scaled - one).abs() < 1e-11 * one.abs().max(1.0));
            let tolerance = 1e-11 * value(&slope.abs().max()).max(1.0);
            prop_assert!(max_difference(&(scaled_slope * scale), &slope) < tolerance);
        }
    }
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
fn mean_variance_checks_its_target_and_the_channels() -> Result<()> {
    let _guard = seeded(3);
    let ones = |shape: &[i64]| Tensor::ones(shape, (Kind::Float, tch::Device::Cpu));
    let is_shape = |error: Error, argument: &str| matches!(error, Error::Shape { what, .. } if what == argument);
    for (mean, variance) in [
        (f64::NAN, 1.0),
        (1e50, 1.0),
        (0.0, 0.0),
        (0.0, -1.0),
        (0.0, f64::INFINITY),
        (0.0, f64::NAN),
        (0.0, 1e-50),
        (0.0, 1e50),
    ] {
        let target = MeanVariance::per_sample(mean, variance);
        assert!(matches!(target, Err(Error::OutOfRange { .. })), "{mean} {variance}");
    }
    let three = ones(&[3]);
    assert!(is_shape(
        MeanVariance::per_channel(&three, &three.narrow(0, 0, 2)).unwrap_err(),
        "target variance"
    ));
    assert!(matches!(
        MeanVariance::per_channel(&three, &Tensor::from_slice(&[1.0f32, f32::NAN, 1.0])),
        Err(Error::OutOfRange { what: "target variance", .. })
    ));
    let matrix = ones(&[3, 1]);
    assert!(is_shape(MeanVariance::per_channel(&matrix, &matrix).unwrap_err(), "target mean"));
    assert!(is_shape(
        MeanVariance::measured(&Tensor::from(1.0), Statistics::PerSample).unwrap_err(),
        "real samples"
    ));
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-50] {
        let floor = MeanVariance::per_sample(0.0, 1.0)?.floor(bad);
        assert!(matches!(floor, Err(Error::OutOfRange { what: "variance floor", .. })), "{bad}");
    }

    let (cond, teacher) = (Condition::none(), gaussian_teacher(0.5));
    let four_channels = wave(&[2, 4, 3], 0.0, Kind::Float);
    let batch = Batch::new(&four_channels, &cond)?;
    let probe = Probe::draw(&teacher, &batch, &Renoising::new(Uniform::FULL))?;
    assert!(is_shape(MeanVariance::per_channel(&three, &three)?.loss(&probe).unwrap_err(), "x"));
    Ok(())
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

mod training {
    use decoupled_dmd::{CfgAugmentation, Group, Guidance, Objective};

    use super::super::training::{BATCH, FLOAT, Student, VARIANCE};
    use super::*;

    #[test]
    fn mean_variance_keeps_the_statistics_that_the_engine_would_change() -> Result<()> {
        const WIDTH: i64 = 64;
        let _guard = seeded(13);
        // The data are one picture with noise, the null branch knows the noise alone: guidance draws the
        // picture over and over.
        let picture = wave(&[WIDTH], 0.0, Kind::Float);
        let cond = Condition::from(picture.expand([BATCH, WIDTH], false));
        let null = Condition::from(Tensor::zeros([BATCH, WIDTH], FLOAT));
        let real = &picture + Tensor::randn([4096, WIDTH], FLOAT) * VARIANCE.sqrt();
        let target = MeanVariance::measured(&real, Statistics::PerSample)?.target();
        let (mean, variance) = (value(&target.0), value(&target.1));
        // ln(variance of the samples / variance of the data) after each hundred updates.
        let drift = |weight: Option<f64>| -> Result<Vec<f64>> {
            let group = || Group::new(Renoising::new(Uniform::FULL));
            let engine = CfgAugmentation::new(Guidance::new(2.0)?);
            let mut objective = Objective::new(gaussian_teacher(VARIANCE))
                .observed()
                .with(group().engine("ca", 1.0, engine));
            if let Some(weight) = weight {
                let term = MeanVariance::per_sample(mean, variance)?;
                objective = objective.with(group().regularizer("mv", weight, term));
            }
            let mut student = Student::new(WIDTH);
            let mut history = Vec::new();
            for step in 0..700 {
                let x = student.generate();
                let evaluation = objective.evaluate(&Batch::new(&x, &cond)?.with_null(&null))?;
                if step % 100 == 99 {
                    let all = evaluation.diagnostics.as_ref().expect("observed");
                    history.push(all.variance_drift(variance)?.expect("finite samples"));
                }
                student.descend(&evaluation.loss, 0.5);
            }
            Ok(history)
        };
        // Alone it never stops: here at more than seven times the variance of the data.
        let alone = drift(None)?;
        assert!(alone.windows(2).all(|pair| pair[1] > pair[0] + 0.1), "{alone:.3?}");
        assert!(alone[alone.len() - 1] > 2.0, "{alone:.3?}");
        // The regularizer comes to rest against it, the closer to the data the stronger it is.
        for (weight, limit) in [(10.0, 0.25), (30.0, 0.1)] {
            let regularizered = drift(Some(weight))?;
            assert!(
                regularizered.iter().all(|drift| drift.abs() < limit),
                "{weight} {regularizered:.3?}"
            );
            let settled = &regularizered[2..];
            assert!(
                settled.iter().all(|d| (d - settled[0]).abs() < 0.02),
                "{weight} {regularizered:.3?}"
            );
        }
        Ok(())
    }
}
