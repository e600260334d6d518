//! The critic's loss with its logits, and R1 where there is no graph to follow.

use decoupled_dmd::{
    Adversarial, Batch, Condition, CriticPenalty, PostShift, RectifiedFlow, Result,
};
use tch::{Device, Kind, Tensor};

use super::super::common::{max_difference, value, wave};

const SHAPE: [i64; 2] = [3, 4];
const R1: CriticPenalty = CriticPenalty::R1 { gamma: 0.5 };

fn half() -> PostShift {
    PostShift::all(0.5, 3, (Kind::Double, Device::Cpu)).unwrap()
}

fn tensors() -> (Tensor, Tensor, Tensor) {
    let noise = wave(&SHAPE, 5.0, Kind::Double);
    (wave(&SHAPE, 0.3, Kind::Double), wave(&SHAPE, 1.3, Kind::Double), noise)
}

#[test]
fn the_logits_are_those_of_both_sides_and_have_no_graph() -> Result<()> {
    let (x, real, noise) = tensors();
    let weight = wave(&[4, 2], 3.0, Kind::Double).set_requires_grad(true);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight);
    let gan = Adversarial::new(RectifiedFlow, critic).penalty(R1)?;
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let found = gan.critic_evaluation_at(&batch, &half(), &noise, &noise)?;
    let logits = |side: &Tensor| (side * 0.5 + &noise * 0.5).matmul(&weight);
    assert!(max_difference(&found.fake_logits, &logits(&x)) < 1e-15);
    assert!(max_difference(&found.real_logits, &logits(&real)) < 1e-15);
    assert!(!found.fake_logits.requires_grad() && !found.real_logits.requires_grad());
    assert!(found.loss.requires_grad());
    let alone = gan.critic_loss_at(&batch, &half(), &noise, &noise)?;
    assert_eq!(value(&found.loss), value(&alone));
    Ok(())
}

#[test]
fn the_report_counts_what_is_judged_right() -> Result<()> {
    let x = Tensor::from_slice(&[-1.0, -3.0, 2.0, -2.0]).view([4, 1]);
    let real = Tensor::from_slice(&[4.0, 2.0, -2.0, -1.0]).view([4, 1]);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x * 2.0;
    let gan = Adversarial::new(RectifiedFlow, critic);
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let time = PostShift::all(0.5, 4, (Kind::Double, Device::Cpu))?;
    let none = x.zeros_like();
    let report = gan.critic_evaluation_at(&batch, &time, &none, &none)?.report()?;
    let expected = [
        ("real_logit", 0.75),
        ("fake_logit", -1.0),
        ("logit_gap", 1.75),
        ("real_accuracy", 0.5),
        ("fake_accuracy", 0.75),
    ];
    assert_eq!(report, expected);
    Ok(())
}

#[test]
fn r1_has_its_value_where_the_caller_wants_no_graph() -> Result<()> {
    let (x, real, noise) = tensors();
    let weight = wave(&[4, 1], 3.0, Kind::Double).set_requires_grad(true);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight).tanh();
    let gan = Adversarial::new(RectifiedFlow, critic).penalty(R1)?;
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let with = gan.critic_loss_at(&batch, &half(), &noise, &noise)?;
    let without = {
        let _no_grad = tch::no_grad_guard();
        let loss = gan.critic_loss_at(&batch, &half(), &noise, &noise)?;
        // The caller's no_grad still holds.
        assert!(!(&weight * 2.0).requires_grad());
        loss
    };
    assert!(with.requires_grad() && !without.requires_grad());
    assert_eq!(value(&with), value(&without));
    Ok(())
}

#[test]
fn r1_of_a_critic_that_cannot_be_followed_is_zero() -> Result<()> {
    let (x, real, noise) = tensors();
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let weight = wave(&[4, 1], 3.0, Kind::Double);
    type Logits<'a> = &'a dyn Fn(&Tensor) -> Tensor;
    let cut = |x: &Tensor| tch::no_grad(|| x.matmul(&weight));
    let blind = |x: &Tensor| x.detach().narrow(1, 0, 1).zeros_like();
    for logits in [&cut as Logits<'_>, &blind] {
        let critic = |x: &Tensor, _: &Tensor, _: &Condition| logits(x);
        let plain = Adversarial::new(RectifiedFlow, critic);
        let penalised = Adversarial::new(RectifiedFlow, critic).penalty(R1)?;
        let loss = |gan: &Adversarial<'_>| gan.critic_loss_at(&batch, &half(), &noise, &noise);
        assert_eq!(value(&loss(&plain)?), value(&loss(&penalised)?));
    }
    Ok(())
}
