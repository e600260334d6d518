//! Paired regression against numbers by hand.

use decoupled_dmd::{
    Batch, Condition, Distance, Error, Group, Objective, PairedRegression, Perceptual, Renoising,
    Result, Uniform, testing,
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
    assert!(matches!(missing, Error::Missing { what: "target", setter: "Batch::with_target" }));
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
    Ok(())
}
