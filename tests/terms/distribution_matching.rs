//! Distribution Matching: its direction, the loss of its fake score, and a training.

use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, Normalizer, PostShift, Prediction, Probe,
    RectifiedFlow, Regularizer, Result, Weighting,
};
use tch::{Kind, Tensor};

use super::check_parameter_gradient;
use super::common::paper::{FAKE_VARIANCE, TEACHER_VARIANCE, mean_abs, setting};
use super::common::{
    gaussian_denoiser, gaussian_teacher, gradient, max_difference, paths, value, wave,
};

const SHAPE: [i64; 3] = [3, 2, 2];

fn double(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double)
}

#[test]
fn equation_2_dm_follows_teacher_minus_fake() -> Result<()> {
    let s = setting(Kind::Double);
    let teacher = gaussian_teacher(TEACHER_VARIANCE);
    let dm = DistributionMatching::new(gaussian_teacher(FAKE_VARIANCE));
    let batch = s.batch();
    let tau = PostShift::new(s.u.shallow_clone())?;
    let probe = Probe::at(&teacher, &batch, tau, s.noise.shallow_clone())?;
    let [_, cond, _, fake] = s.predictions();
    let expected = (&cond - fake) / mean_abs(&(&s.x - &cond)).clamp_min(0.1);
    assert!(max_difference(&dm.direction(&probe)?, &expected) < 1e-14);
    let slope = gradient(&dm.loss(&probe)?, &s.x);
    assert!(max_difference(&slope, &(-expected / s.x.numel() as f64)) < 1e-16);
    Ok(())
}

#[test]
fn equations_1_and_2_the_mean_direction_is_the_slope_of_the_divergence() -> Result<()> {
    // Student N(m, v), teacher N(mu, r): KL(p_fake || p_real) at tau, differentiated in m.
    let (m, v, mu, r) = (0.7, FAKE_VARIANCE, -0.4, TEACHER_VARIANCE);
    for tau in [0.1, 0.5, 0.9] {
        let (a, s): (f64, f64) = (tau, 1.0 - tau);
        let (fake, real) = (a * a * v + s * s, a * a * r + s * s);
        let divergence =
            |m: f64| 0.5 * ((real / fake).ln() + (fake + (a * (m - mu)).powi(2)) / real - 1.0);
        let slope = (divergence(m + 1e-5) - divergence(m - 1e-5)) / 2e-5;
        // Scores are affine in x_tau, so two samples and noises about their means average exactly.
        let x = Tensor::from_slice(&[m - 1.0, m + 1.0]).view([2, 1]);
        let noise = Tensor::from_slice(&[-0.5, 0.5]).view([2, 1]);
        let cond = Condition::from(Tensor::from_slice(&[mu, m]));
        let of = |index: usize, variance| {
            Denoiser::new(
                RectifiedFlow,
                Prediction::Sample,
                move |x: &Tensor, t: &Tensor, c: &Condition| {
                    gaussian_denoiser(x, t, &c[0].get(index as i64), variance)
                },
            )
        };
        let dm = DistributionMatching::new(of(1, v));
        let (teacher, batch) = (of(0, r), Batch::new(&x, &cond)?);
        let tau = PostShift::new(Tensor::from_slice(&[tau, tau]))?;
        let probe = Probe::at(&teacher, &batch, tau, noise)?.normalizer(Normalizer::OFF);
        let direction = value(&dm.direction(&probe)?.mean(None));
        // d = (s^2 / a) (s_real - s_fake), and dx_tau/dm = a.
        approx::assert_relative_eq!(direction, -(s / a).powi(2) * slope, max_relative = 1e-8);
    }
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
                check_parameter_gradient(
                    &format!("path {which}, {prediction:?}, {weighting:?}"),
                    &parameters,
                    loss,
                )?;
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

mod training {
    use decoupled_dmd::{Error, Group, Objective, Renoising, Uniform};
    use tch::Device;
    use tch::nn::{self, OptimizerConfig};

    use super::super::common::seeded;
    use super::super::training::{BATCH, CENTER, Student, VARIANCE, perceptron};
    use super::*;

    #[test]
    fn distribution_matching_alone_reaches_the_mean_and_spread_of_the_data() -> Result<()> {
        let _guard = seeded(11);
        let center = Tensor::from_slice(&CENTER);
        let cond = Condition::from(center.expand([BATCH, 2], false));
        let vs = nn::VarStore::new(Device::Cpu);
        let network = perceptron(&vs.root(), 2);
        let fake = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
        let dm = DistributionMatching::new(fake);
        let objective = Objective::new(gaussian_teacher(VARIANCE)).with(
            Group::new(Renoising::new(Uniform::new(0.02, 0.98)?)).regularizer("dm", 1.0, &dm),
        );
        let mut fake_optimizer = nn::Adam::default().build(&vs, 2e-3).map_err(Error::from)?;
        let mut student = Student::new(2);
        let (start_offset, start_spread) = student.residual(&center);
        assert!(start_offset > 1.0 && start_spread > 1.0);
        for step in 0..2000 {
            let x = student.generate();
            let batch = Batch::new(&x, &cond)?;
            if step >= 100 && step % 2 == 0 {
                let evaluation = objective.evaluate(&batch)?;
                student.descend(&evaluation.loss, 0.02);
            }
            fake_optimizer.backward_step(&dm.denoising_loss(&batch)?);
        }
        let (offset, spread) = student.residual(&center);
        assert!(offset < 0.1, "offset {offset}");
        assert!((spread - VARIANCE.sqrt()).abs() < 0.1, "spread {spread}");
        Ok(())
    }
}
