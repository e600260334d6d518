//! Gradients of both players: where they end, and their values.

use std::cell::RefCell;

use decoupled_dmd::{
    Adversarial, Batch, Condition, CriticPenalty, GanLoss, PostShift, RectifiedFlow, Result,
};
use tch::{Kind, Tensor};

use super::super::check_parameter_gradient;
use super::super::common::{gradient, loss_of, max_difference, value, wave};
use super::{half, leaf};

const SHAPE: [i64; 3] = [3, 2, 2];

fn double(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double)
}

#[test]
fn pitfall_11_each_step_leaves_the_other_player_alone() -> Result<()> {
    let cond = Condition::none();
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        let (x, real) = (leaf(&[3, 4], 0.3), wave(&[3, 4], 1.3, Kind::Double));
        // A trunk that is not even frozen by the user, and a head.
        let (trunk, head) = (leaf(&[4, 5], 2.0), leaf(&[5, 2], 3.0));
        let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&trunk).tanh().matmul(&head);
        let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
        let gan = gan.penalty(CriticPenalty::R1 { gamma: 0.1 })?;
        let batch = Batch::new(&x, &cond)?.with_real(&real)?;

        loss_of(&gan, &batch)?.backward();
        assert!(value(&x.grad().abs().max()) > 1e-3, "{gan_loss:?}");
        assert!(!trunk.grad().defined() && !head.grad().defined(), "{gan_loss:?}");
        // The gradient is the gradient of the chain through the trunk.
        let logits = |t: &Tensor| {
            let noised: Tensor = 0.5 * t + 0.5 * wave(&[3, 4], 5.0, Kind::Double);
            noised.matmul(&trunk).tanh().matmul(&head)
        };
        let (fake, judged) = (logits(&x), logits(&real));
        let plain = match gan_loss {
            GanLoss::NonSaturating => (-fake).softplus().mean(None),
            GanLoss::Hinge => -fake.mean(None),
            _ => (judged - fake).softplus().mean(None),
        };
        assert!(max_difference(&x.grad(), &gradient(&plain, &x)) < 1e-16, "{gan_loss:?}");

        let before = x.grad().copy();
        let noise = wave(&[3, 4], 5.0, Kind::Double);
        gan.critic_loss_at(&batch, &half(3), &noise, &noise)?.backward();
        assert!(trunk.grad().defined() && head.grad().defined());
        assert!(x.grad().equal(&before) && !real.requires_grad());
    }
    Ok(())
}

#[test]
fn pitfall_11_approximate_r1_moves_the_noised_sample_and_tends_to_r1() -> Result<()> {
    // Four samples at one place, moved along +- sqrt(2) e_i: the mean over n is exact for a plane.
    let x = leaf(&[4, 2], 0.3);
    let real = Tensor::from_slice(&[0.3, -0.8]).expand([4, 2], false);
    let noise = Tensor::from_slice(&[0.5, 1.0]).expand([4, 2], false);
    let root = 2f64.sqrt();
    let perturbation =
        Tensor::from_slice(&[root, 0.0, -root, 0.0, 0.0, root, 0.0, -root]).view([4, 2]);
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let seen = RefCell::new(Vec::new());
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| {
        seen.borrow_mut().push(x.detach());
        (x * Tensor::from_slice(&[1.0, -2.0])).sin().sum_dim_intlist(&[1i64][..], true, None)
    };
    let loss = |penalty: CriticPenalty| -> Result<f64> {
        let gan = Adversarial::new(RectifiedFlow, critic).penalty(penalty)?;
        Ok(value(&gan.critic_loss_at(&batch, &half(4), &noise, &perturbation)?))
    };
    let none = loss(CriticPenalty::R1 { gamma: 0.0 })?;
    let exact = loss(CriticPenalty::R1 { gamma: 2.0 })? - none;
    let mut errors = Vec::new();
    for sigma in [0.1, 0.01, 0.001] {
        seen.borrow_mut().clear();
        // gamma = 2 weight sigma^2
        let weight = 1.0 / (sigma * sigma);
        let approximate = loss(CriticPenalty::ApproximateR1 { weight, sigma })? - none;
        errors.push((approximate / exact - 1.0).abs());
        let seen = seen.borrow();
        let noised: Tensor = 0.5 * &real + 0.5 * &noise;
        assert_eq!(seen.len(), 3);
        assert!(max_difference(&seen[1], &noised) < 1e-15);
        assert!(max_difference(&seen[2], &(noised + sigma * &perturbation)) < 1e-15);
    }
    assert!(errors[0] < 0.1 && errors[1] < 1e-3 && errors[2] < 1e-5, "{errors:?}");
    Ok(())
}

#[test]
fn the_loss_of_the_critic_in_every_form_with_every_penalty() -> Result<()> {
    let (x, real) = (double(&SHAPE, 0.3), double(&SHAPE, 1.3));
    let (noise, perturbation) = (double(&SHAPE, 5.0), double(&SHAPE, 7.0));
    let (cond, real_cond) = (double(&[3, 2], 1.1).into(), double(&[3, 2], 3.7).into());
    let batch = Batch::new(&x, &cond)?.with_real(&real)?.with_real_cond(&real_cond);
    let time = PostShift::new(Tensor::from_slice(&[0.2, 0.5, 0.8]))?;
    // A trunk of 4 to 3 and a head of 3 to 2 logits.
    let parameters = double(&[18], 0.9);
    let penalties = [
        None,
        Some(CriticPenalty::R1 { gamma: 0.7 }),
        Some(CriticPenalty::ApproximateR1 { weight: 3.0, sigma: 0.1 }),
    ];
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        for penalty in penalties {
            let loss = |parameters: &Tensor| {
                let (trunk, head) = (parameters.narrow(0, 0, 12), parameters.narrow(0, 12, 6));
                let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
                    let hidden = x.flatten(1, -1).matmul(&trunk.view([4, 3])) + t.unsqueeze(1);
                    hidden.tanh().matmul(&head.view([3, 2])) + &c[0] * 0.3
                };
                let mut gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
                if let Some(penalty) = penalty {
                    gan = gan.penalty(penalty)?;
                }
                gan.critic_loss_at(&batch, &time, &noise, &perturbation)
            };
            check_parameter_gradient(&format!("{gan_loss:?}, {penalty:?}"), &parameters, loss)?;
        }
    }
    Ok(())
}
