//! Maximum mean discrepancy: values by hand, gradients, laws of the estimate, and a training.

use decoupled_dmd::{
    Bandwidth, Batch, Condition, Error, Estimator, Kernel, MaximumMeanDiscrepancy, Result,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::common::{
    DOUBLE, FLOAT64, float32_bound, gradient, max_difference, seeded, value, values, wave,
};
use super::{central_differences, loss_of, reorder};

fn kernels() -> [Kernel; 4] {
    let fixed = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(2.0), scales: vec![0.5, 3.0] };
    [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy, fixed]
}

fn term(kernel: &Kernel, estimator: Estimator) -> MaximumMeanDiscrepancy<'static> {
    MaximumMeanDiscrepancy::new(kernel.clone()).unwrap().estimator(estimator)
}

fn leaf(x: &Tensor) -> Tensor {
    x.detach().set_requires_grad(true)
}

#[test]
fn two_points_give_the_numbers_worked_out_by_hand() -> Result<()> {
    // x = {0, 2}, y = {1, 1}: own pairs at distance 2 and 0, cross pairs at distance 1.
    let x = Tensor::from_slice(&[0.0, 2.0]).view([2, 1]);
    let y = Tensor::from_slice(&[1.0, 1.0]).view([2, 1]);
    let gaussian = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(2.0), scales: vec![1.0] };
    let between =
        |estimator| -> Result<f64> { Ok(value(&term(&gaussian, estimator).between(&x, &y)?)) };
    let (far, near) = ((-2.0f64).exp(), (-0.5f64).exp());
    let unbiased = far + 1.0 - 2.0 * near;
    let biased = (1.0 + far) / 2.0 + 1.0 - 2.0 * near;
    approx::assert_abs_diff_eq!(between(Estimator::Unbiased)?, unbiased, epsilon = 1e-15);
    approx::assert_abs_diff_eq!(between(Estimator::Biased)?, biased, epsilon = 1e-15);
    let energy = value(&term(&Kernel::Energy, Estimator::Biased).between(&x, &y)?);
    approx::assert_abs_diff_eq!(energy, 2.0 - 1.0, epsilon = 1e-15);
    Ok(())
}

#[test]
fn the_gradient_is_that_of_the_value_with_the_bandwidth_held() -> Result<()> {
    let x = wave(&[4, 3], 0.3, Kind::Double);
    let y = wave(&[5, 3], 1.3, Kind::Double) * 1.5 + 0.4;
    let pairs = |points: &Tensor| points.pdist(2.0);
    let median = value(&pairs(&Tensor::cat(&[&x, &y], 0)).median().square());
    let at = |bandwidth| Kernel::Gaussian { bandwidth, scales: vec![0.5, 1.0] };
    let held = at(Bandwidth::Fixed(median));
    for estimator in [Estimator::Unbiased, Estimator::Biased] {
        let bandwidth = Bandwidth::Fixed(1.5);
        let multiquadric = Kernel::InverseMultiquadric { bandwidth, scales: vec![0.5, 2.0] };
        for kernel in [held.clone(), multiquadric, Kernel::Energy] {
            let term = term(&kernel, estimator);
            let x = leaf(&x);
            let slope = gradient(&term.between(&x, &y)?, &x);
            let expected = central_differences(&x, |x| value(&term.between(x, &y).unwrap()));
            let difference = max_difference(&slope, &expected);
            assert!(difference < 1e-8, "{kernel:?} {difference}");
        }
        let x = leaf(&x);
        let slope = |kernel: &Kernel| -> Result<Tensor> {
            Ok(gradient(&term(kernel, estimator).between(&x, &y)?, &x))
        };
        let measured = at(Bandwidth::Median);
        assert!(max_difference(&slope(&measured)?, &slope(&held)?) < 1e-15);
        // Had the bandwidth carried a gradient, it would be another one.
        let moving =
            central_differences(&x, |x| value(&term(&measured, estimator).between(x, &y).unwrap()));
        assert!(max_difference(&slope(&measured)?, &moving) > 1e-4);
    }
    Ok(())
}

#[test]
fn blocks_of_rows_give_what_all_pairs_at_once_give() -> Result<()> {
    let _guard = seeded(22);
    // Numbers, so that all pairs are one matrix. Each of the three sums has more of them than a block,
    // even than the 4.2 million of one on a GPU, and a last block that is not like the others.
    let (m, n) = (2100.0, 2050.0);
    let x = leaf(&Tensor::randn([2100, 1], DOUBLE));
    let y = Tensor::randn([2050, 1], DOUBLE) * 1.1 + 0.2;
    let pooled = Tensor::cat(&[&x, &y], 0);
    let squares = value(&pooled.square().sum(None)) / (m + n);
    let mean_square = 2.0 * (m + n) / (m + n - 1.0) * (squares - value(&pooled.mean(None)).powi(2));
    // Kernels of a difference, and their derivatives.
    type OfDifference<'a> = &'a dyn Fn(&Tensor) -> (Tensor, Tensor);
    let gaussian = |d: &Tensor| {
        let [one, other] = [0.5, 3.0].map(|width| (d.square() / -width).exp());
        ((&one + &other) / 2.0, -d * (one / 0.5 + other / 3.0))
    };
    let multiquadric = |d: &Tensor| {
        let k = mean_square / (d.square() + mean_square);
        (k.shallow_clone(), d * k.square() * (-2.0 / mean_square))
    };
    let energy = |d: &Tensor| (-d.abs(), -d.sign());
    let fixed = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(1.0), scales: vec![0.5, 3.0] };
    let mean = Kernel::InverseMultiquadric { bandwidth: Bandwidth::Mean, scales: vec![1.0] };
    let cases: [(Kernel, f64, OfDifference<'_>); 3] =
        [(fixed, 1.0, &gaussian), (mean, 1.0, &multiquadric), (Kernel::Energy, 0.0, &energy)];
    for (kernel, at_zero, of_difference) in cases {
        let loss = term(&kernel, Estimator::Unbiased).between(&x, &y)?;
        let sums = |a: &Tensor, b: &Tensor| {
            let (k, slope) = of_difference(&(a - b.transpose(0, 1)).detach());
            (value(&k.sum(None)), slope.sum_dim_intlist(&[1i64][..], true, None))
        };
        let ((own, own_slope), (real, _), (cross, cross_slope)) =
            (sums(&x, &x), sums(&y, &y), sums(&x, &y));
        let expected = (own - m * at_zero) / (m * (m - 1.0))
            + (real - n * at_zero) / (n * (n - 1.0))
            - 2.0 * cross / (m * n);
        approx::assert_abs_diff_eq!(value(&loss), expected, epsilon = 1e-12);
        let expected = 2.0 * own_slope / (m * (m - 1.0)) - 2.0 * cross_slope / (m * n);
        let difference = max_difference(&gradient(&loss, &x), &expected);
        assert!(difference < 1e-11 * value(&expected.abs().max()), "{kernel:?} {difference}");
    }
    Ok(())
}

#[test]
fn large_batches_and_points_that_coincide_are_fine() -> Result<()> {
    let _guard = seeded(23);
    let draw = || Tensor::randn([1500, 2], (Kind::Float, Device::Cpu));
    let estimate =
        value(&term(&Kernel::gaussian(), Estimator::Unbiased).between(&draw(), &draw())?);
    assert!(estimate.abs() < 5e-3, "{estimate}");
    for kernel in kernels() {
        for kind in [Kind::Float, Kind::Double] {
            let x = leaf(&Tensor::full([3, 2], 0.5, (kind, Device::Cpu)));
            let loss = term(&kernel, Estimator::Biased).between(&x, &x.detach())?;
            // A difference of kernels that are 1.
            let bound = if kind == Kind::Double { FLOAT64 } else { float32_bound(0.0) };
            assert!(value(&loss).abs() <= bound, "{kernel:?}");
            assert!(value(&gradient(&loss, &x).abs().max()) <= bound, "{kernel:?}");
        }
    }
    Ok(())
}

#[test]
fn features_pass_the_gradient_on_and_keep_none() -> Result<()> {
    let (x, y) = (leaf(&wave(&[4, 2, 3], 0.3, Kind::Double)), wave(&[5, 2, 3], 1.3, Kind::Double));
    let weight = leaf(&wave(&[6, 3], 2.0, Kind::Double));
    let calls = std::cell::Cell::new(0);
    let term = MaximumMeanDiscrepancy::new(Kernel::Energy)?.features(|x: &Tensor| {
        calls.set(calls.get() + 1);
        x.flatten(1, -1).matmul(&weight).tanh()
    });
    let cond = Condition::none();
    let loss = loss_of(&term, &Batch::new(&x, &cond)?.with_real(&y)?)?;
    assert_eq!(calls.get(), 2);
    loss.backward();
    assert!(!weight.grad().defined(), "the features are frozen");
    let fixed = weight.detach();
    let expected = central_differences(&x, |x| {
        let map = |x: &Tensor| x.flatten(1, -1).matmul(&fixed).tanh();
        let plain = MaximumMeanDiscrepancy::new(Kernel::Energy).unwrap();
        value(&plain.between(&map(x), &map(&y)).unwrap())
    });
    assert!(max_difference(&x.grad(), &expected) < 1e-8);

    let quiet = tch::no_grad(|| term.between(&x, &y))?;
    assert!(!quiet.requires_grad());
    assert!(!term.between(&x.detach(), &y)?.requires_grad());
    approx::assert_relative_eq!(value(&quiet), value(&loss), max_relative = 1e-14);
    let cut = MaximumMeanDiscrepancy::new(Kernel::Energy)?.features(|x: &Tensor| x.detach());
    assert!(matches!(cut.between(&x, &y), Err(Error::NoGradient { what: "features" })));
    let _value = cut.between(&x.detach(), &y)?;
    Ok(())
}

#[test]
fn features_are_handed_one_type() -> Result<()> {
    use Kind::{BFloat16, Double, Float};
    for (x, real, handed) in
        [(Float, BFloat16, Float), (BFloat16, Float, Float), (Double, Float, Double)]
    {
        let seen = std::cell::RefCell::new(Vec::new());
        let term = MaximumMeanDiscrepancy::new(Kernel::Energy)?.features(|x: &Tensor| {
            seen.borrow_mut().push(x.kind());
            x.shallow_clone()
        });
        let x = leaf(&wave(&[4, 3], 0.3, x));
        term.between(&x, &wave(&[5, 3], 1.3, real))?.backward();
        assert_eq!(x.grad().kind(), x.kind());
        assert_eq!(*seen.borrow(), [handed; 2]);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn order_does_not_matter_and_the_biased_estimate_is_not_negative(
        entries in prop::collection::vec(-3.0..3.0f64, 16),
        kernel in prop::sample::select(kernels().to_vec()),
    ) {
        let points = Tensor::from_slice(&entries).view([8, 2]);
        let (x, y) = (points.narrow(0, 0, 3), points.narrow(0, 3, 5));
        let biased = term(&kernel, Estimator::Biased);
        let loss = |x: &Tensor, y: &Tensor| {
            let x = leaf(x);
            let loss = biased.between(&x, y).unwrap();
            (value(&loss), gradient(&loss, &x))
        };
        let (straight, slope) = loss(&x, &y);
        let (turned, turned_slope) = loss(&reorder(&x, &[2, 0, 1]), &reorder(&y, &[4, 1, 0, 3, 2]));
        prop_assert!(straight > -1e-14);
        prop_assert!((straight - turned).abs() < 1e-14);
        prop_assert!(max_difference(&turned_slope, &reorder(&slope, &[2, 0, 1])) < 1e-13);
        // Only differences count.
        let (moved, _) = loss(&(&x + 10.0), &(&y + 10.0));
        prop_assert!((straight - moved).abs() < 1e-12);
        // No gradient moves the samples as a whole when they are where the data are.
        let (same, still) = loss(&y, &y);
        prop_assert!(same.abs() < 1e-14 && values(&still).iter().all(|g| g.abs() < 1e-13));
    }

    #[test]
    fn a_measured_kernel_knows_no_unit_and_the_energy_distance_is_in_that_of_the_data(
        entries in prop::collection::vec(-3.0..3.0f64, 16),
        scale in (-3.0..3.0f64).prop_map(|exponent| 10f64.powf(exponent)),
        estimator in prop::sample::select(&[Estimator::Unbiased, Estimator::Biased][..]),
    ) {
        let points = Tensor::from_slice(&entries).view([8, 2]);
        let loss = |kernel: &Kernel, scale: f64| {
            let x = leaf(&(points.narrow(0, 0, 3) * scale));
            let loss = term(kernel, estimator).between(&x, &(points.narrow(0, 3, 5) * scale)).unwrap();
            (value(&loss), gradient(&loss, &x))
        };
        for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric()] {
            let ((one, slope), (scaled, scaled_slope)) = (loss(&kernel, 1.0), loss(&kernel, scale));
            prop_assert!((scaled - one).abs() < 1e-12, "{kernel:?}");
            prop_assert!(max_difference(&(scaled_slope * scale), &slope) < 1e-12, "{kernel:?}");
        }
        let ((one, slope), (scaled, scaled_slope)) =
            (loss(&Kernel::Energy, 1.0), loss(&Kernel::Energy, scale));
        prop_assert!((scaled / scale - one).abs() < 1e-12);
        prop_assert!(max_difference(&scaled_slope, &slope) < 1e-12);
    }
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let refused = |kernel: Kernel, argument: &str| {
        let result = MaximumMeanDiscrepancy::new(kernel);
        matches!(result, Err(Error::OutOfRange { what, .. }) if what == argument)
    };
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-50, 1e50] {
        let fixed = |bandwidth, scale| Kernel::Gaussian { bandwidth, scales: vec![scale] };
        assert!(refused(fixed(Bandwidth::Fixed(bad), 1.0), "kernel bandwidth"));
        assert!(refused(fixed(Bandwidth::Mean, bad), "kernel scale"));
    }
    for (bandwidth, scale) in [(1e30, 1e30), (1e-30, 1e-30)] {
        let kernel =
            Kernel::Gaussian { bandwidth: Bandwidth::Fixed(bandwidth), scales: vec![1.0, scale] };
        assert!(refused(kernel, "kernel scale"), "{bandwidth} {scale}");
    }
    let none = Kernel::InverseMultiquadric { bandwidth: Bandwidth::Mean, scales: vec![] };
    assert!(refused(none, "number of kernel scales"));

    let (x, cond) = (wave(&[4, 3], 0.3, Kind::Float), Condition::none());
    let plain = term(&Kernel::gaussian(), Estimator::Unbiased);
    assert!(matches!(
        loss_of(&plain, &Batch::new(&x, &cond)?),
        Err(Error::Missing { what: "real samples", setter: "Batch::with_real" })
    ));
    let one = x.narrow(0, 0, 1);
    for (x, y, argument) in [(&one, &x, "number of samples"), (&x, &one, "number of real samples")]
    {
        let result = plain.between(x, y);
        assert!(matches!(result, Err(Error::OutOfRange { what, .. }) if what == argument));
        assert!(term(&Kernel::gaussian(), Estimator::Biased).between(x, y).is_ok());
    }
    let shape = |result: Result<Tensor>, argument: &str| matches!(result, Err(Error::Shape { what, .. }) if what == argument);
    let wide = wave(&[4, 5], 0.3, Kind::Float);
    assert!(shape(plain.between(&x, &wide), "features of the real samples"));
    assert!(shape(plain.between(&x.flatten(0, -1), &x), "x"));
    let mixing = MaximumMeanDiscrepancy::new(Kernel::Energy)?
        .features(|x: &Tensor| x.mean_dim(&[0i64][..], true, None));
    assert!(shape(mixing.between(&x, &x), "features"));
    let failing =
        MaximumMeanDiscrepancy::new(Kernel::Energy)?.features(|x: &Tensor| x.f_view([-7]));
    assert!(matches!(failing.between(&x, &x), Err(Error::Network { .. })));
    Ok(())
}

#[test]
fn pitfall_10_estimates_of_the_discrepancy_keep_what_they_promise() -> Result<()> {
    let _guard = seeded(21);
    for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
        let (unbiased, biased) =
            (term(&kernel, Estimator::Unbiased), term(&kernel, Estimator::Biased));
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
    let (x, y) = (leaf(&wave(&[4, 3], 0.3, Kind::Double)), wave(&[5, 3], 1.3, Kind::Double) * 1.5);
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

mod training {
    use super::super::training::train_with_regularizer;
    use super::*;

    #[test]
    fn maximum_mean_discrepancy_reaches_the_data_with_every_kernel() -> Result<()> {
        let _guard = seeded(41);
        for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
            let term = MaximumMeanDiscrepancy::new(kernel.clone())?;
            let (offset, spread) = train_with_regularizer(&term, (400, 0.02), |_| Ok(()))?;
            println!("{kernel:?}: mean off by {offset:.3}, spread by {spread:.3}");
            assert!(offset < 0.05 && spread < 0.05, "{kernel:?} {offset} {spread}");
        }
        Ok(())
    }
}
