//! Arithmetic of a tensor and a number, with errors.
//!
//! The calls of tch 0.26 that take a number, such as `f_mul_scalar`, panic where libtorch fails, as for want of memory:
//! tch's copy of the number is dropped before the error is read, and its destructor unwraps that error. Here a number
//! is a tensor without axes, which libtorch takes as it takes a number. It lies on the CPU: the binary operators used
//! here take it beside tensors of a GPU without waiting. Engines, regularizers and networks of one's own that are to
//! return every failure as an error compute with it too. `scripts/numbers.py` refuses the calls of tch.
//!
//! ```
//! use decoupled_dmd::arithmetic::{Arithmetic, counting};
//! use tch::{Device, Kind, Tensor};
//!
//! # fn main() -> Result<(), tch::TchError> {
//! let x = counting(3, (Kind::Float, Device::Cpu))?; // 0, 1, 2
//! let y = x.times(2.0)?.plus(1.0)?.within(0.0, 4.0)?;
//! assert_eq!(y, Tensor::from_slice(&[1f32, 3.0, 4.0]));
//! # Ok(())
//! # }
//! ```

use std::result;

use tch::{Device, Kind, TchError, Tensor};

type Result<T> = result::Result<T, TchError>;

/// A number as a tensor without axes on the CPU, in the type that `like` is computed in: float64 where `like` has it,
/// else float32. An operator with `like` keeps the type of `like` if that has axes.
pub(crate) fn number(value: f64, like: &Tensor) -> Result<Tensor> {
    number_of(value, like.f_kind()?)
}

fn number_of(value: f64, kind: Kind) -> Result<Tensor> {
    match kind {
        Kind::Double => Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Double),
        _ => Tensor::f_from_data_size(&(value as f32).to_ne_bytes(), &[], Kind::Float),
    }
}

/// A number with the type and device of `like`, for operators that take no other.
pub(crate) fn number_like(value: f64, like: &Tensor) -> Result<Tensor> {
    // A copy from the CPU is not waited for: libtorch copies the number before it returns.
    number(value, like)?.f_to_device_(like.device(), like.f_kind()?, true, false)
}

/// A whole number as a tensor without axes on the CPU, in Int64, for operators with whole numbers.
///
/// # Errors
/// If libtorch fails.
pub fn whole_number(value: i64) -> Result<Tensor> {
    Tensor::f_from_data_size(&value.to_ne_bytes(), &[], Kind::Int64)
}

/// A tensor of one floating-point number.
///
/// # Errors
/// If libtorch fails, or the type holds no such numbers.
pub fn filled(size: &[i64], value: f64, options: (Kind, Device)) -> Result<Tensor> {
    let mut zeros = Tensor::f_zeros(size, options)?;
    zeros.plus_(value)
}

/// The whole numbers from 0 to `length - 1`, `[length]`.
///
/// # Errors
/// If the length is negative, or libtorch fails.
pub fn counting(length: i64, (kind, device): (Kind, Device)) -> Result<Tensor> {
    let from_one = Tensor::f_ones([length], (Kind::Int64, device))?.f_cumsum(0, None::<Kind>)?;
    from_one.f_sub(&whole_number(1)?)?.f_to_kind(kind)
}

/// Arithmetic of a floating-point tensor and a number; the result of all but a comparison has the tensor's type. The
/// gradient is that of tch's own calls, but at the number itself in `at_least`, `at_most` and `within`, where it is
/// halved.
///
/// # Errors
/// Of all methods, those of libtorch.
#[expect(clippy::missing_errors_doc, reason = "said once for all")]
pub trait Arithmetic {
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
    /// `x ^ number`; a type narrower than float32 rounds the exponent.
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
    /// `x + share (other - x)`, and exactly `other` for a share of 1; the type of `x` rounds the share.
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
        self.f_gt_tensor(&number(value, self)?)
    }

    fn below(&self, value: f64) -> Result<Tensor> {
        self.f_lt_tensor(&number(value, self)?)
    }

    fn toward(&self, other: &Tensor, share: f64) -> Result<Tensor> {
        self.f_lerp_tensor(other, &number_like(share, self)?)
    }

    fn times_(&mut self, value: f64) -> Result<Tensor> {
        let number = number(value, self)?;
        self.f_mul_(&number)
    }

    fn plus_(&mut self, value: f64) -> Result<Tensor> {
        let number = number(value, self)?;
        self.f_add_(&number)
    }

    fn toward_(&mut self, other: &Tensor, share: f64) -> Result<Tensor> {
        let share = number_like(share, self)?;
        self.f_lerp_tensor_(other, &share)
    }
}

/// The result of `operator` in the type of `x`: without axes, float32 beside bfloat16 would give float32.
fn with(
    x: &Tensor,
    number: f64,
    operator: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let kind = x.f_kind()?;
    let result = operator(x, &number_of(number, kind)?)?;
    Ok(if result.f_kind()? == kind { result } else { result.f_to_kind(kind)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Calls of tch beside those here.
    type Call = fn(&Tensor, &Tensor) -> Result<(Tensor, Tensor)>;

    const CALLS: [(&str, Call); 10] = [
        ("times", |x, _| Ok((x.times(0.3)?, x.f_mul_scalar(0.3)?))),
        ("over", |x, _| Ok((x.over(0.3)?, x.f_div_scalar(0.3)?))),
        ("plus", |x, _| Ok((x.plus(0.3)?, x.f_add_scalar(0.3)?))),
        ("minus", |x, _| Ok((x.minus(0.3)?, x.f_sub_scalar(0.3)?))),
        ("complement", |x, _| Ok((x.complement()?, x.f_neg()?.f_add_scalar(1.0)?))),
        ("power", |x, _| Ok((x.power(0.3)?, x.f_pow_tensor_scalar(0.3)?))),
        ("at least", |x, _| Ok((x.at_least(0.3)?, x.f_clamp_min(0.3)?))),
        ("at most", |x, _| Ok((x.at_most(0.3)?, x.f_clamp_max(0.3)?))),
        ("within", |x, _| Ok((x.within(0.2, 0.6)?, x.f_clamp(0.2, 0.6)?))),
        ("toward", |x, y| Ok((x.toward(y, 0.25)?, x.f_lerp(y, 0.25)?))),
    ];

    #[test]
    fn types_numbers_and_gradients_are_those_of_tch() -> Result<()> {
        let numbers = Tensor::from_slice(&[0.1, 0.55, 0.9]);
        let others = Tensor::from_slice(&[0.7, -0.2, 0.4]);
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half] {
            // A tensor without axes would take the type of a number that is one too.
            for (x, y) in
                [(numbers.shallow_clone(), others.shallow_clone()), (numbers.get(1), others.get(1))]
            {
                let (x, y) = (x.to_kind(kind).set_requires_grad(true), y.to_kind(kind));
                for (name, call) in CALLS {
                    if name == "power" && matches!(kind, Kind::BFloat16 | Kind::Half) {
                        continue;
                    }
                    let (found, expected) = call(&x, &y)?;
                    assert_eq!((found.kind(), found.size()), (kind, x.size()), "{name}");
                    let gradient = |of: &Tensor| {
                        Tensor::run_backward(&[of.sum(None)], &[&x], true, false).remove(0)
                    };
                    for (one, two) in
                        [(&found, &expected), (&gradient(&found), &gradient(&expected))]
                    {
                        let distance = (one - two).abs().max().double_value(&[]);
                        let step = if kind == Kind::Double { 1e-15 } else { 1e-7 };
                        assert!(distance <= step, "{name} {kind:?}: {distance:e}");
                    }
                }
                assert!(x.above(0.5)?.equal(&x.gt(0.5)) && x.below(0.5)?.equal(&x.lt(0.5)));
            }
        }
        Ok(())
    }

    #[test]
    fn what_is_in_place_is() -> Result<()> {
        let x = Tensor::from_slice(&[1.0f32, -2.0]);
        let mut same = x.shallow_clone();
        let _ = same.times_(2.0)?.plus_(1.0)?.toward_(&Tensor::from_slice(&[7.0f32, 7.0]), 0.5)?;
        assert_eq!(Vec::<f32>::try_from(&x).unwrap(), [5.0, 2.0]);
        let _ = same.toward_(&Tensor::from_slice(&[0.1f32, 0.2]), 1.0)?;
        assert_eq!(Vec::<f32>::try_from(&x).unwrap(), [0.1, 0.2]);
        Ok(())
    }

    #[test]
    fn not_a_number_stays_so() -> Result<()> {
        let nan = Tensor::from_slice(&[f64::NAN]);
        for result in [nan.at_least(0.0)?, nan.at_most(0.0)?, nan.within(0.0, 1.0)?] {
            assert!(result.double_value(&[0]).is_nan());
        }
        assert!(!nan.above(0.0)?.equal(&nan.isnan()) && !nan.below(0.0)?.equal(&nan.isnan()));
        Ok(())
    }

    #[test]
    fn numbers_take_the_type_and_the_place_that_is_asked() -> Result<()> {
        let options = (Kind::BFloat16, Device::Cpu);
        let filled = filled(&[2], 0.5, options)?;
        assert_eq!((filled.size(), filled.kind()), (vec![2], Kind::BFloat16));
        assert_eq!(number_like(0.5, &filled)?.kind(), Kind::BFloat16);
        assert_eq!(whole_number(i64::MAX)?.int64_value(&[]), i64::MAX);
        for kind in [Kind::Int64, Kind::Float, Kind::Double] {
            let options = (kind, Device::Cpu);
            assert!(counting(5, options)?.equal(&Tensor::arange(5, options)));
        }
        assert_eq!(counting(0, options)?.size(), [0]);
        assert!(counting(-1, options).is_err() && counting(i64::MAX, options).is_err());
        Ok(())
    }
}
