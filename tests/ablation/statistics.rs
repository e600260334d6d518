//! Intervals, spectra and variances of the experiments, against SciPy, NumPy and closed forms.

use anyhow::Result;
use serde::Deserialize;
use tch::Tensor;
use tch_training::files::read_json;
use zimage::emoji::mean_variance;

use super::ablation::bench::radial_spectrum;
use super::ablation::statistics::{Interval, quantile};
use super::common;

#[derive(Deserialize)]
struct Numbers {
    quantiles: Vec<f64>,
    samples: Vec<Sample>,
    images: Vec<f64>,
    shape: Vec<i64>,
    spectrum: Vec<f64>,
}

#[derive(Deserialize)]
struct Sample {
    values: Vec<f64>,
    low: f64,
    high: f64,
}

fn numbers() -> Result<Numbers> {
    Ok(read_json("tests/reference/ablation.json".as_ref())?)
}

#[test]
fn intervals_are_those_of_scipy() -> Result<()> {
    let numbers = numbers()?;
    for (degrees, expected) in (1..).zip(&numbers.quantiles) {
        // The table holds four digits after the point.
        assert!((quantile(degrees) - expected).abs() < 1e-4, "{degrees} degrees of freedom");
    }
    assert_eq!(numbers.quantiles.len(), 20);
    for sample in &numbers.samples {
        let interval = Interval::of(&sample.values).expect("values");
        let half_width = interval.half_width.expect("two values or more");
        let tolerance = 3e-5 * half_width;
        assert!((interval.mean - half_width - sample.low).abs() < tolerance);
        assert!((interval.mean + half_width - sample.high).abs() < tolerance);
        assert_eq!(interval.excludes_zero(), sample.low > 0.0 || sample.high < 0.0);
    }
    assert_eq!(Interval::of(&[]), None);
    assert_eq!(Interval::of(&[2.0]), Some(Interval { mean: 2.0, half_width: None, count: 1 }));
    Ok(())
}

#[test]
fn spectra_are_those_of_numpy() -> Result<()> {
    let numbers = numbers()?;
    let images = Tensor::from_slice(&numbers.images).view(numbers.shape.as_slice());
    let spectrum = radial_spectrum(&images)?;
    assert_eq!(spectrum.len(), numbers.spectrum.len());
    for (found, expected) in spectrum.iter().zip(&numbers.spectrum) {
        assert!((found - expected).abs() < 1e-12, "{spectrum:?} {:?}", numbers.spectrum);
    }
    // A wave of three periods is in ring 3 alone, with half its squared amplitude.
    let phase = Tensor::arange(16, common::DOUBLE) * (6.0 * std::f64::consts::PI / 16.0);
    let wave = (phase.cos() * 2.0).view([1, 1, 1, 16]).repeat([1, 1, 16, 1]);
    for (ring, power) in radial_spectrum(&wave)?.into_iter().enumerate() {
        assert!((power - if ring == 3 { 2.0 } else { 0.0 }).abs() < 1e-12, "{ring}: {power}");
    }
    let error = radial_spectrum(&Tensor::zeros([1, 1, 4, 8], common::DOUBLE)).unwrap_err();
    assert!(error.to_string().contains("4x8"), "{error}");
    Ok(())
}

#[test]
fn variance_is_that_of_one_image_averaged() -> Result<()> {
    let images = Tensor::from_slice(&[1.0, 3.0, 10.0, 16.0]).view([2, 2]);
    assert!((mean_variance(&images)? - 5.0).abs() < 1e-12);
    Ok(())
}
