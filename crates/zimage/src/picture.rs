//! Images to PNG.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::arithmetic::{Arithmetic as _, whole_number};
use tch::{Kind, Tensor};
use tch_training::files::write_atomically;

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
    let bytes = to_bytes(images, zoom)?;
    let grid = white([3, rows * cell_h - 1, columns * cell_w - 1])?;
    for index in 0..count {
        let (row, column) = (index / columns, index % columns);
        let mut cell =
            grid.f_narrow(1, row * cell_h, cell_h - 1)?.f_narrow(2, column * cell_w, cell_w - 1)?;
        cell.f_copy_(&bytes.f_select(0, index)?)?;
    }
    save(path, &grid)
}

/// A page without anything on it.
fn white(size: [i64; 3]) -> Result<Tensor> {
    let black = Tensor::f_zeros(size, (Kind::Uint8, tch::Device::Cpu))?;
    Ok(black.f_add(&whole_number(255)?)?)
}

/// [-1, 1] to bytes, every pixel `zoom` times as large.
fn to_bytes(images: &Tensor, zoom: i64) -> Result<Tensor> {
    Ok(images
        .within(-1.0, 1.0)?
        .plus(1.0)?
        .times(127.5)?
        .f_round()?
        .f_to_device(tch::Device::Cpu)?
        .f_to_kind(Kind::Uint8)?
        .f_repeat_interleave_self_int(zoom, 2, None)?
        .f_repeat_interleave_self_int(zoom, 3, None)?)
}

/// Writes bytes `[3, H, W]` as a PNG.
fn save(path: &Path, picture: &Tensor) -> Result<()> {
    let (_, height, width) = picture.size3()?;
    let pixels = picture.f_permute([1, 2, 0])?.f_contiguous()?.f_reshape([-1])?;
    let buffer = image::RgbImage::from_raw(width as u32, height as u32, Vec::try_from(&pixels)?)
        .context("picture size")?;
    Ok(write_atomically(path, |temporary| {
        buffer.save_with_format(temporary, image::ImageFormat::Png)
    })?)
}

/// Side of a letter of scale 1.
const LETTER: i64 = 8;

/// How a table of pictures is laid out.
#[derive(Clone, Copy, Debug)]
pub struct Sheet {
    /// How many times as large every pixel is.
    pub zoom: i64,
    /// Tables side by side.
    pub blocks: i64,
}

impl Sheet {
    /// Of many pictures of a few pixels.
    pub const SMALL: Self = Self { zoom: 3, blocks: 3 };
    /// Of a few large pictures.
    pub const LARGE: Self = Self { zoom: 1, blocks: 1 };
}

/// Writes a table of pictures: one row for each caption, one headed column for each tensor
/// `[N, 3, H, W]` in [-1, 1], the caption under its row.
///
/// # Errors
/// If a column does not hold one picture a caption, or the file cannot be written.
pub fn write_comparison(
    path: &Path,
    headings: &[&str],
    columns: &[Tensor],
    captions: &[&str],
    Sheet { zoom, blocks }: Sheet,
) -> Result<()> {
    let size = columns.first().context("no column")?.size();
    let (count, _, height, width) = columns[0].size4()?;
    ensure!(headings.len() == columns.len(), "one heading a column");
    ensure!(captions.len() as i64 == count, "one caption a picture");
    ensure!(columns.iter().all(|images| images.size() == size), "columns must be of one shape");
    // Letters and gaps that are to be seen beside large pictures.
    let scale = (width * zoom / 256).max(1);
    let (letter, gap) = (LETTER * scale, 4 * scale);
    let (cell_h, cell_w) = (height * zoom + letter + 2 * gap, width * zoom + gap);
    let block_w = cell_w * columns.len() as i64 + if blocks > 1 { 4 * gap } else { 0 };
    let rows = (count + blocks - 1) / blocks;
    let top = letter + 2 * gap;
    let page = white([3, top + rows * cell_h, blocks * block_w])?;
    for block in 0..blocks {
        for (heading, x) in headings.iter().zip((block * block_w..).step_by(cell_w as usize)) {
            write_text(&page, heading, (gap, x), cell_w - gap, scale)?;
        }
    }
    for (column, images) in (0..).zip(columns) {
        let bytes = to_bytes(images, zoom)?;
        for index in 0..count {
            let (block, row) = (index / rows, index % rows);
            let (x, y) = (block * block_w + column * cell_w, top + row * cell_h);
            let mut cell = page.f_narrow(1, y, height * zoom)?.f_narrow(2, x, width * zoom)?;
            cell.f_copy_(&bytes.f_select(0, index)?)?;
        }
    }
    for (index, caption) in (0..).zip(captions) {
        let (block, row) = (index / rows, index % rows);
        let y = top + row * cell_h + height * zoom + gap / 2;
        write_text(&page, caption, (y, block * block_w), block_w - gap, scale)?;
    }
    save(path, &page)
}

/// Draws black letters on `[3, H, W]` bytes; what does not fit into `width` is left out.
fn write_text(page: &Tensor, text: &str, (y, x): (i64, i64), width: i64, scale: i64) -> Result<()> {
    use font8x8::UnicodeFonts;

    let side = LETTER * scale;
    for (index, letter) in (0..width / side).zip(text.chars()) {
        let Some(rows) = font8x8::BASIC_FONTS.get(letter) else { continue };
        let dark: Vec<u8> = rows
            .iter()
            .flat_map(|row| (0..LETTER).map(move |bit| if row >> bit & 1 == 1 { 0 } else { 255 }))
            .collect();
        let glyph = Tensor::f_from_slice(&dark)?
            .f_view([1, LETTER, LETTER])?
            .f_repeat_interleave_self_int(scale, 1, None)?
            .f_repeat_interleave_self_int(scale, 2, None)?;
        let mut cell = page.f_narrow(1, y, side)?.f_narrow(2, x + index * side, side)?;
        cell.f_copy_(&glyph)?;
    }
    Ok(())
}
