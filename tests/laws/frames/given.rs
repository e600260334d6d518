//! Given frames: neither trained on nor noised.

use decoupled_dmd::{Batch, Condition, DistributionMatching, Group, Objective, Renoising, Uniform};
use tch::{Kind, Tensor};

use super::*;

/// The first frame of the first video, and the first two of the second.
fn given(shape: &[i64]) -> Tensor {
    let given =
        Tensor::from_slice(&[true, false, false, false, false, true, true, false, false, false]);
    let given = given.view([2, 5]);
    if shape == CHANNELS_FIRST { given.unsqueeze(1) } else { given }
}

/// A network that looks at all frames: what it says of the others depends on those that are given.
fn mixing(scale: f64) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor {
    let own = network(scale);
    move |x: &Tensor, t: &Tensor, c: &Condition| {
        let all = own(x, t, c);
        let rest: Vec<i64> = (1..).take(x.dim() - 1).collect();
        &all + all.mean_dim(rest.as_slice(), true, None)
    }
}

#[test]
fn given_frames_are_clean_and_left_out_on_every_path() -> Result<()> {
    for shape in [FRAMES_FIRST, CHANNELS_FIRST] {
        let (given, cond, null) = (given(&shape), double(&shape, 1.1), double(&shape, 2.2));
        let (cond, null) = (Condition::from(cond), Condition::from(null));
        let (x, noise) = (double(&shape, 0.3).set_requires_grad(true), double(&shape, 5.0));
        let drawn = double(&given.size(), 2.0) * 0.3 + 0.5;
        let times = drawn.where_self(&given.logical_not(), &drawn.ones_like());
        let kept = factor(&given.logical_not(), &x).expand_as(&x);
        for (index, path) in all_paths().iter().enumerate() {
            let model = |scale| Denoiser::new(&**path, Prediction::FlowVelocity, mixing(scale));
            let (teacher, dm) = (model(0.7), DistributionMatching::new(model(0.4)));
            let slopes = |batch: &Batch<'_>, tau: &Tensor| -> Result<[Tensor; 2]> {
                let tau = || PostShift::new(tau.shallow_clone());
                let probe = Probe::at(&teacher, batch, tau()?, noise.shallow_clone())?;
                let probe = probe.normalizer(Normalizer::conditional().over_frame());
                let ca = CfgAugmentation::new(Guidance::new(3.0)?).direction(&probe)?;
                let loss = dm.loss(&probe)? + probe.loss_of(&ca)?;
                Ok([gradient(&loss, &x), dm.denoising_loss_at(batch, &tau()?, &noise)?])
            };
            let batch = || -> Result<_> { Ok(Batch::new(&x, &cond)?.with_null(&null)) };
            // By hand: the mask, and times of 1.
            let expected = slopes(&batch()?.with_mask(&kept)?, &times)?;
            let found = slopes(&batch()?.with_given_frames(&given)?, &drawn)?;
            for (found, expected) in found.iter().zip(&expected) {
                assert!(found.equal(expected), "path {index}");
            }
            let of_given = found[0].masked_select(&kept.logical_not());
            assert_eq!(value(&of_given.abs().max()), 0.0);
            assert!(value(&found[0].abs().max()) > 0.0 && value(&found[1]).is_finite());
            // A mask beside it, said before or after.
            let mask = double(&shape, 4.0).gt(0.0);
            let both = mask.logical_and(&kept);
            let expected = slopes(&batch()?.with_mask(&both)?, &times)?;
            for batch in [
                batch()?.with_mask(&mask)?.with_given_frames(&given)?,
                batch()?.with_given_frames(&given)?.with_mask(&mask)?,
            ] {
                let found = slopes(&batch, &drawn)?;
                assert!(found.iter().zip(&expected).all(|(found, expected)| found.equal(expected)));
            }
        }
    }
    Ok(())
}

#[test]
fn a_time_of_the_sample_is_that_of_the_frames_that_are_not_given() -> Result<()> {
    let shape = CHANNELS_FIRST;
    let (given, cond) = (given(&shape), Condition::from(double(&shape, 1.1)));
    let x = double(&shape, 0.3).set_requires_grad(true);
    let handed = std::cell::RefCell::new(Vec::new());
    let network = network(0.5);
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        |x: &Tensor, t: &Tensor, c: &Condition| {
            handed.borrow_mut().push((x.shallow_clone(), t.shallow_clone()));
            network(x, t, c)
        },
    );
    let batch = Batch::new(&x, &cond)?.with_given_frames(&given)?;
    assert!(batch.given_frames().is_some_and(|frames| frames.equal(&given)));
    let dm = DistributionMatching::new(teacher.clone());
    let group = Group::new(Renoising::new(Uniform::new(0.2, 0.4)?)).regularizer("dm", 1.0, &dm);
    let draw = Draw { u: Tensor::from_slice(&[0.0, 1.0]), noise: double(&shape, 5.0) };
    let _ = Objective::new(teacher.clone()).with(group).evaluate_at(&batch, vec![draw])?;
    let handed = handed.borrow();
    let (noised, times) = &handed[0];
    let expected =
        Tensor::from_slice(&[1.0, 0.2, 0.2, 0.2, 0.2, 1.0, 1.0, 0.4, 0.4, 0.4]).view([2, 1, 5]);
    assert!(max_difference(times, &expected) < 1e-15);
    let untouched = factor(&given, &x).expand_as(&x);
    let difference = (noised - &x).masked_select(&untouched).abs().max();
    assert_eq!(value(&difference), 0.0, "no noise on a given frame");
    let time = batch.keep_given(&PostShift::new(Tensor::from_slice(&[0.25, 0.5]))?)?;
    assert_eq!((time.tensor().size(), time.range()), (vec![2, 1, 5], (0.25, 1.0)));
    Ok(())
}

#[test]
fn a_frame_without_an_element_that_counts_has_no_direction() -> Result<()> {
    let (x, cond) = (double(&FRAMES_FIRST, 0.3), Condition::from(double(&FRAMES_FIRST, 1.1)));
    let given = Tensor::ones([2, 5], (Kind::Bool, tch::Device::Cpu));
    let model = |scale| Denoiser::new(TrigFlow, Prediction::Velocity, network(scale));
    let (teacher, dm) = (model(0.7), DistributionMatching::new(model(0.4)));
    let batch = Batch::new(&x, &cond)?.with_given_frames(&given)?;
    for normalizer in [Normalizer::OFF, Normalizer::conditional().unguarded().over_frame()] {
        let tau = PostShift::new(Tensor::from_slice(&[0.25, 0.5]))?;
        let probe = Probe::at(&teacher, &batch, tau, double(&FRAMES_FIRST, 5.0))?;
        let direction = dm.direction(&probe.normalizer(normalizer))?;
        assert_eq!(value(&direction.abs().max()), 0.0);
    }
    Ok(())
}
