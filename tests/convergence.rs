//! Whole trainings on 2-D Gaussians whose teacher is known in closed form. Each takes seconds.

mod common;

use common::{gaussian_teacher, seeded, value, wave};
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Error, Group, Guidance,
    MeanVariance, Objective, PreShift, Prediction, RectifiedFlow, Renoising, Result, Schedule,
    Statistics, Uniform,
};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const BATCH: i64 = 256;
const VARIANCE: f64 = 0.25;
const CENTER: [f32; 2] = [1.0, -0.5];

/// A one-step student, x = mean + spread * z, which starts far from the data.
struct Student {
    mean: Tensor,
    spread: Tensor,
}

impl Student {
    fn new(width: i64) -> Self {
        let all = |value| Tensor::full([width], value, FLOAT).set_requires_grad(true);
        Self { mean: all(0.0), spread: all(1.2) }
    }
    fn generate(&self) -> Tensor {
        &self.mean + &self.spread * Tensor::randn([BATCH, self.mean.size()[0]], FLOAT)
    }
    fn descend(&mut self, loss: &Tensor, rate: f64) {
        let parameters = [&mut self.mean, &mut self.spread];
        let gradients =
            Tensor::run_backward(&[loss], &[&*parameters[0], &*parameters[1]], false, false);
        let _guard = tch::no_grad_guard();
        for (parameter, gradient) in parameters.into_iter().zip(gradients) {
            let _ = parameter.f_sub_(&(gradient * rate)).unwrap();
        }
    }
    /// Distance of the mean from `center`, and the mean spread.
    fn residual(&self, center: &Tensor) -> (f64, f64) {
        let offset = (&self.mean - center).square().sum(Kind::Double).sqrt();
        (value(&offset), value(&self.spread.abs().mean(Kind::Double)))
    }
}

fn fake_network(vs: &nn::Path) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor + use<> {
    let net = nn::seq()
        .add(nn::linear(vs / "in", 3, 64, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(vs / "mid", 64, 64, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(vs / "out", 64, 2, Default::default()));
    move |x, t, _| net.forward(&Tensor::cat(&[x, &t.unsqueeze(1)], 1))
}

#[test]
fn distribution_matching_alone_reaches_the_mean_and_spread_of_the_data() -> Result<()> {
    let _guard = seeded(11);
    let center = Tensor::from_slice(&CENTER);
    let cond = Condition::from(center.expand([BATCH, 2], false));
    let vs = nn::VarStore::new(Device::Cpu);
    let network = fake_network(&vs.root());
    let fake = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
    let dm = DistributionMatching::new(fake);
    let objective = Objective::new(gaussian_teacher(VARIANCE))
        .with(Group::new(Renoising::new(Uniform::new(0.02, 0.98)?)).regularizer("dm", 1.0, &dm));
    let mut fake_optimizer = nn::Adam::default().build(&vs, 2e-3).map_err(Error::from)?;
    let mut student = Student::new(2);
    let (start_offset, start_spread) = student.residual(&center);
    assert!(start_offset > 1.0 && start_spread > 1.0);
    for step in 0..2000 {
        let x = student.generate();
        let batch = Batch::new(&x, &cond)?;
        if step >= 100 && step % 2 == 0 {
            let evaluation = objective.evaluate(&batch)?;
            student.descend(&evaluation.loss, 0.02);
        }
        fake_optimizer.backward_step(&dm.denoising_loss(&batch)?);
    }
    let (offset, spread) = student.residual(&center);
    assert!(offset < 0.1, "offset {offset}");
    assert!((spread - VARIANCE.sqrt()).abs() < 0.1, "spread {spread}");
    Ok(())
}

/// Trains with an exact fake score (the student is Gaussian, so its score is known), and returns the
/// offset from the condition's centre and the spread after each hundred updates.
fn train(
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

#[test]
fn cfg_augmentation_has_no_fixed_point_and_distribution_matching_gives_it_one() -> Result<()> {
    let guidance = Guidance::new(2.0)?;
    let alone = train(|teacher, _| {
        Ok(Objective::new(teacher).with(Group::new(Renoising::new(Uniform::FULL)).engine(
            "ca",
            1.0,
            CfgAugmentation::new(guidance),
        )))
    })?;
    // The engine alone walks away from the null, past the centre of the condition, and never stops.
    let offsets: Vec<f64> = alone.iter().map(|(offset, _)| *offset).collect();
    assert!(offsets.windows(2).skip(3).all(|pair| pair[1] > pair[0] + 0.01), "{offsets:?}");

    for schedule in Schedule::ALL {
        let shielded = train(|teacher, dm| Ok(schedule.objective(teacher, guidance, dm)))?;
        let (offset, spread) = shielded[shielded.len() - 1];
        let (earlier, _) = shielded[shielded.len() - 5];
        assert!((offset - earlier).abs() < 0.05, "{schedule:?} {shielded:?}");
        assert!(offset < 0.8 * offsets[offsets.len() - 1], "{schedule:?} {offset} {offsets:?}");
        assert!((0.3..0.8).contains(&spread), "{schedule:?} {spread}");
    }
    Ok(())
}

#[test]
fn mean_variance_keeps_the_statistics_that_the_engine_would_change() -> Result<()> {
    const WIDTH: i64 = 64;
    let _guard = seeded(13);
    // The data are one picture with noise, the null branch knows the noise alone: guidance draws the
    // picture over and over.
    let picture = wave(&[WIDTH], 0.0, Kind::Float);
    let cond = Condition::from(picture.expand([BATCH, WIDTH], false));
    let null = Condition::from(Tensor::zeros([BATCH, WIDTH], FLOAT));
    let real = &picture + Tensor::randn([4096, WIDTH], FLOAT) * VARIANCE.sqrt();
    let target = MeanVariance::measured(&real, Statistics::PerSample)?.target();
    let (mean, variance) = (value(&target.0), value(&target.1));
    // ln(variance of the samples / that of the data) after each hundred updates.
    let drift = |weight: Option<f64>| -> Result<Vec<f64>> {
        let group = || Group::new(Renoising::new(Uniform::FULL));
        let engine = CfgAugmentation::new(Guidance::new(2.0)?);
        let mut objective = Objective::new(gaussian_teacher(VARIANCE))
            .observed()
            .with(group().engine("ca", 1.0, engine));
        if let Some(weight) = weight {
            let term = MeanVariance::per_sample(mean, variance)?;
            objective = objective.with(group().regularizer("mv", weight, term));
        }
        let mut student = Student::new(WIDTH);
        let mut history = Vec::new();
        for step in 0..700 {
            let x = student.generate();
            let evaluation = objective.evaluate(&Batch::new(&x, &cond)?.with_null(&null))?;
            if step % 100 == 99 {
                let all = evaluation.diagnostics.as_ref().expect("observed");
                history.push(all.variance_drift(variance)?.expect("finite samples"));
            }
            student.descend(&evaluation.loss, 0.5);
        }
        Ok(history)
    };
    // Alone it never stops: here at more than seven times the variance of the data.
    let alone = drift(None)?;
    assert!(alone.windows(2).all(|pair| pair[1] > pair[0] + 0.1), "{alone:.3?}");
    assert!(alone[alone.len() - 1] > 2.0, "{alone:.3?}");
    // The shield comes to rest against it, the closer to the data the stronger it is.
    for (weight, limit) in [(10.0, 0.25), (30.0, 0.1)] {
        let shielded = drift(Some(weight))?;
        assert!(shielded.iter().all(|drift| drift.abs() < limit), "{weight} {shielded:.3?}");
        let settled = &shielded[2..];
        assert!(settled.iter().all(|d| (d - settled[0]).abs() < 0.02), "{weight} {shielded:.3?}");
    }
    Ok(())
}
