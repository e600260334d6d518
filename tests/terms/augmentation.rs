//! Augmentations: exact moves, linearity and adjoints, one draw for both sides, errors.

use decoupled_dmd::{
    Augmentation, AugmentationDraw, Batch, Condition, Distance, Error, PairedRegression,
    Perceptual, Regularizer, Result, testing,
};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, gradient, max_difference, seeded, value, wave};
use super::{central_differences, loss_of};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

fn everything() -> Augmentation {
    Augmentation::new().blit().geometric().colour().cutout(0.5).unwrap()
}

/// The numbers at which nothing changes but what `changes` say, for two samples.
fn draw(augmentation: Augmentation, changes: &[(usize, f64)]) -> Result<AugmentationDraw> {
    let mut numbers = [0.5; 15];
    numbers[1] = 0.0;
    for (column, number) in changes {
        numbers[*column] = *number;
    }
    augmentation.at(&Tensor::from_slice(&numbers).expand([2, 15], false))
}

fn image() -> Tensor {
    wave(&[2, 3, 8, 8], 0.3, Kind::Double)
}

#[test]
fn flips_turns_and_whole_shifts_are_exact() -> Result<()> {
    let blit = Augmentation::new().blit();
    let x = image();
    let close =
        |found: &Tensor, expected: &Tensor| assert!(max_difference(found, expected) < 1e-12);
    close(&draw(blit.geometric(), &[])?.apply(&x)?, &x);
    close(&draw(blit, &[(0, 0.2)])?.apply(&x)?, &x.flip([3]));
    for turns in 0..4 {
        let quarter = draw(blit, &[(1, 0.25 * turns as f64 + 0.1)])?;
        close(&quarter.apply(&x)?, &x.rot90(turns, [2, 3]));
        let once = draw(blit, &[(1, 0.3)])?;
        let mut turned = x.copy();
        for _ in 0..4 {
            turned = once.apply(&turned)?;
        }
        close(&turned, &x);
        // The adjoint of a turn is the turn back.
        let leaf = x.copy().set_requires_grad(true);
        let other = wave(&[2, 3, 8, 8], 1.9, Kind::Double);
        let found = gradient(&(quarter.apply(&leaf)? * &other).sum(None), &leaf);
        close(&found, &other.rot90(-turns, [2, 3]));
    }
    // By one element to the right and up: what comes in at the edge is the edge again.
    let moved = draw(blit, &[(2, 1.0), (3, 0.0)])?.apply(&x)?;
    let right = Tensor::from_slice(&[0i64, 0, 1, 2, 3, 4, 5, 6]);
    let up = Tensor::from_slice(&[1i64, 2, 3, 4, 5, 6, 7, 7]);
    close(&moved, &x.index_select(3, &right).index_select(2, &up));
    // A number of exactly 1 is no fifth turn.
    close(&draw(blit, &[(1, 1.0)])?.apply(&x)?, &x.rot90(3, [2, 3]));
    Ok(())
}

/// Bilinear resampling is exact on planes: a value is that of the place which the inverse map names.
#[test]
fn geometry_samples_a_plane_at_the_inverse_map() -> Result<()> {
    let (tall, wide) = (40, 56);
    let row = Tensor::arange(wide, DOUBLE) - (wide as f64 - 1.0) / 2.0;
    let column = (Tensor::arange(tall, DOUBLE) - (tall as f64 - 1.0) / 2.0).view([-1, 1]);
    let plane = |x: &Tensor, y: &Tensor| x * 0.7 - y * 0.4 + 0.2;
    let x = plane(&row, &column).expand([2, 1, tall, wide], false);
    let numbers = [(4, 0.7), (5, 0.55), (6, 0.3), (7, 0.42), (8, 0.6), (9, 0.45)];
    let found = draw(Augmentation::new().geometric(), &numbers)?.apply(&x)?;
    let normal = |u: f64| value(&Tensor::from(u).special_ndtri());
    let pi = std::f64::consts::PI;
    let (scale, stretch) = ((-0.2 * normal(0.7)).exp2(), (-0.2 * normal(0.3)).exp2());
    let (first, second) = (pi * (2.0 * 0.55 - 1.0), pi * (2.0 * 0.42 - 1.0));
    let (by_x, by_y) = (-0.125 * normal(0.6) * wide as f64, -0.125 * normal(0.45) * tall as f64);
    // The factors from the right: the last one meets the place first.
    let (px, py) = (&row + by_x, &column + by_y);
    let turn = |x: &Tensor, y: &Tensor, angle: f64| {
        (x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos())
    };
    let (px, py) = turn(&px, &py, second);
    let (px, py) = (px * stretch, py / stretch);
    let (px, py) = turn(&px, &py, first);
    let (px, py) = (px * scale, py * scale);
    let inside =
        px.abs().lt(wide as f64 / 2.0 - 1.0).logical_and(&py.abs().lt(tall as f64 / 2.0 - 1.0));
    assert!(inside.sum(Kind::Double).double_value(&[]) > 300.0);
    let error = (found - plane(&px, &py)).abs() * inside;
    assert!(value(&error.max()) < 1e-12, "{}", value(&error.max()));
    Ok(())
}

#[test]
fn moves_are_linear_with_their_adjoints_and_keep_constants() -> Result<()> {
    let _guard = seeded(71);
    let (x, y) = (image(), wave(&[2, 3, 8, 8], 1.9, Kind::Double));
    let moves = Augmentation::new().blit().geometric();
    for round in 0..8 {
        let constant = moves.draw(&x)?.apply(&x.full_like(0.37))?;
        assert!(max_difference(&constant, &x.full_like(0.37)) < 1e-12);
        for augmentation in [moves, moves.cutout(0.6)?, everything()] {
            // Brightness is added, not linear: none of it.
            let numbers = Tensor::f_rand([2, 15], DOUBLE)?;
            let _ = numbers.narrow(1, 10, 1).fill_(0.5);
            let draw = augmentation.at(&numbers)?;
            let both = draw.apply(&(&x * 1.3 - &y * 0.4))?;
            let apart = draw.apply(&x)? * 1.3 - draw.apply(&y)? * 0.4;
            assert!(max_difference(&both, &apart) < 1e-12, "{round}");
            let leaf = x.copy().set_requires_grad(true);
            let product = (draw.apply(&leaf)? * &y).sum(None);
            let adjoint = gradient(&product, &leaf);
            let error = value(&product) - value(&(&adjoint * &x).sum(None));
            assert!(error.abs() < 1e-12, "{round}: {error:e}");
        }
    }
    Ok(())
}

#[test]
fn colours_have_their_formulas_and_brightness_cancels() -> Result<()> {
    let colour = Augmentation::new().colour();
    let (x, y) = (image(), wave(&[2, 3, 8, 8], 1.9, Kind::Double));
    let brighter = draw(colour, &[(10, 0.8)])?;
    assert!(max_difference(&brighter.apply(&x)?, &(&x + 0.3)) < 1e-14);
    let difference = brighter.apply(&x)? - brighter.apply(&y)?;
    assert!(max_difference(&difference, &(&x - &y)) < 1e-14);
    let mean = x.mean_dim([1i64, 2, 3].as_slice(), true, None);
    let contrasted = draw(colour, &[(11, 0.9)])?.apply(&x)?;
    assert!(max_difference(&contrasted, &((&x - &mean) * 1.4 + &mean)) < 1e-14);
    let grey = x.mean_dim([1i64].as_slice(), true, None);
    let saturated = draw(colour, &[(12, 0.85)])?.apply(&x)?;
    assert!(max_difference(&saturated, &((&x - &grey) * 1.7 + &grey)) < 1e-14);
    // One channel has no saturation.
    let single = x.narrow(1, 0, 1);
    assert!(max_difference(&draw(colour, &[(12, 0.0)])?.apply(&single)?, &single) < 1e-14);
    Ok(())
}

#[test]
fn a_cutout_leaves_its_box_out_of_the_loss() -> Result<()> {
    let (x, y) = (image(), wave(&[2, 3, 8, 8], 1.9, Kind::Double));
    // Centre (0.25, 0.75), half of each side: columns 0 to 3, rows 4 to 7.
    let box_of_zeros = draw(Augmentation::new().cutout(0.5)?, &[(13, 0.25), (14, 0.75)])?;
    let kept = Tensor::ones([1, 1, 8, 8], DOUBLE);
    let _ = kept.narrow(2, 4, 4).narrow(3, 0, 4).fill_(0.0);
    assert!(max_difference(&box_of_zeros.apply(&x)?, &(&x * &kept)) <= 0.0);
    let squared = PairedRegression::new(Distance::Squared);
    let expected = ((&x - &y).square() * &kept).sum(None) / x.numel() as f64;
    let found = squared.between_at(&x, &y, &box_of_zeros)?;
    approx::assert_relative_eq!(value(&found), value(&expected), max_relative = 1e-14);
    // At a corner the box is cut off, and a number that is not finite is gone with it.
    let bad = x.copy();
    let _ = bad.narrow(2, 0, 1).narrow(3, 0, 1).fill_(f64::NAN);
    let corner = draw(Augmentation::new().cutout(0.5)?, &[(13, 0.0), (14, 0.0)])?;
    let found = corner.apply(&bad)?;
    assert_eq!(found.isfinite().all().int64_value(&[]), 1);
    assert_eq!(found.eq(0.0).sum(Kind::Int64).int64_value(&[]), 2 * 3 * 4);
    Ok(())
}

#[test]
fn pairs_share_one_draw() -> Result<()> {
    let _guard = seeded(72);
    let x = image();
    let y = wave(&[2, 3, 8, 8], 1.9, Kind::Double);
    for round in 0..8 {
        // Equal sides stay equal whatever is drawn: two draws would part them.
        let leaf = x.copy().set_requires_grad(true);
        let loss =
            PairedRegression::new(Distance::Squared).augmented(everything()).between(&leaf, &x)?;
        assert_eq!(value(&loss), 0.0, "{round}");
        assert_eq!(value(&gradient(&loss, &leaf).abs().max()), 0.0, "{round}");
    }
    // A turn moves both sides: the loss and its gradient stay.
    let plain = PairedRegression::new(Distance::Squared);
    let leaf = x.copy().set_requires_grad(true);
    let expected = plain.between(&leaf, &y)?;
    for turn in [
        draw(Augmentation::new().blit(), &[(0, 0.1)])?,
        draw(Augmentation::new().blit(), &[(1, 0.3)])?,
    ] {
        let loss = plain.between_at(&leaf, &y, &turn)?;
        approx::assert_relative_eq!(value(&loss), value(&expected), max_relative = 1e-13);
        assert!(max_difference(&gradient(&loss, &leaf), &gradient(&expected, &leaf)) < 1e-13);
    }
    // Nothing set changes no bit, and the plain distance is added to the augmented one.
    let none = PairedRegression::new(Distance::Squared).augmented(Augmentation::new());
    assert!(none.between(&x, &y)?.equal(&plain.between(&x, &y)?));
    let draw = everything().draw(&x)?;
    let both = PairedRegression::new(Distance::Squared).with_absolute(0.7)?;
    let found = value(&both.between_at(&x, &y, &draw)?);
    let expected =
        value(&plain.between_at(&x, &y, &draw)?) + 0.7 * value(&(&x - &y).abs().mean(None));
    approx::assert_relative_eq!(found, expected, max_relative = 1e-14);
    // The gradient against central differences, features included, and none for the features.
    let kernel = wave(&[4, 3, 3, 3], 0.2, Kind::Double).set_requires_grad(true);
    let features = |x: &Tensor| vec![x.conv2d(&kernel, None::<&Tensor>, 1, 1, 1, 1).tanh()];
    let perceptual = Perceptual::new(features, vec![Tensor::ones([4], DOUBLE)])?;
    let regression = PairedRegression::new(Distance::Perceptual(perceptual)).with_absolute(1.0)?;
    let (small, target) = (x.narrow(2, 0, 4).narrow(3, 0, 4), y.narrow(2, 0, 4).narrow(3, 0, 4));
    let leaf = small.copy().set_requires_grad(true);
    let found = gradient(&regression.between_at(&leaf, &target, &draw)?, &leaf);
    let at = |x: &Tensor| value(&regression.between_at(x, &target, &draw).unwrap());
    let expected = central_differences(&small.copy(), at);
    assert!(max_difference(&found, &expected) < 1e-8 && !kernel.grad().defined());
    Ok(())
}

#[test]
fn frames_share_one_draw_and_masks_hold() -> Result<()> {
    let _guard = seeded(73);
    let video = wave(&[2, 5, 3, 6, 8], 0.3, Kind::Double);
    let moves = Augmentation::new().blit().geometric().cutout(0.5)?;
    let draw = moves.draw(&video)?;
    let found = draw.apply(&video)?;
    assert_eq!(found.size(), video.size());
    for frame in 0..5 {
        let alone = draw.apply(&video.select(1, frame))?;
        assert!(max_difference(&found.select(1, frame), &alone) < 1e-14);
    }
    // Saturation is about the mean of the channels of a frame.
    let mut numbers = [0.5; 15];
    numbers[12] = 0.0;
    let grey =
        Augmentation::new().colour().at(&Tensor::from_slice(&numbers).expand([2, 15], false))?;
    let expected = video.mean_dim([2i64].as_slice(), true, None).expand_as(&video);
    assert!(max_difference(&grey.apply(&video)?, &expected) < 1e-14);

    let cond = Condition::none();
    let (x, y) = (image(), wave(&[2, 3, 8, 8], 1.9, Kind::Double));
    let bad = x.copy();
    let _ = bad.get(1).fill_(f64::NAN);
    let mask = Tensor::from_slice(&[true, false]);
    let regression = PairedRegression::new(Distance::Squared).augmented(everything());
    let run = |x: &Tensor| -> Result<Tensor> {
        tch::manual_seed(5);
        loss_of(&regression, &Batch::new(x, &cond)?.with_target(&y)?.with_mask(&mask)?)
    };
    assert!(run(&bad)?.equal(&run(&x)?));
    // An augmentation that changes nothing keeps the contract of a term.
    let still = PairedRegression::new(Distance::Squared).augmented(Augmentation::new());
    let batch = Batch::new(&x, &cond)?.with_target(&y)?;
    testing::check_regularizer(&still, &gaussian_teacher(1.0), &batch).expect("the contract");
    Ok(())
}

#[test]
fn half_precision_is_computed_in_float32() -> Result<()> {
    let (x, y) =
        (wave(&[2, 3, 8, 8], 0.3, Kind::BFloat16), wave(&[2, 3, 8, 8], 1.9, Kind::BFloat16));
    let _guard = seeded(74);
    let draw = everything().draw(&x)?;
    let found = draw.apply(&x)?;
    assert_eq!(found.kind(), Kind::Float);
    let expected = draw.apply(&x.to_kind(Kind::Double))?;
    assert!(max_difference(&found, &expected) < 2e-5);
    let leaf = x.copy().set_requires_grad(true);
    let cond = Condition::none();
    let regression = PairedRegression::new(Distance::Squared).augmented(everything());
    let loss = loss_of(&regression, &Batch::new(&leaf, &cond)?.with_target(&y)?)?;
    loss.backward();
    assert_eq!((loss.kind(), leaf.grad().kind()), (Kind::Float, Kind::BFloat16));
    assert_eq!(leaf.grad().isfinite().all().int64_value(&[]), 1);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let _guard = seeded(75);
    for bad in [0.0, -0.5, 1.5, f64::NAN] {
        let made = Augmentation::new().cutout(bad);
        assert!(matches!(made, Err(Error::OutOfRange { what: "side of the cutout", .. })), "{bad}");
    }
    const NUMBERS: &str = "numbers of an augmentation";
    let all = everything();
    let narrow = Tensor::zeros([2, 14], DOUBLE);
    assert!(matches!(all.at(&narrow), Err(Error::Shape { what: NUMBERS, .. })));
    let whole = Tensor::zeros([2, 15], (Kind::Int64, Device::Cpu));
    assert!(matches!(all.at(&whole), Err(Error::Kind { what: NUMBERS, .. })));
    for bad in [-0.1, 1.1, f64::NAN] {
        let numbers = Tensor::full([2, 15], bad, DOUBLE);
        assert!(matches!(all.at(&numbers), Err(Error::OutOfRange { what: NUMBERS, .. })), "{bad}");
    }
    const SAMPLES: &str = "samples to augment";
    let draw = draw(all, &[])?;
    for shape in [&[3i64, 3, 8, 8][..], &[2, 3, 8], &[2, 1, 1, 3, 8, 8], &[2, 3, 0, 8]] {
        let found = draw.apply(&Tensor::zeros(shape, DOUBLE));
        assert!(matches!(found, Err(Error::Shape { what: SAMPLES, .. })), "{shape:?}");
    }
    let found = draw.apply(&Tensor::zeros([2, 3, 8, 8], (Kind::Int64, Device::Cpu)));
    assert!(matches!(found, Err(Error::Kind { what: SAMPLES, .. })));
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        let made = PairedRegression::new(Distance::Squared).with_absolute(bad);
        let what = "weight of the absolute distance";
        assert!(matches!(made, Err(Error::OutOfRange { what: found, .. }) if found == what));
    }
    // Flat samples have no plane.
    let (flat, cond) = (wave(&[2, 3], 0.3, Kind::Double), Condition::none());
    let regression = PairedRegression::new(Distance::Squared).augmented(all);
    let batch = Batch::new(&flat, &cond)?.with_target(&flat)?;
    assert!(matches!(loss_of(&regression, &batch), Err(Error::Shape { what: SAMPLES, .. })));
    assert!(regression.own_loss(&batch)?.is_none());
    Ok(())
}
