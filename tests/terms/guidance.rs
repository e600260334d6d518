//! Forms of guidance: rescaled over the channels, and within an interval of times.

use std::cell::Cell;

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, Engine, FewStepGrid, Guidance, Normalizer,
    PostShift, Prediction, Probe, RectifiedFlow, Result, Sampler, Transition,
};
use tch::{Device, Kind, Tensor};

use super::common::{max_difference, value, wave};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Flow velocity `sin(x + c)`, counted.
fn teacher<'a>(forwards: &'a Cell<usize>) -> Denoiser<'a> {
    let network = move |x: &Tensor, _: &Tensor, c: &Condition| {
        forwards.set(forwards.get() + 1);
        (x + &c[0]).sin()
    };
    Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network)
}

fn direction(guidance: Guidance, times: &[f64]) -> Result<(Tensor, Tensor)> {
    let forwards = Cell::new(0);
    let teacher = teacher(&forwards);
    let x = wave(&[2, 3, 2, 2], 0.4, Kind::Double);
    let (cond, null) = (Condition::from(Tensor::from(0.7)), Condition::from(Tensor::from(-0.2)));
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    let tau = PostShift::new(Tensor::from_slice(times))?;
    let probe = Probe::at(&teacher, &batch, tau, wave(&[2, 3, 2, 2], 2.0, Kind::Double))?;
    let probe = probe.normalizer(Normalizer::OFF);
    let found = CfgAugmentation::new(guidance).direction(&probe)?;
    Ok((found, probe.noised().shallow_clone()))
}

#[test]
fn rescaled_guidance_has_the_norm_of_the_conditional_output_at_each_place() -> Result<()> {
    let (found, noised) = direction(Guidance::new(4.0)?.rescaled(), &[0.3, 0.6])?;
    let (cond, null) = ((&noised + 0.7).sin(), (&noised - 0.2).sin());
    let plain = &null + (&cond - &null) * 4.0;
    let norm = |t: &Tensor| t.square().sum_dim_intlist([1i64].as_slice(), true, None).sqrt();
    let guided = &plain * norm(&cond) / norm(&plain);
    assert!(max_difference(&norm(&guided), &norm(&cond)) < 1e-14);
    // x0 = x_t - (1 - t) u.
    let level = Tensor::from_slice(&[0.7, 0.4]).view([2, 1, 1, 1]);
    assert!(max_difference(&found, &((&cond - guided) * level)) < 1e-14);
    assert!(value(&found.abs().max()) > 0.01);
    Ok(())
}

#[test]
fn within_an_interval_guidance_is_plain_and_outside_it_is_none() -> Result<()> {
    let guidance = Guidance::new(4.0)?.within(0.5, 1.0)?;
    let (found, _) = direction(guidance, &[0.3, 0.6])?;
    let (plain, _) = direction(Guidance::new(4.0)?, &[0.3, 0.6])?;
    assert!(value(&found.get(0).abs().max()) <= 0.0);
    assert!(max_difference(&found.get(1), &plain.get(1)) < 1e-14);
    assert!(value(&plain.get(0).abs().max()) > 0.01);
    Ok(())
}

#[test]
fn a_sampler_asks_the_null_branch_only_where_guidance_acts() -> Result<()> {
    let forwards = Cell::new(0);
    let teacher = teacher(&forwards);
    let (cond, null) = (Condition::from(Tensor::from(0.7)), Condition::from(Tensor::from(-0.2)));
    let noise = Tensor::ones([2, 3], DOUBLE);
    for (guidance, expected) in [
        (Guidance::new(4.0)?, 8),
        (Guidance::new(4.0)?.within(0.5, 1.0)?, 6),
        (Guidance::new(4.0)?.within(0.8, 1.0)?, 4),
        (Guidance::NEUTRAL, 4),
    ] {
        forwards.set(0);
        let sampler = Sampler::new(&teacher, FewStepGrid::even(4)?, Transition::Ddim);
        let _samples = sampler.guided(guidance, &null).sample(&noise, &cond)?;
        assert_eq!(forwards.get(), expected, "{guidance:?}");
    }
    Ok(())
}

/// Auto-guidance by a weak model of another prediction: what is guided is the clean sample.
#[test]
fn outputs_of_two_predictions_are_guided_by_their_clean_samples() -> Result<()> {
    let (x, time) = (wave(&[2, 3, 2, 2], 0.4, Kind::Double), Tensor::from_slice(&[0.3, 0.6]));
    let level: Tensor = 1.0 - &time;
    let level = level.view([2, 1, 1, 1]);
    let time = PostShift::new(time)?;
    // One and the same weak model, x0 = sin x, and a strong one.
    let as_sample = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, _: &Tensor, _: &Condition| x.sin(),
    );
    let of_flow = |x: &Tensor, _: &Tensor, _: &Condition| -> Tensor { (x - x.sin()) / &level };
    let as_flow = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, of_flow);
    let forwards = Cell::new(0);
    let (strong, cond) = (teacher(&forwards), Condition::from(Tensor::from(0.7)));
    let guided = |strong: &Denoiser<'_>, weak: &Denoiser<'_>, guidance| -> Result<Tensor> {
        let strong = strong.predict(&x, &time, &cond)?;
        strong.guided(&weak.predict(&x, &time, &cond)?, guidance)?.into_sample()
    };
    let guidance = Guidance::new(3.0)?;
    let expected = guided(&strong, &as_flow, guidance)?;
    assert!(max_difference(&guided(&strong, &as_sample, guidance)?, &expected) < 1e-14);
    let same = guided(&as_flow, &as_sample, guidance.rescaled())?;
    assert!(max_difference(&same, &x.sin()) < 1e-14);
    Ok(())
}
