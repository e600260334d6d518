//! A number for each sample, some of which may be undefined.

use tch::{Kind, Tensor};

use crate::arithmetic::number_like;
use crate::error::{Error, Result};
use crate::numeric::masked;

/// One number for each sample of the batch, on the device. Samples at which it is undefined are marked: a
/// cosine with a vanishing vector, a sample that is not finite or wholly masked.
#[derive(Debug)]
pub struct PerSample {
    values: Tensor,
    defined: Tensor,
}

impl PerSample {
    /// `values` `[B]` where `defined` (booleans `[B]`) says so and they are finite.
    pub(crate) fn new(values: Tensor, defined: &Tensor) -> Result<Self> {
        let defined = values.f_isfinite()?.f_logical_and(defined)?;
        let values = masked(&values.f_to_kind(Kind::Double)?, Some(&defined))?;
        Ok(Self { values, defined })
    }

    /// The same samples with other values.
    pub(crate) fn map(&self, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Self::new(f(&self.values)?, &self.defined)
    }

    /// The numbers, `[B]` in float64; 0 where undefined.
    pub fn values(&self) -> &Tensor {
        &self.values
    }

    /// Whether each number is defined, `[B]` of booleans.
    pub fn defined(&self) -> &Tensor {
        &self.defined
    }

    /// The mean over the samples at which the number is defined; `None` if there are none. It waits
    /// for the device.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn mean(&self) -> Result<Option<f64>> {
        let mean = self.mean_tensor()?.f_double_value(&[])?;
        Ok((!mean.is_nan()).then_some(mean))
    }

    /// The smallest of the numbers that are defined; `None` if there are none. It waits for the
    /// device.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn min(&self) -> Result<Option<f64>> {
        let min = self.min_tensor()?.f_double_value(&[])?;
        Ok(min.is_finite().then_some(min))
    }

    /// The largest of the numbers that are defined, likewise.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn max(&self) -> Result<Option<f64>> {
        let max = self.max_tensor()?.f_double_value(&[])?;
        Ok(max.is_finite().then_some(max))
    }

    /// The numbers on the host, `None` where undefined.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn to_vec(&self) -> Result<Vec<Option<f64>>> {
        let values = self.or_else(f64::NAN)?;
        let values = Vec::<f64>::try_from(values).map_err(Error::from)?;
        Ok(values.into_iter().map(|value| (!value.is_nan()).then_some(value)).collect())
    }

    /// The values, with `number` where undefined.
    fn or_else(&self, number: f64) -> Result<Tensor> {
        Ok(self.values.f_where_self(&self.defined, &number_like(number, &self.values)?)?)
    }

    /// NaN if no sample is defined.
    pub(crate) fn mean_tensor(&self) -> Result<Tensor> {
        let count = self.defined.f_sum(Kind::Double)?;
        Ok(self.values.f_sum(Kind::Double)?.f_div(&count)?)
    }

    /// Infinite if no sample is defined.
    pub(crate) fn min_tensor(&self) -> Result<Tensor> {
        Ok(self.or_else(f64::INFINITY)?.f_min()?)
    }

    /// Infinite if no sample is defined.
    pub(crate) fn max_tensor(&self) -> Result<Tensor> {
        Ok(self.or_else(f64::NEG_INFINITY)?.f_max()?)
    }

    /// The standard deviation over the samples, from the biased variance; NaN if none is defined.
    pub(crate) fn std_tensor(&self) -> Result<Tensor> {
        let offset = self.values.f_sub(&self.mean_tensor()?)?;
        self.map(|_| Ok(offset.f_square()?))?.mean_tensor()?.f_sqrt().map_err(Error::from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn undefined_numbers_are_none_and_take_no_part() -> Result<()> {
        let values = Tensor::from_slice(&[3.0, f64::NAN, 5.0, -9.0]);
        let some = PerSample::new(values, &Tensor::from_slice(&[true, true, true, false]))?;
        assert_eq!(some.to_vec()?, [Some(3.0), None, Some(5.0), None]);
        assert_eq!((some.mean()?, some.min()?, some.max()?), (Some(4.0), Some(3.0), Some(5.0)));
        approx::assert_relative_eq!(some.std_tensor()?.double_value(&[]), 1.0);
        let none = some.map(|values| Ok(values.f_log()?.f_neg()?.f_mul_scalar(f64::NAN)?))?;
        assert_eq!((none.mean()?, none.min()?, none.max()?), (None, None, None));
        assert!(none.std_tensor()?.double_value(&[]).is_nan());
        Ok(())
    }
}
