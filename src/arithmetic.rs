//! Arithmetic of a tensor and a number, with errors.
//!
//! The calls of tch 0.26 that take a number, such as `f_mul_scalar`, panic where libtorch fails, as for want of memory:
//! tch's copy of the number is dropped before the error is read, and its destructor unwraps that error. Here a number
//! is a tensor without axes, which libtorch takes as it takes a number. It lies on the CPU: the binary operators used
//! here take it beside tensors of a GPU without waiting. `scripts/numbers.py` refuses the calls of tch in `src`.

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// A number as a tensor without axes on the CPU, in the type that `like` is computed in: float64 where `like` has it,
/// else float32. An operator with `like` keeps the type of `like` if that has axes.
pub(crate) fn number(value: f64, like: &Tensor) -> Result<Tensor> {
    number_of(value, like.f_kind()?)
}

fn number_of(value: f64, kind: Kind) -> Result<Tensor> {
    Ok(match kind {
        Kind::Double => Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Double)?,
        _ => Tensor::f_from_data_size(&(value as f32).to_ne_bytes(), &[], Kind::Float)?,
    })
}

/// A number with the type and device of `like`, for operators that take no other.
pub(crate) fn number_like(value: f64, like: &Tensor) -> Result<Tensor> {
    // A copy from the CPU is not waited for: libtorch copies the number before it returns.
    Ok(number(value, like)?.f_to_device_(like.device(), like.f_kind()?, true, false)?)
}

/// A whole number as a tensor without axes on the CPU, in Int64.
pub(crate) fn whole_number(value: i64) -> Result<Tensor> {
    Ok(Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Int64)?)
}

/// A tensor of one floating-point number.
pub(crate) fn filled(size: &[i64], value: f64, options: (Kind, Device)) -> Result<Tensor> {
    let mut zeros = Tensor::f_zeros(size, options)?;
    zeros.plus_(value)
}

/// Arithmetic of a floating-point tensor and a number; the result of all but a comparison has the tensor's type. The
/// gradient is that of tch's own calls, but at the number itself in `at_least`, `at_most` and `within`, where it is
/// halved.
pub(crate) trait Arithmetic {
    /// `x * number`.
    fn times(&self, number: f64) -> Result<Tensor>;
    /// `x / number`.
    fn over(&self, number: f64) -> Result<Tensor>;
    /// `x + number`.
    fn plus(&self, number: f64) -> Result<Tensor>;
    /// `x - number`.
    fn minus(&self, number: f64) -> Result<Tensor>;
    /// `1 - x`.
    fn complement(&self) -> Result<Tensor>;
    /// `x ^ number`.
    fn power(&self, number: f64) -> Result<Tensor>;
    /// `max(x, number)`; NaN stays NaN.
    fn at_least(&self, number: f64) -> Result<Tensor>;
    /// `min(x, number)`; NaN stays NaN.
    fn at_most(&self, number: f64) -> Result<Tensor>;
    /// `min(max(x, low), high)`; NaN stays NaN.
    fn within(&self, low: f64, high: f64) -> Result<Tensor>;
    /// `x > number`, booleans.
    fn above(&self, number: f64) -> Result<Tensor>;
    /// `x < number`, booleans.
    fn below(&self, number: f64) -> Result<Tensor>;
    /// `x + share (other - x)`, and exactly `other` for a share of 1.
    fn toward(&self, other: &Tensor, share: f64) -> Result<Tensor>;
    /// [`times`](Self::times) in place.
    fn times_(&mut self, number: f64) -> Result<Tensor>;
    /// [`plus`](Self::plus) in place.
    fn plus_(&mut self, number: f64) -> Result<Tensor>;
    /// [`toward`](Self::toward) in place.
    fn toward_(&mut self, other: &Tensor, share: f64) -> Result<Tensor>;
}

impl Arithmetic for Tensor {
    fn times(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_mul)
    }

    fn over(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_div)
    }

    fn plus(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_add)
    }

    fn minus(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_sub)
    }

    fn complement(&self) -> Result<Tensor> {
        with(self, 1.0, |x, one| one.f_sub(x))
    }

    fn power(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_pow)
    }

    fn at_least(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_maximum)
    }

    fn at_most(&self, number: f64) -> Result<Tensor> {
        with(self, number, Tensor::f_minimum)
    }

    fn within(&self, low: f64, high: f64) -> Result<Tensor> {
        self.at_least(low)?.at_most(high)
    }

    fn above(&self, value: f64) -> Result<Tensor> {
        Ok(self.f_gt_tensor(&number(value, self)?)?)
    }

    fn below(&self, value: f64) -> Result<Tensor> {
        Ok(self.f_lt_tensor(&number(value, self)?)?)
    }

    fn toward(&self, other: &Tensor, share: f64) -> Result<Tensor> {
        Ok(self.f_lerp_tensor(other, &number_like(share, self)?)?)
    }

    fn times_(&mut self, value: f64) -> Result<Tensor> {
        let number = number(value, self)?;
        Ok(self.f_mul_(&number)?)
    }

    fn plus_(&mut self, value: f64) -> Result<Tensor> {
        let number = number(value, self)?;
        Ok(self.f_add_(&number)?)
    }

    fn toward_(&mut self, other: &Tensor, share: f64) -> Result<Tensor> {
        let share = number_like(share, self)?;
        Ok(self.f_lerp_tensor_(other, &share)?)
    }
}

/// The result of `operator` in the type of `x`: without axes, float32 beside bfloat16 would give float32.
fn with(
    x: &Tensor,
    number: f64,
    operator: impl Fn(&Tensor, &Tensor) -> Result<Tensor, tch::TchError>,
) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let result = operator(x, &number_of(number, kind)?)?;
    Ok(if result.f_kind()? == kind { result } else { result.f_to_kind(kind)? })
}
