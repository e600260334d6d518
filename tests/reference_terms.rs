//! The regularizers against stock PyTorch in float64: every variant, in three types.
//!
//! `scripts/reference/terms.py` writes the values and gradients. One line a case shows the worst error:
//! `./with-libtorch cargo test --test reference_terms -- --nocapture`

mod common;

use std::collections::HashMap;

use common::{gaussian_teacher, max_difference, value, values};
use decoupled_dmd::{
    Adversarial, Bandwidth, Batch, Condition, CriticHeads, CriticPenalty, Estimator, GanLoss,
    Kernel, MaximumMeanDiscrepancy, MeanVariance, PostShift, Probe, RectifiedFlow, Regularizer,
    Result, Shift, Statistics,
};
use tch::{Device, Kind, Tensor, nn};

/// What is allowed for a value, relative to itself or to what it is a difference of, and for a
/// gradient, relative to its largest element; both are computed in float32 or wider.
fn tolerance(case: &str, kind: Kind) -> f64 {
    match kind {
        Kind::Double => 1e-12,
        // The rounding error of a finite difference over sigma = 0.01.
        _ if case.ends_with("approximate_r1") => 1e-5,
        _ => 1e-6,
    }
}

/// The type of everything but x and the real samples, which may be bfloat16.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

struct Reference(HashMap<String, Tensor>);

impl Reference {
    fn read() -> Result<Self> {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/terms.safetensors");
        Ok(Self(Tensor::read_safetensors(path)?.into_iter().collect()))
    }

    fn get(&self, name: &str, kind: Kind) -> Tensor {
        self.0.get(name).unwrap_or_else(|| panic!("no {name} in the reference")).to_kind(kind)
    }

    fn leaf(&self, name: &str, kind: Kind) -> Tensor {
        self.get(name, kind).detach().set_requires_grad(true)
    }

    /// Compares the value of `loss` and its gradient in each leaf.
    fn compare(&self, case: &str, kind: Kind, loss: &Tensor, leaves: &[(&str, &Tensor)]) {
        let relative = |found: &Tensor, name: &str, scale: &str| {
            let expected = self.get(&format!("{case}/{name}"), Kind::Double);
            let scale = self.0.get(&format!("{case}/{scale}")).unwrap_or(&expected);
            let found = found.view(expected.size().as_slice());
            max_difference(&found, &expected) / value(&scale.abs().max()).max(1e-300)
        };
        let error = relative(loss, "value", "scale");
        let mut line = format!("{case:<46} {kind:<9?} value {error:.1e}");
        // NaN is above every tolerance.
        let off = |error: f64, allowed: f64| error.is_nan() || error > allowed;
        let mut failed = off(error, tolerance(case, kind));
        assert_eq!(loss.kind(), wide(kind), "{case}");
        let inputs: Vec<&Tensor> = leaves.iter().map(|(_, leaf)| *leaf).collect();
        let gradients = Tensor::run_backward(&[loss], &inputs, true, false);
        for ((name, leaf), gradient) in leaves.iter().zip(&gradients) {
            assert_eq!(gradient.kind(), leaf.kind());
            let error = relative(gradient, &format!("grad_{name}"), "");
            // bfloat16 has eight bits: half a unit in the last place of the gradient itself.
            let allowed =
                if leaf.kind() == Kind::BFloat16 { 1.0 / 256.0 } else { tolerance(case, kind) };
            failed |= off(error, allowed);
            line += &format!("  d{name} {error:.1e}");
        }
        println!("{line}");
        assert!(!failed, "{line}");
    }
}

const KINDS: [Kind; 3] = [Kind::Double, Kind::Float, Kind::BFloat16];

/// The loss of a term at tau = 0.5 without noise.
fn loss_of(term: &dyn Regularizer, batch: &Batch<'_>) -> Result<Tensor> {
    let teacher = gaussian_teacher(1.0);
    let tau = PostShift::all(0.5, batch.batch_size(), (wide(batch.x().kind()), Device::Cpu))?;
    term.loss(&Probe::at(&teacher, batch, tau, batch.x().zeros_like())?)
}

#[test]
fn mean_variance() -> Result<()> {
    let reference = Reference::read()?;
    let cond = Condition::none();
    for kind in KINDS {
        let x = reference.leaf("mv/x", kind);
        let batch = Batch::new(&x, &cond)?;
        let check = |case: &str, term: &MeanVariance| -> Result<()> {
            reference.compare(case, kind, &loss_of(term, &batch)?, &[("x", &x)]);
            Ok(())
        };
        check("mv_sample", &MeanVariance::per_sample(0.075, 0.81)?)?;
        check("mv_floor", &MeanVariance::per_sample(0.075, 0.81)?.floor(0.5)?)?;
        let target = |name| reference.get(name, wide(kind));
        check("mv_channel", &MeanVariance::per_channel(&target("mv/mu"), &target("mv/var"))?)?;
        let batches = [0, 1, 2].map(|k| reference.get(&format!("mv/batch_{k}"), kind));
        for (name, statistics) in
            [("sample", Statistics::PerSample), ("channel", Statistics::PerChannel)]
        {
            let measured = || MeanVariance::measured(&batches[0], statistics);
            check(&format!("mv_measured_{name}"), &measured()?)?;
            for (decay, shown) in [(0.75, "0.75"), (1.0, "1.0")] {
                let case = format!("mv_running_{name}_{shown}");
                let term = measured()?.running(decay, 0)?;
                for batch in &batches {
                    term.update(batch)?;
                }
                check(&case, &term)?;
                // Resuming after the first batch gives the same.
                let resumed = measured()?.running(decay, 1)?;
                batches[1..].iter().try_for_each(|batch| resumed.update(batch))?;
                check(&case, &resumed)?;
            }
        }
    }
    Ok(())
}

#[test]
fn maximum_mean_discrepancy() -> Result<()> {
    let reference = Reference::read()?;
    let with_mean = |kernel| match kernel {
        Kernel::Gaussian { scales, .. } => Kernel::Gaussian { bandwidth: Bandwidth::Mean, scales },
        other => other,
    };
    let fixed = Kernel::Gaussian { bandwidth: Bandwidth::Fixed(3.0), scales: vec![1.0] };
    let kernels = [
        ("gaussian_median", Kernel::gaussian()),
        ("gaussian_mean", with_mean(Kernel::gaussian())),
        ("gaussian_fixed", fixed),
        ("imq_mean", Kernel::inverse_multiquadric()),
        ("energy", Kernel::Energy),
    ];
    let cond = Condition::none();
    for kind in KINDS {
        let (x, y) = (reference.leaf("mmd/x", kind), reference.get("mmd/y", kind));
        let projection = reference.get("mmd/projection", wide(kind)).tr();
        let batch = Batch::new(&x, &cond)?.real(&y)?;
        for (name, kernel) in &kernels {
            for (shown, estimator) in
                [("unbiased", Estimator::Unbiased), ("biased", Estimator::Biased)]
            {
                let term = || {
                    Ok::<_, decoupled_dmd::Error>(
                        MaximumMeanDiscrepancy::new(kernel.clone())?.estimator(estimator),
                    )
                };
                let case = format!("mmd_{name}_{shown}");
                let loss = loss_of(&term()?, &batch)?;
                reference.compare(&format!("{case}_flat"), kind, &loss, &[("x", &x)]);
                let mapped = term()?.features(|x: &Tensor| {
                    x.to_kind(wide(kind)).flatten(1, -1).matmul(&projection).tanh()
                });
                let loss = loss_of(&mapped, &batch)?;
                reference.compare(&format!("{case}_tanh"), kind, &loss, &[("x", &x)]);
            }
        }
    }
    Ok(())
}

#[test]
fn adversarial() -> Result<()> {
    let reference = Reference::read()?;
    for kind in KINDS {
        let sample = |name: &str| reference.get(&format!("gan/{name}"), kind);
        let other = |name: &str| reference.get(&format!("gan/{name}"), wide(kind));
        let leaf = |name: &str| other(name).detach().set_requires_grad(true);
        let (x, y) = (reference.leaf("gan/x", kind), sample("y"));
        let (w1, u, w2) = (leaf("w1"), leaf("u"), leaf("w2"));
        let (cond, real_cond) = (other("cond").into(), Condition::from(other("real_cond")));
        let tau = || PostShift::new(other("tau"));
        let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
            (x.matmul(&w1.tr()) + t.unsqueeze(1) * &u + &c[0]).tanh().matmul(&w2.tr())
        };
        let batch = Batch::new(&x, &cond)?.real(&y)?.real_cond(&real_cond);
        let teacher = gaussian_teacher(1.0);
        let probe = Probe::at(&teacher, &batch, tau()?, sample("noise"))?;
        for (name, gan_loss) in [
            ("non_saturating", GanLoss::NonSaturating),
            ("hinge", GanLoss::Hinge),
            ("relativistic", GanLoss::Relativistic),
        ] {
            let term = || Adversarial::new(RectifiedFlow, Shift::NONE, critic).gan_loss(gan_loss);
            let loss = term().loss(&probe)?;
            reference.compare(&format!("gan_{name}_generator"), kind, &loss, &[("x", &x)]);
            for (shown, penalty) in [
                ("none", None),
                ("r1", Some(CriticPenalty::R1 { gamma: 0.5 })),
                (
                    "approximate_r1",
                    Some(CriticPenalty::ApproximateR1 { weight: 100.0, sigma: 0.01 }),
                ),
            ] {
                let term = match penalty {
                    Some(penalty) => term().penalty(penalty)?,
                    None => term(),
                };
                let (noise, perturbation) = (sample("noise"), sample("perturbation"));
                let loss = term.critic_loss_at(&batch, &tau()?, &noise, &perturbation)?;
                let case = format!("gan_{name}_critic_{shown}");
                let leaves = [("w1", &w1), ("u", &u), ("w2", &w2)];
                reference.compare(&case, kind, &loss, &leaves);
            }
        }
    }
    Ok(())
}

#[test]
fn critic_heads() -> Result<()> {
    let reference = Reference::read()?;
    for kind in [Kind::Double, Kind::Float] {
        let mut store = nn::VarStore::new(Device::Cpu);
        let heads = {
            let _guard = common::seeded(1);
            CriticHeads::new(&store.root(), &[4, 5], 16)?
        };
        store.set_kind(kind);
        // The store was made anew for this type: the heads hold the same tensors.
        let mut parameters: Vec<_> = store.variables().into_iter().collect();
        parameters.sort_by(|a, b| a.0.cmp(&b.0));
        for (name, parameter) in &mut parameters {
            let saved = reference.get(&format!("heads/{name}"), kind);
            let _no_grad = tch::no_grad_guard();
            parameter.copy_(&saved.view(parameter.size().as_slice()));
        }
        let levels = [0, 1].map(|k| reference.get(&format!("heads/level_{k}"), kind));
        let logits = heads.logits(&levels)?;
        assert_eq!(logits.size(), [3, 2]);
        let leaves: Vec<_> = parameters.iter().map(|(name, t)| (name.as_str(), t)).collect();
        reference.compare("heads", kind, &(&logits * 0.125).exp().sum(kind), &leaves);
        assert!(values(&logits).iter().all(|logit| logit.is_finite()));
    }
    Ok(())
}
