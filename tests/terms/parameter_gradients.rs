//! The losses of networks: gradients in their parameters against central differences in float64.

use decoupled_dmd::{
    Adversarial, Batch, Condition, CriticPenalty, Denoiser, DistributionMatching, GanLoss,
    PostShift, Prediction, RectifiedFlow, Result, Weighting,
};
use tch::{Kind, Tensor};

use super::central_differences;
use super::common::{gradient, max_difference, paths, value, wave};

const SHAPE: [i64; 3] = [3, 2, 2];

fn double(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double)
}

/// Compares the gradient of `loss` in parameters at `values` with central differences.
fn check(case: &str, values: &Tensor, loss: impl Fn(&Tensor) -> Result<Tensor>) -> Result<()> {
    let parameters = values.detach().set_requires_grad(true);
    let found = gradient(&loss(&parameters)?, &parameters);
    let expected = central_differences(values, |at| value(&loss(at).unwrap()));
    let error = max_difference(&found, &expected) / value(&expected.abs().max());
    // NaN is above every tolerance.
    assert!(error < 1e-7, "{case}: {error:e}");
    Ok(())
}

#[test]
fn the_denoising_loss_of_every_prediction_and_weighting() -> Result<()> {
    let (x, noise, cond) = (double(&SHAPE, 0.3), double(&SHAPE, 5.0), double(&SHAPE, 1.1).into());
    let mask = Tensor::from_slice(&[true, true, false]);
    let time = PostShift::new(Tensor::from_slice(&[0.2, 0.5, 0.8]))?;
    let mut weightings = vec![Weighting::UNIFORM, Weighting::min_snr(5.0)?, Weighting::edm(0.5)?];
    weightings.extend(Prediction::ALL.map(Weighting::measured_as));
    let parameters = Tensor::from_slice(&[0.6, -0.4, 1.3]);
    for (which, path) in paths().iter().enumerate() {
        for prediction in Prediction::ALL {
            for (index, &weighting) in weightings.iter().enumerate() {
                let loss = |parameters: &Tensor| {
                    let network = |x: &Tensor, t: &Tensor, c: &Condition| {
                        let [scale, of_time, of_cond] =
                            [0, 1, 2].map(|index| parameters.get(index));
                        (x * scale + t.view([-1, 1, 1]) * of_time + &c[0] * of_cond).sin()
                    };
                    let fake = Denoiser::new(path, prediction, network);
                    let dm = DistributionMatching::new(fake).weighting(weighting);
                    let mut batch = Batch::new(&x, &cond)?;
                    if index % 2 == 0 {
                        batch = batch.with_mask(&mask)?;
                    }
                    dm.denoising_loss_at(&batch, &time, &noise)
                };
                check(&format!("path {which}, {prediction:?}, {weighting:?}"), &parameters, loss)?;
            }
        }
    }
    Ok(())
}

#[test]
fn what_a_mask_leaves_out_may_be_anything() -> Result<()> {
    let (noise, cond) = (double(&SHAPE, 5.0), Condition::none());
    let time = PostShift::new(Tensor::from_slice(&[0.2, 0.5, 0.8]))?;
    let weight = Tensor::from(0.6).set_requires_grad(true);
    let slope = |x: &Tensor, mask: &Tensor| -> Result<Tensor> {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| (x * &weight).sin();
        let fake = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
        let dm = DistributionMatching::new(fake);
        let loss = dm.denoising_loss_at(&Batch::new(x, &cond)?.with_mask(mask)?, &time, &noise)?;
        assert!(value(&loss).is_finite());
        Ok(gradient(&loss, &weight))
    };
    // One of three samples, and one element of each.
    let per_element = Tensor::from_slice(&[true, true, true, false]).view([1, 2, 2]);
    for mask in [Tensor::from_slice(&[true, false, true]), per_element] {
        let x = double(&SHAPE, 0.3);
        let expected = slope(&x, &mask)?;
        let kept = if mask.dim() == 1 { mask.view([3, 1, 1]) } else { mask.shallow_clone() };
        for left_out in [f64::NAN, f64::INFINITY] {
            let found = slope(&x.where_scalarother(&kept, left_out), &mask)?;
            assert_eq!(found, expected, "{left_out}");
        }
    }
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
            check(&format!("{gan_loss:?}, {penalty:?}"), &parameters, loss)?;
        }
    }
    Ok(())
}
