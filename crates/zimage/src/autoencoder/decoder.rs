//! The autoencoder between images and latents: diffusers' `AutoencoderKL`, as Flux and Z-Image use it.

use std::path::Path;

use anyhow::{Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::parameters::check_shapes;
use tch_training::safetensors::Weights;

use crate::autoencoder::blocks::Network;
use crate::autoencoder::config::{AutoencoderConfig, Half};

const WEIGHTS: &str = "diffusion_pytorch_model";
/// Limits of the encoder's log-variance, those of diffusers' `DiagonalGaussianDistribution`.
const LOG_VARIANCE: (f64, f64) = (-30.0, 20.0);

/// The half that turns latents into images, which is all that training without data needs.
#[derive(Debug)]
pub struct Decoder {
    config: AutoencoderConfig,
    network: Network,
}

impl Decoder {
    /// Reads the decoder of `vae/` of a diffusers folder; the encoder may be there or not.
    ///
    /// Where the config has `force_upcast`, a dtype of less than 32 bits becomes float32.
    ///
    /// # Errors
    /// If a file cannot be read, the config is not supported, or parameters are missing, unexpected
    /// or mis-shaped.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let (config, parameters) = read(folder, &[Half::Decoder], kind, device)?;
        let network = Network::new(&parameters, &config, Half::Decoder)?;
        Ok(Self { config, network })
    }

    /// The model's shape.
    pub fn config(&self) -> &AutoencoderConfig {
        &self.config
    }

    /// Latents of the diffusion model `[B, C, h, w]` to images `[B, 3, H, W]`, H and W being
    /// [`AutoencoderConfig::spatial_factor`] times as large. Black is -1 and white is 1; as nothing is
    /// cut off, so that gradients flow, values lie somewhat beyond at times.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        let channels = self.config.latent_channels;
        ensure!(
            matches!(latents.size()[..], [batch, c, height, width]
                if batch > 0 && c == channels && height > 0 && width > 0),
            "latents must be [B, {channels}, h, w], found {:?}",
            latents.size()
        );
        let AutoencoderConfig { scaling_factor, .. } = self.config;
        // In the dtype that the network computes in, which may be wider than that of the latents.
        let latents = latents.f_to_kind(self.network.kind())?;
        self.network.forward(&latents.over(scaling_factor)?.plus(self.config.shift())?)
    }

    /// [`Self::decode`] of `part` images at a time, for batches whose activations would not fit into
    /// memory together. Outside of `no_grad` they are kept all the same.
    ///
    /// # Errors
    /// If the shape is another or `part` is not positive.
    pub fn decode_in_parts(&self, latents: &Tensor, part: i64) -> Result<Tensor> {
        ensure!(part > 0, "the number of images at a time must be positive, found {part}");
        let images = latents
            .f_split(part, 0)?
            .iter()
            .map(|latents| self.decode(latents))
            .collect::<Result<Vec<_>>>()?;
        Ok(Tensor::f_cat(&images, 0)?)
    }
}

/// Both halves.
#[derive(Debug)]
pub struct Autoencoder {
    encoder: Network,
    pub decoder: Decoder,
}

impl Autoencoder {
    /// Reads `vae/` of a diffusers folder; the rest is as for [`Decoder::load`].
    ///
    /// # Errors
    /// As for [`Decoder::load`].
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let (config, parameters) = read(folder, &[Half::Decoder, Half::Encoder], kind, device)?;
        let encoder = Network::new(&parameters, &config, Half::Encoder)?;
        let network = Network::new(&parameters, &config, Half::Decoder)?;
        Ok(Self { encoder, decoder: Decoder { config, network } })
    }

    /// The model's shape.
    pub fn config(&self) -> &AutoencoderConfig {
        &self.decoder.config
    }

    /// [`Decoder::decode`].
    ///
    /// # Errors
    /// If the shape is another.
    pub fn decode(&self, latents: &Tensor) -> Result<Tensor> {
        self.decoder.decode(latents)
    }

    /// Images `[B, 3, H, W]` in [-1, 1] to latents of the diffusion model `[B, C, h, w]`, h and w being
    /// H and W over [`AutoencoderConfig::spatial_factor`], rounded down. Without `noise` the mean of
    /// each image's distribution, with standard normal `noise` `[B, C, h, w]` a sample of it.
    ///
    /// # Errors
    /// If a shape is another, or an image is smaller than one latent pixel.
    pub fn encode(&self, images: &Tensor, noise: Option<&Tensor>) -> Result<Tensor> {
        let config = self.config();
        let (channels, factor) = (config.in_channels, config.spatial_factor());
        ensure!(
            matches!(images.size()[..], [batch, c, height, width]
                if batch > 0 && c == channels && height >= factor && width >= factor),
            "images must be [B, {channels}, H, W] with H and W at least {factor}, found {:?}",
            images.size()
        );
        let moments = self.encoder.forward(images)?.f_chunk(2, 1)?;
        let (mean, log_variance) = (&moments[0], &moments[1]);
        let latents = match noise {
            None => mean.shallow_clone(),
            Some(noise) => {
                ensure!(
                    noise.size() == mean.size(),
                    "noise must be {:?}, as the latents, found {:?}",
                    mean.size(),
                    noise.size()
                );
                let (low, high) = LOG_VARIANCE;
                let deviation = log_variance.within(low, high)?.times(0.5)?.f_exp()?;
                let noise = noise.f_to_device(mean.device())?.f_to_kind(mean.f_kind()?)?;
                mean.f_addcmul(&deviation, &noise)?
            }
        };
        Ok(latents.minus(config.shift())?.times(config.scaling_factor)?)
    }
}

/// Config and parameters of the halves asked for.
fn read(
    folder: &Path,
    halves: &[Half],
    kind: Kind,
    device: Device,
) -> Result<(AutoencoderConfig, Parameters)> {
    let folder = folder.join("vae");
    let config = AutoencoderConfig::load(&folder.join("config.json"))?;
    let kind = match kind {
        Kind::Half | Kind::BFloat16 if config.force_upcast => Kind::Float,
        kind => kind,
    };

    let weights = Weights::open(&folder, WEIGHTS)?;
    let is_wanted = |name: &str| halves.contains(&Half::Encoder) || !name.starts_with("encoder.");
    let expected = halves.iter().flat_map(|half| config.parameters(*half)).collect::<Vec<_>>();
    let place = folder.join(WEIGHTS);
    let found = weights.shapes().filter(|(name, _)| is_wanted(name));
    check_shapes(place.display(), &expected, found)?;
    let parameters = expected
        .into_iter()
        .map(|(name, _)| {
            let tensor = weights.tensor(&name, kind, device)?;
            Ok((name, tensor))
        })
        .collect::<Result<_>>()?;
    Ok((config, parameters))
}
