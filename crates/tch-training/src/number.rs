//! Numbers as tensors: the calls of tch 0.26 that take a number, such as `f_mul_scalar`, panic where libtorch fails, as
//! for want of memory, since tch's copy of the number is dropped before the error is read.

use tch::{Kind, TchError, Tensor};

/// A number as a tensor without axes on the CPU, which operators take beside any tensor that has axes, of the CPU or a
/// GPU: they keep that one's type, and wait for nothing. In float64 for a `kind` of that, else in float32.
pub(crate) fn number(value: f64, kind: Kind) -> Result<Tensor, TchError> {
    match kind {
        Kind::Double => Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Double),
        _ => Tensor::f_from_data_size(&(value as f32).to_ne_bytes(), &[], Kind::Float),
    }
}

/// `x * value` of a tensor that has axes.
pub(crate) fn times(x: &Tensor, value: f64) -> Result<Tensor, TchError> {
    x.f_mul(&number(value, x.f_kind()?)?)
}
