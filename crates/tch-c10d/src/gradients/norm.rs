//! The norm of all gradients, and whether they are finite.

use tch::{Device, Kind, TchError, Tensor};

/// The largest element less the smallest, in double precision: finite exactly if all elements are.
pub(super) fn spread(flat: &Tensor) -> Result<Tensor, TchError> {
    let (least, largest) = flat.f_aminmax(None, false)?;
    largest.f_to_kind(Kind::Double)?.f_sub(&least.f_to_kind(Kind::Double)?)
}

/// The 2-norm, as a number in double precision.
///
/// Elements are squared and added up in their own type in rows of 1024, whose norms are put together in double
/// precision: as fast as libtorch's norm of all in one, which is off by 2e-4 for some millions of floats on a
/// CPU, and five times as fast as in double precision throughout, from which it differs by 1e-9.
pub(super) fn norm(flat: &Tensor) -> Result<Tensor, TchError> {
    const ROW: i64 = 1024;
    let kind = if flat.f_kind()? == Kind::Double { Kind::Double } else { Kind::Float };
    let length = flat.numel() as i64;
    let rest = length % ROW;
    let rows = flat.f_narrow(0, 0, length - rest)?.f_view([-1, 1, ROW])?;
    let rows = matrix_norms(&rows, kind)?;
    let rest = norm_exactly(&flat.f_narrow(0, length - rest, rest)?)?;
    norm_exactly(&Tensor::f_cat(&[rows.f_to_kind(Kind::Double)?, rest.f_view([1])?], 0)?)
}

/// The 2-norm in double precision throughout.
pub(super) fn norm_exactly(tensor: &Tensor) -> Result<Tensor, TchError> {
    matrix_norms(&tensor.f_reshape([1, -1])?, Kind::Double)
}

/// The 2-norms over the last two axes, computed in `kind`. libtorch's norm of vectors takes a number, with which tch's
/// call panics where libtorch fails.
fn matrix_norms(matrices: &Tensor, kind: Kind) -> Result<Tensor, TchError> {
    matrices.f_linalg_norm_ord_str("fro", [-2_i64, -1].as_slice(), false, kind)
}

/// The norm of all gradients from those of the buckets, on the CPU.
///
/// Where the squares may have been too large or too small for single precision it is made anew.
pub(super) fn total_norm(
    norms: &[Tensor],
    gradients: &[Option<Tensor>],
) -> Result<Tensor, TchError> {
    let total = norm_exactly(&on_cpu(norms)?)?;
    if (1e-12..1e18).contains(&total.f_double_value(&[])?) {
        return Ok(total);
    }
    let exact = gradients.iter().flatten().map(norm_exactly).collect::<Result<Vec<_>, _>>()?;
    norm_exactly(&on_cpu(&exact)?)
}

/// Numbers that may be on several devices, as one tensor on the CPU.
pub(super) fn on_cpu(numbers: &[Tensor]) -> Result<Tensor, TchError> {
    if numbers.is_empty() {
        return Tensor::f_zeros([0], (Kind::Double, Device::Cpu));
    }
    let numbers = numbers.iter().map(|number| number.f_to_device(Device::Cpu));
    Tensor::f_stack(&numbers.collect::<Result<Vec<_>, _>>()?, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The norm against double precision, beyond the length of a row and for numbers whose squares a float
    /// cannot hold.
    #[test]
    fn norms_are_those_of_double_precision() {
        let total = |gradients: &[Option<Tensor>]| {
            let norms: Vec<_> =
                gradients.iter().flatten().map(|gradient| norm(gradient).unwrap()).collect();
            total_norm(&norms, gradients).unwrap().double_value(&[])
        };
        for length in [1, 1023, 1024, 1025, 1_000_003] {
            let exact = (Tensor::arange(length, (Kind::Double, Device::Cpu)) * 0.7).sin() + 1.0;
            for (kind, unit) in [(Kind::Double, 1e-16), (Kind::Float, 6e-8), (Kind::BFloat16, 6e-8)]
            {
                for scale in [1.0, 1e-25, 1e25] {
                    let gradient = (&exact * scale).to_kind(kind);
                    let truth = gradient.to_kind(Kind::Double).norm().double_value(&[]);
                    let error = (total(&[Some(gradient)]) - truth).abs() / truth;
                    // A thousand additions in a row at most, each with one rounding.
                    assert!(error <= 1024.0 * unit, "{length} of {kind:?} * {scale:e}: {error:e}");
                }
            }
        }
        assert_eq!(total(&[]), 0.0);
        assert_eq!(total(&[Some(Tensor::zeros([5], (Kind::Float, Device::Cpu)))]), 0.0);
    }

    #[test]
    fn spreads_are_finite_exactly_if_all_elements_are() {
        let is_finite = |elements: &[f32]| {
            spread(&Tensor::from_slice(elements)).unwrap().double_value(&[]).is_finite()
        };
        assert!(is_finite(&[0.0, f32::MAX, f32::MIN]));
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(!is_finite(&[0.0, bad, 1.0]) && !is_finite(&[bad]) && !is_finite(&[bad, -bad]));
        }
    }
}
