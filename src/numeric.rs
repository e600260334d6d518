//! Fallible tensor helpers shared by the terms. Kept private: none of them is about distillation.

use std::cell::OnceCell;

use tch::{Device, Kind, Tensor};

use crate::value::checked;
use crate::{Error, Result};

/// The type to compute in: float32, or float64 where the input has it.
pub(crate) fn compute_kind(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// `tensor` in float32 or wider.
pub(crate) fn widen(tensor: &Tensor) -> Result<Tensor> {
    widen_like(tensor, tensor)
}

/// `tensor` in the type that is computed in for `like`.
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

/// One number per sample, `[B]`, as `[B, 1, ..]` with the rank of `like`.
pub(crate) fn per_sample(values: &Tensor, like: &Tensor) -> Result<Tensor> {
    let mut shape = vec![1; like.dim()];
    if let (Some(first), Some(&batch)) = (shape.first_mut(), like.size().first()) {
        *first = batch;
    }
    Ok(values.f_view(shape.as_slice())?)
}

/// Mean over everything but the batch, `[B]`.
pub(crate) fn sample_mean(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_flatten(1, -1)?.f_mean_dim(&[1i64][..], false, None::<Kind>)?)
}

/// Mean of |one - two| over everything but the batch, `[B]`, without a graph. libtorch's distance
/// between rows reads both once and makes nothing of their size.
pub(crate) fn sample_distance(one: &Tensor, two: &Tensor) -> Result<Tensor> {
    let width = one.size().last().copied().unwrap_or(1);
    let rows = |tensor: &Tensor| tensor.f_reshape([-1, 1, width]);
    let distances = Tensor::f_cdist(&rows(one)?, &rows(two)?, 1.0, None::<i64>)?;
    let per_sample = distances.f_reshape([batch_size(one), -1])?;
    Ok(per_sample.f_mean_dim(&[1i64][..], false, None::<Kind>)?.f_div_scalar(width)?)
}

/// Sums of squares over the last axis, `[B, ..]` to `[B, ..]` with one axis less. They are as exact as
/// a sum of squared elements, and need no tensor of these.
pub(crate) fn row_squares(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_norm_scalaropt_dim(2.0, &[-1i64][..], false)?.f_square()?)
}

/// Mean over all elements, a scalar. Unlike that of libtorch's own mean, its gradient is one number
/// for all of them until it meets the first operation that needs more.
pub(crate) fn mean(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_sum(None::<Kind>)?.f_div_scalar(tensor.numel() as f64)?)
}

/// `tensor` with zeros where `mask`, a boolean of its shape, is false; NaN and its gradient go too.
pub(crate) fn masked(tensor: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    match mask {
        Some(mask) => Ok(tensor.f_where_scalarother(mask, 0.0)?),
        None => Ok(tensor.shallow_clone()),
    }
}

/// `tensor` with zeros in place of what is not finite, but only where `mask` is false.
pub(crate) fn finite_where_masked(tensor: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    match mask {
        Some(mask) => masked(tensor, Some(&mask.f_logical_or(&tensor.f_isfinite()?)?)),
        None => Ok(tensor.shallow_clone()),
    }
}

/// [`sample_mean`] over the elements that `mask` keeps; 0 for a sample without any.
pub(crate) fn masked_mean(tensor: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let Some(mask) = mask else { return sample_mean(tensor) };
    let kept = mask.f_flatten(1, -1)?.f_sum_dim_intlist(&[1i64][..], false, Kind::Int64)?;
    let sum = masked(tensor, Some(mask))?.f_flatten(1, -1)?;
    let sum = sum.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?;
    Ok(sum.f_div(&kept.f_clamp_min(1)?)?)
}

/// The scalar `value`, with `gradient` as its gradient in `at`, whatever `value` was computed from.
pub(crate) fn with_gradient(value: &Tensor, at: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let gradient = widen(&gradient.f_detach()?)?;
    // A dot product makes no temporary.
    let slope = widen(at)?.f_flatten(0, -1)?.f_dot(&gradient.f_flatten(0, -1)?)?;
    // The bracket is exactly zero, so the value keeps all its bits.
    Ok(value.f_detach()?.f_add(&slope.f_sub(&slope.f_detach()?)?)?)
}

/// The scalar `loss(x)` with its gradient in `x` and in nothing else: parameters of the networks that
/// `loss` calls receive none, though the gradient runs through them.
///
/// The gradient is taken here and now, on a copy of `x` without a past, so there is no second one.
///
/// Fails where x has a gradient to receive and `what`, which the closure that made it may have
/// detached, sends none.
pub(crate) fn only_in(
    what: &'static str,
    x: &Tensor,
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let leaf = x.f_detach()?.f_set_requires_grad(x.requires_grad())?;
    let value = loss(&leaf)?;
    if !(leaf.requires_grad() && is_recording()?) {
        return Ok(value.f_detach()?);
    }
    if !value.requires_grad() {
        return Err(Error::NoGradient { what });
    }
    let gradients = Tensor::f_run_backward(&[&value], &[&leaf], false, false)?;
    match gradients.into_iter().next().filter(Tensor::defined) {
        Some(gradient) => with_gradient(&value, x, &gradient),
        None => Err(Error::NoGradient { what }),
    }
}

/// Whether autograd records what is computed: not under no_grad.
fn is_recording() -> Result<bool> {
    let leaf = Tensor::f_zeros([0i64], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
    Ok(leaf.f_neg()?.requires_grad())
}

/// Unit Gaussian noise with the shape, type and device of `like`.
pub(crate) fn noise_like(like: &Tensor) -> Result<Tensor> {
    Ok(Tensor::f_randn(like.size(), (like.f_kind()?, like.device()))?)
}

/// Refuses a tensor that is undefined, not floating point, without samples, or below `rank`.
pub(crate) fn check_samples(what: &'static str, tensor: &Tensor, rank: usize) -> Result<()> {
    let size = tensor.size();
    if !tensor.defined() || size.len() < rank || size.contains(&0) {
        let expected = if rank > 1 || size.len() > 1 {
            "[B, ..] with B >= 1 and no empty axis"
        } else {
            "[B]"
        };
        return Err(Error::shape(what, expected, &size));
    }
    check_floating(what, tensor.f_kind()?)
}

/// Refuses a type that is not floating point.
pub(crate) fn check_floating(what: &'static str, kind: Kind) -> Result<()> {
    match kind {
        Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16 => Ok(()),
        found => Err(Error::Kind { what, expected: "a floating-point type", found }),
    }
}

/// Refuses a tensor that differs from `like` in shape or device, or is not floating point.
pub(crate) fn check_like(what: &'static str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    check_size(what, tensor, &like.size())?;
    check_device(what, tensor, like)
}

/// Refuses a tensor that is not floating point of shape `expected`.
pub(crate) fn check_size(what: &'static str, tensor: &Tensor, expected: &[i64]) -> Result<()> {
    let found = tensor.size();
    if !tensor.defined() || found != expected {
        return Err(Error::shape(what, format!("{expected:?}"), &found));
    }
    check_floating(what, tensor.f_kind()?)
}

/// Refuses a tensor that is on another device than `like`.
pub(crate) fn check_device(what: &'static str, tensor: &Tensor, like: &Tensor) -> Result<()> {
    same_device(what, like.device(), tensor.device())
}

fn same_device(what: &'static str, expected: Device, found: Device) -> Result<()> {
    if expected == found { Ok(()) } else { Err(Error::Device { what, expected, found }) }
}

/// Refuses anything but one floating-point number for each sample of `x`, on its device.
pub(crate) fn check_per_sample(what: &'static str, values: &Tensor, x: &Tensor) -> Result<()> {
    let batch: Vec<i64> = x.size().into_iter().take(1).collect();
    check_size(what, values, &batch)?;
    check_device(what, values, x)
}

/// Refuses anything but floating-point numbers `[B]`, B >= 1.
pub(crate) fn check_vector(what: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.size().len() > 1 {
        return Err(Error::shape(what, "[B]", &tensor.size()));
    }
    check_samples(what, tensor, 1)
}

/// Scalars of one type as numbers, read in one go: a GPU is waited for once.
pub(crate) fn numbers<const N: usize>(scalars: [Tensor; N]) -> Result<[f64; N]> {
    let together = Tensor::f_stack(&scalars, 0)?.f_to_kind(Kind::Double)?;
    let mut values = [0.0; N];
    together.f_to_device(Device::Cpu)?.f_copy_data(&mut values, N)?;
    Ok(values)
}

/// Refuses numbers outside `[low, high]`, NaN included, and returns the extremes. Waits for a GPU,
/// once.
pub(crate) fn check_range(
    what: &'static str,
    requirement: &'static str,
    tensor: &Tensor,
    (low, high): (f64, f64),
) -> Result<(f64, f64)> {
    let [least, most] = numbers([tensor.f_min()?, tensor.f_max()?])?;
    for value in [least, most] {
        checked(what, requirement, value, (low..=high).contains(&value))?;
    }
    Ok((least, most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_device_is_refused_and_named() {
        let (cpu, gpu) = (Device::Cpu, Device::Cuda(0));
        assert!(same_device("tau", cpu, cpu).is_ok() && same_device("tau", gpu, gpu).is_ok());
        let error = same_device("tau", gpu, cpu).unwrap_err();
        assert!(matches!(&error, Error::Device { what: "tau", expected, found }
            if *expected == gpu && *found == cpu));
        assert_eq!(error.to_string(), "tau: expected a tensor on Cuda(0), found one on Cpu");
    }
}
