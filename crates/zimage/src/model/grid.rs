//! Sizes of latents in patches, and lengths of sequences after padding.

use anyhow::{Result, bail};

use crate::model::config::SEQUENCE_MULTIPLE;

/// Size of a latent in patches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Grid {
    pub frames: i64,
    pub rows: i64,
    pub columns: i64,
}

impl Grid {
    /// A single patch.
    pub const POINT: Self = Self { frames: 1, rows: 1, columns: 1 };

    /// The grid of a latent `[C, frames, H, W]` with sides that are multiples of `patch`; `size` is its
    /// shape.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn new(size: &[i64], channels: i64, patch: i64) -> Result<Self> {
        match *size {
            [c, frames, height, width]
                if c == channels
                    && frames > 0
                    && height > 0
                    && width > 0
                    && height % patch == 0
                    && width % patch == 0 =>
            {
                Ok(Self { frames, rows: height / patch, columns: width / patch })
            }
            _ => bail!(
                "a latent must be [{channels}, frames, H, W] with H and W multiples of {patch}, found \
                 {size:?}"
            ),
        }
    }

    /// Number of patches.
    pub fn tokens(self) -> i64 {
        self.frames * self.rows * self.columns
    }
}

/// Length after padding to the next multiple of 32 tokens.
pub fn padded(length: i64) -> i64 {
    (length + SEQUENCE_MULTIPLE - 1) / SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE
}
