//! The recipes of `docs/recipes.md` on small networks: that the code there runs, how often it asks the teacher,
//! and who gets a gradient.

use decoupled_dmd::{
    Adversarial, AdversarialDistributionMatching, Augmentation, Batch, CfgAugmentation, Condition,
    CriticPenalty, Denoiser, Distance, DistributionMatching, Divergence, Draw, Edm, Error,
    FewStepGrid, GanLoss, Group, Guidance, NoisePath, Normalizer, Objective, PairedRegression,
    Perceptual, PostShift, Power, PreShift, Prediction, Probe, RectifiedFlow, Renoising, Result,
    Reward, Sampler, Shift, Transition, Uniform, Weighting, freeze_matching,
};
use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::common::{Calls, counting_teacher, gaussian_denoiser, seeded, value, wave};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
const SHAPE: [i64; 4] = [4, 3, 8, 8];

/// A network of samples, times and an embedding, `[B, 3, 8, 8]` each but for the times.
fn network(store: &nn::VarStore) -> impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor + use<> {
    let root = store.root();
    let entry = nn::conv2d(&root / "block" / "conv", 3, 3, 1, Default::default());
    let exit = nn::conv2d(&root / "out", 3, 3, 1, Default::default());
    move |x, t, c| exit.forward(&(entry.forward(x) + t.view([-1, 1, 1, 1]) + c).tanh())
}

fn model<P: NoisePath + 'static>(path: P, store: &nn::VarStore) -> Denoiser<'static> {
    let network = network(store);
    Denoiser::new(path, Prediction::FlowVelocity, move |x: &Tensor, t: &Tensor, c: &Condition| {
        network(x, t, &c[0])
    })
}

/// A critic of three logits.
fn critic(store: &nn::VarStore) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor + use<> {
    let network = network(store);
    move |x, t, c| network(x, t, &c[0]).mean_dim([2i64, 3].as_slice(), false, None)
}

fn stores<const N: usize>() -> [nn::VarStore; N] {
    [(); N].map(|()| nn::VarStore::new(Device::Cpu))
}

fn learns(store: &nn::VarStore) -> bool {
    store.trainable_variables().iter().any(|parameter| {
        parameter.grad().defined()
            && value(&parameter.grad().abs().max().to_kind(Kind::Double)) > 0.0
    })
}

fn adam(store: &nn::VarStore) -> Result<nn::Optimizer> {
    nn::Adam { beta1: 0.0, beta2: 0.99, ..Default::default() }
        .build(store, 1e-4)
        .map_err(Error::from)
}

fn clean() -> Renoising<'static> {
    Renoising::new(Uniform::new(1.0, 1.0).unwrap())
}

fn noise() -> Tensor {
    Tensor::randn(SHAPE, FLOAT)
}

fn condition() -> Condition {
    Condition::from(wave(&SHAPE, 0.9, Kind::Float))
}

#[test]
fn diffusion2gan_regresses_pairs_and_plays_against_their_ends() -> Result<()> {
    let _guard = seeded(81);
    let [student_store, critic_store] = stores();
    let (path, calls, cond) = (RectifiedFlow, Calls::default(), condition());
    let (student, teacher) = (model(path, &student_store), counting_teacher(&calls, 1.0));
    let kernel = wave(&[5, 3, 3, 3], 0.2, Kind::Float);
    let features = |x: &Tensor| vec![x.conv2d(&kernel, None::<&Tensor>, 1, 1, 1, 1).tanh()];
    let lpips = Perceptual::new(features, vec![Tensor::ones([5], FLOAT)])?;

    let pairs = PairedRegression::new(Distance::Perceptual(lpips))
        .augmented(Augmentation::new().geometric().cutout(0.5)?)
        .with_absolute(1.0)?;
    let gan = Adversarial::new(path, critic(&critic_store)).renoising(clean()).mismatched(0.3)?;
    let objective = Objective::new(teacher)
        .with(Group::new(clean()).engine_loss("pairs", 1.0, pairs).regularizer("gan", 0.1, &gan));
    let mut optimizers = (adam(&student_store)?, adam(&critic_store)?);
    for step in 0..3 {
        let (z, end) = (noise(), noise() * 0.5);
        let x = student.denoise(&path.start(&z)?, &PostShift::all(0.0, 4, FLOAT)?, &cond)?;
        let batch = Batch::new(&x, &cond)?.with_target(&end)?.with_real(&end)?;
        let mut loss = gan.critic_loss(&batch)?;
        if step % 2 == 0 {
            let (row, row_cond) = (end.narrow(0, 1, 1), Condition::from(cond[0].narrow(0, 1, 1)));
            let one = Batch::new(&x, &cond)?.with_real(&row)?.with_real_cond(&row_cond);
            loss += gan.penalty_loss(&one, CriticPenalty::R1 { gamma: 0.1 })? * 2.0;
        }
        optimizers.1.backward_step(&loss);
        assert!(learns(&critic_store) && (step > 0 || !learns(&student_store)));
        optimizers.1.zero_grad();
        optimizers.0.backward_step(&objective.evaluate(&batch)?.loss);
        assert!(learns(&student_store) && !learns(&critic_store));
    }
    assert_eq!(calls.count(), 0);
    Ok(())
}

#[test]
fn adm_comes_after_a_stage_on_pairs() -> Result<()> {
    let _guard = seeded(82);
    let [student_store, latent_store, pixel_store, fake_store, adm_store] = stores();
    let (path, calls, cond) = (RectifiedFlow, Calls::default(), condition());
    let null = Condition::from(Tensor::zeros(SHAPE, FLOAT));
    let (student, teacher) = (model(path, &student_store), counting_teacher(&calls, 1.0));
    let cubic = Renoising::new(Power::new(3.0)?);
    let even = || Renoising::new(Uniform::FULL);
    let hinge = |store| Adversarial::new(path, critic(store)).gan_loss(GanLoss::Hinge);

    let (latent, pixel) = (hinge(&latent_store), hinge(&pixel_store).renoising(clean()));
    let adp = Objective::new(teacher.clone())
        .with(Group::new(even()).engine_loss("latent", 0.85, &latent))
        .with(Group::new(clean()).engine_loss("pixel", 0.15, &pixel));
    let (z, end) = (noise(), noise() * 0.5);
    let time = cubic.draw(&path, &end, None)?;
    let x = student.denoise(&path.renoise(&end, &time, &z)?, &time, &cond)?;
    let batch = Batch::new(&x, &cond)?.with_real(&end)?;
    for (name, loss) in adp.own_losses(&batch)? {
        assert!(loss.requires_grad(), "{name}");
    }
    adp.evaluate(&batch)?.loss.backward();
    assert!(learns(&student_store) && !learns(&latent_store) && !learns(&pixel_store));
    assert_eq!(calls.count(), 0);

    let dm = DistributionMatching::new(model(path, &fake_store));
    let adm = AdversarialDistributionMatching::new(&dm, teacher.clone(), critic(&adm_store))
        .guided(Guidance::new(3.0)?);
    let below = Renoising::new(Uniform::new(0.0, 1.0 - 1.0 / 64.0)?);
    let objective = Objective::new(teacher).with(Group::new(below).regularizer("adm", 1.0, &adm));
    let sampler = Sampler::new(&student, FewStepGrid::even(1)?, Transition::Ddim);
    let made = sampler.simulate(&noise(), &cond, 0)?;
    let batch = Batch::of(&made, &cond)?.with_null(&null);
    dm.denoising_loss(&batch)?.backward();
    adm.critic_loss(&batch)?.backward();
    assert!(learns(&fake_store) && learns(&adm_store) && calls.count() == 2);
    objective.evaluate(&batch)?.loss.backward();
    assert_eq!(calls.count(), 2, "the student's turn asks the teacher nothing");
    Ok(())
}

#[test]
fn d2o_trains_what_is_left_by_its_critic_alone() -> Result<()> {
    let _guard = seeded(83);
    let [mut student_store, critic_store] = stores();
    let (path, calls, cond) = (Edm::default(), Calls::default(), condition());
    let student = model(path, &student_store);
    let holds = |name: &str, parts: &[&str]| parts.iter().any(|part| name.contains(part));
    let frozen = freeze_matching(&mut student_store, |name| {
        holds(name, &["block", "up", "down", "in"]) && holds(name, &["conv", "proj"])
    })?;
    assert_eq!(frozen.tensors, 2);
    let mut optimizers = (adam(&student_store)?, adam(&critic_store)?);
    let gan = Adversarial::new(path, critic(&critic_store)).renoising(clean());
    let objective = Objective::new(Denoiser::new(
        path,
        Prediction::Sample,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            calls.record(t);
            x.shallow_clone()
        },
    ))
    .with(Group::new(clean()).engine_loss("gan", 1.0, &gan));
    let r1 = CriticPenalty::R1 { gamma: 1e-4 * 9.0 };
    for step in 0..3 {
        let real = noise() * 0.5;
        let x = student.denoise(&path.start(&noise())?, &PostShift::all(0.0, 4, FLOAT)?, &cond)?;
        let batch = Batch::new(&x, &cond)?.with_real(&real)?;
        optimizers.0.backward_step(&objective.evaluate(&batch)?.loss);
        optimizers.1.backward_step(&gan.critic_loss(&batch)?);
        if step % 2 == 0 {
            optimizers.1.backward_step(&(gan.penalty_loss(&batch, r1)? * 2.0));
        }
    }
    assert!(learns(&student_store) && calls.count() == 0);
    Ok(())
}

#[test]
fn jdm_shows_the_control_to_the_fake_score_and_not_to_the_teacher() -> Result<()> {
    let _guard = seeded(84);
    let [student_store, fake_store] = stores();
    let path = RectifiedFlow;
    let cond =
        Condition::from(vec![wave(&SHAPE, 0.9, Kind::Float), wave(&SHAPE, 2.0, Kind::Float)]);
    let null = Condition::from(vec![Tensor::zeros(SHAPE, FLOAT), cond[1].shallow_clone()]);
    let both = |store| {
        let network = network(store);
        Denoiser::new(
            path,
            Prediction::FlowVelocity,
            move |x: &Tensor, t: &Tensor, c: &Condition| network(x, t, &(&c[0] + &c[1])),
        )
    };
    let (student, fake) = (both(&student_store), both(&fake_store));
    let teacher =
        Denoiser::new(path, Prediction::Sample, |x: &Tensor, t: &Tensor, c: &Condition| {
            gaussian_denoiser(x, t, &c[0], 1.0)
        });
    let dm = DistributionMatching::new(fake);
    let control = Reward::new(|x: &Tensor, c: &Condition| {
        (x - &c[1]).square().mean_dim([1i64, 2, 3].as_slice(), false, None) * -0.5
    });
    let guidance = Guidance::new(4.0)?;
    let objective = Objective::new(teacher).with(
        Group::new(Renoising::new(Uniform::FULL))
            .engine("ca", 1.0, CfgAugmentation::new(guidance))
            .regularizer("dm", 1.0, &dm)
            .engine_loss("control", 0.2, control),
    );
    let sampler = Sampler::new(&student, FewStepGrid::even(1)?, Transition::Ddim);
    let made = sampler.simulate(&noise(), &cond, 0)?;
    let batch = Batch::of(&made, &cond)?.with_null(&null);
    dm.denoising_loss(&batch)?.backward();
    assert!(learns(&fake_store) && !learns(&student_store));
    objective.evaluate(&batch)?.loss.backward();
    assert!(learns(&student_store));
    Ok(())
}

#[test]
fn f_distill_weighs_distribution_matching_by_its_critic() -> Result<()> {
    let _guard = seeded(85);
    let [student_store, fake_store, critic_store] = stores();
    let (path, calls, cond) = (RectifiedFlow, Calls::default(), condition());
    let (student, teacher) = (model(path, &student_store), counting_teacher(&calls, 1.0));
    let gan = Adversarial::new(path, critic(&critic_store));
    let dm = DistributionMatching::new(model(path, &fake_store))
        .divergence(Divergence::JensenShannon, |probe: &Probe<'_>| gan.log_ratio(probe));
    let objective = Objective::new(teacher).with(
        Group::new(Renoising::new(Uniform::FULL))
            .regularizer("dm", 1.0, &dm)
            .regularizer("gan", 1e-3, &gan),
    );
    let sampler = Sampler::new(&student, FewStepGrid::even(1)?, Transition::Ddim);
    let made = sampler.simulate(&noise(), &cond, 0)?;
    let of_teacher = noise();
    let batch = Batch::of(&made, &cond)?.with_real(&of_teacher)?;
    let own = dm.denoising_loss(&batch)? + gan.critic_loss(&batch)?;
    own.backward();
    assert!(learns(&fake_store) && learns(&critic_store) && !learns(&student_store));
    objective.evaluate(&batch)?.loss.backward();
    assert!(learns(&student_store) && calls.count() == 1);
    // A critic of other laws, or on another path, gives no ratio of these.
    let pretrained = counting_teacher(&calls, 1.0);
    let tau = PostShift::all(0.5, batch.batch_size(), (Kind::Float, Device::Cpu))?;
    let probe = Probe::at(&pretrained, &batch, tau, made.x.zeros_like())?;
    let new = || Adversarial::new(path, critic(&critic_store));
    let blurred = new().augmented(Augmentation::new().blit());
    let elsewhere = Adversarial::new(path.shifted(Shift::new(3.0)?), critic(&critic_store));
    for gan in [new().mismatched(0.5)?, blurred, elsewhere] {
        assert!(matches!(gan.log_ratio(&probe), Err(Error::OutOfRange { .. })));
    }
    Ok(())
}

#[test]
fn tdm_and_cdm_judge_the_student_inside_a_segment_and_off_its_rollout() -> Result<()> {
    let _guard = seeded(86);
    let [student_store, fake_store] = stores();
    let shift = Shift::new(3.0)?;
    let (path, calls, cond) = (RectifiedFlow.shifted(shift), Calls::default(), condition());
    let null = Condition::from(Tensor::zeros(SHAPE, FLOAT));
    let student = model(path, &student_store);
    let teacher =
        Denoiser::new(path, Prediction::Sample, |x: &Tensor, t: &Tensor, c: &Condition| {
            calls.record(t);
            gaussian_denoiser(x, t, &c[0], 1.0)
        });
    let min_snr = Weighting::min_snr(5.0)?;
    let dm = DistributionMatching::new(model(path, &fake_store)).weighting(min_snr);
    let guidance = Guidance::new(4.5)?;
    let group =
        || Group::new(Renoising::new(Uniform::FULL)).normalizer(Normalizer::guided(guidance));
    let objective = Objective::new(teacher.clone()).with(
        group().engine("ca", 1.0, CfgAugmentation::new(guidance)).regularizer("dm", 1.0, &dm),
    );
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Ddim);
    let times = sampler.grid().times().to_vec();
    for step in 0..4 {
        let from = sampler.simulate(&noise(), &cond, step)?;
        let batch = Batch::of(&from, &cond)?.with_null(&null);
        let (start, end) = (times[step], times.get(step + 1).copied().unwrap_or(1.0));
        let u = Tensor::rand([4], FLOAT) * (0.95 * (end - start)) + start;
        let (mid, tau) = (
            shift.apply(&PreShift::all(end, 4, FLOAT)?)?,
            shift.apply(&PreShift::new(u.shallow_clone())?)?,
        );
        let implied = path.implied_noise(&from.input, &from.x.detach(), &from.time)?;
        let mix = path.segment_noise(&mid, &tau, &implied, &noise())?;
        dm.denoising_loss_at(&batch, &tau, &mix)?.backward();
        assert!(learns(&fake_store) && (step > 0 || !learns(&student_store)));
        objective.evaluate_at(&batch, vec![Draw { u, noise: mix }])?.loss.backward();
        assert!(learns(&student_store));
    }
    assert_eq!(calls.count(), 8);

    let off = Objective::new(teacher).with(group().regularizer("off", 1.0, &dm));
    let from = sampler.simulate(&noise(), &cond, 2)?;
    let times = PreShift::new(Tensor::rand([4], FLOAT) * 0.96 + 0.02)?;
    let made = sampler.simulate_off_trajectory(&from, &cond, &times)?;
    let batch = Batch::of(&made, &cond)?.with_null(&null);
    let loss = off.evaluate(&batch)?.loss;
    assert!(loss.requires_grad());
    Ok(())
}

#[test]
fn a_reward_is_ramped_beside_distribution_matching() -> Result<()> {
    let _guard = seeded(87);
    let [student_store, fake_store] = stores();
    let (path, calls, cond) = (RectifiedFlow, Calls::default(), condition());
    let (student, teacher) = (model(path, &student_store), counting_teacher(&calls, 1.0));
    let dm = DistributionMatching::new(model(path, &fake_store));
    let bright = Reward::new(|x: &Tensor, _: &Condition| {
        x.sigmoid().mean_dim([1i64, 2, 3].as_slice(), false, None)
    });
    let mut objective = Objective::new(teacher).with(
        Group::new(Renoising::new(Uniform::FULL))
            .regularizer("dm", 1.0, &dm)
            .engine_loss("reward", 0.0, bright),
    );
    let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Ddim);
    let mut gradients = Vec::new();
    for weight in [0.0, 0.05] {
        tch::manual_seed(3);
        objective.set_weight("reward", weight)?;
        let made = sampler.simulate(&noise(), &cond, 1)?;
        let x = made.x.shallow_clone();
        let loss = objective.evaluate(&Batch::of(&made, &cond)?)?.loss;
        gradients.push(Tensor::run_backward(&[&loss], &[&x], false, false).remove(0));
    }
    assert!(!gradients[0].equal(&gradients[1]));
    Ok(())
}
