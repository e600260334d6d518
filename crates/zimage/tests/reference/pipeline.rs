//! The pipeline from prompts to pixels against diffusers' ZImagePipeline (`scripts/reference/pipeline.py`).

use anyhow::Result;
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Transition};
use tch::{Device, Kind, Tensor};
use tch_training::safetensors::read_tensors;
use zimage::autoencoder::Decoder;
use zimage::distil::{Prompts, Renderer, Sampling, denoiser};
use zimage::model::Pipeline;
use zimage::text::TextEncoder;

use super::common::small_pipeline::Workplace;
use super::common::{assert_float32, bound_of, max_difference, reference, relative, seeded};

const PROMPTS: usize = 3;
const STEPS: usize = 8;

/// [-1, 1] and a little beyond to what pipelines return.
fn pixels(images: &Tensor) -> Tensor {
    (images / 2 + 0.5).clamp(0.0, 1.0)
}

#[test]
fn images_equal_those_of_diffusers() -> Result<()> {
    let _guard = seeded(3);
    let place = Workplace::new()?;
    let (kind, device) = (Kind::Float, Device::Cpu);
    let expected = read_tensors(&reference("pipeline/expected.safetensors"))?;
    let texts: Vec<String> = (0..PROMPTS)
        .map(|i| Ok(String::from_utf8(Vec::try_from(&expected[&format!("prompts/{i}")])?)?))
        .collect::<Result<_>>()?;
    let texts: Vec<&str> = texts.iter().map(String::as_str).chain([""]).collect();
    let mut features = TextEncoder::load(&place.model(), kind, device)?.encode(&texts)?;
    let empty = features.pop().expect("the empty prompt");
    let lengths: Vec<i64> = features.iter().map(|features| features.size()[0]).collect();
    assert_eq!(lengths, [17, 15, 47]);

    let base = Pipeline::load(&place.model(), kind, device)?;
    let prompts = Prompts::from_features(&base.transformer, features.into_iter().map(Ok), &empty)?;
    let latents = &expected["latents"];
    let model = place.model();
    let studio = Renderer::new(&model, &base, &prompts, 0, latents.shallow_clone());
    let decoder = Decoder::load(&model, kind, device)?;
    // The pipeline counts pos + g (pos - neg).
    for (name, guidance) in [("unguided", Guidance::NEUTRAL), ("guided", Guidance::from_w(3.0)?)] {
        let run = Sampling { steps: STEPS, guidance, transition: Transition::Ddim };
        let single = pixels(&studio.render(&base.transformer, run)?);
        assert_float32(&single, &expected, name);

        // What is of one padded length, as training batches it.
        let batches = prompts.batches(&[0, 1, 2], PROMPTS)?;
        assert_eq!(batches, [vec![0, 1], vec![2]]);
        let _guard = tch::no_grad_guard();
        let denoiser = denoiser(&base.transformer, base.shift);
        for batch in batches {
            let index = Tensor::from_slice(&batch);
            let (cond, null) = prompts.conditions(&batch)?;
            let grid = FewStepGrid::even(STEPS)?;
            let sampler = Sampler::new(&denoiser, grid, Transition::Ddim).guided(guidance, &null);
            let images =
                decoder.decode(&sampler.sample(&latents.index_select(0, &index), &cond)?)?;
            let expected_images = expected[name].index_select(0, &index);
            let (error, bound) =
                (relative(name, &pixels(&images), &expected_images), bound_of(&expected, name));
            println!("{name}, {batch:?} together: {error:.1e} of {bound:.1e}");
            assert!(error <= bound, "{name}, {batch:?} together: {error:e} > {bound:e}");
        }
    }
    // A picture is the same whatever was drawn before.
    let renoised =
        Sampling { steps: 2, guidance: Guidance::NEUTRAL, transition: Transition::Renoise };
    let first = studio.render(&base.transformer, renoised)?;
    assert_eq!(studio.render(&base.transformer, renoised)?, first);
    // Nothing above would notice if both were the same.
    assert!(max_difference(&expected["guided"], &expected["unguided"]) > 0.1);
    Ok(())
}
