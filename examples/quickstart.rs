//! Decoupled DMD from end to end on a 2-D mixture: `./with-libtorch cargo run --example quickstart`
//!
//! Data: four narrow Gaussians on the corners of a square; class 0 owns the left two, class 1 the
//! right two. The teacher is known in closed form. The student, a small network that starts from
//! random weights, learns to draw from a class in two steps. Expected, in some seconds: the energy distance to
//! the data falls from 0.76 to 0.06 (guidance keeps it from zero), and 82 % of the samples end within three
//! standard deviations of a corner of their own class. Over the seeds 0 to 9 the energy distance ends between 0.05
//! and 0.16, and 79 % to 89 % are at home.

use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, FewStepGrid, Guidance, Prediction,
    RectifiedFlow, Sampler, Schedule, Transition,
};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const BATCH: i64 = 256;
const SPREAD: f64 = 0.2;
const STEPS: i32 = 3000;

fn corners() -> Tensor {
    Tensor::from_slice(&[-1.0f32, -1.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]).view([4, 2])
}

/// E[x0 | x_t] of the mixture with component weights `weights` [B, 4].
fn mixture_denoiser(x: &Tensor, t: &Tensor, weights: &Tensor) -> Tensor {
    let a = t.view([-1, 1, 1]);
    let variance = a.square() * SPREAD.powi(2) + (1.0f64 - &a).square(); // around a component
    let offset = x.unsqueeze(1) - &a * corners();
    let distance = offset.square().sum_dim_intlist(&[-1i64][..], true, None::<Kind>);
    let logits = weights.log().unsqueeze(-1) - distance / (2.0f64 * &variance);
    let means = corners() + &a * SPREAD.powi(2) / variance * offset;
    (logits.softmax(1, None::<Kind>) * means).sum_dim_intlist(&[1i64][..], false, None::<Kind>)
}

fn network(vs: &nn::Path) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor + use<> {
    let net = nn::seq()
        .add(nn::linear(vs / "in", 2 + 1 + 4, 128, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(vs / "mid", 128, 128, Default::default()))
        .add_fn(Tensor::silu)
        .add(nn::linear(vs / "out", 128, 2, Default::default()));
    move |x, t, cond| net.forward(&Tensor::cat(&[x, &t.unsqueeze(1), &cond[0]], 1))
}

/// Energy distance to the data of class 0, and the share of samples within 3 sigma of its corners.
fn residual(x: &Tensor) -> (f64, f64) {
    let corner = corners().slice(0, 0, 2, 1);
    let data = corner.repeat([BATCH / 2, 1]) + Tensor::randn([BATCH, 2], CPU) * SPREAD;
    let mean = |p: &Tensor, q: &Tensor| Tensor::cdist(p, q, 2.0, None).mean(Kind::Double);
    let energy = mean(x, &data) * 2.0 - mean(x, x) - mean(&data, &data);
    let nearest = Tensor::cdist(x, &corner, 2.0, None).amin([1i64], false);
    (energy.double_value(&[]), nearest.lt(3.0 * SPREAD).mean(Kind::Float).double_value(&[]))
}

fn main() -> anyhow::Result<()> {
    tch::manual_seed(0);
    let [student_vs, fake_vs] = [(); 2].map(|()| nn::VarStore::new(Device::Cpu));
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network(&student_vs.root()));
    let fake = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network(&fake_vs.root()));
    let teacher = Denoiser::new(RectifiedFlow, Prediction::Sample, |x, t, c: &Condition| {
        mixture_denoiser(x, t, &c[0])
    });
    let dm = DistributionMatching::new(fake);
    let objective = Schedule::DecoupledHybrid.objective(teacher, Guidance::new(1.5)?, &dm);
    let sampler = Sampler::new(&student, FewStepGrid::even(2)?, Transition::Renoise);
    let (student_rate, fake_rate) = (3e-3, 6e-3);
    let mut student_optimizer = nn::Adam::default().build(&student_vs, student_rate)?;
    let mut fake_optimizer = nn::Adam::default().build(&fake_vs, fake_rate)?;
    let classes = Tensor::from_slice(&[0.5f32, 0.5, 0.0, 0.0, 0.0, 0.0, 0.5, 0.5]).view([2, 4]);
    let null = Condition::from(Tensor::full([BATCH, 4], 0.25, CPU));
    let left = Condition::from(classes.get(0).repeat([BATCH, 1]));
    let report = |when: &str| -> anyhow::Result<()> {
        let (energy, share) = residual(&sampler.sample(&Tensor::randn([BATCH, 2], CPU), &left)?);
        println!("{when:>6}: energy distance {energy:.4}, {:3.0} % at home", 100.0 * share);
        Ok(())
    };
    report("before")?;
    for step in 0..STEPS {
        // Both rates fall to zero, or the last student is one of those that circle around the best.
        let remaining = 1.0 - f64::from(step) / f64::from(STEPS);
        student_optimizer.set_lr(student_rate * remaining);
        fake_optimizer.set_lr(fake_rate * remaining);
        let labels = Tensor::randint(2, [BATCH], (Kind::Int64, Device::Cpu));
        let cond = Condition::from(classes.index_select(0, &labels));
        let noise = Tensor::randn([BATCH, 2], CPU);
        let made = sampler.simulate(&noise, &cond, sampler.draw_step()?)?;
        let batch = Batch::of(&made, &cond)?.with_null(&null);
        fake_optimizer.backward_step(&dm.denoising_loss(&batch)?);
        if step % 3 == 0 {
            student_optimizer.backward_step(&objective.evaluate(&batch)?.loss);
        }
    }
    report("after")
}
