//! Gaussian data in float64: its teachers, and students that are exact.

use decoupled_dmd::{
    Batch, Condition, Consistency, Denoiser, Engine, NoisePath, PostShift, Prediction, Probe,
    RectifiedFlow, Result, Shift, TrigFlow, VariancePreserving,
};
use tch::{Device, Kind, Tensor};

use super::super::common::{value, wave};

pub(super) const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
pub(super) const MEAN: f64 = 0.7;
pub(super) const STD: f64 = 0.5;

/// a and s of a path at times `[B]`, as `[B, 1]`.
pub(super) fn coefficients(path: &dyn NoisePath, t: &Tensor) -> (Tensor, Tensor) {
    let at = path.coefficients(&PostShift::new(t.detach()).unwrap()).unwrap();
    (at.data.view([-1, 1]).to_kind(t.kind()), at.noise.view([-1, 1]).to_kind(t.kind()))
}

/// The variance of x_t for data of variance STD^2.
pub(super) fn variance(a: &Tensor, s: &Tensor) -> Tensor {
    a.square() * (STD * STD) + s.square()
}

/// The denoiser of N(condition, STD^2), which predicts the clean sample.
pub(super) fn teacher<'a>(path: &'a dyn NoisePath) -> Denoiser<'a> {
    Denoiser::new(path, Prediction::Sample, move |x: &Tensor, t: &Tensor, c: &Condition| {
        let (a, s) = coefficients(path, t);
        &c[0] + &a * (STD * STD) / variance(&a, &s) * (x - &a * &c[0])
    })
}

/// The consistency function of that teacher: where its ODE from (x, t) ends.
pub(super) fn exact_student<'a>(path: &'a dyn NoisePath) -> Denoiser<'a> {
    Denoiser::new(path, Prediction::Sample, move |x: &Tensor, t: &Tensor, c: &Condition| {
        let (a, s) = coefficients(path, t);
        &c[0] + variance(&a, &s).sqrt().reciprocal() * STD * (x - &a * &c[0])
    })
}

/// A rectified-flow denoiser of which the time may be differentiated, with its exact derivative by two
/// reversed passes.
pub(super) fn differentiable<'a>(
    path: impl NoisePath + 'a,
    prediction: Prediction,
    network: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor + Copy + 'a,
) -> Denoiser<'a> {
    let with_slope = move |x: &Tensor, t: &Tensor, c: &Condition, dx: &Tensor, dt: &Tensor| {
        tch::with_grad(|| {
            let x = x.detach().set_requires_grad(true);
            let t = t.detach().set_requires_grad(true);
            let output = network(&x, &t, &c[0]);
            let seed = output.zeros_like().set_requires_grad(true);
            let dot = (&output * &seed).sum(None);
            let slopes = Tensor::run_backward(&[&dot], &[&x, &t], true, true);
            let along = [(&slopes[0], dx), (&slopes[1], dt)]
                .into_iter()
                .filter(|(slope, _)| slope.defined())
                .map(|(slope, along)| (slope * along).sum(None))
                .reduce(|one, other| one + other)
                .expect("the network depends on its input");
            let tangent = Tensor::run_backward(&[&along], &[&seed], false, false).remove(0);
            (output.detach(), tangent)
        })
    };
    Denoiser::new(path, prediction, move |x: &Tensor, t: &Tensor, c: &Condition| {
        network(x, t, &c[0])
    })
    .tangent(with_slope)
}

/// The clean prediction of N(mean, STD^2) on rectified flow.
pub(super) fn flow_teacher(x: &Tensor, t: &Tensor, mean: &Tensor) -> Tensor {
    let a = t.view([-1, 1]);
    let s: Tensor = 1.0 - &a;
    mean + &a * (STD * STD) / variance(&a, &s) * (x - &a * mean)
}

pub(super) fn flow_exact(x: &Tensor, t: &Tensor, mean: &Tensor) -> Tensor {
    let a = t.view([-1, 1]);
    let s: Tensor = 1.0 - &a;
    mean + variance(&a, &s).sqrt().reciprocal() * STD * (x - &a * mean)
}

/// The direction of an engine for a student at given inputs.
pub(super) fn direction(
    engine: &Consistency<'_>,
    student: &Denoiser<'_>,
    teacher: &Denoiser<'_>,
    input: &Tensor,
    time: &PostShift,
    conditions: (&Condition, Option<&Condition>),
) -> Result<Tensor> {
    let x = student.denoise(input, time, conditions.0)?;
    let mut batch = Batch::new(&x, conditions.0)?.with_student_input(input, time)?;
    if let Some(null) = conditions.1 {
        batch = batch.with_null(null);
    }
    let tau = PostShift::all(0.5, x.size()[0], (x.kind(), Device::Cpu))?;
    engine.direction(&Probe::at(teacher, &batch, tau, x.zeros_like())?)
}

pub(super) fn mean_condition() -> Condition {
    Condition::from(Tensor::from(MEAN))
}

pub(super) fn times() -> Result<PostShift> {
    PostShift::new(Tensor::from_slice(&[0.05, 0.3, 0.6, 0.9]))
}

/// Inputs at those times, with the spread that the path gives them.
pub(super) fn inputs(path: &dyn NoisePath, time: &PostShift) -> Tensor {
    let (a, s) = coefficients(path, time.tensor());
    &a * MEAN + variance(&a, &s).sqrt() * wave(&[4, 3], 0.4, Kind::Double)
}

pub(super) fn largest(tensor: &Tensor) -> f64 {
    value(&tensor.abs().max())
}

pub(super) fn ending_paths() -> Vec<Box<dyn NoisePath>> {
    vec![
        Box::new(RectifiedFlow),
        Box::new(TrigFlow),
        Box::new(VariancePreserving::linear(0.1, 20.0).unwrap()),
        Box::new(RectifiedFlow.shifted(Shift::new(3.0).unwrap())),
    ]
}
