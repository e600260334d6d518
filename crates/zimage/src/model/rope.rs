//! Rotary position embedding over three axes: caption position or frame, row, column.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::model::config::Config;
use crate::model::grid::{Grid, padded};

/// Unit complex factors for the tokens of one image size and padded caption length,
/// as interleaved (re, im) pairs in float32.
#[derive(Debug)]
pub(crate) struct RotaryTable {
    /// Image tokens, padding included: complex `[S_image, d/2]`.
    pub image: Tensor,
    /// Caption tokens, padding included: complex `[S_caption, d/2]`.
    pub caption: Tensor,
    /// Image tokens followed by caption tokens.
    pub unified: Tensor,
}

impl RotaryTable {
    /// The table for a grid of patches and a caption padded to `caption` tokens.
    ///
    /// # Errors
    /// If a position lies outside `axes_lens`.
    pub(crate) fn new(config: &Config, caption: i64, grid: Grid, device: Device) -> Result<Self> {
        let Grid { frames, rows, columns } = grid;
        // Caption tokens count from 1, and frames go on after them.
        for (axis, needed) in [1 + caption + frames, rows, columns].into_iter().enumerate() {
            ensure!(
                needed <= config.axes_lens[axis],
                "axis {axis} needs {needed} positions but axes_lens allows {}",
                config.axes_lens[axis]
            );
        }
        let caption_ids: Vec<[i64; 3]> = (1..=caption).map(|j| [j, 0, 0]).collect();
        let mut image_ids: Vec<[i64; 3]> = (0..grid.tokens())
            .map(|token| (token / (rows * columns), token % (rows * columns)))
            .map(|(frame, place)| [caption + 1 + frame, place / columns, place % columns])
            .collect();
        // Image padding sits at the origin, where nothing is rotated.
        image_ids.resize(padded(grid.tokens()) as usize, [0, 0, 0]);

        let image = rotary_factors(config, &image_ids, device)?;
        let caption = rotary_factors(config, &caption_ids, device)?;
        let unified = Tensor::f_cat(&[&image, &caption], 0)?;
        Ok(Self { image, caption, unified })
    }
}

/// Tables by padded caption length and grid, made when first asked for.
#[derive(Debug, Default)]
pub(crate) struct RotaryCache(RefCell<HashMap<(i64, Grid), Rc<RotaryTable>>>);

impl RotaryCache {
    /// The table of a size; see [`RotaryTable::new`].
    ///
    /// # Errors
    /// If a position lies outside `axes_lens`.
    pub(crate) fn get(
        &self,
        config: &Config,
        caption: i64,
        grid: Grid,
        device: Device,
    ) -> Result<Rc<RotaryTable>> {
        if let Some(table) = self.0.borrow().get(&(caption, grid)) {
            return Ok(table.clone());
        }
        let table = Rc::new(RotaryTable::new(config, caption, grid, device)?);
        self.0.borrow_mut().insert((caption, grid), table.clone());
        Ok(table)
    }
}

/// Complex factors `[S, d/2]` for position ids `[S][3]`.
///
/// # Errors
/// If libtorch fails.
pub fn rotary_factors(config: &Config, ids: &[[i64; 3]], device: Device) -> Result<Tensor> {
    let mut factors = Vec::with_capacity(ids.len() * config.head_dim() as usize);
    for id in ids {
        for (position, width) in id.iter().zip(&config.axes_dims) {
            for k in 0..width / 2 {
                // Angles in float64, then rounded: the reference's order.
                let frequency = config.rope_theta.powf(-(2.0 * k as f64) / *width as f64);
                let angle = (*position as f64 * frequency) as f32;
                factors.extend([angle.cos(), angle.sin()]);
            }
        }
    }
    let shape = [ids.len() as i64, config.head_dim() / 2, 2];
    let pairs = Tensor::f_from_slice(&factors)?.f_reshape(shape)?.f_to_device(device)?;
    Ok(pairs.f_view_as_complex()?)
}

/// Rotates adjacent channel pairs of `x` `[B, heads, S, d]` by `factors` `[S, d/2]` or
/// `[B, 1, S, d/2]` in float32, or in float64 where `x` is.
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn rotate(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let wide = if kind == Kind::Double { kind } else { Kind::Float };
    let size = x.size();
    let pairs = x
        .f_to_kind(wide)?
        .f_reshape([size[0], size[1], size[2], size[3] / 2, 2])?
        .f_view_as_complex()?;
    let rotated = pairs.f_mul(factors)?.f_view_as_real()?;
    Ok(rotated.f_reshape(&size)?.f_to_kind(kind)?)
}
