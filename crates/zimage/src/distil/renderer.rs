//! Pictures of a released model: prompts drawn from kept noise, through the autoencoder.

use std::path::Path;

use anyhow::{Result, ensure};
use decoupled_dmd::{FewStepGrid, Sampler, Shift};
use tch::{Device, Kind, Tensor};
use tch_training::parameters::is_finite;
use tch_training::seed::begin;

use crate::autoencoder::Decoder;
use crate::distil::adapter::denoiser;
use crate::distil::prompts::Prompts;
use crate::distil::sampling::Sampling;
use crate::distil::stream::Stream;
use crate::distil::weights::Network;
use crate::model::Pipeline;

/// Draws prompts, always from the same noise.
#[derive(Debug)]
pub struct Renderer<'a> {
    checkpoint: &'a Path,
    prompts: &'a Prompts,
    shift: Shift,
    device: Device,
    seed: u64,
    /// `[N, C, h, w]`; row i is that of prompt i.
    noise: Tensor,
}

impl<'a> Renderer<'a> {
    /// For pictures of the first N of `prompts` from `noise` `[N, C, h, w]`, decoded by `vae/` of the
    /// diffusers folder `checkpoint`, on the grid and the device of `base`. The noise that some transitions
    /// draw between steps depends on `seed`.
    pub fn new(
        checkpoint: &'a Path,
        base: &Pipeline,
        prompts: &'a Prompts,
        seed: u64,
        noise: Tensor,
    ) -> Self {
        let device = base.transformer.device();
        Self { checkpoint, prompts, shift: base.shift, device, seed, noise }
    }

    /// What pictures start from.
    pub fn noise(&self) -> &Tensor {
        &self.noise
    }

    /// Pictures `[N, 3, H, W]`, of which black is -1 and white is 1.
    ///
    /// # Errors
    /// If there are fewer prompts than rows of noise, the noise does not fit the model, the autoencoder cannot
    /// be read, or latents or pictures are not finite.
    pub fn render<'n>(&self, network: impl Into<Network<'n>>, run: Sampling) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let Sampling { steps, guidance, transition } = run;
        let denoiser = denoiser(network, self.shift);
        let grid = FewStepGrid::even(steps)?;
        // One after the other: captions differ in length.
        let latents = (0..self.noise.size()[0])
            .map(|item| {
                // Of the noise between steps, where there is some: that of a resumed run is the same.
                begin(self.seed, Stream::Picture(item as u64));
                let (cond, null) = self.prompts.conditions(&[item])?;
                let noise = self.noise.f_narrow(0, item, 1)?.f_to_device(self.device)?;
                let sampler = Sampler::new(&denoiser, grid.clone(), transition);
                Ok(sampler.guided(guidance, &null).sample(&noise, &cond)?)
            })
            .collect::<Result<Vec<_>>>()?;
        // Not kept while training, which needs the memory.
        let decoder = Decoder::load(self.checkpoint, Kind::Float, self.device)?;
        let latents = Tensor::f_cat(&latents, 0)?;
        ensure!(is_finite(&latents)?, "the transformer made latents that are not finite");
        let images = decoder.decode_in_parts(&latents, 1)?;
        ensure!(is_finite(&images)?, "the autoencoder made pictures that are not finite");
        Ok(images)
    }
}

/// Standard normal `[N, C, h, w]` for `count` pictures, the same on every device.
///
/// # Errors
/// If libtorch cannot allocate it.
pub fn draw_noise(seed: u64, count: usize, [channels, height, width]: [i64; 3]) -> Result<Tensor> {
    tch::manual_seed(seed as i64);
    let shape = [count as i64, channels, height, width];
    Ok(Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?)
}
