//! The contract of an engine, guidance, observations and errors.

use super::*;

#[test]
fn the_engine_keeps_the_contract() -> Result<()> {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        let network = |x: &Tensor, t: &Tensor, _: &Condition| x * t.view([-1, 1]).to_kind(x.kind());
        let student = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network).tangent(
            |x: &Tensor, t: &Tensor, _: &Condition, dx: &Tensor, dt: &Tensor| {
                let column = |values: &Tensor| values.view([-1, 1]).to_kind(x.kind());
                (x * column(t), dx * column(t) + x * column(dt))
            },
        );
        let teacher = Denoiser::new(
            RectifiedFlow,
            Prediction::FlowVelocity,
            |x: &Tensor, t: &Tensor, c: &Condition| {
                (x * 0.5 + t.view([-1, 1]).to_kind(x.kind())).sin() * c[0].to_kind(x.kind())
            },
        );
        let (x, input) = (wave(&[4, 3], 0.1, kind), wave(&[4, 3], 0.9, Kind::Float));
        let input = input.to_kind(if kind == Kind::Double { kind } else { Kind::Float });
        let time = PostShift::new(Tensor::from_slice(&[0.1, 0.3, 0.5, 0.8]).to_kind(input.kind()))?;
        let (cond, null) = (mean_condition(), Condition::from(Tensor::from(0.2)));
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_input(&input, &time)?;
        let mask = Tensor::from_slice(&[true, true, false, true]);
        let masked = Batch::new(&x, &cond)?
            .with_null(&null)
            .with_student_input(&input, &time)?
            .with_mask(&mask)?;
        let engines = [
            Consistency::discrete(student.clone(), 0.1)?,
            Consistency::discrete(student.clone(), 0.1)?.normalized(0.01)?,
            Consistency::continuous(student.clone(), Tangent::Central { step: 0.05 })?,
            Consistency::continuous(student.clone(), Tangent::Ahead { step: 1.0 / 48.0 })?
                .guided(Guidance::new(3.0)?),
            Consistency::continuous(student.clone(), Tangent::Exact)?,
            Consistency::continuous(student.clone(), Tangent::Exact)?.guided(Guidance::new(3.0)?),
        ];
        engines[5].set_warmup(0.5)?;
        for engine in &engines {
            testing::check_engine(engine, &teacher, &batch).expect("the contract");
            testing::check_engine(engine, &teacher, &masked).expect("the contract under a mask");
            let mask = wave(&[4, 3], 0.5, Kind::Float).gt(-0.3);
            let elements = Batch::new(&x, &cond)?.with_null(&null).with_mask(&mask)?;
            let elements = elements.with_student_input(&input, &time)?;
            testing::check_engine(engine, &teacher, &elements).expect("the contract under a mask");
            let tau = PostShift::all(0.5, 4, (input.kind(), Device::Cpu))?;
            let found = engine.direction(&Probe::at(&teacher, &masked, tau, x.zeros_like())?)?;
            assert!(largest(&found.get(2)) <= 0.0 && largest(&found.get(1)) > 0.0);
        }
    }
    Ok(())
}

#[test]
fn the_checks_find_an_engine_that_mixes_the_students_inputs() -> Result<()> {
    let (x, input) = (wave(&[4, 3], 0.1, Kind::Double), wave(&[4, 3], 0.9, Kind::Double));
    let (cond, time, teacher) = (mean_condition(), times()?, teacher(&RectifiedFlow));
    let mask = wave(&[4, 3], 0.5, Kind::Float).gt(-0.3);
    type Direction = fn(&Tensor, &Tensor) -> Tensor;
    let cases: [(Option<testing::Check>, Direction); 4] = [
        (None, |input, t| input * t.view([-1, 1])),
        (Some(testing::Check::Permutation), |input, t| input.cumsum(0, None) * t.view([-1, 1])),
        (Some(testing::Check::Permutation), |input, t| input * t.cumsum(0, None).view([-1, 1])),
        (Some(testing::Check::BadSample), |input, _| input - input.mean(None)),
    ];
    for (check, direction) in cases {
        let engine = engine_fn(move |probe| {
            let (input, time) = probe.batch().student_input()?;
            probe.masked(&direction(input, time.tensor()))
        });
        let batch = || Batch::new(&x, &cond)?.with_student_input(&input, &time);
        for batch in [batch()?, batch()?.with_mask(&mask)?] {
            let found = match testing::check_engine(&engine, &teacher, &batch) {
                Err(testing::Failure::Broken { check, .. }) => Some(check),
                result => result.map(|()| None).expect("no error of the engine"),
            };
            assert_eq!(found, check);
        }
    }
    Ok(())
}

#[test]
fn guidance_bakes_in_the_guided_teacher() -> Result<()> {
    // cond N(0.7, sd^2), null N(0.2, sd^2): the guided teacher is the denoiser of N(0.2 + 3 0.5, sd^2).
    let (cond, null) = (mean_condition(), Condition::from(Tensor::from(0.2)));
    let nulls = Cell::new(0);
    let counting = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, t: &Tensor, c: &Condition| {
            if value(&c[0]) < 0.5 {
                nulls.set(nulls.get() + 1);
            }
            flow_teacher(x, t, &c[0])
        },
    );
    let guided_mean = Tensor::from(0.2 + 3.0 * 0.5);
    let exact = |x: &Tensor, t: &Tensor, _: &Tensor| flow_exact(x, t, &Tensor::from(1.7));
    assert!((value(&guided_mean) - 1.7).abs() < 1e-12);
    let student = differentiable(RectifiedFlow, Prediction::Sample, exact);
    let time = times()?;
    let input = inputs(&RectifiedFlow, &time);
    let of = |guidance: f64| {
        let engine = Consistency::continuous(student.clone(), Tangent::Exact)?
            .guided(Guidance::new(guidance)?);
        direction(&engine, &student, &counting, &input, &time, (&cond, Some(&null)))
    };
    assert!(largest(&of(3.0)?) < 1e-11);
    assert_eq!(nulls.get(), 1);
    assert!(largest(&of(1.0)?) > 0.1);
    assert_eq!(nulls.get(), 1, "neutral guidance needs no null branch");
    Ok(())
}

#[test]
fn observations_tell_a_derivative_from_rounding_noise() -> Result<()> {
    let (cond, time) = (mean_condition(), times()?);
    let (path, teacher) = (&RectifiedFlow, teacher(&RectifiedFlow));
    let input = inputs(path, &time);
    let roughness = |noisy: bool, step: f64| -> Result<f64> {
        let network = move |x: &Tensor, t: &Tensor, c: &Condition| {
            let clean = flow_teacher(x, t, &c[0]);
            // As a bfloat16 network answers.
            if noisy { clean.to_kind(Kind::BFloat16).to_kind(Kind::Double) } else { clean }
        };
        let student = Denoiser::new(path, Prediction::Sample, network);
        let x = student.denoise(&input, &time, &cond)?;
        let batch = Batch::new(&x, &cond)?.with_student_input(&input, &time)?;
        let engine = Consistency::continuous(student.clone(), Tangent::Central { step })?;
        let group = Group::new(Renoising::new(Uniform::FULL)).engine("scm", 1.0, engine);
        let _guard = seeded(2);
        let evaluation = Objective::new(teacher.clone()).with(group).observed().evaluate(&batch)?;
        let report = evaluation.report()?;
        let of = |name: &str| report.iter().find(|(found, _)| found == name).map(|found| found.1);
        assert!(of("scm_tangent_rms").expect("recorded") > 0.0);
        Ok(of("scm_roughness").expect("recorded"))
    };
    let (smooth, rough) = (roughness(false, 1e-3)?, roughness(true, 1e-3)?);
    assert!(smooth < 0.02 && rough > 0.3, "{smooth} {rough}");
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let student = exact_student(&RectifiedFlow);
    for step in [0.0, -0.1, 1.1, f64::NAN] {
        let what = "step along the teacher's ODE";
        let made = [
            Consistency::discrete(student.clone(), step),
            Consistency::continuous(student.clone(), Tangent::Central { step }),
        ];
        for made in made {
            assert!(matches!(made, Err(Error::OutOfRange { what: found, .. }) if found == what));
        }
    }
    let central = || Consistency::continuous(student.clone(), Tangent::Central { step: 1e-3 });
    for bad in [0.0, f64::NAN, f64::INFINITY] {
        assert!(central()?.normalized(bad).is_err() && central()?.data_std(bad).is_err());
    }
    let (cond, time) = (mean_condition(), times()?);
    let input = inputs(&RectifiedFlow, &time);
    let flow = teacher(&RectifiedFlow);
    let x = student.denoise(&input, &time, &cond)?;
    let tau = || PostShift::all(0.5, 4, DOUBLE);
    let of = |engine: &Consistency<'_>, teacher: &Denoiser<'_>, batch: &Batch<'_>| {
        engine.direction(&Probe::at(teacher, batch, tau()?, x.zeros_like())?)
    };
    let bare = Batch::new(&x, &cond)?;
    let missing = of(&central()?, &flow, &bare).unwrap_err();
    assert!(matches!(missing, Error::Missing { what: "student input", .. }));
    let batch = || Batch::new(&x, &cond)?.with_student_input(&input, &time);
    let guided = central()?.guided(Guidance::new(2.0)?);
    let missing = of(&guided, &flow, &batch()?).unwrap_err();
    assert!(matches!(missing, Error::Missing { what: "null condition", .. }));
    let other = of(&central()?, &teacher(&TrigFlow), &batch()?).unwrap_err();
    assert!(matches!(other, Error::OutOfRange { what: "share of data on the term's path", .. }));
    let exact = Consistency::continuous(student.clone(), Tangent::Exact)?;
    assert!(matches!(of(&exact, &flow, &batch()?).unwrap_err(), Error::NoTangent));
    // At the clean end the angle has no sine.
    let end = PostShift::all(1.0, 4, DOUBLE)?;
    let clean = Batch::new(&x, &cond)?.with_student_input(&input, &end)?;
    let refused = of(&central()?, &flow, &clean).unwrap_err();
    assert!(matches!(refused, Error::OutOfRange { .. }), "{refused}");
    // A step within one level of a table.
    let table = sdxl();
    let student = exact_student(&table);
    let short = Consistency::continuous(student.clone(), Tangent::Central { step: 1e-4 })?;
    let refused = of(&short, &teacher(&table), &batch()?).unwrap_err();
    assert!(matches!(refused, Error::OutOfRange { what: "step along the teacher's ODE", .. }));
    let long = Consistency::discrete(student.clone(), 0.02)?;
    assert!(of(&long, &teacher(&table), &batch()?).is_ok());
    for (wrong, what) in
        [(wave(&[4, 2], 0.0, Kind::Double), "student input"), (Tensor::new(), "student input")]
    {
        let refused = Batch::new(&x, &cond)?.with_student_input(&wrong, &time).unwrap_err();
        assert!(matches!(refused, Error::Shape { what: found, .. } if found == what));
    }
    Ok(())
}

/// At the clean end of a path, or within a level of a table, no angle lies between two times: nothing changes
/// there, and no number is divided by zero.
#[test]
fn where_no_angle_lies_between_there_is_no_tangent() -> Result<()> {
    let cond = mean_condition();
    let table = sdxl();
    let edm = Edm::default();
    let ends: [(&dyn NoisePath, f64); 2] = [(&edm, 1.0), (&table, 0.9995)];
    for (path, time) in ends {
        let (student, teacher) = (exact_student(path), teacher(path));
        let time = PostShift::new(Tensor::from_slice(&[time, 0.3, 0.5, 0.6]))?;
        let input = inputs(path, &time);
        let engine = Consistency::continuous(student.clone(), Tangent::Ahead { step: 1.0 / 48.0 })?;
        let found = direction(&engine, &student, &teacher, &input, &time, (&cond, None))?;
        assert!(bool::try_from(found.isfinite().all())?, "{found}");
        assert!(largest(&found.get(0)) <= 0.0 && largest(&found) > 0.0, "{found}");
    }
    Ok(())
}
