//! Bad tensors and draws for every public function that takes them: the documented error names the argument,
//! and nothing panics.

use std::cell::Cell;

use decoupled_dmd::{
    AboveStudent, Adversarial, Batch, CfgAugmentation, Coefficients, Condition, CriticHeads,
    Denoiser, DistributionMatching, Draw, Edm, Error, FewStepGrid, Group, Guidance, Kernel,
    MaximumMeanDiscrepancy, MeanVariance, NoisePath, Objective, PostShift, PreShift, Prediction,
    Probe, RectifiedFlow, Regularizer, Renoising, Result, Sampler, Statistics, Steps, Transition,
    TrigFlow, Uniform, VariancePreserving,
};
use tch::{Device, Kind, Tensor, nn};

use super::common::{gaussian_teacher, paths, seeded, wave};

const SHAPE: [i64; 3] = [2, 3, 4];
const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn samples() -> Tensor {
    wave(&SHAPE, 0.0, Kind::Float)
}

fn integers(shape: &[i64]) -> Tensor {
    Tensor::ones(shape, (Kind::Int64, Device::Cpu))
}

fn half() -> PostShift {
    PostShift::all(0.5, 2, FLOAT).unwrap()
}

/// The refused argument, and the reason in a word.
fn refusal<T>(result: Result<T>) -> (&'static str, &'static str) {
    match result.err() {
        Some(Error::Shape { what, .. }) => (what, "shape"),
        Some(Error::Kind { what, .. }) => (what, "kind"),
        Some(Error::OutOfRange { what, .. }) => (what, "range"),
        Some(Error::Missing { what, .. }) => (what, "missing"),
        Some(Error::Term { source, .. }) => refusal::<()>(Err(*source)),
        Some(other) => panic!("{other}"),
        None => ("nothing", "refused"),
    }
}

/// Tensors that are not like samples of [`SHAPE`], and how they are refused.
fn unlike() -> [(Tensor, &'static str); 6] {
    [
        (integers(&SHAPE), "kind"),
        (Tensor::new(), "shape"),
        (Tensor::from(1.0f32), "shape"),
        (wave(&[2, 3], 0.0, Kind::Float), "shape"),
        // These would spread over the batch without a word.
        (wave(&[1, 3, 4], 0.0, Kind::Float), "shape"),
        (wave(&[3, 4], 0.0, Kind::Float), "shape"),
    ]
}

/// Tensors that are no draws for two samples.
fn no_draws() -> [(Tensor, &'static str); 8] {
    [
        (Tensor::from_slice(&[0i64, 1]), "kind"),
        (Tensor::new(), "shape"),
        (Tensor::from(0.5f32), "shape"),
        (Tensor::from_slice(&[0.5f32]), "shape"),
        (wave(&[2, 2, 2], 0.0, Kind::Float), "shape"),
        (Tensor::from_slice(&[0.5f32, 7.0]), "range"),
        (Tensor::from_slice(&[-0.1f32, 0.5]), "range"),
        (Tensor::from_slice(&[0.5f32, f32::NAN]), "range"),
    ]
}

#[test]
fn draws_of_a_schedule() -> Result<()> {
    let (student, one) = (PreShift::all(0.5, 2, FLOAT)?, PreShift::all(0.5, 1, FLOAT)?);
    let renoising = Renoising::new(AboveStudent::FULL);
    assert_eq!(
        renoising
            .at(&RectifiedFlow, &Tensor::from_slice(&[0.0f32, 1.0]), Some(&student))?
            .tensor()
            .size(),
        [2]
    );
    for (u, why) in no_draws() {
        // One draw for two times of the student is the latter's fault.
        let what = if u.size() == [1] { "student time" } else { "draw" };
        assert_eq!(refusal(renoising.at(&RectifiedFlow, &u, Some(&student))), (what, why), "{u:?}");
    }
    let draws = Tensor::from_slice(&[0.2f32, 0.4]);
    assert_eq!(
        refusal(renoising.at(&RectifiedFlow, &draws, Some(&one))),
        ("student time", "shape")
    );
    assert_eq!(refusal(renoising.at(&RectifiedFlow, &draws, None)), ("student time", "missing"));
    assert_eq!(
        refusal(renoising.draw(&RectifiedFlow, &samples(), Some(&one))),
        ("student time", "shape")
    );
    for (x, why) in
        [(Tensor::from(1.0f32), "shape"), (Tensor::new(), "shape"), (integers(&[2]), "kind")]
    {
        assert_eq!(
            refusal(Renoising::new(Uniform::FULL).draw(&RectifiedFlow, &x, None)),
            ("x", why)
        );
    }
    Ok(())
}

#[test]
fn draws_of_an_objective() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let batch = Batch::new(&x, &cond)?;
    let term = MeanVariance::per_sample(0.0, 1.0)?;
    let objective = Objective::new(gaussian_teacher(0.5))
        .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("statistics", 1.0, &term));
    let evaluate = |u: &Tensor, noise: &Tensor| {
        let draw = Draw { u: u.shallow_clone(), noise: noise.shallow_clone() };
        objective.evaluate_at(&batch, vec![draw])
    };
    let u = Tensor::from_slice(&[0.0f32, 1.0]);
    assert!(evaluate(&u, &x).is_ok());
    for (bad, why) in no_draws() {
        assert_eq!(refusal(evaluate(&bad, &x)), ("draw", why), "{bad:?}");
    }
    for (noise, why) in unlike() {
        assert_eq!(refusal(evaluate(&u, &noise)), ("noise", why), "{noise:?}");
    }
    Ok(())
}

#[test]
fn noise_and_times_of_a_path() -> Result<()> {
    let x = samples();
    for path in paths() {
        assert_eq!(path.renoise(&x, &half(), &x)?.size(), SHAPE);
        for (bad, why) in unlike() {
            assert_eq!(refusal(path.renoise(&x, &half(), &bad)), ("noise", why));
        }
        for (bad, why) in &unlike()[..3] {
            assert_eq!(refusal(path.renoise(bad, &half(), &x)), ("x0", *why));
            assert_eq!(refusal(path.start(bad)), ("noise", *why));
        }
        let three = PostShift::all(0.5, 3, FLOAT)?;
        assert_eq!(refusal(path.renoise(&x, &three, &x)), ("time", "shape"));
    }
    Ok(())
}

#[test]
fn clocks_of_paths() -> Result<()> {
    let edm = Edm::default();
    let table = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
    let linear = VariancePreserving::linear(0.1, 20.0)?;
    for (t, why) in [
        (integers(&[2]), "kind"),
        (Tensor::new(), "shape"),
        (Tensor::from(0.5f32), "shape"),
        (Tensor::zeros([0], FLOAT), "shape"),
        (Tensor::zeros([2, 2, 2], FLOAT), "shape"),
    ] {
        for refused in [
            refusal(edm.sigma(&t)),
            refusal(edm.preconditioning(&t, 0.5)),
            refusal(table.timestep(&t)),
            refusal(linear.timestep(&t)),
            refusal(TrigFlow.angle(&t)),
        ] {
            assert_eq!(refused, ("t", why), "{t:?}");
        }
    }
    let of_two = edm.preconditioning(&Tensor::from_slice(&[0.1f32, 0.9]), 0.5)?;
    let apply = |x: &Tensor| of_two.apply(x, |x: &Tensor, _: &Tensor| x.shallow_clone());
    assert!(apply(&samples()).is_ok());
    assert_eq!(refusal(apply(&integers(&SHAPE))), ("x", "kind"));
    let three = wave(&[3, 2], 0.0, Kind::Float);
    assert_eq!(refusal(apply(&three)), ("times of the preconditioning", "shape"));
    for sigma in [0.0, 0.001, 81.0, f64::NAN] {
        assert_eq!(refusal(edm.time_of(sigma)), ("sigma", "range"));
    }
    Ok(())
}

#[test]
fn samples_and_answers_of_a_denoiser() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let denoiser = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone(),
    );
    for (bad, why) in &unlike()[..3] {
        assert_eq!(refusal(denoiser.denoise(bad, &half(), &cond)), ("noised sample", *why));
        let pair = denoiser.denoise_pair(bad, &half(), &cond, &cond);
        assert_eq!(refusal(pair), ("noised sample", *why));
        assert_eq!(refusal(denoiser.denoising_loss(bad, &half(), &x, &cond)), ("x", *why));
    }
    for (bad, why) in unlike() {
        assert_eq!(refusal(denoiser.denoising_loss(&x, &half(), &bad, &cond)), ("noise", why));
    }
    let three = PostShift::all(0.5, 3, FLOAT)?;
    assert_eq!(refusal(denoiser.denoising_loss(&x, &three, &x, &cond)), ("time", "shape"));
    // Both outputs of a pair are checked.
    for wrong in [0, 1] {
        let paired = denoiser_with_pair(wrong);
        let pair = paired.denoise_pair(&x, &half(), &cond, &cond);
        assert_eq!(refusal(pair), ("network output", "shape"), "{wrong}");
    }
    Ok(())
}

fn denoiser_with_pair<'a>(wrong: usize) -> Denoiser<'a> {
    let same = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    Denoiser::new(RectifiedFlow, Prediction::Sample, same).paired(
        move |x: &Tensor, _: &Tensor, _: &Condition, _: &Condition| {
            let flat = x.flatten(1, -1);
            if wrong == 0 { (flat, x.shallow_clone()) } else { (x.shallow_clone(), flat) }
        },
    )
}

#[test]
fn differences_of_a_probe() -> Result<()> {
    let (x, cond) = (samples(), Condition::from(wave(&SHAPE, 1.0, Kind::Float)));
    let (batch, teacher) = (Batch::new(&x, &cond)?, gaussian_teacher(0.5));
    let probe = Probe::at(&teacher, &batch, half(), x.detach())?;
    assert!(probe.normalize(&x).is_ok() && probe.masked(&x).is_ok());
    for (bad, why) in unlike() {
        assert_eq!(refusal(probe.normalize(&bad)), ("difference", why));
        assert_eq!(refusal(probe.masked(&bad)), ("tensor to mask", why));
        let noise = Probe::at(&teacher, &batch, half(), bad);
        assert_eq!(refusal(noise), ("noise", why));
    }
    // Without the null condition.
    let engine = CfgAugmentation::new(Guidance::new(2.0)?);
    let refused = refusal(decoupled_dmd::Engine::direction(&engine, &probe));
    assert_eq!(refused, ("null condition", "missing"));
    Ok(())
}

/// Rectified flow with twice the noise.
struct Loud;

impl NoisePath for Loud {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        let Coefficients { data, noise } = RectifiedFlow.coefficients(time)?;
        Ok(Coefficients { data, noise: noise * 2.0 })
    }
}

#[test]
fn a_fake_score_on_another_path() -> Result<()> {
    let (x, cond) = (samples(), Condition::from(wave(&SHAPE, 1.0, Kind::Float)));
    let (batch, teacher) = (Batch::new(&x, &cond)?, gaussian_teacher(0.5));
    let probe = Probe::at(&teacher, &batch, half(), x.detach())?;
    let calls = Cell::new(0);
    let on = |path: Box<dyn NoisePath>| {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| {
            calls.set(calls.get() + 1);
            x.shallow_clone()
        };
        let fake = Denoiser::new(path, Prediction::Sample, network);
        DistributionMatching::new(fake).loss(&probe).map(|_| ())
    };
    for (which, path) in paths().into_iter().enumerate() {
        let found = refusal(on(path));
        if which == 0 {
            assert_eq!(found, ("nothing", "refused"));
        } else {
            assert_eq!(found, ("share of data on the term's path", "range"), "{which}");
        }
    }
    assert_eq!(refusal(on(Box::new(Loud))), ("share of noise on the term's path", "range"));
    assert_eq!(calls.get(), 1, "a fake on another path is not run");
    Ok(())
}

#[test]
fn noise_steps_and_rollouts_of_a_sampler() -> Result<()> {
    let _guard = seeded(1);
    let (noise, cond) = (samples(), Condition::from(wave(&SHAPE, 1.0, Kind::Float)));
    let denoiser = gaussian_teacher(0.5);
    let on = |steps| -> Result<Sampler<'_>> {
        Ok(Sampler::new(&denoiser, FewStepGrid::even(steps)?, Transition::Ddim))
    };
    let sampler = on(4)?;
    for (bad, why) in &unlike()[..3] {
        assert_eq!(refusal(sampler.sample(bad, &cond)), ("noise", *why));
        assert_eq!(refusal(sampler.simulate(bad, &cond, 0)), ("noise", *why));
        assert_eq!(refusal(sampler.trajectory(bad, &cond)), ("noise", *why));
        assert_eq!(refusal(sampler.simulate_from_real(bad, &cond)), ("real samples", *why));
    }
    let given = |steps: &Tensor| Steps::new(steps.shallow_clone());
    let steps = given(&Tensor::from_slice(&[0i64, 3]))?;
    let kept = sampler.trajectory(&noise, &cond)?;
    for (bad, why) in unlike() {
        assert_eq!(
            refusal(sampler.simulate_from_real_at(&noise, &cond, &steps, &bad)),
            ("noise", why)
        );
    }
    for (bad, refused) in [
        (Tensor::from_slice(&[0i64]), ("steps", "shape")),
        (Tensor::from_slice(&[0i64, 1, 2]), ("steps", "shape")),
        (Tensor::new(), ("steps", "shape")),
        (Tensor::from_slice(&[0.0f32, 1.0]), ("steps", "kind")),
        (Tensor::from_slice(&[0i64, 4]), ("step", "range")),
        (Tensor::from_slice(&[-1i64, 0]), ("step", "range")),
    ] {
        let on = |steps: Steps| sampler.simulate_on(&kept, &cond, &steps);
        assert_eq!(refusal(given(&bad).and_then(on)), refused);
        assert_eq!(refusal(given(&bad).and_then(|steps| kept.samples_at(&steps))), refused);
        let at = |steps: Steps| sampler.simulate_from_real_at(&noise, &cond, &steps, &noise);
        assert_eq!(refusal(given(&bad).and_then(at)), refused);
    }
    // The rollout of another grid has other times, and was perhaps shifted otherwise.
    let foreign = on(3)?.trajectory(&noise, &cond)?;
    let refused = refusal(sampler.simulate_on(&foreign, &cond, &steps));
    assert_eq!(refused, ("steps of the trajectory", "range"));
    let fresh = |_: usize, _: &Tensor| Ok(wave(&[1, 3, 4], 0.0, Kind::Float));
    let grid = FewStepGrid::even(2)?;
    let renoising = Sampler::new(&denoiser, grid, Transition::Renoise);
    let refused = refusal(renoising.trajectory_with(&noise, &cond, fresh));
    assert_eq!(refused, ("fresh noise", "shape"));
    Ok(())
}

#[test]
fn samples_of_regularizers() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let real = wave(&[5, 3, 4], 2.0, Kind::Float);
    let term = MaximumMeanDiscrepancy::new(Kernel::Energy)?;
    assert!(term.between(&x, &real).is_ok());
    for (bad, why) in &unlike()[..3] {
        assert_eq!(refusal(term.between(bad, &real)), ("x", *why));
        assert_eq!(refusal(term.between(&x, bad)), ("real samples", *why));
        assert_eq!(refusal(Batch::new(&x, &cond)?.with_real(bad)), ("real samples", *why));
        let measured = MeanVariance::measured(bad, Statistics::PerSample);
        assert_eq!(refusal(measured), ("real samples", *why));
        let running = MeanVariance::per_sample(0.0, 1.0)?.running(0.9, 0)?;
        assert_eq!(refusal(running.update(bad)), ("real samples", *why));
    }
    let none = Tensor::zeros([0, 3, 4], FLOAT);
    assert_eq!(refusal(Batch::new(&x, &cond)?.with_real(&none)), ("real samples", "shape"));
    Ok(())
}

#[test]
fn noise_of_losses_that_train_networks() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let batch = Batch::new(&x, &cond)?.with_real(&x)?;
    let fake = || {
        Denoiser::new(RectifiedFlow, Prediction::Sample, |x: &Tensor, _: &Tensor, _: &Condition| {
            x.shallow_clone()
        })
    };
    let dm = DistributionMatching::new(fake());
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.flatten(1, -1);
    let gan = Adversarial::new(RectifiedFlow, critic);
    for (bad, why) in unlike() {
        assert_eq!(refusal(dm.denoising_loss_at(&batch, &half(), &bad)), ("noise", why));
        assert_eq!(refusal(dm.denoising_loss_per_sample_at(&batch, &half(), &bad)), ("noise", why));
        assert_eq!(refusal(gan.critic_loss_at(&batch, &half(), &bad, &x)), ("noise", why));
        let perturbed = gan.critic_evaluation_at(&batch, &half(), &x, &bad);
        assert_eq!(refusal(perturbed), ("perturbation", why));
    }
    let three = PostShift::all(0.5, 3, FLOAT)?;
    assert_eq!(refusal(dm.denoising_loss_at(&batch, &three, &x)), ("time", "shape"));
    assert_eq!(refusal(gan.critic_loss_at(&batch, &three, &x, &x)), ("time", "shape"));
    let above = || Renoising::new(AboveStudent::FULL);
    let dm = DistributionMatching::new(fake()).renoising(above());
    let gan = Adversarial::new(RectifiedFlow, critic).renoising(above());
    assert_eq!(refusal(dm.denoising_loss(&batch)), ("student time", "missing"));
    assert_eq!(refusal(gan.critic_loss(&batch)), ("student time", "missing"));
    Ok(())
}

#[test]
fn features_of_critic_heads() -> Result<()> {
    let _guard = seeded(2);
    let store = nn::VarStore::new(Device::Cpu);
    let heads = CriticHeads::new(&store.root(), &[3, 5], 8)?;
    let level = |shape: &[i64]| wave(shape, 0.0, Kind::Float);
    let good = || level(&[2, 5]);
    assert_eq!(heads.logits(&[level(&[2, 3, 7]), good()])?.size(), [2, 2]);
    for (bad, refused) in [
        (integers(&[2, 3]), ("features of the critic", "kind")),
        (level(&[2, 4]), ("features of the critic", "shape")),
        (Tensor::zeros([2, 3, 0], FLOAT), ("features of the critic", "shape")),
        (Tensor::zeros([0, 3], FLOAT), ("features of the critic", "shape")),
        (Tensor::new(), ("features of the critic", "shape")),
        (level(&[3, 3]), ("samples of a feature level", "shape")),
    ] {
        assert_eq!(refusal(heads.logits(&[bad, good()])), refused);
    }
    assert_eq!(refusal(heads.logits(&[good()])), ("number of feature levels", "range"));
    Ok(())
}
