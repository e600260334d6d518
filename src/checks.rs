//! Checks of tensors: shape, type, device and range, with the name of the argument in the error.

use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};
use crate::numeric::numbers;
use crate::value::checked;

/// Refuses a tensor that is undefined, not strided, not floating point, without samples, or below `rank`.
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
    check_strided(what, tensor)?;
    check_floating(what, tensor.f_kind()?)
}

/// Refuses a defined tensor that is sparse or in the blocks of oneDNN. (Sparse tensors in compressed rows are not
/// known to tch: they fail in libtorch.)
pub(crate) fn check_strided(what: &'static str, tensor: &Tensor) -> Result<()> {
    let is_strided = !(tensor.is_sparse() || tensor.is_mkldnn());
    if is_strided { Ok(()) } else { Err(Error::Layout { what }) }
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

/// Refuses a tensor that is not strided and floating point of shape `expected`.
pub(crate) fn check_size(what: &'static str, tensor: &Tensor, expected: &[i64]) -> Result<()> {
    let found = tensor.size();
    if !tensor.defined() || found != expected {
        return Err(Error::shape(what, format!("{expected:?}"), &found));
    }
    check_strided(what, tensor)?;
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

/// Refuses anything but one floating-point number for each sample of `x`, `[B]`, or for each frame, on its device.
///
/// Frames lie along one of the other axes of `x`. Numbers for each have the first axes of `x` up to that one, with 1
/// for those between: `[B, F]` for `[B, F, ..]`, `[B, 1, F]` for `[B, C, F, ..]`.
pub(crate) fn check_times(what: &'static str, times: &Tensor, x: &Tensor) -> Result<()> {
    check_leading(what, times, &x.size())?;
    check_strided(what, times)?;
    check_floating(what, times.f_kind()?)?;
    check_device(what, times, x)
}

/// Refuses a tensor without the shape of a number for each sample, or for each frame, of samples of `size`.
pub(crate) fn check_leading(what: &'static str, tensor: &Tensor, size: &[i64]) -> Result<()> {
    let found = tensor.size();
    let last = found.len().saturating_sub(1);
    let is_of_x = found.len() <= size.len() && found.first() == size.first();
    if tensor.defined() && is_of_x && is_clock(&found) && found.get(last) == size.get(last) {
        return Ok(());
    }
    let batch = size.first().copied().unwrap_or_default();
    let expected = if size.len() < 2 {
        format!("[{batch}]")
    } else {
        format!("[{batch}], or [{batch}, F] or [{batch}, 1, F] for the frames of {size:?}")
    };
    Err(Error::shape(what, expected, &found))
}

/// Whether a size is `[B]`, `[B, F]` or `[B, 1, F]`: all axes between the first and the last are 1.
fn is_clock(size: &[i64]) -> bool {
    let between = size.len().saturating_sub(2);
    !size.is_empty() && size.iter().skip(1).take(between).all(|&length| length == 1)
}

/// Refuses anything but floating-point numbers `[B]`, `[B, F]` or `[B, 1, F]`, B and F >= 1.
pub(crate) fn check_clock(what: &'static str, tensor: &Tensor) -> Result<()> {
    let size = tensor.size();
    if !size.is_empty() && !is_clock(&size) {
        return Err(Error::shape(what, "[B], or [B, F] or [B, 1, F] for frames", &size));
    }
    check_samples(what, tensor, 1)
}

/// Refuses anything but one number, or one for each of `batch` samples, of a type that has a mean.
pub(crate) fn check_numbers(what: &'static str, tensor: &Tensor, batch: i64) -> Result<()> {
    let size = tensor.size();
    if !tensor.defined() || !(size.is_empty() || size == [batch]) {
        return Err(Error::shape(what, format!("[] or [{batch}]"), &size));
    }
    check_strided(what, tensor)?;
    let found = tensor.f_kind()?;
    let is_complex = tensor.f_is_complex()?;
    if is_complex { Err(Error::Kind { what, expected: "real numbers", found }) } else { Ok(()) }
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
