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

/// Refuses anything but floating-point numbers `[B]`, B >= 1.
pub(crate) fn check_vector(what: &'static str, tensor: &Tensor) -> Result<()> {
    if tensor.size().len() > 1 {
        return Err(Error::shape(what, "[B]", &tensor.size()));
    }
    check_samples(what, tensor, 1)
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
