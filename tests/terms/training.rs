//! Students that are trained for seconds with one term each.

use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, Error, Group, Objective, PreShift,
    Prediction, RectifiedFlow, Regularizer, Renoising, Result, Uniform,
};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, seeded, value, values};

pub const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
pub const BATCH: i64 = 256;
/// The data of the engines: a Gaussian about a centre.
pub const VARIANCE: f64 = 0.25;
pub const CENTER: [f32; 2] = [1.0, -0.5];

/// A network of a sample of two numbers and its time, with two hidden layers.
pub fn perceptron(
    root: &nn::Path<'_>,
    outputs: i64,
) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor + use<> {
    let layers = nn::seq()
        .add(nn::linear(root / "in", 3, 64, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(root / "mid", 64, 64, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(root / "out", 64, outputs, Default::default()));
    move |x, t, _| layers.forward(&Tensor::cat(&[x, &t.unsqueeze(1)], 1))
}

/// A one-step student, x = mean + spread * z, which starts far from the data.
pub struct Student {
    pub mean: Tensor,
    pub spread: Tensor,
}

impl Student {
    pub fn new(width: i64) -> Self {
        let all = |value| Tensor::full([width], value, FLOAT).set_requires_grad(true);
        Self { mean: all(0.0), spread: all(1.2) }
    }
    pub fn generate(&self) -> Tensor {
        &self.mean + &self.spread * Tensor::randn([BATCH, self.mean.size()[0]], FLOAT)
    }
    pub fn descend(&mut self, loss: &Tensor, rate: f64) {
        let parameters = [&mut self.mean, &mut self.spread];
        let gradients =
            Tensor::run_backward(&[loss], &[&*parameters[0], &*parameters[1]], false, false);
        let _guard = tch::no_grad_guard();
        for (parameter, gradient) in parameters.into_iter().zip(gradients) {
            let _ = parameter.f_sub_(&(gradient * rate)).unwrap();
        }
    }
    /// Distance of the mean from `center`, and the mean spread.
    pub fn residual(&self, center: &Tensor) -> (f64, f64) {
        let offset = (&self.mean - center).square().sum(Kind::Double).sqrt();
        (value(&offset), value(&self.spread.abs().mean(Kind::Double)))
    }
}

/// Trains with an exact fake score (the student is Gaussian, so its score is known), and returns the
/// offset from the condition's centre and the spread after each hundred updates.
pub fn train_with_exact_fake(
    build: impl for<'a> Fn(Denoiser<'a>, &'a DistributionMatching<'a>) -> Result<Objective<'a>>,
) -> Result<Vec<(f64, f64)>> {
    let _guard = seeded(12);
    let center = Tensor::from_slice(&CENTER);
    let cond = Condition::from(center.expand([BATCH, 2], false));
    let null = Condition::from(Tensor::zeros([BATCH, 2], FLOAT));
    let time = PreShift::all(0.0, BATCH, FLOAT)?;
    let student = std::cell::RefCell::new(Student::new(2));
    let fake = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            let student = student.borrow();
            let (mean, spread) = (student.mean.detach(), student.spread.detach());
            let a = t.unsqueeze(1);
            let s: Tensor = 1.0 - &a;
            let variance = spread.square();
            let gain = &a * &variance / (a.square() * &variance + s.square());
            &mean + gain * (x - a * &mean)
        },
    );
    let dm = DistributionMatching::new(fake);
    let objective = build(gaussian_teacher(VARIANCE), &dm)?;
    let mut history = Vec::new();
    for step in 0..1500 {
        let x = student.borrow().generate();
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
        let evaluation = objective.evaluate(&batch)?;
        student.borrow_mut().descend(&evaluation.loss, 0.05);
        if step % 100 == 99 {
            history.push(student.borrow().residual(&center));
        }
    }
    Ok(history)
}

/// Trains for `steps` updates with `term`, calling `each` on every batch before; returns how far the
/// mean and the spread averaged over the last quarter are from the data.
pub fn train_with_regularizer(
    term: impl Regularizer,
    (steps, rate): (usize, f64),
    mut each: impl FnMut(&Batch<'_>) -> Result<()>,
) -> Result<(f64, f64)> {
    let store = nn::VarStore::new(Device::Cpu);
    let start = |name: &str, value: f64| store.root().var(name, &[2], nn::Init::Const(value));
    let (mean, spread) = (start("mean", -0.5), start("spread", 1.2));
    let mut optimizer = nn::Adam::default().build(&store, rate).map_err(Error::from)?;
    let center = Tensor::from_slice(&CENTER);
    let objective = Objective::new(gaussian_teacher(1.0))
        .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("term", 1.0, term));
    let cond = Condition::none();
    let mut average = Tensor::zeros([2, 2], FLOAT);
    let tail = steps / 4;
    for step in 0..steps {
        let x = &mean + &spread * Tensor::randn([128, 2], FLOAT);
        let real = &center + Tensor::randn([128, 2], FLOAT) * VARIANCE.sqrt();
        let batch = Batch::new(&x, &cond)?.with_real(&real)?;
        each(&batch)?;
        optimizer.backward_step(&objective.evaluate(&batch)?.loss);
        if step >= steps - tail {
            average +=
                Tensor::stack(&[&mean - &center, spread.abs() - VARIANCE.sqrt()], 0).detach();
        }
    }
    let errors = values(&(average / tail as f64));
    Ok((errors[0].hypot(errors[1]), errors[2].hypot(errors[3])))
}
