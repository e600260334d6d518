//! The contract of an engine, observations, errors, and a training of seconds.

use super::*;

#[test]
fn the_engine_keeps_the_contract() -> Result<()> {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        let network = |x: &Tensor, t: &Tensor, _: &Condition| x * t.view([-1, 1]).to_kind(x.kind());
        let student = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
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
        ];
        for engine in &engines {
            testing::check_engine(engine, &teacher, &batch).expect("the contract");
            let tau = PostShift::all(0.5, 4, (input.kind(), Device::Cpu))?;
            let found = engine.direction(&Probe::at(&teacher, &masked, tau, x.zeros_like())?)?;
            assert!(largest(&found.get(2)) <= 0.0 && largest(&found.get(1)) > 0.0);
        }
    }
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

/// A one-step student of 2-D Gaussian data, trained by central differences on noised data, follows the
/// teacher's ODE from pure noise to its end: the map `mu + sd x` of each coordinate.
#[test]
fn training_learns_the_teachers_ode() -> Result<()> {
    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    let _guard = seeded(3);
    let spread = Tensor::from_slice(&[0.5f32, 0.2]);
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            let a = t.view([-1, 1]);
            let s: Tensor = 1.0 - &a;
            &a * spread.square() / (a.square() * spread.square() + s.square()) * x
        },
    );
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let layers = [(3, 64), (64, 64), (64, 2)]
        .map(|(from, to)| nn::linear(&root, from, to, Default::default()));
    let network = |x: &Tensor, t: &Tensor, _: &Condition| {
        let input = Tensor::cat(&[x, &t.view([-1, 1])], 1);
        let hidden = input.apply(&layers[0]).silu().apply(&layers[1]).silu();
        hidden.apply(&layers[2])
    };
    let student = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
    let cond = Condition::none();
    let mut optimizer = nn::Adam::default().build(&store, 2e-3)?;
    let draw = || -> Result<(Tensor, Tensor, PostShift)> {
        let data = Tensor::f_randn([256, 2], FLOAT)?.f_mul(&spread)?;
        let noise = Tensor::f_randn([256, 2], FLOAT)?;
        let time = PostShift::new(Tensor::f_rand([256], FLOAT)?.f_mul_scalar(0.98)?)?;
        Ok((data, noise, time))
    };
    for _ in 0..600 {
        let (data, noise, time) = draw()?;
        optimizer.backward_step(&student.denoising_loss(&data, &time, &noise, &cond)?);
    }
    let noise = Tensor::f_randn([2048, 2], FLOAT)?;
    let error = || -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let start = PostShift::all(0.0, 2048, FLOAT)?;
        let found = student.denoise(&noise, &start, &cond)?;
        Ok(value(&(found - &noise * &spread).square().mean(None).sqrt()))
    };
    let before = error()?;
    let engine = Consistency::continuous(student.clone(), Tangent::Central { step: 1e-3 })?;
    let group = Group::new(Renoising::new(Uniform::FULL)).engine("scm", 1.0, &engine);
    let objective = Objective::new(teacher).with(group);
    for step in 0..1500 {
        engine.set_warmup(f64::from(step) / 1500.0)?;
        optimizer.set_lr(2e-3 * (1.0 - f64::from(step) / 1500.0));
        let (data, noise, time) = draw()?;
        let input = RectifiedFlow.renoise(&data, &time, &noise)?;
        let x = student.denoise(&input, &time, &cond)?;
        let batch = Batch::new(&x, &cond)?.with_student_input(&input, &time)?;
        optimizer.backward_step(&objective.evaluate(&batch)?.loss);
    }
    let after = error()?;
    assert!(before > 0.3 && after < 0.05, "{before} {after}");
    Ok(())
}
