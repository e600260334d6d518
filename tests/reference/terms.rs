//! The regularizers against stock PyTorch in float64: every variant, in three types.
//!
//! `scripts/reference/terms.py` writes the values and gradients. One line a case shows the worst error:
//! `./with-libtorch cargo test --test reference terms -- --nocapture`

use decoupled_dmd::{
    Adversarial, Bandwidth, Batch, Condition, CriticHeads, CriticPenalty, Estimator, GanLoss,
    Kernel, MaximumMeanDiscrepancy, MeanVariance, PostShift, Probe, RectifiedFlow, Regularizer,
    Result, Statistics,
};
use tch::{Device, Kind, Tensor, nn};

use super::common::reference::{Reference, leaf, wide};
use super::common::{self, BFLOAT16, gaussian_teacher, max_difference, relative, value};

fn input(reference: &Reference, name: &str, kind: Kind) -> Tensor {
    reference.get(name).to_kind(kind)
}

/// Compares the value of `loss`, relative to itself or to what it is a difference of, and its gradient in
/// each leaf, relative to its largest element; both are computed in float32 or wider.
fn compare(
    reference: &Reference,
    case: &str,
    kind: Kind,
    loss: &Tensor,
    leaves: &[(&str, &Tensor)],
) {
    let relative = |found: &Tensor, name: &str, scale: &str| {
        let expected = input(reference, &format!("{case}/{name}"), Kind::Double);
        let scale = reference.get(&format!("{case}/{scale}"));
        let found = found.view(expected.size().as_slice());
        max_difference(&found, &expected) / value(&scale.abs().max()).max(1e-300)
    };
    // MMD is a difference of larger numbers.
    let scale = if case.starts_with("mmd_") { "scale" } else { "value" };
    let error = relative(loss, "value", scale);
    let bound = reference.bound("value", kind);
    reference.report(case, &[(&format!("value {kind:?}"), error, bound)]);
    assert_eq!(loss.kind(), wide(kind), "{case}");
    let inputs: Vec<&Tensor> = leaves.iter().map(|(_, leaf)| *leaf).collect();
    let gradients = Tensor::run_backward(&[loss], &inputs, true, false);
    for ((name, leaf), gradient) in leaves.iter().zip(&gradients) {
        assert_eq!(gradient.kind(), leaf.kind());
        let of = format!("grad_{name}");
        // The rounding error of a finite difference over sigma = 0.01 is larger than that of the others.
        let values = match case.ends_with("approximate_r1") {
            true => "gradient_of_approximate_r1",
            false => "gradient",
        };
        let bound = reference.bound(values, kind);
        let bound = if leaf.kind() == Kind::BFloat16 { BFLOAT16 } else { bound };
        let error = (format!("gradient {kind:?}"), relative(gradient, &of, &of), bound);
        reference.report(&format!("{case} d{name}"), &[(&error.0, error.1, error.2)]);
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
fn every_value_of_the_reference() -> Result<()> {
    Reference::check("terms", |reference| {
        mean_variance(reference)?;
        maximum_mean_discrepancy(reference)?;
        adversarial(reference)?;
        critic_heads(reference)
    })
}

fn mean_variance(reference: &Reference) -> Result<()> {
    let cond = Condition::none();
    for kind in KINDS {
        let x = leaf(reference.get("mv/x"), kind);
        let batch = Batch::new(&x, &cond)?;
        let check = |case: &str, term: &MeanVariance| -> Result<()> {
            compare(reference, case, kind, &loss_of(term, &batch)?, &[("x", &x)]);
            Ok(())
        };
        check("mv_sample", &MeanVariance::per_sample(0.075, 0.81)?)?;
        check("mv_floor", &MeanVariance::per_sample(0.075, 0.81)?.floor(0.5)?)?;
        let target = |name| input(reference, name, wide(kind));
        check("mv_channel", &MeanVariance::per_channel(&target("mv/mu"), &target("mv/var"))?)?;
        let batches = [0, 1, 2].map(|k| input(reference, &format!("mv/batch_{k}"), kind));
        for (name, statistics) in
            [("sample", Statistics::PerSample), ("channel", Statistics::PerChannel)]
        {
            let measured = || MeanVariance::measured(&batches[0], statistics);
            check(&format!("mv_measured_{name}"), &measured()?)?;
            for (decay, shown) in [(0.75, "0.75"), (1.0, "1.0")] {
                let case = format!("mv_running_{name}_{shown}");
                let term = measured()?.running(decay, 0)?;
                // Resuming after the first batch gives the same.
                let resumed = measured()?.running(decay, 1)?;
                for (k, batch) in batches.iter().enumerate() {
                    term.update(batch)?;
                    if k > 0 {
                        resumed.update(batch)?;
                    }
                }
                check(&case, &term)?;
                check(&case, &resumed)?;
                for (what, found) in [("mu", term.target().0), ("var", term.target().1)] {
                    let expected = input(reference, &format!("{case}/{what}"), Kind::Double);
                    let error = relative(&case, &found.view(expected.size().as_slice()), &expected);
                    // Batches in bfloat16 are measured in float32.
                    let what = format!("target {kind:?}");
                    reference.report(&case, &[(&what, error, reference.bound("target", kind))]);
                }
            }
        }
    }
    Ok(())
}

fn maximum_mean_discrepancy(reference: &Reference) -> Result<()> {
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
        let (x, y) = (leaf(reference.get("mmd/x"), kind), input(reference, "mmd/y", kind));
        let projection = input(reference, "mmd/projection", wide(kind)).tr();
        let batch = Batch::new(&x, &cond)?.with_real(&y)?;
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
                compare(reference, &format!("{case}_flat"), kind, &loss, &[("x", &x)]);
                let mapped = term()?.features(|x: &Tensor| {
                    x.to_kind(wide(kind)).flatten(1, -1).matmul(&projection).tanh()
                });
                let loss = loss_of(&mapped, &batch)?;
                compare(reference, &format!("{case}_tanh"), kind, &loss, &[("x", &x)]);
            }
        }
    }
    Ok(())
}

fn adversarial(reference: &Reference) -> Result<()> {
    for kind in KINDS {
        let sample = |name: &str| input(reference, &format!("gan/{name}"), kind);
        let other = |name: &str| input(reference, &format!("gan/{name}"), wide(kind));
        let weights = |name: &str| other(name).detach().set_requires_grad(true);
        let (x, y) = (leaf(reference.get("gan/x"), kind), sample("y"));
        let (w1, u, w2) = (weights("w1"), weights("u"), weights("w2"));
        let (cond, real_cond) = (other("cond").into(), Condition::from(other("real_cond")));
        let tau = || PostShift::new(other("tau"));
        let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
            (x.matmul(&w1.tr()) + t.unsqueeze(1) * &u + &c[0]).tanh().matmul(&w2.tr())
        };
        let batch = Batch::new(&x, &cond)?.with_real(&y)?.with_real_cond(&real_cond);
        let teacher = gaussian_teacher(1.0);
        let probe = Probe::at(&teacher, &batch, tau()?, sample("noise"))?;
        for (name, gan_loss) in [
            ("non_saturating", GanLoss::NonSaturating),
            ("hinge", GanLoss::Hinge),
            ("relativistic", GanLoss::Relativistic),
        ] {
            let term = || Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
            let loss = term().loss(&probe)?;
            compare(reference, &format!("gan_{name}_generator"), kind, &loss, &[("x", &x)]);
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
                compare(reference, &case, kind, &loss, &leaves);
            }
        }
    }
    Ok(())
}

fn critic_heads(reference: &Reference) -> Result<()> {
    // Features are converted to the type of the parameters: in bfloat16, which has all of their
    // digits, they change nothing. Parameters in bfloat16 do: the hidden features are rounded to eight
    // bits four times in a row.
    for (parameters, features) in [
        (Kind::Double, Kind::Double),
        (Kind::Double, Kind::BFloat16),
        (Kind::Float, Kind::Float),
        (Kind::Float, Kind::BFloat16),
        (Kind::BFloat16, Kind::BFloat16),
    ] {
        let bound = reference.bound("heads", parameters);
        let bound = if parameters == Kind::BFloat16 { 4.0 * BFLOAT16 } else { bound };
        let (heads, leaves) = heads(reference, parameters)?;
        let levels = [0, 1].map(|k| input(reference, &format!("heads/level_{k}"), features));
        let logits = heads.logits(&levels)?;
        assert_eq!(logits.kind(), parameters);
        let wide = wide(parameters);
        let loss = (logits.to_kind(wide) * 0.125).exp().sum(wide);
        let inputs: Vec<&Tensor> = leaves.iter().map(|(_, leaf)| leaf).collect();
        let gradients = Tensor::run_backward(&[&loss], &inputs, false, false);
        let names = leaves.iter().map(|(name, _)| format!("grad_{name}"));
        let found = names.zip(gradients).chain([
            ("logits".to_owned(), logits.detach()),
            ("value".to_owned(), loss.detach().view([1])),
        ]);
        for (name, found) in found {
            let name = format!("heads/{name}");
            let found = found.view(reference.get(&name).size().as_slice());
            let error = reference.error(&name, &found);
            reference.report(&name, &[(&format!("heads {parameters:?}"), error, bound)]);
        }
    }
    Ok(())
}

/// Heads with the parameters of the reference.
fn heads(reference: &Reference, kind: Kind) -> Result<(CriticHeads, Vec<(String, Tensor)>)> {
    let mut store = nn::VarStore::new(Device::Cpu);
    let heads = {
        let _guard = common::seeded(1);
        CriticHeads::new(&store.root(), &[4, 5], 16)?
    };
    store.set_kind(kind);
    // The heads hold the tensors of the store, which was made for this type.
    let mut parameters: Vec<_> = store.variables().into_iter().collect();
    parameters.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, parameter) in &mut parameters {
        let saved = input(reference, &format!("heads/{name}"), kind);
        let _no_grad = tch::no_grad_guard();
        parameter.copy_(&saved.view(parameter.size().as_slice()));
    }
    Ok((heads, parameters))
}
