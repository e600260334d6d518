//! No number that is kept holds a graph.

use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, Denoiser, Diagnostics, DistributionMatching,
    Draw, Group, Guidance, MeanVariance, Objective, PerSample, Prediction, RectifiedFlow,
    Renoising, Result, Uniform, engine_fn, regularizer_fn,
};
use tch::{Kind, Tensor};

use super::SHAPE;
use crate::common::wave;

/// All tensors of the diagnostics that can be had from outside.
fn tensors(all: &Diagnostics) -> Vec<(String, Tensor)> {
    let mut found = Vec::new();
    let mut numbers = |name: String, some: Option<&PerSample>| {
        if let Some(some) = some {
            found.push((name.clone(), some.values().shallow_clone()));
            found.push((name.clone(), some.defined().shallow_clone()));
        }
    };
    for (name, some) in [("mean", &all.x_mean), ("std", &all.x_std), ("rms", &all.x_rms)] {
        numbers(name.into(), Some(some));
    }
    for (term, of) in &all.terms {
        numbers(format!("{term} update_rms"), of.update_rms.as_ref());
        numbers(format!("{term} n"), of.n.as_ref());
        numbers(format!("{term} on_guard"), of.on_guard.as_ref());
        if let Some(scores) = &of.scores {
            numbers(format!("{term} rel_gap"), Some(&scores.rel_gap));
            numbers(format!("{term} cos"), Some(&scores.cos));
            numbers(format!("{term} mag_ratio"), Some(&scores.mag_ratio));
        }
        for (other, _) in &all.terms {
            let cos = all.update_cos(term, other).unwrap();
            numbers(format!("{term} {other} cos"), cos.as_ref());
        }
    }
    for (term, of) in &all.terms {
        found.push((format!("{term} tau"), of.tau.shallow_clone()));
        for (name, observed) in &of.observations {
            found.push((format!("{term} {name}"), observed.shallow_clone()));
        }
    }
    found
}

#[test]
fn nothing_that_is_kept_has_a_graph() -> Result<()> {
    // Whatever a graph could lead to has one: samples, and each network.
    let leaf = |phase| wave(&SHAPE, phase, Kind::Double).set_requires_grad(true);
    let [x, cond, null] = [0.3, 1.1, 2.9].map(leaf);
    let (cond, null) = (Condition::from(cond), Condition::from(null));
    let weights = [0.5, 0.8, 0.3].map(|weight| Tensor::from(weight).set_requires_grad(true));
    let learned = |weight: &Tensor| {
        let weight = weight.shallow_clone();
        let network = move |x: &Tensor, _: &Tensor, c: &Condition| x * &weight + &c[0];
        Denoiser::new(RectifiedFlow, Prediction::Sample, network)
    };
    let critic = |x: &Tensor, _: &Tensor, _: &Condition| (x * &weights[2]).flatten(1, -1);
    let half = Tensor::from_slice(&[true, false, true]);
    for mask in [None, Some(half)] {
        let dm = DistributionMatching::new(learned(&weights[1]));
        let own = regularizer_fn(|probe| {
            let loss = probe.x().f_square()?.f_mean(None)?;
            // Made before, with its graph.
            probe.observe("loss", || Ok(loss.shallow_clone()))?;
            probe.observe("root", || Ok(loss.f_sqrt()?))?;
            Ok(loss)
        });
        let objective = Objective::new(learned(&weights[0])).observed().with(
            Group::new(Renoising::new(Uniform::FULL))
                .engine("ca", 1.0, CfgAugmentation::new(Guidance::new(4.0)?))
                .engine("drawn", 1.0, engine_fn(|probe| Ok(probe.x().f_neg()?)))
                .regularizer("dm", 1.0, &dm)
                .regularizer("mv", 1.0, MeanVariance::per_sample(0.0, 1.0)?)
                .regularizer("gan", 1.0, Adversarial::new(RectifiedFlow, critic))
                .regularizer("own", 1.0, own),
        );
        let mut batch = Batch::new(&x, &cond)?.with_null(&null);
        if let Some(mask) = &mask {
            batch = batch.with_mask(mask)?;
        }
        let draw = Draw {
            u: Tensor::from_slice(&[0.2, 0.5, 0.7]),
            noise: wave(&SHAPE, 5.0, Kind::Double),
        };
        let evaluation = objective.evaluate_at(&batch, vec![draw])?;
        assert!(evaluation.loss.requires_grad());
        let all = tensors(&evaluation.diagnostics.expect("observed"));
        // Of the samples 6; of six updates 6 x 2, their cosines 36 x 2; n and on_guard of two
        // terms 4 x 2; scores 3 x 2; a tau each; logit, loss and root.
        assert_eq!(all.len(), 6 + 12 + 72 + 8 + 6 + 6 + 3);
        for (name, tensor) in all {
            assert!(!tensor.requires_grad(), "{name}");
        }
    }
    Ok(())
}
