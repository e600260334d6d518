//! SiD and SIM against identities of Gaussians with an exact fake score.

use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, Error, Guidance, NoisePath, Normalizer,
    PostShift, Prediction, Probe, RectifiedFlow, Regularizer, Result, ScoreIdentity, Shift,
    testing,
};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, max_difference, value, values, wave};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
/// Mean and variance of the student's samples; the teacher has N(0, 1).
const MEAN: f64 = 0.7;
const VARIANCE: f64 = 0.36;

fn gaussian<'a>(mean: f64, variance: f64) -> Denoiser<'a> {
    Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        move |x: &Tensor, t: &Tensor, _: &Condition| {
            let a = t.view([-1, 1]);
            let s = a.neg() + 1.0;
            let gain = &a * variance / (a.square() * variance + s.square());
            mean + gain * (x - a * mean)
        },
    )
}

/// Gradients in x of each sample, times the number of samples and elements.
fn gradients(
    term: &dyn Regularizer,
    teacher: &Denoiser<'_>,
    x: &Tensor,
    noise: &Tensor,
    t: f64,
    normalizer: Normalizer,
) -> Result<Tensor> {
    let x = x.detach().set_requires_grad(true);
    let cond = Condition::from(Tensor::from(0.0));
    let batch = Batch::new(&x, &cond)?;
    let tau = PostShift::all(t, x.size()[0], DOUBLE)?;
    let probe = Probe::at(teacher, &batch, tau, noise.shallow_clone())?.normalizer(normalizer);
    term.loss(&probe)?.backward();
    Ok(x.grad() * x.numel() as f64)
}

/// Nodes of x's own noise z and of the re-noising noise, with their weights: the trapezoid rule, which is
/// exact to rounding for Gaussian integrands.
fn nodes() -> (Tensor, Tensor, Tensor) {
    let (count, end) = (121, 7.0);
    let line = Tensor::linspace(-end, end, count, DOUBLE);
    let step = 2.0 * end / (count - 1) as f64;
    let density = (line.square() * -0.5).exp() * (step / (2.0 * std::f64::consts::PI).sqrt());
    let grid = |t: &Tensor, other: &Tensor| {
        (t.view([-1, 1]) * other.ones_like().view([1, -1])).flatten(0, -1)
    };
    let z = grid(&line, &line);
    let noise = (line.ones_like().view([-1, 1]) * line.view([1, -1])).flatten(0, -1);
    let weight = (density.view([-1, 1]) * density.view([1, -1])).flatten(0, -1);
    (z.view([-1, 1]), noise.view([-1, 1]), weight.view([-1, 1]))
}

/// E |delta|^2 at time t, for points drawn with the mean `sampled` and a fake score of mean `known`.
fn divergence(
    t: f64,
    sampled: f64,
    known: f64,
    distance: impl Fn(Tensor) -> Tensor,
) -> Result<f64> {
    let (z, noise, weight) = nodes();
    let noised = (z * VARIANCE.sqrt() + sampled) * t + noise * (1.0 - t);
    let time = PostShift::all(t, noised.size()[0], DOUBLE)?;
    let cond = Condition::none();
    let real = gaussian(0.0, 1.0).denoise(&noised, &time, &cond)?;
    let fake = gaussian(known, VARIANCE).denoise(&noised, &time, &cond)?;
    Ok(value(&(distance(real - fake) * weight).sum(None)))
}

/// The gradient in the mean of the student's samples.
fn slope(term: &dyn Regularizer, t: f64) -> Result<f64> {
    let (z, noise, weight) = nodes();
    let x = z * VARIANCE.sqrt() + MEAN;
    let found = gradients(term, &gaussian(0.0, 1.0), &x, &noise, t, Normalizer::OFF)?;
    Ok(value(&(found * weight).sum(None)))
}

fn derivative(f: impl Fn(f64) -> Result<f64>) -> Result<f64> {
    let h = 1e-4;
    Ok((f(MEAN + h)? - f(MEAN - h)?) / (2.0 * h))
}

#[test]
fn a_half_and_one_are_gradients_of_fishers_divergence() -> Result<()> {
    let dm = DistributionMatching::new(gaussian(MEAN, VARIANCE));
    let square = |delta: Tensor| delta.square();
    for t in [0.25, 0.6, 0.9] {
        let half = 2.0 * slope(&ScoreIdentity::new(&dm, 0.5)?, t)?;
        let total = derivative(|mean| divergence(t, mean, mean, square))?;
        approx::assert_relative_eq!(half, total, max_relative = 1e-6);
        // At alpha 1 the points stay where they are and the fake score alone moves.
        let one = 2.0 * slope(&ScoreIdentity::new(&dm, 1.0)?, t)?;
        let fixed = derivative(|mean| divergence(t, MEAN, mean, square))?;
        approx::assert_relative_eq!(one, fixed, max_relative = 1e-6);
        // So does SIM, with its own distance.
        let c = 0.3;
        let sim = slope(&ScoreIdentity::pseudo_huber(&dm, c)?, t)?;
        let huber = |delta: Tensor| (delta.square() + c * c).sqrt();
        let fixed = derivative(|mean| divergence(t, MEAN, mean, huber))?;
        approx::assert_relative_eq!(sim, fixed, max_relative = 1e-6);
    }
    Ok(())
}

#[test]
fn equal_variances_make_it_a_share_of_distribution_matching() -> Result<()> {
    let (t, variance) = (0.6, 0.49);
    let (a, s) = (t, 1.0 - t);
    let k = a * variance / (a * a * variance + s * s);
    let dm = DistributionMatching::new(gaussian(0.7, variance));
    let teacher = gaussian(-0.2, variance);
    let (x, noise) = (wave(&[5, 3], 0.4, Kind::Double), wave(&[5, 3], 2.0, Kind::Double));
    let plain = gradients(&dm, &teacher, &x, &noise, t, Normalizer::OFF)?;
    for alpha in [0.0, 1.0, 1.2] {
        let sid = ScoreIdentity::new(&dm, alpha)?;
        let found = gradients(&sid, &teacher, &x, &noise, t, Normalizer::OFF)?;
        assert!(max_difference(&found, &(&plain * (1.0 - k * a))) < 1e-13);
    }
    Ok(())
}

#[test]
fn constant_predictions_make_it_distribution_matching() -> Result<()> {
    let constant = |value: f64| {
        let network = move |x: &Tensor, _: &Tensor, _: &Condition| x.full_like(value);
        Denoiser::new(RectifiedFlow, Prediction::Sample, network)
    };
    let dm = DistributionMatching::new(constant(0.4));
    let (x, noise) = (wave(&[5, 3], 0.4, Kind::Double), wave(&[5, 3], 2.0, Kind::Double));
    for normalizer in
        [Normalizer::OFF, Normalizer::default(), Normalizer::conditional().unguarded()]
    {
        let plain = gradients(&dm, &constant(1.0), &x, &noise, 0.6, normalizer)?;
        for alpha in [0.5, 1.0, 1.2] {
            let sid = ScoreIdentity::new(&dm, alpha)?;
            let found = gradients(&sid, &constant(1.0), &x, &noise, 0.6, normalizer)?;
            assert!(max_difference(&found, &plain) < 1e-13);
        }
    }
    Ok(())
}

#[test]
fn the_contract_is_kept_and_networks_get_no_gradient() -> Result<()> {
    let weights = [0.8, 0.5].map(|value| Tensor::from(value).set_requires_grad(true));
    let network = |weight: &Tensor| {
        let weight = weight.shallow_clone();
        let network = move |x: &Tensor, t: &Tensor, _: &Condition| {
            x.square() * &weight * t.view([-1, 1]) + x * 0.3
        };
        Denoiser::new(RectifiedFlow, Prediction::Sample, network)
    };
    let (teacher, dm) = (network(&weights[0]), DistributionMatching::new(network(&weights[1])));
    let x = wave(&[4, 3], 0.4, Kind::Double).set_requires_grad(true);
    let (cond, null) = (Condition::none(), Condition::none());
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    for sid in [
        ScoreIdentity::new(&dm, 1.2)?,
        ScoreIdentity::pseudo_huber(&dm, 0.1)?,
        ScoreIdentity::new(&dm, 1.0)?.guided(Guidance::new(3.0)?),
    ] {
        testing::check_regularizer(&sid, &teacher, &batch).expect("the contract");
        testing::check_independence(&sid, &teacher, &batch).expect("samples do not meet");
    }
    // Without a normaliser, which is detached, the gradient is the gradient of the value.
    let sim = ScoreIdentity::pseudo_huber(&dm, 0.1)?;
    testing::check_gradient(&sim, &teacher, &batch).expect("the gradient of the value");
    for weight in &weights {
        assert!(!weight.grad().defined());
    }
    assert!(sim.own_loss(&batch)?.is_none());
    let mask = Tensor::from_slice(&[true, false, true, true]);
    let masked = Batch::new(&x, &cond)?.with_mask(&mask)?;
    let tau = PostShift::all(0.5, 4, DOUBLE)?;
    let probe = Probe::at(&teacher, &masked, tau, wave(&[4, 3], 2.0, Kind::Double))?;
    let loss = ScoreIdentity::new(&dm, 1.0)?.loss(&probe)?;
    let gradient = Tensor::run_backward(&[&loss], &[&x], false, false).remove(0);
    assert!(values(&gradient.get(1)).iter().all(|g| g.abs() <= 0.0));
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let dm = DistributionMatching::new(gaussian_teacher(0.5));
    for bad in [f64::NAN, f64::INFINITY, 1e39] {
        assert!(matches!(ScoreIdentity::new(&dm, bad), Err(Error::OutOfRange { .. })));
    }
    for bad in [0.0, -1.0, f64::NAN] {
        assert!(matches!(ScoreIdentity::pseudo_huber(&dm, bad), Err(Error::OutOfRange { .. })));
    }
    let (x, cond) = (wave(&[2, 3], 0.4, Kind::Double), Condition::from(Tensor::from(0.0)));
    let batch = Batch::new(&x, &cond)?;
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
    let path = RectifiedFlow.shifted(Shift::new(3.0)?);
    let shifted = Denoiser::new(path, Prediction::Sample, network);
    let tau = PostShift::all(0.5, 2, DOUBLE)?;
    let probe = Probe::at(&shifted, &batch, tau, x.zeros_like())?;
    let refused = ScoreIdentity::new(&dm, 1.0)?.loss(&probe).unwrap_err();
    assert!(matches!(refused, Error::OutOfRange { what: "shift of the term's path", .. }));
    Ok(())
}
