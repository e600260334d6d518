//! A student x = mean + spread z that starts far from Gaussian data, and one term at a time.

use decoupled_dmd::{
    Adversarial, Batch, Condition, CriticPenalty, Error, GanLoss, Group, Kernel,
    MaximumMeanDiscrepancy, Objective, RectifiedFlow, Regularizer, Renoising, Result, Uniform,
};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, seeded, values};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);
const BATCH: i64 = 128;
const CENTER: [f32; 2] = [1.0, -0.5];
const SPREAD: f64 = 0.5;

/// Trains for `steps` updates with `term`, calling `each` on every batch before; returns how far the
/// mean and the spread averaged over the last quarter are from the data.
fn train(
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
    let mut average = Tensor::zeros([2, 2], CPU);
    let tail = steps / 4;
    for step in 0..steps {
        let x = &mean + &spread * Tensor::randn([BATCH, 2], CPU);
        let real = &center + Tensor::randn([BATCH, 2], CPU) * SPREAD;
        let batch = Batch::new(&x, &cond)?.with_real(&real)?;
        each(&batch)?;
        optimizer.backward_step(&objective.evaluate(&batch)?.loss);
        if step >= steps - tail {
            average += Tensor::stack(&[&mean - &center, spread.abs() - SPREAD], 0).detach();
        }
    }
    let errors = values(&(average / tail as f64));
    Ok((errors[0].hypot(errors[1]), errors[2].hypot(errors[3])))
}

#[test]
fn maximum_mean_discrepancy_reaches_the_data_with_every_kernel() -> Result<()> {
    let _guard = seeded(41);
    for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
        let term = MaximumMeanDiscrepancy::new(kernel.clone())?;
        let (offset, spread) = train(&term, (400, 0.02), |_| Ok(()))?;
        println!("{kernel:?}: mean off by {offset:.3}, spread by {spread:.3}");
        assert!(offset < 0.05 && spread < 0.05, "{kernel:?} {offset} {spread}");
    }
    Ok(())
}

#[test]
fn a_critic_leads_the_samples_to_the_data() -> Result<()> {
    let _guard = seeded(42);
    let cases = [
        (GanLoss::NonSaturating, CriticPenalty::R1 { gamma: 0.1 }),
        (GanLoss::Hinge, CriticPenalty::ApproximateR1 { weight: 500.0, sigma: 0.01 }),
        (GanLoss::Relativistic, CriticPenalty::R1 { gamma: 0.1 }),
    ];
    for (gan_loss, penalty) in cases {
        let store = nn::VarStore::new(Device::Cpu);
        let root = store.root();
        let net = nn::seq()
            .add(nn::linear(&root / "in", 3, 64, Default::default()))
            .add_fn(Tensor::silu)
            .add(nn::linear(&root / "mid", 64, 64, Default::default()))
            .add_fn(Tensor::silu)
            .add(nn::linear(&root / "out", 64, 1, Default::default()));
        let critic = |x: &Tensor, t: &Tensor, _: &Condition| {
            net.forward(&Tensor::cat(&[x, &t.unsqueeze(1)], 1))
        };
        let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss).penalty(penalty)?;
        let mut optimizer = nn::Adam::default().build(&store, 2e-3).map_err(Error::from)?;
        let (offset, spread) = train(&gan, (1200, 5e-3), |batch| {
            optimizer.backward_step(&gan.critic_loss(batch)?);
            Ok(())
        })?;
        println!("{gan_loss:?}: mean off by {offset:.3}, spread by {spread:.3}");
        assert!(offset < 0.15 && spread < 0.15, "{gan_loss:?} {offset} {spread}");
    }
    Ok(())
}
