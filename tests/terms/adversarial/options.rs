//! Options of the adversarial term: independent draws, mismatched pairs, weights over time, augmentation.

use std::cell::RefCell;

use decoupled_dmd::{
    Adversarial, Augmentation, Batch, Condition, CriticPenalty, Error, GanLoss, PostShift, Probe,
    RectifiedFlow, Regularizer, Result, testing,
};
use tch::{Device, Kind, Tensor};

use super::super::common::{
    DOUBLE, gaussian_teacher, gradient, loss_of, max_difference, seeded, value, wave,
};
use super::{LOSSES, half, leaf};

const SHAPE: [i64; 2] = [3, 4];
const UNPAIRED: [GanLoss; 2] = [GanLoss::NonSaturating, GanLoss::Hinge];

fn double(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double)
}

fn times(values: &[f64]) -> PostShift {
    PostShift::new(Tensor::from_slice(values)).unwrap()
}

#[test]
fn defaults_change_no_bit_and_no_draw() -> Result<()> {
    let _guard = seeded(41);
    let (x, real) = (leaf(&SHAPE, 0.3), double(&SHAPE, 1.3));
    let (cond, weight) = (Condition::none(), leaf(&[4, 2], 2.0));
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| x.matmul(&weight) + t.view([-1, 1]);
    for gan_loss in LOSSES {
        let plain = || Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
        let drawn = |gan: &Adversarial<'_>| -> Result<Tensor> {
            tch::manual_seed(5);
            gan.critic_loss(&batch)
        };
        tch::manual_seed(5);
        let u = Tensor::f_rand([3], DOUBLE)?;
        let (noise, perturbation) = (x.detach().randn_like(), x.detach().randn_like());
        let by_hand = plain().critic_loss_at(&batch, &PostShift::new(u)?, &noise, &perturbation)?;
        let expected = drawn(&plain())?;
        assert!(by_hand.equal(&expected), "{gan_loss:?}");
        let one = |t: &Tensor| t.ones_like();
        for gan in [plain().mismatched(0.0)?, plain().weighted(one)] {
            assert!(drawn(&gan)?.equal(&expected), "{gan_loss:?}");
            assert!(loss_of(&gan, &batch)?.equal(&loss_of(&plain(), &batch)?), "{gan_loss:?}");
        }
    }
    // Independent draws that happen to be equal are the shared form.
    for gan_loss in UNPAIRED {
        let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss).independent();
        let mut draw = gan.draw(&batch)?;
        let shared = gan.critic_loss_at(&batch, &draw.time, &draw.noise, &draw.perturbation)?;
        draw.real = Some((draw.time.shallow_clone(), draw.noise.shallow_clone()));
        assert!(gan.critic_evaluation_with(&batch, &draw)?.loss.equal(&shared));
    }
    Ok(())
}

#[test]
fn independent_draws_are_apart_for_real_samples() -> Result<()> {
    let _guard = seeded(42);
    let (x, real, cond) = (leaf(&SHAPE, 0.3), double(&SHAPE, 1.3), Condition::none());
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let seen = RefCell::new(Vec::new());
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| {
        seen.borrow_mut().push((x.detach(), t.copy()));
        x.sum_dim_intlist([1i64].as_slice(), true, None)
    };
    let gan = Adversarial::new(RectifiedFlow, critic).independent();
    let mut draw = gan.draw(&batch)?;
    let (time, noise) = draw.real.as_ref().expect("independent draws");
    assert!(!time.tensor().equal(draw.time.tensor()) && !noise.equal(&draw.noise));
    let (one, other) = (times(&[0.2, 0.5, 0.9]), times(&[0.6, 0.1, 0.4]));
    let (noise, real_noise) = (double(&SHAPE, 5.0), double(&SHAPE, 6.0));
    draw.time = one.shallow_clone();
    draw.noise = noise.shallow_clone();
    draw.real = Some((other.shallow_clone(), real_noise.shallow_clone()));
    let loss = gan.critic_evaluation_with(&batch, &draw)?.loss;
    let at = |x: &Tensor, t: &PostShift, noise: &Tensor| {
        let t = t.tensor().view([-1, 1]);
        x * &t + noise * (&t * -1.0 + 1.0)
    };
    let (fake, real) = (at(&x.detach(), &one, &noise), at(&real, &other, &real_noise));
    let seen = seen.borrow();
    assert_eq!(seen.len(), 2);
    assert!(max_difference(&seen[0].0, &fake) < 1e-15 && seen[0].1.equal(one.tensor()));
    assert!(max_difference(&seen[1].0, &real) < 1e-15 && seen[1].1.equal(other.tensor()));
    let sum = |x: &Tensor| x.sum_dim_intlist([1i64].as_slice(), true, None);
    let expected = sum(&fake).softplus().mean(None) + (-sum(&real)).softplus().mean(None);
    approx::assert_relative_eq!(value(&loss), value(&expected), max_relative = 1e-13);
    Ok(())
}

#[test]
fn mismatched_samples_take_their_share_of_the_fakes() -> Result<()> {
    let (x, real) = (leaf(&SHAPE, 0.3), double(&SHAPE, 1.3));
    let cond = Condition::from(double(&[3, 1], 0.9));
    let real_cond = Condition::from(double(&[3, 1], 4.0));
    let batch = Batch::new(&x, &cond)?.with_real(&real)?.with_real_cond(&real_cond);
    let (weight, calls) = (leaf(&[4, 2], 2.0), RefCell::new(0));
    let logits = |x: &Tensor, c: &Tensor| x.matmul(&weight) * (c + 1.5);
    let critic = |x: &Tensor, _: &Tensor, c: &Condition| {
        *calls.borrow_mut() += 1;
        logits(x, &c[0])
    };
    let noise = double(&SHAPE, 5.0);
    for gan_loss in UNPAIRED {
        let of_fake = |d: Tensor| match gan_loss {
            GanLoss::Hinge => (d + 1.0).relu().mean(None),
            _ => d.softplus().mean(None),
        };
        let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss).mismatched(0.3)?;
        calls.replace(0);
        let loss = gan.critic_loss_at(&batch, &half(3), &noise, &noise)?;
        assert_eq!(calls.take(), 3);
        let at = |x: &Tensor| x * 0.5 + &noise * 0.5;
        let expected = of_fake(logits(&at(&x.detach()), &cond[0])) * 0.7
            + of_fake(logits(&at(&real.roll(1, 0)), &real_cond[0])) * 0.3
            + of_fake(-logits(&at(&real), &real_cond[0]));
        approx::assert_relative_eq!(value(&loss), value(&expected), max_relative = 1e-13);
        assert!(max_difference(&gradient(&loss, &weight), &gradient(&expected, &weight)) < 1e-13);
        // The generator does not see them.
        let plain = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
        assert!(loss_of(&gan, &batch)?.equal(&loss_of(&plain, &batch)?));
    }
    Ok(())
}

/// Two conditions and two samples, y given c; the generator follows the data. The best critic is
/// - ln(1 - share + share p(y) / p(y given c)).
#[test]
fn mismatched_samples_reward_what_is_typical_of_a_condition() -> Result<()> {
    let _guard = seeded(43);
    let (count, share) = (40_000, 0.5);
    let given = [0.2, 0.7];
    let marginal = 0.5 * (given[0] + given[1]);
    let mut best = Vec::new();
    for one in given {
        for (p, all) in [(1.0 - one, 1.0 - marginal), (one, marginal)] {
            best.push(-f64::ln(1.0 - share + share * all / p));
        }
    }
    let table = Tensor::from_slice(&best).set_requires_grad(true);
    let critic = |y: &Tensor, _: &Tensor, c: &Condition| {
        let place = (&c[0] * 2.0 + y.view([-1])).to_kind(Kind::Int64);
        table.index_select(0, &place)
    };
    let c = Tensor::f_rand([count], DOUBLE)?.lt(0.5).to_kind(Kind::Double);
    let draw = || {
        let p = &c * (given[1] - given[0]) + given[0];
        Tensor::rand([count], DOUBLE).less_tensor(&p).to_kind(Kind::Double).view([-1, 1])
    };
    let (x, real, cond) = (draw(), draw(), Condition::from(c.shallow_clone()));
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let gan = Adversarial::new(RectifiedFlow, critic).mismatched(share)?;
    let clean = PostShift::all(1.0, count, DOUBLE)?;
    let at_rest = gan.critic_loss_at(&batch, &clean, &x, &x)?;
    let slope = value(&gradient(&at_rest, &table).abs().max());
    assert!(slope < 0.01, "{slope}");
    // Without mismatched samples the rest is elsewhere.
    let plain = Adversarial::new(RectifiedFlow, critic).critic_loss_at(&batch, &clean, &x, &x)?;
    assert!(value(&gradient(&plain, &table).abs().max()) > 0.03);
    Ok(())
}

#[test]
fn weights_follow_each_samples_own_time() -> Result<()> {
    let (x, real, cond) = (leaf(&SHAPE, 0.3), double(&SHAPE, 1.3), Condition::none());
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let weight = leaf(&[4, 2], 2.0);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight);
    let (time, noise) = (times(&[0.2, 0.5, 0.9]), double(&SHAPE, 5.0));
    let t = time.tensor().view([-1, 1]);
    let at = |x: &Tensor| (x * &t + &noise * (&t * -1.0 + 1.0)).matmul(&weight);
    let penalty = CriticPenalty::R1 { gamma: 0.4 };
    let gan = Adversarial::new(RectifiedFlow, critic).weighted(|t: &Tensor| t.square());
    let gan = gan.penalty(penalty)?;
    let found = gan.critic_loss_at(&batch, &time, &noise, &noise)?;
    let each = at(&x.detach()).softplus() + (-at(&real)).softplus();
    let expected = (each * t.square()).mean(None)
        + gan.penalty_loss_at(&batch, penalty, &time, &noise, &noise)?;
    approx::assert_relative_eq!(value(&found), value(&expected), max_relative = 1e-13);
    let teacher = gaussian_teacher(1.0);
    let probe = Probe::at(&teacher, &batch, time.shallow_clone(), noise.shallow_clone())?;
    let found = gan.loss(&probe)?;
    let expected = ((-at(&x)).softplus() * t.square()).mean(None);
    approx::assert_relative_eq!(value(&found), value(&expected), max_relative = 1e-13);
    assert!(max_difference(&gradient(&found, &x), &gradient(&expected, &x)) < 1e-15);
    Ok(())
}

#[test]
fn both_sides_are_changed_by_one_draw_before_the_noise() -> Result<()> {
    let _guard = seeded(44);
    let shape = [3i64, 2, 4, 4];
    let (x, real, noise) = (leaf(&shape, 0.3), double(&shape, 1.3), double(&shape, 5.0));
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let (weight, seen) = (leaf(&[32, 2], 2.0), RefCell::new(Vec::new()));
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| {
        seen.borrow_mut().push(x.detach());
        x.flatten(1, -1).tanh().matmul(&weight)
    };
    let augmentation = Augmentation::new().blit().geometric().colour().cutout(0.5)?;
    for gan_loss in LOSSES {
        let gan =
            Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss).augmented(augmentation);
        let change = augmentation.draw(&x)?;
        let at = |x: &Tensor| change.apply(x).unwrap() * 0.5 + &noise * 0.5;
        let mut draw = gan.draw(&batch)?;
        assert!(draw.augmentation.is_some());
        draw.time = half(3);
        draw.noise = noise.shallow_clone();
        let teacher = gaussian_teacher(1.0);
        let probe = Probe::at(&teacher, &batch, half(3), noise.shallow_clone())?;
        seen.take();
        let loss = gan.generator_loss_at(&probe, Some(&change))?;
        let sides = seen.take();
        assert_eq!(sides.len(), if gan_loss == GanLoss::Relativistic { 2 } else { 1 });
        for (found, clean) in sides.iter().zip([&x, &real]) {
            assert!(max_difference(found, &at(clean)) < 1e-15);
        }
        // Its gradient is that of the chain, and ends in x.
        let logits = |x: &Tensor| at(x).flatten(1, -1).tanh().matmul(&weight);
        let expected = match gan_loss {
            GanLoss::NonSaturating => (-logits(&x)).softplus().mean(None),
            GanLoss::Hinge => -logits(&x).mean(None),
            _ => (logits(&real) - logits(&x)).softplus().mean(None),
        };
        assert!(max_difference(&gradient(&loss, &x), &gradient(&expected, &x)) < 1e-15);
        loss.backward();
        assert!(!weight.grad().defined());
        draw.augmentation = Some(change);
        let at =
            |x: &Tensor| draw.augmentation.as_ref().unwrap().apply(x).unwrap() * 0.5 + &noise * 0.5;
        let _loss = gan.critic_evaluation_with(&batch, &draw)?;
        for (found, clean) in seen.take().iter().zip([&x, &real]) {
            assert!(max_difference(found, &at(clean)) < 1e-15);
        }
    }
    // In bfloat16 the change is computed in float32, and the gradient comes back in bfloat16.
    let half_x = wave(&shape, 0.3, Kind::BFloat16).set_requires_grad(true);
    let batch = Batch::new(&half_x, &cond)?.with_real(&real)?;
    let float = |x: &Tensor, _: &Tensor, _: &Condition| x.flatten(1, -1).sin();
    let gan = Adversarial::new(RectifiedFlow, float).augmented(augmentation).independent();
    loss_of(&gan, &batch)?.backward();
    assert_eq!(half_x.grad().kind(), Kind::BFloat16);
    assert_eq!(gan.critic_loss(&batch)?.kind(), Kind::Float);
    Ok(())
}

#[test]
fn every_option_keeps_the_contract_and_each_turn_its_gradients() -> Result<()> {
    let _guard = seeded(45);
    let (x, real) = (leaf(&SHAPE, 0.3), double(&SHAPE, 1.3));
    let cond = Condition::from(double(&[3, 1], 0.9));
    type Option = fn(Adversarial<'_>) -> Result<Adversarial<'_>>;
    let options: [Option; 3] = [
        |gan| Ok(gan.independent()),
        |gan| gan.mismatched(0.4),
        |gan| Ok(gan.weighted(|t: &Tensor| t.square() + 0.1)),
    ];
    for option in options {
        let (x, weight) = (x.detach().copy().set_requires_grad(true), leaf(&[4, 2], 2.0));
        let critic = |x: &Tensor, _: &Tensor, c: &Condition| (x.matmul(&weight) + &c[0]).tanh();
        let gan = option(Adversarial::new(RectifiedFlow, critic))?;
        let batch = Batch::new(&x, &cond)?.with_real(&real)?;
        testing::check_own_loss(&gan, &batch).expect("its own loss");
        loss_of(&gan, &batch)?.backward();
        assert!(x.grad().defined() && !weight.grad().defined());
        let before = x.grad().copy();
        gan.critic_loss(&batch)?.backward();
        assert!(value(&weight.grad().abs().max()) > 0.0);
        assert!(x.grad().equal(&before) && !real.requires_grad());
    }
    Ok(())
}

#[test]
fn bad_options_are_named() -> Result<()> {
    let _guard = seeded(46);
    let (x, real, cond) = (leaf(&SHAPE, 0.3), double(&SHAPE, 1.3), Condition::none());
    let plain = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    let gan = || Adversarial::new(RectifiedFlow, plain);
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let named = |result: Result<Tensor>, argument: &str| matches!(result, Err(Error::OutOfRange { what, .. } | Error::Shape { what, .. }) if what == argument);
    for bad in [-0.1, 1.0, f64::NAN] {
        let made = gan().mismatched(bad);
        let what = "share of mismatched samples";
        assert!(matches!(made, Err(Error::OutOfRange { what: found, .. }) if found == what));
    }
    // The order of the setters does not matter.
    let relativistic = GanLoss::Relativistic;
    let torn =
        [gan().independent().gan_loss(relativistic), gan().gan_loss(relativistic).independent()];
    for gan in torn {
        assert!(named(gan.critic_loss(&batch), "independent draws"));
        assert!(named(loss_of(&gan, &batch), "independent draws"));
    }
    let torn = gan().gan_loss(relativistic).mismatched(0.5)?;
    assert!(named(torn.critic_loss(&batch), "share of mismatched samples"));
    let (one, real_one) = (leaf(&[1, 4], 0.3), double(&[1, 4], 1.3));
    let single = Batch::new(&one, &cond)?.with_real(&real_one)?;
    let found = gan().mismatched(0.5)?.critic_loss(&single);
    assert!(named(found, "number of samples to mismatch"));
    let scalar = gan().weighted(|t: &Tensor| t.mean(None));
    assert!(named(scalar.critic_loss(&batch), "weight of a time"));
    assert!(named(loss_of(&scalar, &batch), "weight of a time"));
    let failing = gan().weighted(|t: &Tensor| t.f_view([-7]));
    assert!(matches!(loss_of(&failing, &batch), Err(Error::Network { .. })));
    let flat = gan().augmented(Augmentation::new().blit());
    assert!(named(flat.critic_loss(&batch), "samples to augment"));
    let mut draw = gan().draw(&batch)?;
    draw.real = Some((half(2), double(&SHAPE, 5.0)));
    assert!(named(gan().critic_evaluation_with(&batch, &draw).map(|found| found.loss), "time"));
    draw.real = Some((half(3), Tensor::zeros([3, 5], (Kind::Double, Device::Cpu))));
    assert!(named(gan().critic_evaluation_with(&batch, &draw).map(|found| found.loss), "noise"));
    Ok(())
}
