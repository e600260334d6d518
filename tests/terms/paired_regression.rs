//! Paired regression and rewards against numbers by hand.

use decoupled_dmd::{
    Batch, Condition, Denoiser, Distance, DistributionMatching, Error, Group, Normalizer,
    Objective, PairedRegression, Perceptual, PostShift, Prediction, Probe, RectifiedFlow,
    Regularizer, Renoising, Result, Reward, Uniform, testing,
};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, max_difference, seeded, value, wave};
use super::loss_of;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn condition() -> Condition {
    Condition::from(Tensor::from(0.0))
}

#[test]
fn distances_by_hand() -> Result<()> {
    let x = Tensor::from_slice(&[1.0, 2.0, -1.0, 0.5]).view([2, 2]);
    let y = Tensor::from_slice(&[0.0, 2.0, 1.0, 0.0]).view([2, 2]);
    let of =
        |distance| -> Result<f64> { Ok(value(&PairedRegression::new(distance).between(&x, &y)?)) };
    // Differences 1, 0, -2, 0.5.
    approx::assert_relative_eq!(of(Distance::Squared)?, 5.25 / 4.0);
    approx::assert_relative_eq!(of(Distance::Absolute)?, 3.5 / 4.0);
    let huber = |d: f64, c: f64| (d * d + c * c).sqrt() - c;
    let c = 0.3;
    let expected = (huber(1.0, c) + huber(2.0, c) + huber(0.5, c)) / 4.0;
    approx::assert_relative_eq!(of(Distance::pseudo_huber(c)?)?, expected, epsilon = 1e-14);
    let expected = (huber(1.0, c) + huber(4.25_f64.sqrt(), c)) / 2.0;
    approx::assert_relative_eq!(
        of(Distance::pseudo_huber_of_samples(c)?)?,
        expected,
        epsilon = 1e-14
    );
    Ok(())
}

/// One layer: the samples themselves, `[B, C, H, W]`.
fn identity<'a>() -> Result<Distance<'a>> {
    let weight = Tensor::ones([3], DOUBLE);
    Ok(Distance::Perceptual(Perceptual::new(|x: &Tensor| vec![x.shallow_clone()], vec![weight])?))
}

#[test]
fn a_perceptual_distance_of_the_samples_is_two_minus_two_cosines() -> Result<()> {
    let (x, y) = (wave(&[2, 3, 4, 4], 0.3, Kind::Double), wave(&[2, 3, 4, 4], 1.9, Kind::Double));
    let regression = PairedRegression::new(identity()?);
    let cosine = Tensor::cosine_similarity(&x, &y, 1, 1e-12);
    let expected = value(&(cosine * -2.0 + 2.0).mean(None));
    // 1e-8 inside of the root, against vectors of about unit length.
    approx::assert_relative_eq!(value(&regression.between(&x, &y)?), expected, epsilon = 1e-5);
    let scaled = value(&regression.between(&(&x * 7.0), &y)?);
    approx::assert_relative_eq!(scaled, expected, epsilon = 1e-5);
    // Scale is not looked at: the gradient is at right angles to the sample at each place.
    let leaf = x.copy().set_requires_grad(true);
    regression.between(&leaf, &y)?.backward();
    let along = (leaf.grad() * &x).sum_dim_intlist([1i64].as_slice(), false, None);
    assert!(value(&along.abs().max()) < 1e-6 * value(&leaf.grad().abs().max()));
    let zero = x.zeros_like().set_requires_grad(true);
    regression.between(&zero, &y)?.backward();
    assert_eq!(zero.grad().isfinite().all().int64_value(&[]), 1);
    Ok(())
}

#[test]
fn layers_add_up_and_networks_get_no_gradient() -> Result<()> {
    let kernel = wave(&[5, 3, 3, 3], 0.2, Kind::Double).set_requires_grad(true);
    let features = |x: &Tensor| {
        let first = x.conv2d(&kernel, None::<&Tensor>, 1, 1, 1, 1).tanh();
        let second = first.avg_pool2d([2, 2], [2, 2], 0, false, true, None::<i64>);
        vec![first, second]
    };
    let weights = vec![wave(&[5], 0.1, Kind::Double).abs(), wave(&[5], 0.9, Kind::Double).abs()];
    let (x, y) = (wave(&[2, 3, 4, 4], 0.3, Kind::Double), wave(&[2, 3, 4, 4], 1.9, Kind::Double));
    let mut expected = 0.0;
    for ((x, y), weight) in features(&x).iter().zip(features(&y)).zip(&weights) {
        let unit = |t: &Tensor| {
            t / (t.square().sum_dim_intlist([1i64].as_slice(), true, None) + 1e-8).sqrt()
        };
        let square = (unit(x) - unit(&y)).square() * weight.view([1, -1, 1, 1]);
        expected += value(&square.sum_dim_intlist([1i64].as_slice(), false, None).mean(None));
    }
    let perceptual =
        Perceptual::new(features, weights.iter().map(Tensor::shallow_clone).collect())?;
    let regression = PairedRegression::new(Distance::Perceptual(perceptual));
    approx::assert_relative_eq!(value(&regression.between(&x, &y)?), expected, epsilon = 1e-13);
    let cond = condition();
    let batch = Batch::new(&x, &cond)?.with_target(&y)?;
    testing::check_regularizer(&regression, &gaussian_teacher(1.0), &batch).expect("the contract");
    testing::check_gradient(&regression, &gaussian_teacher(1.0), &batch).expect("its gradient");
    testing::check_independence(&regression, &gaussian_teacher(1.0), &batch).expect("alone");
    assert!(!kernel.grad().defined());
    Ok(())
}

#[test]
fn pairs_keep_the_contract_under_every_distance_and_mask() -> Result<()> {
    let (x, y) = (wave(&[4, 3], 0.3, Kind::Double), wave(&[4, 3], 1.9, Kind::Double));
    let cond = condition();
    let batch = Batch::new(&x, &cond)?.with_target(&y)?;
    let distances = || -> Result<Vec<Distance<'static>>> {
        Ok(vec![
            Distance::Squared,
            Distance::Absolute,
            Distance::pseudo_huber(0.1)?,
            Distance::pseudo_huber_of_samples(0.1)?,
        ])
    };
    for distance in distances()? {
        let regression = PairedRegression::new(distance);
        testing::check_regularizer(&regression, &gaussian_teacher(1.0), &batch)
            .expect("the contract");
        testing::check_gradient(&regression, &gaussian_teacher(1.0), &batch).expect("its gradient");
        testing::check_independence(&regression, &gaussian_teacher(1.0), &batch).expect("alone");
        let mask = Tensor::from_slice(&[true, false, true, true]);
        let bad = x.copy();
        let _ = bad.get(1).fill_(f64::NAN);
        let of = |x: &Tensor, y: &Tensor| {
            loss_of(&regression, &Batch::new(x, &cond)?.with_target(y)?.with_mask(&mask)?)
        };
        assert!(max_difference(&of(&bad, &y)?, &of(&x, &y)?) <= 0.0);
    }
    // As an engine: it drives, and the balance of terms sees it as such.
    let half = PairedRegression::new(Distance::Squared);
    let samples = wave(&[4, 3], 0.3, Kind::BFloat16).set_requires_grad(true);
    let target = wave(&[4, 3], 1.9, Kind::BFloat16);
    let group = Group::new(Renoising::new(Uniform::FULL)).engine_loss("pairs", 1.0, half);
    let _guard = seeded(1);
    let batch = Batch::new(&samples, &cond)?.with_target(&target)?;
    let loss = Objective::new(gaussian_teacher(1.0)).with(group).evaluate(&batch)?.loss;
    assert_eq!((loss.kind(), samples.kind()), (Kind::Float, Kind::BFloat16));
    loss.backward();
    let expected =
        (samples.detach().to_kind(Kind::Float) - target.to_kind(Kind::Float)) * (2.0 / 12.0);
    assert!(max_difference(&samples.grad(), &expected) < 2e-3);
    Ok(())
}

#[test]
fn a_reward_is_climbed_by_its_own_gradient() -> Result<()> {
    // The recogniser of a Gaussian control: log q(c | x) = -(c - h x)^2 / (2 R) up to a constant.
    let (h, r) = (0.7, 0.3);
    let gain = Tensor::from(h).set_requires_grad(true);
    let reward = Reward::new(|x: &Tensor, c: &Condition| {
        let error = &c[0] - x * &gain;
        error.square().sum_dim_intlist([1i64].as_slice(), false, None) * (-0.5 / r)
    });
    let x = wave(&[4, 1], 0.3, Kind::Double).set_requires_grad(true);
    let control = wave(&[4, 1], 1.1, Kind::Double);
    let cond = Condition::from(control.shallow_clone());
    let batch = Batch::new(&x, &cond)?;
    loss_of(&reward, &batch)?.backward();
    let expected = (&control - x.detach() * h) * (-h / (r * 4.0));
    assert!(max_difference(&x.grad(), &expected) < 1e-14);
    assert!(!gain.grad().defined());
    testing::check_regularizer(&reward, &gaussian_teacher(1.0), &batch).expect("the contract");
    testing::check_gradient(&reward, &gaussian_teacher(1.0), &batch).expect("its gradient");
    testing::check_independence(&reward, &gaussian_teacher(1.0), &batch).expect("alone");
    Ok(())
}

/// JDM in one dimension: q(x) = N(0, 1), q(c | x) = N(h x, R). With a fake score that sees the control,
/// the student x = slope c + std z has its fixed point at slope (lambda h / R) / (s^2 / V + mu) and
/// variance s^2 (a^2 - mu V) / (a^2 (s^2 + mu V)), mu = lambda h^2 / R, V = a^2 + s^2; blind to the
/// control, another.
#[test]
fn a_new_control_has_its_fixed_point_with_a_fake_score_that_sees_it() -> Result<()> {
    let (h, r): (f64, f64) = (0.7, 0.3);
    for (a, lambda, expected) in
        [(0.6, 0.05, (0.299_638, 0.834_885)), (0.8, 0.02, (0.510_073, 0.787_803))]
    {
        let s = 1.0 - a;
        let v = a * a + s * s;
        let mu = lambda * h * h / r;
        let slope = lambda * h / r / (s * s / v + mu);
        let std = (s * s * (a * a - mu * v) / (a * a * (s * s + mu * v))).sqrt();
        approx::assert_abs_diff_eq!(slope, expected.0, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(std, expected.1, epsilon = 1e-6);
        // Quadrature over the control, the student's noise and the re-noising noise.
        let line = Tensor::linspace(-6.0, 6.0, 41, DOUBLE);
        let density = (line.square() * -0.5).exp() * (0.3 / (2.0 * std::f64::consts::PI).sqrt());
        let grid = Tensor::meshgrid_indexing(&[&line, &line, &line], "ij");
        let [c, z, noise] = [0, 1, 2].map(|axis| grid[axis].reshape([-1, 1]));
        let weights = Tensor::meshgrid_indexing(&[&density, &density, &density], "ij");
        let weight = weights[0].shallow_clone() * &weights[1] * &weights[2];
        let weight = weight.reshape([-1, 1]);
        let x = (&c * slope + &z * std).set_requires_grad(true);
        let cond = Condition::from(c.shallow_clone());
        let batch = Batch::new(&x, &cond)?;
        let gaussian = |mean: &Tensor, variance: f64, x: &Tensor, t: &Tensor| {
            let a = t.view([-1, 1]);
            let s = a.neg() + 1.0;
            mean + &a * variance / (a.square() * variance + s.square()) * (x - &a * mean)
        };
        let teacher = Denoiser::new(
            RectifiedFlow,
            Prediction::Sample,
            // The teacher has never seen the control.
            |x: &Tensor, t: &Tensor, _: &Condition| gaussian(&Tensor::from(0.0), 1.0, x, t),
        );
        let fake = Denoiser::new(
            RectifiedFlow,
            Prediction::Sample,
            |x: &Tensor, t: &Tensor, c: &Condition| gaussian(&(&c[0] * slope), std * std, x, t),
        );
        let dm = DistributionMatching::new(fake);
        let reward = Reward::new(|x: &Tensor, c: &Condition| {
            ((&c[0] - x * h).square() * (-0.5 / r)).view([-1])
        });
        let tau = PostShift::all(a, x.size()[0], DOUBLE)?;
        let probe = Probe::at(&teacher, &batch, tau, noise)?.normalizer(Normalizer::OFF);
        // One element a sample: both losses are means over the same number.
        (dm.loss(&probe)? + reward.loss(&probe)? * lambda).backward();
        let each = x.grad() * x.numel() as f64 * weight;
        let in_slope = value(&(&each * &c).sum(None));
        let in_std = value(&(&each * &z).sum(None));
        let size = value(&(each.abs() * c.abs()).sum(None));
        assert!(
            in_slope.abs() < 1e-6 * size && in_std.abs() < 1e-6 * size,
            "{in_slope} {in_std} {size}"
        );
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    for bad in [0.0, -1.0, f64::NAN] {
        assert!(
            Distance::pseudo_huber(bad).is_err() && Distance::pseudo_huber_of_samples(bad).is_err()
        );
    }
    let perceptual =
        |weights: Vec<Tensor>| Perceptual::new(|x: &Tensor| vec![x.shallow_clone()], weights);
    assert!(matches!(perceptual(vec![]), Err(Error::Shape { .. })));
    assert!(matches!(perceptual(vec![Tensor::from(1.0)]), Err(Error::Shape { .. })));
    assert!(matches!(perceptual(vec![Tensor::from_slice(&[1i64])]), Err(Error::Kind { .. })));
    for bad in [-0.1, f64::NAN, f64::INFINITY] {
        let made = perceptual(vec![Tensor::from_slice(&[1.0, bad])]);
        assert!(
            matches!(made, Err(Error::OutOfRange { what: "weight of a channel", .. })),
            "{bad}"
        );
    }
    let (x, cond) = (wave(&[2, 3, 4, 4], 0.3, Kind::Double), condition());
    let plain = PairedRegression::new(Distance::Squared);
    let missing = loss_of(&plain, &Batch::new(&x, &cond)?).unwrap_err();
    assert!(matches!(missing, Error::Missing { what: "target", setter: "with_target" }));
    let small = wave(&[2, 3], 0.3, Kind::Double);
    assert!(matches!(
        Batch::new(&x, &cond)?.with_target(&small),
        Err(Error::Shape { what: "target", .. })
    ));
    assert!(matches!(plain.between(&x, &small), Err(Error::Shape { what: "target", .. })));
    let ones = || Tensor::ones([3], DOUBLE);
    for (features, what) in [
        (
            Box::new(|_: &Tensor| vec![]) as Box<dyn Fn(&Tensor) -> Vec<Tensor>>,
            "number of layers of features",
        ),
        (Box::new(|x: &Tensor| vec![x.narrow(1, 0, 2)]), "features"),
        (Box::new(|x: &Tensor| vec![x.get(0)]), "features"),
    ] {
        let regression =
            PairedRegression::new(Distance::Perceptual(Perceptual::new(features, vec![ones()])?));
        let found = match regression.between(&x, &x).unwrap_err() {
            Error::OutOfRange { what, .. } | Error::Shape { what, .. } => what,
            error => panic!("{error}"),
        };
        assert_eq!(found, what);
    }
    let leaf = x.copy().set_requires_grad(true);
    let blind = Perceptual::new(|x: &Tensor| vec![x.detach()], vec![ones()])?;
    let refused =
        PairedRegression::new(Distance::Perceptual(blind)).between(&leaf, &x).unwrap_err();
    assert!(matches!(refused, Error::NoGradient { what: "features" }));
    let reward = Reward::new(|x: &Tensor, _: &Condition| x.sum(None));
    assert!(matches!(
        loss_of(&reward, &Batch::new(&x, &cond)?),
        Err(Error::Shape { what: "score", .. })
    ));
    let blind =
        Reward::new(|x: &Tensor, _: &Condition| x.detach().flatten(1, -1).mean_dim(1, false, None));
    let refused = loss_of(&blind, &Batch::new(&leaf, &cond)?).unwrap_err();
    assert!(matches!(refused, Error::NoGradient { what: "score" }));
    Ok(())
}
