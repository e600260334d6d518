//! Directions and diagnostics of two frames by hand, in float64.

use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Engine,
    Group, Guidance, Normalizer, Objective, PostShift, PreShift, Prediction, Probe, RectifiedFlow,
    Renoising, Result, Uniform,
};
use tch::Tensor;

use super::factor;
use crate::common::values;

/// E[x0 | x_t] of data N(mean, variance) on rectified flow.
fn expectation(x: f64, t: f64, (mean, variance): (f64, f64)) -> f64 {
    let s = 1.0 - t;
    mean + t * variance / (t * t * variance + s * s) * (x - t * mean)
}

fn gaussian<'a>(variance: f64) -> Denoiser<'a> {
    let network = move |x: &Tensor, t: &Tensor, c: &Condition| {
        let a = factor(t, x);
        let s: Tensor = 1.0 - &a;
        let gain = &a * variance / (a.square() * variance + s.square());
        &c[0] + gain * (x - a * &c[0])
    };
    Denoiser::new(RectifiedFlow, Prediction::Sample, network)
}

const X: [f64; 4] = [0.9, -1.4, 0.3, 2.0];
const NOISE: [f64; 4] = [-0.5, 1.2, 0.8, -0.1];
const TAU: [f64; 2] = [0.25, 0.75];

/// x_tau and the mean distance of x to E[x0] in each frame, for data N(mean, 0.5).
fn by_hand(mean: f64) -> ([f64; 4], [f64; 2]) {
    let noised = std::array::from_fn(|i| TAU[i / 2] * X[i] + (1.0 - TAU[i / 2]) * NOISE[i]);
    let distance = |i: usize| (X[i] - expectation(noised[i], TAU[i / 2], (mean, 0.5))).abs();
    (noised, [0, 2].map(|first| (distance(first) + distance(first + 1)) / 2.0))
}

#[test]
fn ca_and_dm_of_two_frames() -> Result<()> {
    let [x, noise] = [X, NOISE].map(|values| Tensor::from_slice(&values).view([1, 2, 2]));
    let [cond, null] = [0.4, -0.3].map(|mean| Condition::from(Tensor::from_slice(&[mean])));
    let (teacher, dm) = (gaussian(0.5), DistributionMatching::new(gaussian(2.0)));
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    let (noised, distances) = by_hand(0.4);
    let of_video = (distances[0] + distances[1]) / 2.0;
    for (normalizer, n) in [
        (Normalizer::OFF, [1.0; 2]),
        (Normalizer::conditional().unguarded(), [of_video; 2]),
        (Normalizer::conditional().unguarded().over_frame(), distances),
        (Normalizer::conditional().epsilon(0.5)?.over_frame(), distances.map(|n| n + 0.5)),
        (Normalizer::conditional().unguarded().over_batch(), [of_video; 2]),
    ] {
        let tau = PostShift::new(Tensor::from_slice(&TAU).view([1, 2]))?;
        let probe = Probe::at(&teacher, &batch, tau, noise.shallow_clone())?.normalizer(normalizer);
        let ca = values(&CfgAugmentation::new(Guidance::new(3.0)?).direction(&probe)?);
        let dm = values(&dm.direction(&probe)?);
        for (i, &noised) in noised.iter().enumerate() {
            let at = |data| expectation(noised, TAU[i / 2], data);
            let real = at((0.4, 0.5));
            let n = n[i / 2];
            approx::assert_abs_diff_eq!(ca[i], 2.0 * (real - at((-0.3, 0.5))) / n, epsilon = 1e-14);
            approx::assert_abs_diff_eq!(dm[i], (real - at((0.4, 2.0))) / n, epsilon = 1e-14);
        }
    }
    Ok(())
}

#[test]
fn diagnostics_stay_those_of_samples() -> Result<()> {
    let [x, noise] = [X, NOISE].map(|values| Tensor::from_slice(&values).view([1, 2, 2]));
    let (cond, dm) = (Condition::from(Tensor::from_slice(&[0.4])), gaussian(2.0));
    let dm = DistributionMatching::new(dm);
    let (_, distances) = by_hand(0.4);
    // The guard acts on the smaller of both frames alone.
    let floor = (distances[0] + distances[1]) / 2.0;
    let normalizer = Normalizer::conditional().floor(floor)?.over_frame();
    let guarded = distances.map(|distance| distance.max(floor));
    let objective = Objective::new(gaussian(0.5)).observed().with(
        Group::new(Renoising::new(Uniform::FULL))
            .normalizer(normalizer)
            .regularizer("dm", 1.0, &dm),
    );
    // Three elements of four count: all of the first frame, and one of the second.
    let mask = Tensor::from_slice(&[true, true, true, false]).view([1, 2, 2]);
    for masked in [false, true] {
        let mut batch = Batch::new(&x, &cond)?;
        if masked {
            batch = batch.with_mask(&mask)?;
        }
        let u = Tensor::from_slice(&TAU).view([1, 2]);
        let draw = Draw { u, noise: noise.shallow_clone() };
        let evaluation = objective.evaluate_at(&batch, vec![draw])?;
        let diagnostics = evaluation.diagnostics.unwrap();
        let term = diagnostics.term("dm").unwrap();
        assert_eq!((term.tau.size(), values(&term.tau)), (vec![1, 2], TAU.to_vec()));
        let found = |number: &decoupled_dmd::PerSample| number.to_vec().map(|values| values[0]);
        let n = found(term.n.as_ref().unwrap())?.unwrap();
        let on_guard = found(term.on_guard.as_ref().unwrap())?.unwrap();
        assert_eq!(term.scores.as_ref().unwrap().cos.values().size(), [1]);
        if masked {
            let (noised, _) = by_hand(0.4);
            let second = (X[2] - expectation(noised[2], TAU[1], (0.4, 0.5))).abs();
            let expected = (2.0 * guarded[0] + second.max(floor)) / 3.0;
            approx::assert_abs_diff_eq!(n, expected, epsilon = 1e-14);
        } else {
            approx::assert_abs_diff_eq!(n, (guarded[0] + guarded[1]) / 2.0, epsilon = 1e-14);
            approx::assert_abs_diff_eq!(on_guard, 0.5, epsilon = 1e-14);
        }
    }
    Ok(())
}

#[test]
fn each_frame_is_drawn_above_its_own_student_time() -> Result<()> {
    let x = Tensor::from_slice(&X).view([1, 2, 2]);
    let student = PreShift::new(Tensor::from_slice(&[0.2, 0.6]).view([1, 2]))?;
    let renoising = Renoising::new(AboveStudent::FULL);
    let at = |u: Tensor| -> Result<Vec<f64>> {
        Ok(values(renoising.at(&RectifiedFlow, &u, Some(&student))?.tensor()))
    };
    // One draw for the sample, and one for each frame.
    for (u, expected) in [
        (Tensor::from_slice(&[0.5]), [0.6, 0.8]),
        (Tensor::from_slice(&[0.25, 0.75]).view([1, 2]), [0.4, 0.9]),
    ] {
        for (found, expected) in at(u)?.into_iter().zip(expected) {
            approx::assert_abs_diff_eq!(found, expected, epsilon = 1e-15);
        }
    }
    // One student time for the sample, and draws for its frames.
    let student = PreShift::new(Tensor::from_slice(&[0.2]))?;
    let u = Tensor::from_slice(&[0.25, 0.75]).view([1, 2]);
    let found = renoising.at(&RectifiedFlow, &u, Some(&student))?;
    for (found, expected) in values(found.tensor()).into_iter().zip([0.4, 0.8]) {
        approx::assert_abs_diff_eq!(found, expected, epsilon = 1e-15);
    }
    assert!(Batch::new(&x, &Condition::none())?.with_student_time(&student).is_ok());
    Ok(())
}
