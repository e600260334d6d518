use decoupled_dmd::{Batch, Condition, Error, MeanVariance, Result, Statistics};
use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::common::{gradient, max_difference, value, values, wave};
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
