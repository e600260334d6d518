//! The penalty alone: lazy R1, its rows, and the law of summed logits.

use decoupled_dmd::{
    Adversarial, Batch, Condition, CriticPenalty, Error, PreShift, RectifiedFlow, Result,
};
use tch::{Kind, Tensor};

use super::super::common::{gradient, max_difference, seeded, value, wave};
use super::{half, leaf};

const SHAPE: [i64; 2] = [3, 4];
const PENALTIES: [CriticPenalty; 2] =
    [CriticPenalty::R1 { gamma: 0.7 }, CriticPenalty::ApproximateR1 { weight: 3.0, sigma: 0.1 }];

#[test]
fn the_penalty_alone_is_what_it_adds_to_the_loss() -> Result<()> {
    let (x, real) = (leaf(&SHAPE, 0.3), wave(&SHAPE, 1.3, Kind::Double));
    let (cond, noise) = (Condition::none(), wave(&SHAPE, 5.0, Kind::Double));
    let (n, weight) = (wave(&SHAPE, 6.0, Kind::Double), leaf(&[4, 2], 2.0));
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight).sin();
    let plain = || Adversarial::new(RectifiedFlow, critic);
    for penalty in PENALTIES {
        let eager = plain().penalty(penalty)?.critic_loss_at(&batch, &half(3), &noise, &n)?;
        let alone = plain().penalty_loss_at(&batch, penalty, &half(3), &noise, &n)?;
        let lazy = plain().critic_loss_at(&batch, &half(3), &noise, &n)? + &alone;
        assert!(lazy.equal(&eager), "{penalty:?}");
        // The critic learns from it, and nobody else.
        let slope = gradient(&alone, &weight);
        assert!(value(&slope.abs().max()) > 1e-3);
        alone.backward();
        assert!(!x.grad().defined() && !real.requires_grad());
        // Rows that are taken one by one have the same mean: Diffusion2GAN penalises one at random.
        let mut sum = 0.0;
        for row in 0..3 {
            let of = |t: &Tensor| t.narrow(0, row, 1);
            let real = of(&real);
            let one = Batch::new(&x, &cond)?.with_real(&real)?;
            let found = plain().penalty_loss_at(&one, penalty, &half(1), &of(&noise), &of(&n))?;
            sum += value(&found) / 3.0;
        }
        approx::assert_relative_eq!(sum, value(&alone), max_relative = 1e-13);
    }
    let quiet =
        tch::no_grad(|| plain().penalty_loss_at(&batch, PENALTIES[0], &half(3), &noise, &n))?;
    assert!(value(&quiet) > 0.0);
    Ok(())
}

#[test]
fn a_penalty_on_summed_logits_is_k_squared_as_strong() -> Result<()> {
    let (x, real) = (leaf(&SHAPE, 0.3), wave(&SHAPE, 1.3, Kind::Double));
    let (cond, noise) = (Condition::none(), wave(&SHAPE, 5.0, Kind::Double));
    let logits = 7;
    let weight = leaf(&[4, logits], 2.0);
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let apart = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&weight).sin();
    let summed = |x: &Tensor, t: &Tensor, c: &Condition| {
        apart(x, t, c).sum_dim_intlist([1i64].as_slice(), true, None)
    };
    let square = (logits * logits) as f64;
    let (one, other) = (
        Adversarial::new(RectifiedFlow, apart).penalty_loss_at(
            &batch,
            CriticPenalty::R1 { gamma: 1e-4 * square },
            &half(3),
            &noise,
            &noise,
        )?,
        Adversarial::new(RectifiedFlow, summed).penalty_loss_at(
            &batch,
            CriticPenalty::R1 { gamma: 1e-4 },
            &half(3),
            &noise,
            &noise,
        )?,
    );
    approx::assert_relative_eq!(value(&one), value(&other), max_relative = 1e-13);
    assert!(max_difference(&gradient(&one, &weight), &gradient(&other, &weight)) < 1e-15);
    Ok(())
}

#[test]
fn bad_input_is_named() -> Result<()> {
    let _guard = seeded(51);
    let (x, real, cond) =
        (leaf(&SHAPE, 0.3), wave(&[5, 4], 1.3, Kind::BFloat16), Condition::none());
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.sin();
    let gan = Adversarial::new(RectifiedFlow, critic);
    // As many real samples as there are, in any floating-point type.
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    for penalty in PENALTIES {
        assert!(value(&gan.penalty_loss(&batch, penalty)?) > 0.0);
    }
    // Those of the student are the times of its own samples.
    let student = PreShift::new(Tensor::from_slice(&[0.0, 0.3, 0.6]))?;
    let timed = Batch::new(&x, &cond)?.with_real(&real)?.with_student_time(&student)?;
    assert!(value(&gan.penalty_loss(&timed, PENALTIES[0])?) > 0.0);
    let missing = gan.penalty_loss(&Batch::new(&x, &cond)?, PENALTIES[0]);
    assert!(matches!(
        missing,
        Err(Error::Missing { what: "real samples", setter: "Batch::with_real" })
    ));
    let bad = gan.penalty_loss(&batch, CriticPenalty::R1 { gamma: f64::NAN });
    assert!(matches!(bad, Err(Error::OutOfRange { what: "gamma of R1", .. })));
    let (five, three) = (wave(&[5, 4], 5.0, Kind::Double), wave(&SHAPE, 5.0, Kind::Double));
    let refused = |time, noise: &Tensor, n: &Tensor, argument: &str| {
        let found = gan.penalty_loss_at(&batch, PENALTIES[1], &half(time), noise, n);
        matches!(found, Err(Error::Shape { what, .. }) if what == argument)
    };
    assert!(refused(3, &five, &five, "time"));
    assert!(refused(5, &three, &five, "noise"));
    assert!(refused(5, &five, &three, "perturbation"));
    Ok(())
}
