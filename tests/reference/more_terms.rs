//! The regularizers that `terms.rs` leaves out, against stock PyTorch in float64, in three types.
//!
//! `scripts/reference/more_terms.py` writes the values; `-- --nocapture` shows the errors of each case.

use decoupled_dmd::{
    AdversarialDistributionMatching, Batch, Condition, Denoiser, Distance, DistributionMatching,
    Divergence, Estimator, GanLoss, Guidance, Kernel, MaximumMeanDiscrepancy, Normalizer,
    PairedRegression, Perceptual, PostShift, Prediction, Probe, Regularizer, Result, Reward,
    ScoreIdentity,
};
use tch::{Device, Kind, Tensor};

use super::common::reference::{
    FAKE_GAIN, MASKS, Reference, TEACHER_GAIN, USUAL, denoiser, leaf, wide,
};
use super::common::{self, BFLOAT16, max_difference, relative, seeded, value};

const ALPHA: f64 = 3.0;
const KINDS: [Kind; 3] = [Kind::Double, Kind::Float, Kind::BFloat16];

/// Compares a value, relative to its scale, and its gradients in leaves.
fn compare(
    reference: &Reference,
    case: &str,
    kind: Kind,
    loss: &Tensor,
    leaves: &[(&str, &Tensor)],
) {
    let term = case.split('/').next().unwrap();
    let get = |what: &str| reference.get(&format!("{case}/{what}")).to_kind(Kind::Double);
    assert_eq!(loss.kind(), wide(kind), "{case}");
    let scale = value(&get("scale").abs().maximum(&get("value").abs()));
    let error = max_difference(&loss.view([1]), &get("value")) / scale;
    let bound = reference.bound(&format!("{term}_value"), kind);
    reference.report(case, &[(&format!("{term} value {kind:?}"), error, bound)]);
    let inputs: Vec<_> = leaves.iter().map(|(_, leaf)| *leaf).collect();
    let gradients = Tensor::run_backward(&[loss], &inputs, true, false);
    let bound = reference.bound(&format!("{term}_gradient"), kind);
    let (error, bound) = if leaves.len() > 1 {
        let one = Tensor::cat(&gradients.iter().map(|g| g.flatten(0, -1)).collect::<Vec<_>>(), 0);
        let expected = get("grad_weights");
        let scale = expected.abs().max().maximum(&get("scale_weights"));
        (max_difference(&one, &expected) / value(&scale), bound)
    } else {
        let error = relative(case, &gradients[0], &get(&format!("grad_{}", leaves[0].0)));
        (error, if leaves[0].1.kind() == Kind::BFloat16 { BFLOAT16 } else { bound })
    };
    reference.report(case, &[(&format!("{term} gradient {kind:?}"), error, bound)]);
}

/// Inputs in one type, and the terms on them.
struct Inputs<'r> {
    reference: &'r Reference,
    kind: Kind,
    x: Tensor,
    noise: Tensor,
    cond: Condition,
    null: Condition,
}

impl<'r> Inputs<'r> {
    fn new(reference: &'r Reference, kind: Kind) -> Self {
        let condition = |name| Condition::from(reference.get(name).to_kind(wide(kind)));
        Self {
            reference,
            kind,
            x: leaf(reference.get("x"), kind),
            noise: reference.get("noise").to_kind(kind),
            cond: condition("cond"),
            null: condition("null"),
        }
    }

    fn wide(&self, name: &str) -> Tensor {
        self.reference.get(name).to_kind(wide(self.kind))
    }

    fn time(&self) -> Result<PostShift> {
        PostShift::new(self.wide("times_middle"))
    }

    fn batch(&self, mask: Option<&str>) -> Result<Batch<'_>> {
        let batch = Batch::new(&self.x, &self.cond)?.with_null(&self.null);
        match mask {
            Some(mask) => batch.with_mask(self.reference.get(&format!("mask_{mask}"))),
            None => Ok(batch),
        }
    }

    /// Compares the loss of a term at the times `middle`.
    fn check(
        &self,
        case: &str,
        term: &dyn Regularizer,
        teacher: &Denoiser<'_>,
        batch: &Batch<'_>,
        normalizer: Normalizer,
    ) -> Result<()> {
        let probe = Probe::at(teacher, batch, self.time()?, self.noise.shallow_clone())?;
        let loss = term.loss(&probe.normalizer(normalizer))?;
        compare(self.reference, case, self.kind, &loss, &[("x", batch.x())]);
        Ok(())
    }

    fn of_scores(&self, path: &str, prediction: Prediction) -> Result<()> {
        let network = |gain: f64| denoiser(path, prediction, Tensor::from(gain));
        let (teacher, dm) =
            (network(TEACHER_GAIN)?, DistributionMatching::new(network(FAKE_GAIN)?));
        let unguarded = Normalizer::conditional().unguarded();
        for name in ["sid", "sid_1", "sim"] {
            let term = || match name {
                "sid" => ScoreIdentity::new(&dm, 1.2),
                "sid_1" => ScoreIdentity::new(&dm, 1.0),
                _ => ScoreIdentity::pseudo_huber(&dm, 0.03),
            };
            let case = format!("{}/{path}/{name}", &name[..3]);
            let check = |rest: &str, term: ScoreIdentity<'_>, mask, normalizer| {
                self.check(
                    &format!("{case}{rest}"),
                    &term,
                    &teacher,
                    &self.batch(mask)?,
                    normalizer,
                )
            };
            check("", term()?, None, Normalizer::OFF)?;
            check("_guided", term()?.guided(Guidance::new(ALPHA)?), None, Normalizer::OFF)?;
            let normalizer = if name == "sid" { unguarded } else { Normalizer::OFF };
            for mask in MASKS {
                check(&format!("_mask_{mask}"), term()?, Some(mask), normalizer)?;
            }
            if name == "sid" {
                check("_normalised", term()?, None, unguarded)?;
            }
        }
        for divergence in Divergence::ALL {
            let ratio = |_: &Probe<'_>| self.wide("log_ratio");
            let term = DistributionMatching::new(network(FAKE_GAIN)?).divergence(divergence, ratio);
            let shown = serde_json::to_value(divergence).unwrap();
            let case = format!("divergence/{path}/{}", shown.as_str().unwrap());
            let (whole, masked) = (self.batch(None)?, self.batch(Some("elements"))?);
            self.check(&case, &term, &teacher, &whole, Normalizer::OFF)?;
            self.check(&format!("{case}_masked"), &term, &teacher, &masked, Normalizer::OFF)?;
        }
        Ok(())
    }

    fn of_steps(&self, path: &str, prediction: Prediction) -> Result<()> {
        let network = |gain: f64| denoiser(path, prediction, Tensor::from(gain));
        let (teacher, dm) =
            (network(TEACHER_GAIN)?, DistributionMatching::new(network(FAKE_GAIN)?));
        let [w1, u, w2] =
            ["adm/w1", "adm/u", "adm/w2"].map(|name| leaf(&self.wide(name), wide(self.kind)));
        let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
            let seen = (x.flatten(1, -1) * 0.25).matmul(&w1.tr()) + t.unsqueeze(1) * &u;
            (seen + c[0].flatten(1, -1).narrow(1, 0, 7)).tanh().matmul(&w2.tr())
        };
        for (shown, gan_loss) in [
            ("non_saturating", GanLoss::NonSaturating),
            ("hinge", GanLoss::Hinge),
            ("relativistic", GanLoss::Relativistic),
        ] {
            let term = || {
                AdversarialDistributionMatching::new(&dm, teacher.clone(), critic)
                    .gan_loss(gan_loss)
            };
            let batch = self.batch(None)?;
            for (rest, term) in [
                ("", term()),
                ("_guided", term().guided(Guidance::new(ALPHA)?)),
                ("_detached", term().detached_fake()),
            ] {
                let case = format!("adm/{path}/{shown}{rest}");
                self.check(&format!("{case}/generator"), &term, &teacher, &batch, Normalizer::OFF)?;
                if rest != "_detached" {
                    let loss = term.critic_loss_at(&batch, &self.time()?, &self.noise)?;
                    let leaves = [("w1", &w1), ("u", &u), ("w2", &w2)];
                    compare(self.reference, &format!("{case}/critic"), self.kind, &loss, &leaves);
                }
            }
        }
        Ok(())
    }

    fn of_samples(&self) -> Result<()> {
        let teacher = common::gaussian_teacher(1.0);
        let check = |case: &str, term: &dyn Regularizer, batch: &Batch<'_>| {
            self.check(case, term, &teacher, batch, Normalizer::OFF)
        };
        let target = self.reference.get("paired/target").to_kind(self.kind);
        let projection = self.wide("paired/projection");
        let layers = |x: &Tensor| vec![x.tanh(), x.flatten(1, -1).matmul(&projection).tanh()];
        let weights = ["paired/weight_0", "paired/weight_1"].map(|name| self.wide(name));
        for (shown, distance) in [
            ("squared", Distance::Squared),
            ("absolute", Distance::Absolute),
            ("pseudo_huber", Distance::pseudo_huber(0.25)?),
            ("pseudo_huber_of_samples", Distance::pseudo_huber_of_samples(0.25)?),
            ("perceptual", Distance::Perceptual(Perceptual::new(layers, weights.into())?)),
        ] {
            let term = PairedRegression::new(distance);
            check(
                &format!("paired/{shown}/whole"),
                &term,
                &self.batch(None)?.with_target(&target)?,
            )?;
            for mask in MASKS {
                let batch = self.batch(Some(mask))?.with_target(&target)?;
                check(&format!("paired/{shown}/{mask}"), &term, &batch)?;
            }
        }
        let reward = Reward::new(|x: &Tensor, c: &Condition| {
            (x.tanh() * &c[0]).flatten(1, -1).sum_dim_intlist(1, false, None).square()
        });
        check("reward/whole", &reward, &self.batch(None)?)?;
        MASKS.into_iter().try_for_each(|mask| {
            check(&format!("reward/{mask}"), &reward, &self.batch(Some(mask))?)
        })
    }

    fn of_many_samples(&self) -> Result<()> {
        let x = leaf(self.reference.get("mmd/x"), self.kind);
        let cond = Condition::none();
        let (teacher, batch) = (common::gaussian_teacher(1.0), Batch::new(&x, &cond)?);
        let projection = self.wide("mmd/projection");
        let tau = || PostShift::all(0.5, 6, (wide(self.kind), Device::Cpu));
        for (kernel_name, kernel) in [("gaussian", Kernel::gaussian()), ("energy", Kernel::Energy)]
        {
            for (shown, estimator) in
                [("unbiased", Estimator::Unbiased), ("biased", Estimator::Biased)]
            {
                for features in ["flat", "tanh"] {
                    let term = || -> Result<MaximumMeanDiscrepancy<'_>> {
                        let term =
                            MaximumMeanDiscrepancy::new(kernel.clone())?.estimator(estimator);
                        Ok(match features {
                            "flat" => term,
                            _ => term
                                .features(|x: &Tensor| x.flatten(1, -1).matmul(&projection).tanh()),
                        })
                    };
                    let prior = self.wide(&format!("mmd/prior_{features}"));
                    for (against, term) in [
                        ("prior", term()?.prior(|_: &Tensor| prior.shallow_clone())),
                        ("independence", term()?.independence()),
                    ] {
                        let case = format!("mmd_{against}/{kernel_name}_{shown}_{features}");
                        let probe = Probe::at(&teacher, &batch, tau()?, x.detach().zeros_like())?;
                        let loss = {
                            // The draw of the columns' orders is that of the script.
                            let _guard = seeded(11);
                            term.loss(&probe)?
                        };
                        compare(self.reference, &case, self.kind, &loss, &[("x", &x)]);
                    }
                }
            }
        }
        Ok(())
    }
}

#[test]
fn every_value_of_the_later_regularizers() -> Result<()> {
    Reference::check("more_terms", |reference| {
        for kind in KINDS {
            let inputs = Inputs::new(reference, kind);
            for (path, prediction) in USUAL {
                inputs.of_scores(path, prediction)?;
                inputs.of_steps(path, prediction)?;
            }
            inputs.of_samples()?;
            inputs.of_many_samples()?;
        }
        Ok(())
    })
}
