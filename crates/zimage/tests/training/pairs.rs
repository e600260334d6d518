//! Pairs of noise and the teacher's sample: made once, resumed, refused where they do not fit.

use std::fs;

use anyhow::Result;
use decoupled_dmd::{FewStepGrid, Guidance, Sampler, Shift, Transition};
use tch::{Device, Kind, Tensor};
use tch_training::safetensors::write_tensors;
use tempfile::tempdir;
use zimage::distil::{PairSettings, Pairs, Sampling, denoiser};

use super::common::tiny::{prompts, teacher};
use super::common::{max_difference, seeded};

fn settings() -> Result<PairSettings> {
    let guidance = Guidance::new(3.0)?;
    Ok(PairSettings {
        items: vec![0, 1, 2],
        size: [3, 16, 16],
        sampling: Sampling { steps: 2, guidance, transition: Transition::Ddim },
        shift: Shift::new(3.0)?,
        seed: 0,
    })
}

#[test]
fn pairs_are_made_once_and_refused_where_they_do_not_fit() -> Result<()> {
    let _guard = seeded(6);
    let (teacher, folder) = (teacher()?, tempdir()?);
    let prompts = prompts(&teacher)?;
    let make = |settings: &PairSettings| Pairs::make(folder.path(), &teacher, &prompts, settings);
    let draw = |pairs: &Pairs| {
        tch::manual_seed(1);
        pairs.draw(5, Device::Cpu)
    };
    let settings = settings()?;
    let first = draw(&make(&settings)?)?;
    let file = folder.path().join("pairs-00000.safetensors");
    let written = fs::metadata(&file)?.modified()?;
    let again = draw(&make(&settings)?)?;
    assert_eq!(fs::metadata(&file)?.modified()?, written);
    assert_eq!((again.items, again.noise.size()), (first.items.clone(), vec![5, 3, 16, 16]));
    // What is lost is made again, from the same noise.
    fs::remove_file(&file)?;
    let remade = draw(&make(&settings)?)?;
    assert_eq!(max_difference(&remade.noise, &first.noise), 0.0);
    assert_eq!(max_difference(&remade.samples, &first.samples), 0.0);
    // A sample is the end of the teacher's way from its noise.
    let (cond, null) = prompts.conditions(&first.items)?;
    let denoiser = denoiser(&teacher, settings.shift);
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(2)?, Transition::Ddim);
    let expected = sampler.guided(settings.sampling.guidance, &null).sample(&first.noise, &cond)?;
    assert!(max_difference(&expected, &first.samples) < 1e-5);

    let other = PairSettings { seed: 1, ..settings.clone() };
    let error = make(&other).unwrap_err().to_string();
    assert!(error.contains("pairs of other settings"), "{error}");
    // Nor are pairs of another teacher taken.
    let another = teacher.duplicate()?;
    let _no_grad = tch::no_grad_guard();
    let mut weight = another.named_parameters().remove(0).1;
    let _ = weight.f_add_scalar_(0.5)?;
    let error = Pairs::make(folder.path(), &another, &prompts, &settings).unwrap_err().to_string();
    assert!(error.contains("another teacher"), "{error}");
    let short = Tensor::zeros([1, 3, 16, 16], (Kind::Float, Device::Cpu));
    let tensors = ["noise", "samples"].map(|name| (name.to_owned(), short.shallow_clone()));
    write_tensors(&file, &tensors.into())?;
    let error = make(&settings).unwrap_err().to_string();
    assert!(error.contains("expected [3, 3, 16, 16]"), "{error}");
    Ok(())
}
