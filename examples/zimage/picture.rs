//! Images to PNG.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use tch::{Kind, Tensor};

use super::checkpoint::write_atomically;

/// Writes `[N, 3, H, W]` images in [-1, 1] as one picture, row-major with `columns` images to a row,
/// every pixel `zoom` times as large, one pixel of white between.
///
/// # Errors
/// If the shape is another, or the file cannot be written.
pub fn write_grid(path: &Path, images: &Tensor, columns: i64, zoom: i64) -> Result<()> {
    let (count, channels, height, width) = images.size4()?;
    ensure!(channels == 3 && columns > 0 && count > 0, "nothing to draw in {:?}", images.size());
    let rows = (count + columns - 1) / columns;
    let (cell_h, cell_w) = (height * zoom + 1, width * zoom + 1);
    let bytes = images
        .f_clamp(-1.0, 1.0)?
        .f_add_scalar(1.0)?
        .f_mul_scalar(127.5)?
        .f_round()?
        .f_to_device(tch::Device::Cpu)?
        .f_to_kind(Kind::Uint8)?
        .f_repeat_interleave_self_int(zoom, 2, None)?
        .f_repeat_interleave_self_int(zoom, 3, None)?;
    let grid = Tensor::f_full(
        [3, rows * cell_h - 1, columns * cell_w - 1],
        255,
        (Kind::Uint8, tch::Device::Cpu),
    )?;
    for index in 0..count {
        let (row, column) = (index / columns, index % columns);
        let mut cell =
            grid.f_narrow(1, row * cell_h, cell_h - 1)?.f_narrow(2, column * cell_w, cell_w - 1)?;
        cell.f_copy_(&bytes.f_select(0, index)?)?;
    }
    let (_, height, width) = grid.size3()?;
    let pixels = grid.f_permute([1, 2, 0])?.f_contiguous()?.f_reshape([-1])?;
    let buffer = image::RgbImage::from_raw(width as u32, height as u32, Vec::try_from(&pixels)?)
        .context("picture size")?;
    write_atomically(path, |temporary| {
        Ok(buffer.save_with_format(temporary, image::ImageFormat::Png)?)
    })
}
