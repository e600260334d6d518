//! Weights, draws, costs, masks and errors.

use super::*;

#[test]
fn the_adaptive_weight_is_that_of_each_sample() -> Result<()> {
    let scale = Tensor::from(0.3).set_requires_grad(true);
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| x * &scale);
    let (from, to) = (times(&[0.2, 0.4, 0.1]), times(&[0.9, 1.0, 0.3]));
    let (x, noise) = (wave(&[3, 3], 0.4, Kind::Double), wave(&[3, 3], 2.0, Kind::Double));
    let cond = mean_condition();
    let batch = Batch::new(&x, &cond)?;
    let of = |power, constant| {
        let mean_flow = MeanFlow::new(map.clone(), teacher())?.adaptive(power, constant)?;
        mean_flow.evaluate_at(&batch, &noise, &from, &to)
    };
    let plain = of(0.0, 1.0)?;
    let squares = values(&plain.squares);
    for (power, constant) in [(1.0, 1e-3), (0.5, 0.01), (2.0, 0.1)] {
        let weighted = of(power, constant)?;
        assert!(max_difference(&weighted.squares, &plain.squares) < 1e-15);
        let expected: f64 =
            squares.iter().map(|m| m * (m + constant).powf(-power)).sum::<f64>() / 3.0;
        approx::assert_relative_eq!(value(&weighted.loss), expected, epsilon = 1e-12);
        let slope = Tensor::run_backward(&[&weighted.loss], &[&scale], false, false).remove(0);
        // The weight has no gradient of its own: d/ds of w_i m_i is w_i dm_i/ds.
        let mut by_hand = 0.0;
        for (i, m) in squares.iter().enumerate() {
            let row = |t: &Tensor| t.narrow(0, i as i64, 1);
            let (x, noise) = (row(&x), row(&noise));
            let one = |time: &PostShift| PostShift::new(row(time.tensor()));
            let alone = MeanFlow::new(map.clone(), teacher())?.evaluate_at(
                &Batch::new(&x, &cond)?,
                &noise,
                &one(&from)?,
                &one(&to)?,
            )?;
            let slope = Tensor::run_backward(&[&alone.loss], &[&scale], false, false).remove(0);
            by_hand += value(&slope) * (m + constant).powf(-power) / 3.0;
        }
        approx::assert_relative_eq!(value(&slope), by_hand, epsilon = 1e-11);
    }
    assert!((value(&of(1.0, 1e-9)?.loss) - 1.0).abs() < 1e-6, "p = 1 prints 1 for ever");
    Ok(())
}

#[test]
fn forwards_are_counted() -> Result<()> {
    let (students, teachers) = (Cell::new(0), Cell::new(0));
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| {
        students.set(students.get() + 1);
        x * 0.3
    });
    let map = map.tangent(|x: &Tensor, _: (&Tensor, &Tensor), _: &Condition, along: &Tensor| {
        (x * 0.3, along * 0.3)
    });
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        |x: &Tensor, _: &Tensor, _: &Condition| {
            teachers.set(teachers.get() + 1);
            x * 0.5
        },
    );
    let (from, to) = (times(&[0.2, 0.4]), times(&[0.9, 1.0]));
    let (x, cond) = (wave(&[2, 3], 0.4, Kind::Double), mean_condition());
    let batch = Batch::new(&x, &cond)?.with_null(&cond);
    for (rule, guidance, expected) in [
        (CENTRAL, 1.0, (3, 1)),
        (FlowRule::Eulerian(Tangent::Ahead { step: 1e-3 }), 1.0, (2, 1)),
        (FlowRule::Eulerian(Tangent::Exact), 3.0, (1, 2)),
        (FlowRule::Fraction { share: 0.1 }, 3.0, (2, 2)),
        (FlowRule::Lagrangian { step: 1e-3 }, 3.0, (3, 2)),
    ] {
        students.set(0);
        teachers.set(0);
        let mean_flow = MeanFlow::new(map.clone(), teacher.clone())?
            .rule(rule)?
            .guided(Guidance::new(guidance)?);
        let _loss = mean_flow.evaluate_at(&batch, &x, &from, &to)?;
        assert_eq!((students.get(), teachers.get()), expected, "{rule:?}");
    }
    // The exact tangent agrees with differences: du/dt = 0.3 (-v).
    let of = |rule| {
        MeanFlow::new(map.clone(), teacher.clone())?.rule(rule)?.evaluate_at(&batch, &x, &from, &to)
    };
    let (exact, central) = (of(FlowRule::Eulerian(Tangent::Exact))?, of(CENTRAL)?);
    assert!(max_difference(&exact.squares, &central.squares) < 1e-10);
    Ok(())
}

#[test]
fn times_are_drawn_in_order() -> Result<()> {
    let seen = std::cell::RefCell::new(Vec::new());
    let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        seen.borrow_mut().extend(values(t).into_iter().zip(values(r)));
        x * 0.3
    })
    .shifted(Shift::new(3.0)?);
    let path = RectifiedFlow.shifted(Shift::new(3.0)?);
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
    let teacher = Denoiser::new(path, Prediction::FlowVelocity, network);
    let (x, cond) = (wave(&[400, 2], 0.4, Kind::Float), Condition::none());
    let batch = Batch::new(&x, &cond)?;
    let _guard = seeded(5);
    let draws = |mean_flow: MeanFlow<'_>| -> Result<Vec<(f64, f64)>> {
        seen.borrow_mut().clear();
        let mean_flow = mean_flow.rule(FlowRule::Fraction { share: 1.0 })?;
        let _loss = mean_flow.evaluate(&batch)?;
        // The first forward is that of the loss.
        Ok(seen.borrow()[..400].to_vec())
    };
    let new = || MeanFlow::new(map.clone(), teacher.clone());
    let plain = draws(new()?)?;
    assert!(plain.iter().all(|(t, r)| t < r));
    let uniform = draws(new()?.times(Uniform::new(0.5, 0.6)?))?;
    let shift = Shift::new(3.0)?;
    let inside = |t: &f64| (shift.of(0.5) - 1e-6..=shift.of(0.6) + 1e-6).contains(t);
    assert!(uniform.iter().all(|(t, r)| inside(t) && inside(r)));
    let same = draws(new()?.instantaneous(0.75)?)?;
    let count = same.iter().filter(|(t, r)| (t - r).abs() < 1e-12).count();
    assert!((260..340).contains(&count), "{count}");
    let from_noise = draws(new()?.from_noise())?;
    assert!(from_noise.iter().all(|(t, r)| *t <= 0.0 && *r > 0.0));
    let both = draws(new()?.from_noise().instantaneous(0.75)?)?;
    let count = both.iter().filter(|(t, r)| *t <= 0.0 && *r <= 0.0).count();
    assert!((260..340).contains(&count), "{count}");
    Ok(())
}

#[test]
fn masks_types_and_bad_rows_stay_apart() -> Result<()> {
    let scale = Tensor::from(0.3f32).set_requires_grad(true);
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| {
        x * scale.to_kind(x.kind())
    });
    let teacher = || {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network)
    };
    let (from, to) = (times(&[0.2, 0.4, 0.1]), times(&[0.9, 1.0, 0.3]));
    let cond = Condition::none();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Double] {
        let (x, noise) = (wave(&[3, 2], 0.4, kind), wave(&[3, 2], 2.0, kind));
        let bad = x.copy();
        let _ = bad.get(0).fill_(f64::NAN);
        let mask = Tensor::from_slice(&[false, true, true]);
        let mean_flow = MeanFlow::new(map.clone(), teacher())?;
        let of = |x: &Tensor| {
            let batch = Batch::new(x, &cond)?.with_mask(&mask)?;
            mean_flow.evaluate_at(&batch, &noise, &from, &to)
        };
        let (good, spoilt) = (of(&x)?, of(&bad)?);
        let wide = if kind == Kind::Double { kind } else { Kind::Float };
        assert_eq!(good.loss.kind(), wide);
        assert!(max_difference(&good.squares, &spoilt.squares) <= 0.0, "{kind:?}");
        assert!(value(&good.squares.get(0)) <= 0.0 && value(&good.squares.get(1)) > 0.0);
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let map = exact_map;
    let named = |error: Error, argument: &str| match error {
        Error::OutOfRange { what, .. } | Error::Shape { what, .. } => assert_eq!(what, argument),
        error => panic!("{error}"),
    };
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
    let trig = Denoiser::new(TrigFlow, Prediction::Velocity, network);
    named(MeanFlow::new(map(), trig).unwrap_err(), "straightness of the teacher's path");
    let shifted = map().shifted(Shift::new(3.0)?);
    named(MeanFlow::new(shifted, teacher()).unwrap_err(), "shift of the teacher's path");
    let new = || MeanFlow::new(map(), teacher()).unwrap();
    for bad in [0.0, 1.1, f64::NAN] {
        named(new().rule(FlowRule::Fraction { share: bad }).unwrap_err(), "share of the jump");
        let tangent = Tangent::Central { step: bad };
        named(new().rule(FlowRule::Eulerian(tangent)).unwrap_err(), "step of the tangent");
        let lagrangian = FlowRule::Lagrangian { step: bad };
        named(new().rule(lagrangian).unwrap_err(), "step in the end of the jump");
    }
    named(new().adaptive(-1.0, 1.0).unwrap_err(), "power of the adaptive weight");
    named(new().adaptive(1.0, 0.0).unwrap_err(), "constant of the adaptive weight");
    named(new().instantaneous(1.5).unwrap_err(), "share of samples with r = t");
    let (x, cond) = (wave(&[2, 3], 0.4, Kind::Double), mean_condition());
    let batch = Batch::new(&x, &cond)?;
    let (from, to) = (times(&[0.2, 0.4]), times(&[0.9, 0.3]));
    named(new().evaluate_at(&batch, &x, &from, &to).unwrap_err(), "length of a jump");
    let three = times(&[0.2, 0.4, 0.5]);
    named(new().evaluate_at(&batch, &x, &three, &to).unwrap_err(), "time to jump from");
    named(new().evaluate_at(&batch, &x, &from, &three).unwrap_err(), "time to jump to");
    named(new().evaluate_at(&batch, &x.get(0), &from, &from).unwrap_err(), "noise");
    let exact = new().rule(FlowRule::Eulerian(Tangent::Exact))?;
    let refused = exact.evaluate_at(&batch, &x, &from, &from).unwrap_err();
    assert!(matches!(refused, Error::NoTangent));
    // A clean-sample network has no velocity at the clean end, which the Lagrangian rule asks for.
    let sample = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let lagrangian = MeanFlow::new(map(), sample)?.rule(FlowRule::Lagrangian { step: 1e-3 })?;
    let refused = lagrangian.evaluate_at(&batch, &x, &from, &times(&[1.0, 1.0])).unwrap_err();
    named(refused, "share of noise at the cleanest time");
    let crooked = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| x.get(0));
    named(crooked.velocity(&x, &from, &from, &cond).unwrap_err(), "network output");
    named(map().sample(&Tensor::from(1.0), &cond, &FewStepGrid::even(1)?).unwrap_err(), "noise");
    Ok(())
}
