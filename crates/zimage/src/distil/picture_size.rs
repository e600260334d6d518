//! Sizes of pictures in pixels.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Error, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::autoencoder::AutoencoderConfig;
use crate::model::Config;

/// Width and height in pixels, as text `1024x768`, or `1024` for squares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PictureSize {
    pub width: i64,
    pub height: i64,
}

impl PictureSize {
    /// A square.
    pub const fn square(side: i64) -> Self {
        Self { width: side, height: side }
    }

    /// Size `[C, h, w]` of the latents, by the transformer's config and `vae/config.json` of a diffusers folder, or
    /// that of the released models where there is none.
    ///
    /// # Errors
    /// If the two configs do not fit, or no latents are of that size.
    pub fn latents(self, checkpoint: &Path, config: &Config) -> Result<[i64; 3]> {
        let path = checkpoint.join("vae/config.json");
        let factor = if path.exists() {
            let autoencoder = AutoencoderConfig::load(&path)?;
            ensure!(
                autoencoder.latent_channels == config.in_channels,
                "the autoencoder of {} has {} channels and the transformer {}",
                checkpoint.display(),
                autoencoder.latent_channels,
                config.in_channels
            );
            autoencoder.spatial_factor()
        } else {
            AutoencoderConfig::released().spatial_factor()
        };
        let multiple = factor * config.patch_size();
        let most = config.axes_lens[1].min(config.axes_lens[2]);
        for side in [self.width, self.height] {
            ensure!(
                side > 0 && side % multiple == 0,
                "size must be a positive multiple of {multiple}, found {side}"
            );
            ensure!(
                side / multiple <= most,
                "size must be at most {}, as the model has {most} positions to a side, found {side}",
                most * multiple
            );
        }
        Ok([config.in_channels, self.height / factor, self.width / factor])
    }
}

impl fmt::Display for PictureSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.width, self.height)
    }
}

impl FromStr for PictureSize {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |text: &str| {
            text.parse::<i64>().with_context(|| format!("{text:?} is no number of pixels"))
        };
        match text.split_once('x') {
            Some((width, height)) => Ok(Self { width: number(width)?, height: number(height)? }),
            None => number(text).map(Self::square),
        }
    }
}

impl TryFrom<String> for PictureSize {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<PictureSize> for String {
    fn from(size: PictureSize) -> Self {
        size.to_string()
    }
}
