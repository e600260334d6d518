//! Fallible tensor helpers: types, means, masks, noise. None of them is about distillation.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::error::Result;

/// The type to compute in: float32, or float64 where the input has it.
pub(crate) fn compute_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// `tensor` in float32 or wider.
pub(crate) fn widen(tensor: &Tensor) -> Result<Tensor> {
    widen_like(tensor, tensor)
}

/// `tensor` in float32, or in float64 where `like` is.
pub(crate) fn widen_like(tensor: &Tensor, like: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_to_kind(compute_kind(like.f_kind()?))?)
}

/// `OnceCell::get_or_try_init`, which is not stable yet.
pub(crate) fn once<T>(cell: &OnceCell<T>, compute: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = compute()?;
    Ok(cell.get_or_init(|| value))
}

/// The length of the first axis, B; 0 for a scalar.
pub(crate) fn batch_size(tensor: &Tensor) -> i64 {
    tensor.size().first().copied().unwrap_or_default()
}

/// One number per sample, `[B]`, or one per frame, `[B, F]` or `[B, 1, F]`, with axes of 1 at the end up to the rank
/// of `like`.
pub(crate) fn per_sample(values: &Tensor, like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.dim()];
    let sizes = values.size();
    if sizes.len() > 1 {
        shape.iter_mut().zip(sizes).for_each(|(axis, size)| *axis = size);
    } else if let (Some(first), Some(&batch)) = (shape.first_mut(), like.size().first()) {
        *first = batch;
    }
    Ok(values.f_view(shape.as_slice())?)
}

/// Two tensors of numbers per sample or per frame, brought to the rank of the larger.
pub(crate) fn of_one_rank(one: &Tensor, two: &Tensor) -> Result<(Tensor, Tensor)> {
    if one.dim() < two.dim() {
        Ok((per_sample(one, two)?, two.shallow_clone()))
    } else {
        Ok((one.shallow_clone(), per_sample(two, one)?))
    }
}

/// Differences `[B, ..]` over what lies between, `[B]`, in their type; 0 where nothing lies between.
pub(crate) fn slope(difference: &Tensor, between: &Tensor) -> Result<Tensor> {
    let between = per_sample(&between.f_to_kind(difference.f_kind()?)?, difference)?;
    let slope = difference.f_div(&between)?;
    Ok(slope.f_where_self(&between.f_abs()?.above(0.0)?, &slope.f_zeros_like()?)?)
}

/// Mean over everything but the batch, `[B]`.
pub(crate) fn sample_mean(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_flatten(1, -1)?.f_mean_dim(&[1i64][..], false, None::<Kind>)?)
}

/// Sum over everything but the batch, `[B]`.
pub(crate) fn sample_sum(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_flatten(1, -1)?.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?)
}

/// Mean of |one - two| over everything but the batch, `[B]`, without a graph. libtorch's distance
/// between rows reads both once and makes nothing of their size.
pub(crate) fn sample_distance(one: &Tensor, two: &Tensor) -> Result<Tensor> {
    let width = one.size().last().copied().unwrap_or(1);
    let rows = |tensor: &Tensor| tensor.f_reshape([-1, 1, width]);
    let distances = Tensor::f_cdist(&rows(one)?, &rows(two)?, 1.0, None::<i64>)?;
    let per_sample = distances.f_reshape([batch_size(one), -1])?;
    Ok(per_sample.f_mean_dim(&[1i64][..], false, None::<Kind>)?.over(width as f64)?)
}

/// Sums of squares over the last axis, `[B, ..]` to `[B, ..]` with one axis less: as exact as squaring and
/// summing, without a tensor of the squares.
pub(crate) fn row_squares(tensor: &Tensor) -> Result<Tensor> {
    Ok(frobenius_norm(tensor, -2, false)?.f_square()?)
}

/// The norm over `axis`, of which 1 is left.
pub(crate) fn norm(tensor: &Tensor, axis: i64) -> Result<Tensor> {
    Ok(frobenius_norm(tensor, axis, true)?.f_squeeze_dim(-1)?)
}

/// The norm over `axis` of a tensor to which an axis is added at the end: the norm of matrices is the one that tch
/// asks for by a name and not by a number.
fn frobenius_norm(tensor: &Tensor, axis: i64, is_kept: bool) -> Result<Tensor> {
    let matrices = tensor.f_unsqueeze(-1)?;
    Ok(matrices.f_linalg_norm_ord_str("fro", &[axis, -1][..], is_kept, None::<Kind>)?)
}

/// Mean of all elements, written as sum / count: its gradient stays an expanded scalar, where libtorch's own
/// mean makes a full tensor, until an operation needs the latter.
pub(crate) fn mean(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_sum(None::<Kind>)?.over(tensor.numel() as f64)?)
}

/// `tensor` with zeros where `mask`, a boolean of its shape, is false, also in place of NaN; no gradient
/// passes there.
pub(crate) fn masked(tensor: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    match mask {
        Some(mask) => {
            let zero = Tensor::f_zeros([0i64; 0], (tensor.f_kind()?, tensor.device()))?;
            Ok(tensor.f_where_self(mask, &zero)?)
        }
        None => Ok(tensor.shallow_clone()),
    }
}

/// `tensor` with zeros in place of numbers that are not finite, but only where `mask` is false.
pub(crate) fn finite_where_masked(tensor: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    match mask {
        Some(mask) => masked(tensor, Some(&mask.f_logical_or(&tensor.f_isfinite()?)?)),
        None => Ok(tensor.shallow_clone()),
    }
}

/// Whether the mask leaves a sample any element, `[B]`.
pub(crate) fn any_kept(like: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    Ok(match mask {
        Some(mask) => mask.f_flatten(1, -1)?.f_any_dim(1, false)?,
        None => {
            let batch: Vec<i64> = like.size().into_iter().take(1).collect();
            Tensor::f_ones(batch, (Kind::Bool, like.device()))?
        }
    })
}

/// [`sample_mean`] over the elements at which `mask` is true; 0 for a sample without any.
pub(crate) fn masked_mean(tensor: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let Some(mask) = mask else { return sample_mean(tensor) };
    let kept = mask.f_flatten(1, -1)?.f_sum_dim_intlist(&[1i64][..], false, Kind::Int64)?;
    let sum = masked(tensor, Some(mask))?.f_flatten(1, -1)?;
    let sum = sum.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?;
    Ok(sum.f_div(&kept.f_maximum(&kept.f_ones_like()?)?)?)
}

/// Mean of the elements, at which `mask` is true, of what shares one of `times`, in the shape of the times: of a
/// frame, `[B, F]` or `[B, 1, F]`; 0 for one without any.
pub(crate) fn mean_per_time(
    tensor: &Tensor,
    times: &Tensor,
    mask: Option<&Tensor>,
) -> Result<Tensor> {
    // `[B, ..]` to `[B F, .., 1]`: frames, which are along the last axis of the times, as samples.
    let axis = i64::try_from(times.dim()).unwrap_or(i64::MAX).saturating_sub(1);
    let frames = |tensor: &Tensor| -> Result<Tensor> {
        Ok(tensor.f_movedim_int(axis, 1)?.f_flatten(0, 1)?.f_unsqueeze(-1)?)
    };
    let mask = mask.map(frames).transpose()?;
    Ok(masked_mean(&frames(tensor)?, mask.as_ref())?.f_view(times.size().as_slice())?)
}

/// Unit Gaussian noise with the shape, type and device of `like`.
pub(crate) fn noise_like(like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_randn(like.size(), (like.f_kind()?, like.device()))?)
}

/// Scalars of one type as numbers, read in one go: a GPU is waited for once.
pub(crate) fn numbers<const N: usize>(scalars: [Tensor; N]) -> Result<[f64; N]> {
    let together = Tensor::f_stack(&scalars, 0)?.f_to_kind(Kind::Double)?;
    let mut values = [0.0; N];
    together.f_to_device(Device::Cpu)?.f_copy_data(&mut values, N)?;
    Ok(values)
}
