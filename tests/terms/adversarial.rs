//! Adversarial regularization: losses of both players, penalties, laws and errors.

mod clean_end;
mod critic_evaluation;
mod gradients;
mod heads;
mod options;
mod penalty;
mod training;

use std::cell::RefCell;

use decoupled_dmd::{
    Adversarial, Batch, Condition, CriticHeads, CriticPenalty, Error, GanLoss, PostShift, Probe,
    RectifiedFlow, Regularizer, Renoising, Result, Shift, Uniform,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor, nn};

use super::common::{gaussian_teacher, gradient, max_difference, seeded, value, wave};
use super::{loss_of, reorder};

const LOSSES: [GanLoss; 3] = [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic];
const SHAPE: [i64; 2] = [3, 4];

fn leaf(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double).set_requires_grad(true)
}

fn half(batch: i64) -> PostShift {
    PostShift::all(0.5, batch, (Kind::Double, Device::Cpu)).unwrap()
}

#[test]
fn without_a_graph_there_is_a_value() -> Result<()> {
    let (x, cond) = (leaf(&SHAPE, 0.3), Condition::none());
    let weight = leaf(&[4, 1], 2.0);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight);
    let gan = Adversarial::new(RectifiedFlow, critic);
    let loss = loss_of(&gan, &Batch::new(&x, &cond)?)?;
    let detached = x.detach();
    let batch = Batch::new(&detached, &cond)?;
    for quiet in [loss_of(&gan, &batch)?, tch::no_grad(|| loss_of(&gan, &batch))?] {
        assert!(!quiet.requires_grad());
        assert_eq!(value(&quiet), value(&loss));
    }
    // A critic that ignores the sample, without parameters and with them.
    let blind = |x: &Tensor, _: &Tensor, _: &Condition| x.zeros_like();
    let gan = Adversarial::new(RectifiedFlow, blind);
    let cut = |result| matches!(result, Err(Error::NoGradient { what: "critic logits" }));
    assert!(cut(loss_of(&gan, &Batch::new(&x, &cond)?)));
    let constant = |x: &Tensor, _: &Tensor, _: &Condition| {
        weight.narrow(0, 0, 3).expand([3, 1], false) + x.zeros_like().narrow(1, 0, 1)
    };
    let gan = Adversarial::new(RectifiedFlow, constant);
    assert!(cut(loss_of(&gan, &Batch::new(&x, &cond)?)));
    let loss = loss_of(&gan, &batch)?;
    assert!(!loss.requires_grad());
    let expected = (-weight.narrow(0, 0, 3)).softplus().mean(None);
    approx::assert_abs_diff_eq!(value(&loss), value(&expected), epsilon = 1e-14);
    // It has no slope to penalise.
    let real = wave(&SHAPE, 1.3, Kind::Double);
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let plain = gan.critic_loss_at(&batch, &half(3), &real, &real)?;
    let gan = gan.penalty(CriticPenalty::R1 { gamma: 3.0 })?;
    let penalised = gan.critic_loss_at(&batch, &half(3), &real, &real)?;
    assert_eq!(value(&penalised), value(&plain));
    Ok(())
}

#[test]
fn r1_has_the_closed_form_of_linear_and_quadratic_critics() -> Result<()> {
    let (x, real) = (leaf(&SHAPE, 0.3), wave(&SHAPE, 1.3, Kind::Double));
    let (cond, noise) = (Condition::none(), wave(&SHAPE, 5.0, Kind::Double));
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let weight = leaf(&[4, 2], 2.0);
    let curvature = Tensor::from(0.7).set_requires_grad(true);
    let noised: Tensor = 0.5 * &real + 0.5 * &noise;

    // Two logits: the slope of their mean is the mean of the columns.
    let linear = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight);
    let mean_slope = weight.mean_dim(&[1i64][..], false, None);
    let linear_penalty = 1.5 * mean_slope.square().sum(None);
    let quadratic = |x: &Tensor, _: &Tensor, _: &Condition| {
        0.5 * &curvature * x.square().sum_dim_intlist(&[1i64][..], false, None)
    };
    let squares = noised.square().sum_dim_intlist(&[1i64][..], false, None);
    let quadratic_penalty = 1.5 * curvature.square() * squares.mean(None);

    type Critic<'a> = &'a dyn Fn(&Tensor, &Tensor, &Condition) -> Tensor;
    let cases: [(Critic<'_>, &Tensor, &Tensor); 2] =
        [(&linear, &weight, &linear_penalty), (&quadratic, &curvature, &quadratic_penalty)];
    for (critic, parameter, expected) in cases {
        let loss = |gamma: f64| -> Result<Tensor> {
            Adversarial::new(RectifiedFlow, critic)
                .penalty(CriticPenalty::R1 { gamma })?
                .critic_loss_at(&batch, &half(3), &noise, &noise)
        };
        let penalty = loss(3.0)? - loss(0.0)?;
        assert!((value(&penalty) - value(expected)).abs() < 1e-13);
        let slope = gradient(&penalty, parameter);
        assert!(max_difference(&slope, &gradient(expected, parameter)) < 1e-13);
    }
    Ok(())
}

#[test]
fn real_and_generated_samples_share_tau_and_noise_and_have_their_conditions() -> Result<()> {
    let _guard = seeded(31);
    let (x, real) = (leaf(&SHAPE, 0.3), wave(&SHAPE, 1.3, Kind::Double));
    let (cond, real_cond) = (Tensor::from(1.0).into(), Condition::from(Tensor::from(2.0)));
    let seen = RefCell::new(Vec::new());
    let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
        seen.borrow_mut().push((x.detach(), t.copy(), value(&c[0])));
        x.sum_dim_intlist(&[1i64][..], true, None)
    };
    let gan = Adversarial::new(RectifiedFlow, critic)
        .renoising(Renoising::new(Uniform::FULL).shifted(Shift::new(3.0)?));
    let plain = Batch::new(&x, &cond)?.with_real(&real)?;
    let _loss = gan.own_loss(&plain)?.expect("a critic has a loss");
    let own = Batch::new(&x, &cond)?.with_real(&real)?.with_real_cond(&real_cond);
    let _loss = gan.critic_loss(&own)?;
    let _loss = loss_of(&gan, &own)?;
    let relativistic = gan.gan_loss(GanLoss::Relativistic);
    let _loss = loss_of(&relativistic, &own)?;
    let seen = seen.borrow();
    // Forwards: critic 2, 2; generator 1; relativistic generator 2.
    let conds: Vec<f64> = seen.iter().map(|call| call.2).collect();
    assert_eq!(conds, [1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 2.0]);
    for pair in [&seen[0..2], &seen[2..4], &seen[5..7]] {
        let tau = &pair[0].1;
        assert!(tau.equal(&pair[1].1));
        let difference = tau.unsqueeze(1) * (&x - &real);
        assert!(max_difference(&(&pair[0].0 - &pair[1].0), &difference) < 1e-14);
    }
    Ok(())
}

#[test]
fn logits_far_from_zero_lose_nothing() -> Result<()> {
    let (x, cond) = (leaf(&[1, 1], 0.3), Condition::none());
    let real = wave(&[1, 1], 0.3, Kind::Double);
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    for logit in [-200.0, -30.0, 25.0, 200.0f64] {
        let critic = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.0 + logit;
        let gan = Adversarial::new(RectifiedFlow, critic);
        let softplus = |x: f64| if x > 0.0 { x + (-x).exp().ln_1p() } else { x.exp().ln_1p() };
        let loss = loss_of(&gan, &batch)?;
        approx::assert_relative_eq!(value(&loss), softplus(-logit), max_relative = 1e-14);
        let loss = gan.critic_loss_at(&batch, &half(1), &real, &real)?;
        let expected = softplus(logit) + softplus(-logit);
        approx::assert_relative_eq!(value(&loss), expected, max_relative = 1e-14);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn permuting_the_batch_permutes_the_gradient(
        tau in prop::array::uniform3(0.0..1.0f64),
        gan_loss in prop::sample::select(&LOSSES[..]),
    ) {
        let weight = wave(&[4, 2], 2.0, Kind::Double);
        let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
            (x.matmul(&weight) + t.unsqueeze(1) + &c[0]).tanh()
        };
        let run = |order: &[i64]| -> Result<(f64, f64, Tensor)> {
            let pick = |t: Tensor| reorder(&t, order);
            let x = pick(wave(&SHAPE, 0.3, Kind::Double)).set_requires_grad(true);
            let (real, noise) = (wave(&SHAPE, 1.3, Kind::Double), wave(&SHAPE, 5.0, Kind::Double));
            let (real, noise) = (pick(real), pick(noise));
            let cond = Condition::from(pick(wave(&[3, 2], 4.0, Kind::Double)));
            let batch = Batch::new(&x, &cond)?.with_real(&real)?;
            let time = || PostShift::new(pick(Tensor::from_slice(&tau)));
            let teacher = gaussian_teacher(1.0);
            let gan = Adversarial::new(RectifiedFlow, critic)
                .gan_loss(gan_loss)
                .penalty(CriticPenalty::ApproximateR1 { weight: 1.0, sigma: 0.1 })?;
            let own = gan.critic_loss_at(&batch, &time()?, &noise, &noise)?;
            let loss = gan.loss(&Probe::at(&teacher, &batch, time()?, noise)?)?;
            Ok((value(&own), value(&loss), gradient(&loss, &x)))
        };
        let order = [2, 0, 1];
        let (straight, turned) = (run(&[0, 1, 2]).unwrap(), run(&order).unwrap());
        prop_assert!((straight.0 - turned.0).abs() < 1e-14);
        prop_assert!((straight.1 - turned.1).abs() < 1e-14);
        prop_assert!(max_difference(&turned.2, &reorder(&straight.2, &order)) < 1e-15);
    }
}

#[test]
fn axes_of_samples_and_logits_do_not_matter() -> Result<()> {
    let (flat, real) = (leaf(&[3, 12], 0.3), wave(&[3, 12], 1.3, Kind::Double));
    let noise = wave(&[3, 12], 5.0, Kind::Double);
    let (cond, weight) = (Condition::none(), leaf(&[12, 6], 2.0));
    let plain = |x: &Tensor, _: &Tensor, _: &Condition| x.tanh().matmul(&weight);
    let shaped = |x: &Tensor, _: &Tensor, _: &Condition| {
        x.flatten(1, -1).tanh().matmul(&weight).view([3, 2, 3])
    };
    let image = |t: &Tensor| t.view([3, 2, 3, 2]);
    let (x_image, real_image) = (image(&flat), image(&real));
    let batches = [
        Batch::new(&flat, &cond)?.with_real(&real)?,
        Batch::new(&x_image, &cond)?.with_real(&real_image)?,
    ];
    for gan_loss in LOSSES {
        for penalty in [
            CriticPenalty::R1 { gamma: 0.5 },
            CriticPenalty::ApproximateR1 { weight: 3.0, sigma: 0.1 },
        ] {
            let one = Adversarial::new(RectifiedFlow, plain);
            let other = Adversarial::new(RectifiedFlow, shaped);
            let (one, other) = (one.gan_loss(gan_loss), other.gan_loss(gan_loss));
            let (one, other) = (one.penalty(penalty)?, other.penalty(penalty)?);
            let losses = [
                one.critic_loss_at(&batches[0], &half(3), &noise, &noise)?,
                other.critic_loss_at(&batches[1], &half(3), &image(&noise), &image(&noise))?,
            ];
            approx::assert_relative_eq!(value(&losses[0]), value(&losses[1]), epsilon = 1e-13);
            let slopes = losses.map(|loss| gradient(&loss, &weight));
            assert!(max_difference(&slopes[0], &slopes[1]) < 1e-13, "{gan_loss:?} {penalty:?}");
            // The student's gradients agree too; the probes differ in the noise alone, a wave in both.
            let losses = [loss_of(&one, &batches[0])?, loss_of(&other, &batches[1])?];
            let slopes = losses.map(|loss| gradient(&loss, &flat));
            assert!(max_difference(&slopes[0], &slopes[1]) < 1e-13, "{gan_loss:?}");
        }
    }
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let (x, cond) = (leaf(&SHAPE, 0.3), Condition::none());
    let plain = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    let gan = || Adversarial::new(RectifiedFlow, plain);
    let noise = wave(&SHAPE, 5.0, Kind::Double);
    let missing = |result: Result<Tensor>| {
        matches!(result, Err(Error::Missing { what: "real samples", setter: "Batch::with_real" }))
    };
    let alone = Batch::new(&x, &cond)?;
    assert!(loss_of(&gan(), &alone).is_ok());
    assert!(missing(loss_of(&gan().gan_loss(GanLoss::Relativistic), &alone)));
    assert!(missing(gan().critic_loss_at(&alone, &half(3), &noise, &noise)));

    let shape = |result: Result<Tensor>, argument: &str| matches!(result, Err(Error::Shape { what, .. }) if what == argument);
    let two = wave(&[2, 4], 1.3, Kind::Double);
    let fewer = Batch::new(&x, &cond)?.with_real(&two)?;
    assert!(shape(gan().critic_loss_at(&fewer, &half(3), &noise, &noise), "real samples"));
    let real = wave(&SHAPE, 1.3, Kind::Double);
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    assert!(shape(gan().critic_loss_at(&batch, &half(2), &noise, &noise), "time"));
    assert!(shape(gan().critic_loss_at(&batch, &half(3), &two, &noise), "noise"));
    assert!(shape(gan().critic_loss_at(&batch, &half(3), &noise, &two), "perturbation"));
    let summing = |x: &Tensor, _: &Tensor, _: &Condition| x.sum(None);
    assert!(shape(loss_of(&Adversarial::new(RectifiedFlow, summing), &batch), "critic logits"));
    let without = |x: &Tensor, _: &Tensor, _: &Condition| x.narrow(1, 0, 0);
    assert!(shape(loss_of(&Adversarial::new(RectifiedFlow, without), &batch), "critic logits"));
    let failing = |x: &Tensor, _: &Tensor, _: &Condition| x.f_view([-7]);
    assert!(matches!(
        loss_of(&Adversarial::new(RectifiedFlow, failing), &batch),
        Err(Error::Network { .. })
    ));

    let refused = |penalty, argument: &str| {
        let result = gan().penalty(penalty);
        matches!(result, Err(Error::OutOfRange { what, .. }) if what == argument)
    };
    for bad in [-1.0, f64::NAN, f64::INFINITY, 1e39] {
        assert!(refused(CriticPenalty::R1 { gamma: bad }, "gamma of R1"));
        let approximate = |weight, sigma| CriticPenalty::ApproximateR1 { weight, sigma };
        assert!(refused(approximate(bad, 0.01), "weight of the approximate R1"));
        assert!(refused(approximate(1.0, bad), "sigma of the approximate R1"));
        assert!(refused(approximate(1.0, 0.0), "sigma of the approximate R1"));
    }
    Ok(())
}

#[test]
fn critic_heads_take_any_rank_and_name_what_does_not_fit() -> Result<()> {
    let _guard = seeded(32);
    let store = nn::VarStore::new(Device::Cpu);
    let heads = CriticHeads::new(&store.root(), &[4, 5, 6], 32)?;
    let float = |shape: &[i64]| wave(shape, 0.3, Kind::Float);
    let levels = [float(&[2, 4]), float(&[2, 5, 7]), wave(&[2, 6, 3, 3], 0.3, Kind::BFloat16)];
    let logits = heads.logits(&levels)?;
    assert_eq!(logits.size(), [2, 3]);
    assert!(value(&logits.abs().min()) > 1e-4, "no head is stuck at zero: {logits:?}");
    logits.sum(Kind::Float).backward();
    assert_eq!(store.variables().len(), 18);
    assert!(store.variables().values().all(|parameter| parameter.grad().defined()));

    let fails = |result: Result<Tensor>, argument: &str| matches!(result, Err(Error::Shape { what, .. } | Error::OutOfRange { what, .. }) if what == argument);
    assert!(fails(heads.logits(&levels[..2]), "number of feature levels"));
    let swapped = [float(&[2, 5]), float(&[2, 5]), float(&[2, 6])];
    assert!(fails(heads.logits(&swapped), "features of the critic"));
    for (channels, width) in [(vec![], 8), (vec![0], 8), (vec![4], 0)] {
        let made = CriticHeads::new(&store.root().sub("bad"), &channels, width);
        assert!(matches!(made, Err(Error::OutOfRange { .. })));
    }
    Ok(())
}
