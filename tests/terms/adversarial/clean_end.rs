//! D2O: the critic alone, at clean samples, on a student of which a part is frozen.

use std::cell::RefCell;

use decoupled_dmd::{
    Adversarial, Batch, Condition, Error, Group, Objective, PostShift, RectifiedFlow, Renoising,
    Result, Uniform, freeze_matching,
};
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::super::common::{
    Calls, DOUBLE, counting_teacher, gradient, max_difference, seeded, value, wave,
};
use super::{LOSSES, leaf};

fn clean() -> Renoising<'static> {
    Renoising::new(Uniform::new(1.0, 1.0).unwrap())
}

#[test]
fn the_critic_sees_clean_samples_and_the_teacher_is_never_asked() -> Result<()> {
    let _guard = seeded(61);
    let shape = [3i64, 4];
    let (x, real) = (leaf(&shape, 0.3), wave(&shape, 1.3, Kind::Double));
    let (cond, calls) = (Condition::from(Tensor::from(0.0)), Calls::default());
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let seen = RefCell::new(Vec::new());
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| {
        seen.borrow_mut().push((x.detach(), t.copy()));
        x.sin()
    };
    for gan_loss in LOSSES {
        let gan = Adversarial::new(RectifiedFlow, critic).renoising(clean()).gan_loss(gan_loss);
        let objective = Objective::new(counting_teacher(&calls, 1.0))
            .with(Group::new(clean()).engine_loss("gan", 1.0, &gan));
        seen.take();
        objective.evaluate(&batch)?.loss.backward();
        let _loss = gan.critic_loss(&batch)?;
        let seen = seen.take();
        // Relativistic: the generator sees both sides.
        let (fake, both) = (x.detach(), [x.detach(), real.copy()]);
        let expected: Vec<&Tensor> = if seen.len() == 4 {
            vec![&both[0], &both[1], &both[0], &both[1]]
        } else {
            vec![&fake, &both[0], &both[1]]
        };
        assert_eq!(seen.len(), expected.len());
        for ((found, time), clean) in seen.iter().zip(expected) {
            assert!(found.equal(clean) && value(&time.min()) >= 1.0);
        }
        assert!(value(&x.grad().abs().max()) > 0.0);
    }
    assert_eq!(calls.count(), 0);
    Ok(())
}

/// A critic of x and x^2 that starts at zero is at rest where mean and variance of the samples are those of
/// the data, and only there.
#[test]
fn a_critic_of_two_moments_rests_at_the_mean_and_variance_of_the_data() -> Result<()> {
    let weight = Tensor::zeros([2, 1], DOUBLE).set_requires_grad(true);
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| {
        Tensor::cat(&[x.shallow_clone(), x.square()], 1).matmul(&weight)
    };
    let cond = Condition::none();
    // Mean 0.5 and variance 2 in both, of two laws.
    let real = Tensor::from_slice(&[-1.5, 2.5, 0.5, 0.5]).view([4, 1]);
    let root = 2f64.sqrt();
    let same = Tensor::from_slice(&[0.5 - root, 0.5 + root, 0.5 - root, 0.5 + root]).view([4, 1]);
    let time = PostShift::all(1.0, 4, DOUBLE)?;
    let slope = |x: &Tensor| -> Result<Tensor> {
        let batch = Batch::new(x, &cond)?.with_real(&real)?;
        let gan = Adversarial::new(RectifiedFlow, critic).renoising(clean());
        let loss = gan.critic_loss_at(&batch, &time, &real, &real)?;
        Ok(gradient(&loss, &weight))
    };
    assert!(value(&slope(&same)?.abs().max()) < 1e-15);
    // Half the difference of the moments elsewhere.
    let moved = slope(&(&same + 0.4))?;
    assert!(
        max_difference(&moved, &Tensor::from_slice(&[0.2, 0.5 * (0.9 * 0.9 - 0.25)]).view([2, 1]))
            < 1e-14
    );
    Ok(())
}

/// The rule of D2O's optimizer, with the names of EDM's networks.
fn d2o(name: &str) -> bool {
    let holds = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
    holds(&["block", "up", "down", "in"]) && holds(&["conv", "proj"])
}

fn network(store: &nn::VarStore) -> Tensor {
    let root = store.root();
    for (name, size) in [
        ("enc.8x8_block0.conv0.weight", 9),
        ("enc.8x8_block0.affine.weight", 4),
        ("enc.8x8_block0.norm0.weight", 2),
        ("enc.8x8_block0.qkv.weight", 3),
        ("enc.8x8_block0.proj.weight", 5),
        ("dec.16x16_up.conv1.weight", 6),
        ("dec.16x16_up.skip.weight", 2),
        ("map_layer0.weight", 7),
    ] {
        let path = name.split('.').fold(root.clone(), |path, part| path / part);
        let _ = path.randn("p", &[size], 0.0, 1.0);
    }
    let _statistics = (root / "block_in" / "conv").zeros_no_train("mean", &[3]);
    Tensor::cat(&store.trainable_variables(), 0)
}

#[test]
fn a_part_is_frozen_by_name_and_stays() -> Result<()> {
    let _guard = seeded(62);
    let mut store = nn::VarStore::new(Device::Cpu);
    // A gradient from before must not move what is frozen later.
    network(&store).square().sum(None).backward();
    let frozen = freeze_matching(&mut store, d2o)?;
    assert_eq!((frozen.tensors, frozen.elements), (3, 9 + 5 + 6));
    approx::assert_relative_eq!(frozen.share, 20.0 / 38.0);
    let variables = store.variables();
    for (name, tensor) in &variables {
        assert!(!tensor.grad().defined(), "{name}");
        let trains = !d2o(name) && !name.ends_with("mean");
        assert_eq!(tensor.requires_grad(), trains, "{name}");
    }
    let before: Vec<(String, Tensor)> =
        variables.iter().map(|(name, tensor)| (name.clone(), tensor.detach().copy())).collect();
    let mut optimizer = nn::AdamW { wd: 0.1, ..nn::AdamW::default() }.build(&store, 0.05)?;
    for _ in 0..10 {
        let all = Tensor::cat(&store.trainable_variables(), 0);
        optimizer.backward_step(&all.square().sum(None));
    }
    for (name, old) in before {
        let same = store.variables()[&name].equal(&old);
        assert_eq!(same, d2o(&name) || name.ends_with("mean"), "{name}");
    }
    Ok(())
}

#[test]
fn a_name_that_fits_nothing_or_everything_is_refused() -> Result<()> {
    let _guard = seeded(63);
    let mut store = nn::VarStore::new(Device::Cpu);
    let refused = |store: &mut nn::VarStore, matches: fn(&str) -> bool, count: f64| {
        let found = freeze_matching(store, matches);
        matches!(found, Err(Error::OutOfRange { what: "number of parameters that match", value, .. })
            if (value - count).abs() < 0.5)
    };
    assert!(refused(&mut store, |_| true, 0.0), "an empty store");
    let _ = network(&store);
    assert!(refused(&mut store, |name| name.contains("convolution"), 0.0));
    assert!(refused(&mut store, |_| true, 8.0));
    // A statistic is no parameter: it is neither frozen nor counted.
    assert!(refused(&mut store, |name| name.ends_with("mean"), 0.0));
    assert!(store.trainable_variables().iter().all(Tensor::requires_grad));
    let frozen = freeze_matching(&mut store, |name| name.contains("map"))?;
    approx::assert_relative_eq!(frozen.share, 7.0 / 38.0);
    // The share of a second call is of what was left.
    let frozen = freeze_matching(&mut store, |name| name.contains("skip"))?;
    approx::assert_relative_eq!(frozen.share, 2.0 / 31.0);
    Ok(())
}
