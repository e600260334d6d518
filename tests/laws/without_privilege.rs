//! Shipped terms have no door that a user's term lacks: CFG Augmentation, Distribution Matching and
//! a GAN regularizer, written a second time over the public interface, give the same bits, the same
//! diagnostics and the same forwards as the shipped ones.

use std::cell::Cell;

use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Engine,
    Group, Guidance, Objective, Prediction, Probe, RectifiedFlow, Regularizer, Renoising, Result,
    Uniform, check_same_path, gradient_only_in,
};
use tch::{Device, Kind, Tensor, no_grad_guard};

use super::common::{self, gaussian_denoiser, seeded, wave};

/// CFG Augmentation by a user.
struct OwnAugmentation(Guidance);

impl Engine for OwnAugmentation {
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let (cond, null) = probe.teacher_outputs()?;
        probe.normalize(cond.minus(null)?.times(self.0.w()))
    }
}

/// Distribution Matching by a user, with the loss of its fake score.
struct OwnMatching<'a> {
    fake: Denoiser<'a>,
    renoising: Renoising<'a>,
}

impl Regularizer for OwnMatching<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let direction = {
            let _no_grad = no_grad_guard();
            check_same_path(self.fake.path(), probe.teacher().path())?;
            let real = probe.teacher_output()?;
            let fake = self.fake.predict(probe.noised(), probe.tau(), probe.batch().cond())?;
            probe.observe_scores(|| {
                Ok((real.sample()?.shallow_clone(), fake.sample()?.shallow_clone()))
            })?;
            probe.normalize(real.minus(&fake)?)?
        };
        probe.loss_of(&direction)
    }

    fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
        let (x, cond) = (batch.x(), batch.cond());
        let time = self.renoising.draw(self.fake.path(), x, batch.student_time())?;
        let noise = Tensor::f_randn_like(x)?;
        let error = self.fake.denoising_error(x, &time, &noise, cond, batch.mask())?;
        Ok(Some(error.f_sum(None::<Kind>)?.f_div_scalar(error.numel() as f64)?))
    }
}

type Critic<'a> = dyn Fn(&Tensor, &Tensor) -> Tensor + 'a;

/// A non-saturating GAN by a user, with the loss of its critic.
struct OwnGan<'a> {
    critic: &'a Critic<'a>,
    renoising: Renoising<'a>,
}

impl OwnGan<'_> {
    fn logits(&self, noised: &Tensor, time: &Tensor) -> Result<Tensor> {
        let logits = (self.critic)(noised, time);
        Ok(logits.f_to_kind(noised.f_kind()?)?.f_reshape([noised.size()[0], -1])?)
    }
}

fn softplus_mean(logits: &Tensor) -> Result<Tensor> {
    Ok(logits.f_neg()?.f_log_sigmoid()?.f_neg()?.f_mean(None::<Kind>)?)
}

impl Regularizer for OwnGan<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        gradient_only_in("critic logits", probe.x(), |x| {
            let noised = probe.teacher().path().renoise(x, probe.tau(), probe.noise())?;
            let logits = self.logits(&noised, probe.tau().tensor())?;
            probe.observe("logit", || Ok(logits.f_mean(None::<Kind>)?))?;
            softplus_mean(&logits.f_neg()?)
        })
    }

    fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
        use decoupled_dmd::NoisePath;
        let x = batch.x();
        let time = self.renoising.draw(&RectifiedFlow, x, batch.student_time())?;
        let noise = Tensor::f_randn_like(x)?;
        let logits = |samples: &Tensor| {
            let samples = samples.f_detach()?.f_to_kind(x.f_kind()?)?;
            self.logits(&RectifiedFlow.renoise(&samples, &time, &noise)?, time.tensor())
        };
        let (fake, real) = (logits(x)?, logits(batch.real()?)?);
        Ok(Some(softplus_mean(&fake)?.f_add(&softplus_mean(&real.f_neg()?)?)?))
    }
}

const SHAPE: [i64; 4] = [4, 2, 6, 6];

/// A network with one weight, which counts its forwards and predicts the flow velocity.
fn network<'a>(weight: &'a Tensor, forwards: &'a Cell<usize>) -> Denoiser<'a> {
    let network = move |x: &Tensor, t: &Tensor, c: &Condition| {
        forwards.set(forwards.get() + 1);
        let clean = gaussian_denoiser(x, t, &c[0].to_kind(x.kind()), 0.7);
        (x - clean) * weight.to_kind(x.kind())
    };
    Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network)
}

/// Bits of the loss and of the gradient in x, reports, and forwards of teacher and fake.
#[derive(PartialEq, Debug)]
struct Found {
    loss: Vec<u64>,
    gradient: Vec<u64>,
    report: Vec<(String, u64)>,
    own: Vec<(String, Vec<u64>)>,
    forwards: (usize, usize),
}

fn bits(tensor: &Tensor) -> Vec<u64> {
    let numbers = Vec::<f64>::try_from(tensor.detach().to_kind(Kind::Double).flatten(0, -1));
    numbers.unwrap().into_iter().map(f64::to_bits).collect()
}

/// Everything that an objective shows in one case; its own losses are propagated to the weights.
fn found(kind: Kind, is_masked: bool, is_own: bool) -> Result<Found> {
    let _guard = seeded(11);
    let weights = [1.1, 0.9, 0.05].map(|weight| Tensor::from_slice(&[weight]).to_kind(Kind::Float));
    let weights = weights.map(|weight| weight.set_requires_grad(true));
    let (teacher_forwards, fake_forwards) = (Cell::new(0), Cell::new(0));
    let (teacher, fake) =
        (network(&weights[0], &teacher_forwards), network(&weights[1], &fake_forwards));
    let critic = |x: &Tensor, t: &Tensor| {
        let logits =
            (x * weights[2].to_kind(x.kind())).sum_dim_intlist([2, 3].as_slice(), false, None);
        logits + t.view([-1, 1])
    };

    let mut samples = wave(&SHAPE, 0.0, kind);
    if is_masked {
        let _ = samples.narrow(0, 0, 1).fill_(f64::NAN);
    }
    samples = samples.set_requires_grad(true);
    let condition = |phase| Condition::from(wave(&SHAPE, phase, kind));
    let (cond, null, real) = (condition(1.0), condition(2.0), wave(&SHAPE, 3.0, kind));
    let mask = Tensor::from_slice(&[false, true, true, true]);
    let mut batch = Batch::new(&samples, &cond)?.with_null(&null).with_real(&real)?;
    if is_masked {
        batch = batch.with_mask(&mask)?;
    }

    let guidance = Guidance::new(3.0)?;
    let dm = DistributionMatching::new(fake.clone());
    let closure = |x: &Tensor, t: &Tensor, _: &Condition| critic(x, t);
    let gan = Adversarial::new(RectifiedFlow, closure);
    let own_dm = OwnMatching { fake, renoising: Renoising::new(Uniform::FULL) };
    let own_gan = OwnGan { critic: &critic, renoising: Renoising::new(Uniform::FULL) };
    let group = Group::new(Renoising::new(Uniform::new(0.1, 0.9)?));
    let group = if is_own {
        group.engine("ca", 1.0, OwnAugmentation(guidance)).regularizer("dm", 0.5, &own_dm)
    } else {
        group.engine("ca", 1.0, CfgAugmentation::new(guidance)).regularizer("dm", 0.5, &dm)
    };
    // A critic sees whole samples: a masked sample that is not finite makes its logit NaN.
    let group = match (is_masked, is_own) {
        (true, _) => group,
        (false, true) => group.regularizer("gan", 0.25, &own_gan),
        (false, false) => group.regularizer("gan", 0.25, &gan),
    };
    let objective = Objective::new(teacher).with(group).observed();

    let draw =
        Draw { u: Tensor::from_slice(&[0.2f32, 0.4, 0.6, 0.8]), noise: wave(&SHAPE, 5.0, kind) };
    let evaluation = objective.evaluate_at(&batch, vec![draw])?;
    let report = evaluation.report()?;
    evaluation.loss.backward();
    for weight in &weights {
        assert!(!weight.grad().defined(), "a gradient leaked into a network");
    }
    let forwards = (teacher_forwards.get(), fake_forwards.get());

    tch::manual_seed(12);
    let mut own = Vec::new();
    for (name, loss) in objective.own_losses(&batch)? {
        loss.backward();
        let gradients = weights.iter().filter(|weight| weight.grad().defined());
        own.push((format!("{name} in {} networks", gradients.count()), bits(&loss)));
    }
    own.extend(
        weights[1..]
            .iter()
            .filter(|weight| weight.grad().defined())
            .map(|weight| ("gradient".to_owned(), bits(&weight.grad()))),
    );
    Ok(Found {
        loss: bits(&evaluation.loss),
        gradient: bits(&samples.grad()),
        report: report.into_iter().map(|(name, value)| (name, value.to_bits())).collect(),
        own,
        forwards,
    })
}

#[test]
fn a_users_terms_equal_the_shipped_ones_bit_for_bit() -> Result<()> {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        for is_masked in [false, true] {
            let shipped = found(kind, is_masked, false)?;
            let own = found(kind, is_masked, true)?;
            let case = format!("{kind:?}, masked: {is_masked}");
            assert_eq!(own.report, shipped.report, "{case}");
            assert_eq!(own.own, shipped.own, "{case}");
            assert!(own == shipped, "{case}: loss, gradient or forwards");
            // The comparison is of something.
            assert!(shipped.loss.iter().all(|&bits| f64::from_bits(bits).is_finite()));
            let names: Vec<_> = shipped.report.iter().map(|(name, _)| name.as_str()).collect();
            for name in ["loss", "ca", "dm", "ca_update_rms", "dm_rel_gap", "dm_to_ca", "ca_dm_cos"]
            {
                assert!(names.contains(&name), "{name} in {names:?}");
            }
            assert_eq!(shipped.forwards, (2, 1));
            assert_eq!(shipped.own.len(), if is_masked { 2 } else { 4 });
        }
    }
    Ok(())
}

#[test]
fn the_gradient_beside_a_masked_sample_is_finite_and_not_zero() -> Result<()> {
    let own = found(Kind::Float, true, true)?;
    let gradient: Vec<f64> = own.gradient.iter().map(|&bits| f64::from_bits(bits)).collect();
    let per_sample = gradient.len() / 4;
    assert!(gradient[..per_sample].iter().all(|&value| value.abs() <= 0.0));
    assert!(gradient[per_sample..].iter().all(|value| value.is_finite() && value.abs() > 0.0));
    Ok(())
}

#[test]
fn role_and_form_are_two_things() -> Result<()> {
    let forwards = Cell::new(0);
    let weight = Tensor::from_slice(&[1.0f32]);
    let samples = wave(&SHAPE, 0.0, Kind::Float).set_requires_grad(true);
    let cond = Condition::from(wave(&SHAPE, 1.0, Kind::Float));
    let toward_zero = decoupled_dmd::engine_fn(|probe| Ok(probe.x().f_detach()?.f_neg()?));
    let energy = decoupled_dmd::regularizer_fn(|probe| {
        Ok(probe.x().f_square()?.f_mean(None::<Kind>)?.f_mul_scalar(0.5)?)
    });
    let group = Group::new(Renoising::new(Uniform::FULL))
        .engine_loss("energy", 1.0, energy)
        .regularizer_direction("toward zero", 1.0, toward_zero);
    let objective = Objective::new(network(&weight, &forwards)).with(group).observed();
    let draw =
        Draw { u: Tensor::full([4], 0.5, (Kind::Float, Device::Cpu)), noise: samples.detach() };
    let evaluation = objective.evaluate_at(&Batch::new(&samples, &cond)?, vec![draw])?;
    // The gradient of the energy is x / numel, the direction is -x: both say the same.
    evaluation.loss.backward();
    let expected = samples.detach() * (2.0 / samples.numel() as f64);
    assert!(common::max_difference(&samples.grad(), &expected) < 1e-9);
    assert_eq!(forwards.get(), 0);
    Ok(())
}
