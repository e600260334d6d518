//! A model of a few thousand parameters and three captions for it.

use anyhow::Result;
use tch::{Device, Kind};
use zimage::Config;
use zimage::ZImageTransformer;
use zimage::distil::Prompts;
use zimage::emoji::Vocabulary;

use super::narrow::narrow;
use super::{wave, workspace};

/// A teacher whose zero-initialised parts are filled, so that captions and time matter.
pub fn teacher() -> Result<ZImageTransformer> {
    let config = Config { all_patch_size: vec![4], in_channels: 3, cap_feat_dim: 64, ..narrow() };
    let model = ZImageTransformer::init(config, Device::Cpu)?;
    let _guard = tch::no_grad_guard();
    for (phase, tensor) in (0..).zip(model.parameters().values()) {
        let _ = tensor
            .shallow_clone()
            .f_add_(&(wave(&tensor.size(), phase as f64, Kind::Float) * 0.05))?;
    }
    Ok(model)
}

/// Three captions of waves, of which the second is not a number where one is to be `broken`.
pub fn waves(teacher: &ZImageTransformer, broken: bool) -> Result<Prompts> {
    let features = |phase: f64| wave(&[3, 64], phase, Kind::Float);
    let factor = if broken { f64::NAN } else { 1.0 };
    let captions = [features(0.0), features(1.0) * factor, features(2.0)].map(Ok);
    Prompts::from_features(teacher, captions, &features(3.0))
}

/// Three captions, encoded by `teacher`.
pub fn prompts(teacher: &ZImageTransformer) -> Result<Prompts> {
    let vocabulary = Vocabulary::load(&workspace("assets/emoji"))?;
    let captions = ["google cat face", "twitter pizza", "google red heart"];
    vocabulary.encode_prompts(teacher, captions.into_iter())
}
