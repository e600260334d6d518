//! Trainings of seconds.

use super::*;

/// The distance of samples in one and in two steps from the end of the teacher's ODE, for 2-D Gaussian data and
/// a random start: at first, and after a training.
fn distances(set: impl FnOnce(MeanFlow<'_>) -> Result<MeanFlow<'_>>) -> Result<(f64, f64, f64)> {
    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    let _guard = seeded(3);
    let spread = Tensor::from_slice(&[0.5f32, 0.2]);
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            let a = t.view([-1, 1]);
            let s: Tensor = 1.0 - &a;
            let clean = &a * spread.square() / (a.square() * spread.square() + s.square()) * x;
            (x - clean) / s.clamp_min(1e-4)
        },
    );
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let layer = |from, to| nn::linear(&root, from, to, nn::LinearConfig::default());
    let layers = [layer(4, 64), layer(64, 64), layer(64, 2)];
    let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        let input = Tensor::cat(&[x, &t.view([-1, 1]), &r.view([-1, 1])], 1);
        input.apply(&layers[0]).silu().apply(&layers[1]).silu().apply(&layers[2])
    });
    let mean_flow = set(MeanFlow::new(map.clone(), teacher)?.times(Uniform::FULL))?;
    let cond = Condition::none();
    let noise = Tensor::f_randn([2048, 2], FLOAT)?;
    let error = |steps| -> Result<f64> {
        let samples = map.sample(&noise, &cond, &FewStepGrid::even(steps)?)?;
        Ok(value(&(samples - &noise * &spread).square().mean(None).sqrt()))
    };
    let before = error(1)?;
    let mut optimizer = nn::Adam::default().build(&store, 2e-3)?;
    for step in 0..1500 {
        optimizer.set_lr(2e-3 * (1.0 - f64::from(step) / 1500.0));
        let data = Tensor::f_randn([256, 2], FLOAT)?.f_mul(&spread)?;
        optimizer.backward_step(&mean_flow.evaluate(&Batch::new(&data, &cond)?)?.loss);
    }
    Ok((before, error(1)?, error(2)?))
}

#[test]
fn training_by_mean_flow_learns_jumps_of_any_length() -> Result<()> {
    let (before, one, two) = distances(|term| term.instantaneous(0.25)?.adaptive(0.5, 1e-3))?;
    // Measured: 1.26 before, 0.061 and 0.049 after.
    assert!(before > 0.5 && one < 0.12 && two < 0.12, "{before} {one} {two}");
    Ok(())
}

#[test]
fn training_by_a_fraction_learns_jumps_of_any_length() -> Result<()> {
    let fraction = FlowRule::Fraction { share: 0.1 };
    let (before, one, two) = distances(|term| term.rule(fraction)?.adaptive(1.0, 1e-3))?;
    assert!(before > 0.5 && one < 0.12 && two < 0.12, "{before} {one} {two}");
    Ok(())
}

#[test]
fn training_by_the_lagrangian_rule_needs_no_data_and_learns_one_step() -> Result<()> {
    let lagrangian = FlowRule::Lagrangian { step: 5e-3 };
    let (before, one, two) = distances(|term| Ok(term.rule(lagrangian)?.from_noise()))?;
    assert!(before > 0.5 && one < 0.04, "{before} {one}");
    // No jump but that from pure noise was trained.
    assert!(two > 2.0 * one, "{one} {two}");
    Ok(())
}
