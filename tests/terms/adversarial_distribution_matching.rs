//! Adversarial distribution matching against its steps worked out by hand.

use std::cell::{Cell, RefCell};

use decoupled_dmd::{
    AdversarialDistributionMatching, Batch, Condition, Denoiser, DistributionMatching, Error,
    GanLoss, Guidance, NoisePath, Normalizer, PostShift, Prediction, Probe, RectifiedFlow,
    Regularizer, Renoising, Result, TrigFlow, Uniform, VariancePreserving, testing,
};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};

use super::common::{max_difference, sdxl, seeded, value, wave};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// A denoiser with the clean prediction `gain x + shift` at every time.
fn linear<'a>(path: &'a dyn NoisePath, gain: f64, shift: f64) -> Denoiser<'a> {
    let network = move |x: &Tensor, _: &Tensor, c: &Condition| x * gain + shift + &c[0];
    Denoiser::new(path, Prediction::Sample, network)
}

fn none() -> Condition {
    Condition::from(Tensor::from(0.0))
}

fn coefficients(path: &dyn NoisePath, t: f64) -> (f64, f64) {
    let at = path.coefficients(&PostShift::all(t, 1, DOUBLE).unwrap()).unwrap();
    (at.data.double_value(&[0]), at.noise.double_value(&[0]))
}

#[test]
fn both_steps_differ_by_kappa_times_the_difference_of_predictions() -> Result<()> {
    let cond = none();
    let x = wave(&[3, 2], 0.4, Kind::Double);
    let noise = wave(&[3, 2], 2.0, Kind::Double);
    let table = sdxl();
    let paths: [&dyn NoisePath; 4] =
        [&RectifiedFlow, &TrigFlow, &VariancePreserving::linear(0.1, 20.0)?, &table];
    for path in paths {
        let (teacher, fake) = (linear(path, 0.5, 0.2), linear(path, 0.4, -0.1));
        let dm = DistributionMatching::new(fake.clone());
        let seen = RefCell::new(Vec::new());
        let critic = |x: &Tensor, t: &Tensor, _: &Condition| {
            seen.borrow_mut().push((x.copy(), t.copy()));
            x.shallow_clone()
        };
        let adm = AdversarialDistributionMatching::new(&dm, teacher.clone(), critic);
        for t in [0.02, 0.5, 0.9] {
            seen.borrow_mut().clear();
            let time = PostShift::all(t, 3, DOUBLE)?;
            let _loss = adm.critic_loss_at(&Batch::new(&x, &cond)?, &time, &noise)?;
            let seen = seen.borrow();
            let (real, fakes) = (&seen[0], &seen[1]);
            let to = t + 1.0 / 64.0;
            assert!((real.1.double_value(&[0]) - to).abs() < 1e-15);
            let ((a, s), (later_a, later_s)) = (coefficients(path, t), coefficients(path, to));
            let kappa = later_a - a * later_s / s;
            let noised = path.renoise(&x, &time, &noise)?;
            let delta =
                teacher.denoise(&noised, &time, &cond)? - fake.denoise(&noised, &time, &cond)?;
            assert!(max_difference(&(&real.0 - &fakes.0), &(delta * kappa)) < 1e-12);
            let expected = &noised * (later_s / s) + fake.denoise(&noised, &time, &cond)? * kappa;
            assert!(max_difference(&fakes.0, &expected) < 1e-12);
        }
    }
    // The signal that the critic sees on rectified flow, by sigma.
    for (sigma, kappa) in [(0.98_f64, 0.0159), (0.5, 0.031), (0.1, 0.156)] {
        assert!((1.0 - (sigma - 1.0 / 64.0) / sigma - kappa).abs() < 3e-4, "{sigma}");
    }
    Ok(())
}

#[test]
fn the_generators_gradient_goes_through_the_step() -> Result<()> {
    // x'_f = (s'/s) x_t + kappa (g x_t + ..): dx'_f/dx = a (s'/s + kappa g); detached, a s'/s.
    let (t, gain) = (0.4, 0.3);
    let (teacher, cond) = (linear(&RectifiedFlow, 0.5, 0.2), none());
    let dm = DistributionMatching::new(linear(&RectifiedFlow, gain, -0.1));
    let weight = Tensor::from_slice(&[0.7, -1.2]);
    let gradient = |is_detached: bool| -> Result<Tensor> {
        let x = wave(&[3, 2], 0.4, Kind::Double).set_requires_grad(true);
        let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight.view([2, 1]));
        let mut adm =
            AdversarialDistributionMatching::new(&dm, teacher.clone(), critic).step(0.1)?;
        if is_detached {
            adm = adm.detached_fake();
        }
        let batch = Batch::new(&x, &cond)?;
        let tau = PostShift::all(t, 3, DOUBLE)?;
        let probe = Probe::at(&teacher, &batch, tau, wave(&[3, 2], 2.0, Kind::Double))?;
        adm.loss(&probe)?.backward();
        Ok(x.grad())
    };
    let (a, s, later) = (t, 1.0 - t, 0.5);
    let kappa = 0.5 - a * later / s;
    // Hinge: the generator's loss is -mean D.
    let expected = |slope: f64| &weight.view([1, 2]) * (-slope / 3.0);
    let through = gradient(false)?;
    assert!(
        max_difference(&through, &expected(a * (later / s + kappa * gain)).expand([3, 2], false))
            < 1e-14
    );
    let detached = gradient(true)?;
    assert!(max_difference(&detached, &expected(a * later / s).expand([3, 2], false)) < 1e-14);
    Ok(())
}

#[test]
fn a_fake_score_that_is_the_teacher_leaves_the_critic_nothing_to_tell() -> Result<()> {
    let (teacher, cond) = (linear(&RectifiedFlow, 0.5, 0.2), none());
    let dm = DistributionMatching::new(teacher.clone());
    let weight = Tensor::from_slice(&[0.1, -0.2]).set_requires_grad(true);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight.view([2, 1])).tanh();
    let adm = AdversarialDistributionMatching::new(&dm, teacher.clone(), critic);
    let x = wave(&[4, 2], 0.4, Kind::Double).set_requires_grad(true);
    let time = PostShift::all(0.5, 4, DOUBLE)?;
    let loss =
        adm.critic_loss_at(&Batch::new(&x, &cond)?, &time, &wave(&[4, 2], 2.0, Kind::Double))?;
    approx::assert_relative_eq!(value(&loss), 2.0, epsilon = 1e-14);
    loss.backward();
    assert!(value(&weight.grad().abs().max()) < 1e-14 && !x.grad().defined());
    Ok(())
}

#[test]
fn every_turn_sends_its_gradient_to_its_own_network_and_counts_its_forwards() -> Result<()> {
    for (gan_loss, expected) in [(GanLoss::Hinge, [0, 1, 1]), (GanLoss::Relativistic, [2, 1, 2])] {
        one_form(gan_loss, expected)?;
    }
    Ok(())
}

fn one_form(gan_loss: GanLoss, expected: [usize; 3]) -> Result<()> {
    let weights = [0.5, 0.4, 0.3].map(|value| Tensor::from(value).set_requires_grad(true));
    let calls: [Cell<usize>; 3] = Default::default();
    let network = |index: usize| {
        let (weight, calls) = (&weights[index], &calls[index]);
        let network = move |x: &Tensor, _: &Tensor, c: &Condition| {
            calls.set(calls.get() + 1);
            (x * weight + &c[0]).sin()
        };
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network)
    };
    let (teacher, dm) = (network(0), DistributionMatching::new(network(1)));
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| {
        calls[2].set(calls[2].get() + 1);
        (x * &weights[2] + t.view([-1, 1])).sin()
    };
    let x = wave(&[4, 2], 0.4, Kind::Double).set_requires_grad(true);
    let (cond, null) = (none(), Condition::from(Tensor::from(0.4)));
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    let reset = || calls.iter().for_each(|calls| calls.set(0));
    let counted = || calls.each_ref().map(Cell::get);
    let adm = AdversarialDistributionMatching::new(&dm, teacher.clone(), critic)
        .gan_loss(gan_loss)
        .guided(Guidance::new(3.0)?);
    let tau = PostShift::all(0.5, 4, DOUBLE)?;
    let probe = Probe::at(&teacher, &batch, tau, wave(&[4, 2], 2.0, Kind::Double))?;
    reset();
    adm.loss(&probe)?.backward();
    assert_eq!(counted(), expected);
    assert!(x.grad().defined() && weights.iter().all(|weight| !weight.grad().defined()));
    let time = PostShift::all(0.5, 4, DOUBLE)?;
    reset();
    adm.critic_loss_at(&batch, &time, &wave(&[4, 2], 2.0, Kind::Double))?.backward();
    assert_eq!(counted(), [2, 1, 2]);
    assert!(
        weights[2].grad().defined() && !weights[0].grad().defined() && !weights[1].grad().defined()
    );
    testing::check_regularizer(&adm, &teacher, &batch).expect("the contract");
    testing::check_independence(&adm, &teacher, &batch).expect("samples do not meet");
    // The relativistic form compares with the teacher's step, which is held.
    if gan_loss == GanLoss::Hinge {
        testing::check_gradient(&adm, &teacher, &batch).expect("the gradient of the value");
    }
    let _guard = seeded(1);
    testing::check_own_loss(&adm, &batch).expect("the critic's loss");
    Ok(())
}

/// One dimension: the teacher has N(0, 1), the student starts at N(1.5, 0.25) and the fake score is exact.
#[test]
fn training_brings_mean_and_spread_to_the_teachers() -> Result<()> {
    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    const BATCH: i64 = 256;
    let _guard = seeded(4);
    let student = Tensor::from_slice(&[1.5f32, 0.5]).set_requires_grad(true);
    let gaussian = |mean: Tensor, std: Tensor, x: &Tensor, t: &Tensor| {
        let a = t.view([-1, 1]);
        let s = a.neg() + 1.0;
        let variance = std.square();
        &mean + &a * &variance / (a.square() * &variance + s.square()) * (x - &a * &mean)
    };
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            gaussian(Tensor::from(0f32), Tensor::from(1f32), x, t)
        },
    );
    let fake = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            let at = student.detach();
            gaussian(at.get(0), at.get(1), x, t)
        },
    );
    let dm = DistributionMatching::new(fake);
    let store = nn::VarStore::new(Device::Cpu);
    let root = store.root();
    let layer = |from, to| nn::linear(&root, from, to, nn::LinearConfig::default());
    let layers = [layer(2, 32), layer(32, 32), layer(32, 1)];
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| {
        let input = Tensor::cat(&[x, &t.view([-1, 1])], 1);
        input.apply(&layers[0]).silu().apply(&layers[1]).silu().apply(&layers[2])
    };
    let times = || Renoising::new(Uniform::new(0.1, 0.6).unwrap());
    let adm = AdversarialDistributionMatching::new(&dm, teacher.clone(), critic)
        .step(0.25)?
        .renoising(times());
    let adam = nn::adam(0.0, 0.99, 0.0);
    let mut critics = adam.build(&store, 4e-3)?;
    let mut second = Tensor::zeros([2], FLOAT);
    let cond = none();
    for step in 1..=1500 {
        let z = Tensor::f_randn([BATCH, 1], FLOAT)?;
        let x = &z * student.get(1) + student.get(0);
        let batch = Batch::new(&x, &cond)?;
        critics.backward_step(&adm.critic_loss(&batch)?);
        let probe = Probe::draw(&teacher, &batch, &times())?.normalizer(Normalizer::OFF);
        let loss = adm.loss(&probe)?;
        let gradient = Tensor::run_backward(&[&loss], &[&student], false, false).remove(0);
        // Adam with betas (0, 0.99).
        second = second * 0.99 + gradient.square() * 0.01;
        let unbiased = &second / (1.0 - 0.99f64.powi(step));
        let _no_grad = tch::no_grad_guard();
        let rate = 1e-2 * (1.0 - f64::from(step) / 1500.0);
        let mut parameter = student.shallow_clone();
        let _ = parameter.f_sub_(&(gradient / (unbiased.sqrt() + 1e-8) * rate))?;
    }
    let (mean, std) = (student.double_value(&[0]), student.double_value(&[1]));
    assert!(mean.abs() < 0.2 && (std.abs() - 1.0).abs() < 0.2, "{mean} {std}");
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let (teacher, cond) = (linear(&RectifiedFlow, 0.5, 0.2), none());
    let dm = DistributionMatching::new(linear(&RectifiedFlow, 0.4, 0.1));
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    let adm = || AdversarialDistributionMatching::new(&dm, teacher.clone(), critic);
    for bad in [0.0, 1.0, -0.1, f64::NAN] {
        assert!(matches!(
            adm().step(bad),
            Err(Error::OutOfRange { what: "length of the step", .. })
        ));
    }
    let x = wave(&[2, 2], 0.4, Kind::Double);
    let batch = Batch::new(&x, &cond)?;
    let at = |t: f64| PostShift::all(t, 2, DOUBLE);
    let of = |adm: AdversarialDistributionMatching<'_>, t: f64| match adm.critic_loss_at(
        &batch,
        &at(t)?,
        &x,
    ) {
        Err(
            Error::OutOfRange { what, .. }
            | Error::Missing { what, .. }
            | Error::Shape { what, .. },
        ) => Ok(what),
        Err(error) => Err(error),
        Ok(_) => Ok("nothing"),
    };
    assert_eq!(of(adm(), 0.5)?, "nothing");
    // A step beyond the data ends at the data.
    assert_eq!(of(adm(), 0.995)?, "nothing");
    assert_eq!(of(adm().detached_fake(), 0.995)?, "time after the step");
    assert_eq!(of(adm(), 1.0)?, "share of noise at the cleanest time");
    assert_eq!(of(adm().guided(Guidance::new(2.0)?), 0.5)?, "null condition");
    let other = AdversarialDistributionMatching::new(&dm, linear(&TrigFlow, 0.5, 0.2), critic);
    assert_eq!(of(other, 0.5)?, "share of data on the term's path");
    let few = |x: &Tensor, _: &Tensor, _: &Condition| x.narrow(0, 0, 1);
    let few = AdversarialDistributionMatching::new(&dm, teacher.clone(), few);
    assert_eq!(of(few, 0.5)?, "critic logits");
    Ok(())
}
