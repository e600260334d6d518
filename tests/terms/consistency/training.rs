//! Trainings of seconds.

use super::*;

/// A one-step student of 2-D Gaussian data, trained on noised data, and its distance from the end of the
/// teacher's ODE from pure noise, the map `sd x` of each coordinate: before and after.
fn distances(engine: impl FnOnce(Denoiser<'_>) -> Result<Consistency<'_>>) -> Result<(f64, f64)> {
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
    let engine = engine(student.clone())?;
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
    Ok((before, error()?))
}

#[test]
fn training_by_central_differences_learns_the_teachers_ode() -> Result<()> {
    let tangent = Tangent::Central { step: 1e-3 };
    let (before, after) = distances(|student| Consistency::continuous(student, tangent))?;
    assert!(before > 0.3 && after < 0.05, "{before} {after}");
    Ok(())
}

#[test]
fn training_by_a_finite_normalised_step_learns_the_teachers_ode() -> Result<()> {
    let tangent = Tangent::Ahead { step: 1.0 / 48.0 };
    let (before, after) = distances(|student| Consistency::continuous(student, tangent))?;
    assert!(before > 0.3 && after < 0.06, "{before} {after}");
    Ok(())
}

#[test]
fn training_by_the_discrete_form_learns_its_steps() -> Result<()> {
    // Ten steps of the teacher end about 0.74 / 10 of a deviation short.
    let (before, after) = distances(|student| Consistency::discrete(student, 0.1))?;
    assert!(before > 0.3 && after < 0.12, "{before} {after}");
    Ok(())
}
