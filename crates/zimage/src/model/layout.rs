//! Latents as tokens, and items of unequal size in one batch.

use std::rc::Rc;

use anyhow::{Result, ensure};
use decoupled_dmd::arithmetic::counting;
use tch::{Device, Kind, Tensor};

use crate::model::grid::{Grid, padded};
use crate::model::rope::RotaryTable;

/// `[B, C, F, H, W]` to tokens `[B, F * H/p * W/p, p * p * C]`: frame by frame, row-major, channels
/// fastest.
///
/// # Errors
/// If H or W is not a multiple of `patch`.
pub fn patchify(latents: &Tensor, patch: i64) -> Result<Tensor> {
    let (batch, channels, frames, height, width) = latents.size5()?;
    let (rows, columns) = (height / patch, width / patch);
    Ok(latents
        .f_reshape([batch, channels, frames, rows, patch, columns, patch])?
        .f_permute([0, 2, 3, 5, 4, 6, 1])?
        .f_reshape([batch, frames * rows * columns, patch * patch * channels])?)
}

/// The inverse of [`patchify`].
///
/// # Errors
/// If the number of tokens is not that of the grid.
pub fn unpatchify(tokens: &Tensor, patch: i64, grid: Grid) -> Result<Tensor> {
    let (batch, _, width) = tokens.size3()?;
    let channels = width / (patch * patch);
    let Grid { frames, rows, columns } = grid;
    Ok(tokens
        .f_reshape([batch, frames, rows, columns, patch, patch, channels])?
        .f_permute([0, 6, 1, 2, 4, 3, 5])?
        .f_reshape([batch, channels, frames, rows * patch, columns * patch])?)
}

/// What attention has to know of the tokens of a batch.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Factors as for [`rotate`](super::rope::rotate): `[S, d/2]`, or `[B, 1, S, d/2]` where the items
    /// differ.
    pub rotary: Tensor,
    /// True on an item's own tokens, `[B, 1, 1, S]`; none where all items are S tokens long.
    pub mask: Option<Tensor>,
    /// Tokens, from the first, that are of use after the last block; all of them to begin with.
    pub kept: i64,
}

impl Sequence {
    /// The sequence of a part of the tables of the items.
    ///
    /// # Errors
    /// If there is no item, or libtorch fails.
    pub(crate) fn new(
        tables: &[Rc<RotaryTable>],
        part: fn(&RotaryTable) -> &Tensor,
    ) -> Result<Self> {
        ensure!(!tables.is_empty(), "a batch needs at least one item");
        if tables.iter().all(|table| Rc::ptr_eq(table, &tables[0])) {
            let rotary = part(&tables[0]).shallow_clone();
            return Ok(Self { kept: rotary.size()[0], rotary, mask: None });
        }
        let rotary: Vec<Tensor> = tables.iter().map(|table| part(table).shallow_clone()).collect();
        let lengths: Vec<i64> = rotary.iter().map(|factors| factors.size()[0]).collect();
        let longest = longest(&lengths);
        let mask = if lengths.iter().all(|length| *length == longest) {
            None
        } else {
            let mask = own_tokens(&lengths, longest, rotary[0].device())?;
            Some(mask.f_view([-1, 1, 1, longest])?)
        };
        Ok(Self { rotary: stack(&rotary, longest)?.f_unsqueeze(1)?, mask, kept: longest })
    }

    /// The tokens, from the first, that block `index` of `count` has to give.
    pub(crate) fn rows(&self, index: usize, count: usize) -> i64 {
        if index + 1 == count { self.kept } else { self.rotary.size()[self.rotary.dim() - 2] }
    }
}

/// Rows `[S_i, ..]`, zeros after their ends, as `[B, length, ..]`.
///
/// # Errors
/// If a row is longer than that, or their other axes differ.
pub(crate) fn stack(rows: &[Tensor], length: i64) -> Result<Tensor> {
    let rows = rows
        .iter()
        .map(|row| {
            let missing = length - row.size()[0];
            ensure!(missing >= 0, "a row of {} does not fit in {length}", row.size()[0]);
            if missing == 0 {
                return Ok(row.shallow_clone());
            }
            let mut padding = vec![0; 2 * row.dim()];
            padding[2 * row.dim() - 1] = missing;
            Ok(row.f_constant_pad_nd(&padding)?)
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_stack(&rows, 0)?)
}

/// Rows of tokens `[S_i, F]` as `[B, S, F]`, where S is the longest length after padding.
///
/// # Errors
/// If their widths differ.
pub(crate) fn stack_tokens(rows: &[Tensor]) -> Result<Tensor> {
    stack(rows, rows.iter().map(|row| padded(row.size()[0])).max().unwrap_or(0))
}

/// `hidden` `[B, S, D]` with `token` `[1, D]` in place of every row behind the `counts` of the items.
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn fill_padding(hidden: &Tensor, counts: &[i64], token: &Tensor) -> Result<Tensor> {
    let length = hidden.size()[1];
    if counts.iter().all(|count| *count == length) {
        return Ok(hidden.shallow_clone());
    }
    let is_own = own_tokens(counts, length, hidden.device())?.f_unsqueeze(2)?;
    Ok(hidden.f_where_self(&is_own, token)?)
}

/// Each item's image tokens and then its caption tokens, `[B, S, D]`, without what stood behind them.
/// `lengths` holds both numbers of each item, multiples of 32.
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn join(image: &Tensor, caption: &Tensor, lengths: &[(i64, i64)]) -> Result<Tensor> {
    if lengths.iter().all(|(image_length, _)| *image_length == image.size()[1]) {
        return Ok(Tensor::f_cat(&[image, caption], 1)?);
    }
    let rows = (0..)
        .zip(lengths)
        .map(|(item, (image_length, caption_length))| {
            let image = image.f_select(0, item)?.f_narrow(0, 0, *image_length)?;
            let caption = caption.f_select(0, item)?.f_narrow(0, 0, *caption_length)?;
            Ok(Tensor::f_cat(&[image, caption], 0)?)
        })
        .collect::<Result<Vec<_>>>()?;
    stack_tokens(&rows)
}

/// The first `rows` of an axis.
///
/// # Errors
/// If it has fewer.
pub(crate) fn first_rows(x: &Tensor, axis: i64, rows: i64) -> Result<Tensor> {
    // A view of the whole would cost a copy in the backward pass.
    if x.size()[axis as usize] == rows {
        return Ok(x.shallow_clone());
    }
    Ok(x.f_narrow(axis, 0, rows)?)
}

/// The largest of some lengths, 0 if there is none.
pub(crate) fn longest(lengths: &[i64]) -> i64 {
    lengths.iter().copied().max().unwrap_or(0)
}

/// True where a place of `[B, length]` lies within the item's own length.
fn own_tokens(lengths: &[i64], length: i64, device: Device) -> Result<Tensor> {
    // Not waited for: libtorch reads the lengths before it returns.
    let lengths = Tensor::f_from_slice(lengths)?.f_to_device_(device, Kind::Int64, true, false)?;
    Ok(counting(length, (Kind::Int64, device))?.f_lt_tensor(&lengths.f_unsqueeze(1)?)?)
}
