//! Sums of a kernel over all pairs of rows, and their gradients, in blocks of rows.

use tch::{Device, Kind, Tensor};

use super::Kernel;
use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::batch_size;

/// Pairs in a block, unless one row has more. On a CPU a block fits the cache, so that memory is read and
/// written once for all passes; elsewhere it fills the device.
const CPU_PAIRS: i64 = 1 << 17;
const PAIRS: i64 = 1 << 22;
/// Numbers in the differences of a block, which the gradient of distances makes on CUDA.
const DIFFERENCES: i64 = 1 << 26;
/// The mode of libtorch's `cdist` that does not go over products.
const EXPLICIT_DIFFERENCES: i64 = 2;

impl Kernel {
    /// The sum of k over all pairs of a row of x and a row of y, in float64, and its gradient in the
    /// rows of x.
    pub(super) fn between_rows(
        &self,
        x: &Tensor,
        y: &Tensor,
        unit: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let mut sum = Tensor::f_zeros([0i64; 0], (Kind::Double, x.device()))?;
        let mut slopes = Vec::new();
        let rows = rows_in_block(y.device(), batch_size(y), y.numel());
        for rows in x.f_split(rows, 0)? {
            let pairs = self.pairs(&rows, y, unit)?;
            sum = sum.f_add(&pairs.sum)?;
            slopes.push(pairs.slope_in_rows(&rows, y)?);
        }
        Ok((sum, Tensor::f_cat(&slopes, 0)?))
    }

    /// The sum of k over all pairs of rows of x, a row with itself among them, in float64, and half of its
    /// gradient in x if `is_sloped`, else zeros. Pairs in different blocks are visited once.
    pub(super) fn among_rows(
        &self,
        x: &Tensor,
        unit: &Tensor,
        is_sloped: bool,
    ) -> Result<(Tensor, Tensor)> {
        let mut sum = Tensor::f_zeros([0i64; 0], (Kind::Double, x.device()))?;
        let slope = x.f_zeros_like()?;
        let mut later = x.shallow_clone();
        let mut slope_of_later = slope.shallow_clone();
        let rows = rows_in_block(x.device(), batch_size(x), x.numel());
        for rows in x.f_split(rows, 0)? {
            let count = batch_size(&rows);
            let after = |tensor: &Tensor| tensor.f_slice(0, count, None, 1);
            let mut slope_of_rows = slope_of_later.f_narrow(0, 0, count)?;
            (later, slope_of_later) = (after(&later)?, after(&slope_of_later)?);
            let own = self.pairs(&rows, &rows, unit)?;
            let cross = self.pairs(&rows, &later, unit)?;
            sum = sum.f_add(&own.sum)?.f_add(&cross.sum.times(2.0)?)?;
            if is_sloped {
                let _ = slope_of_rows.f_add_(&own.slope_in_rows(&rows, &rows)?)?;
                let _ = slope_of_rows.f_add_(&cross.slope_in_rows(&rows, &later)?)?;
                let _ = slope_of_later.f_add_(&cross.turned()?.slope_in_rows(&later, &rows)?)?;
            }
        }
        Ok((sum, slope))
    }

    /// All pairs of a row of x and a row of y, at once.
    ///
    /// Distances come from explicit differences: |x|^2 + |y|^2 - 2 xy would lose close pairs to rounding.
    fn pairs(&self, x: &Tensor, y: &Tensor, unit: &Tensor) -> Result<Pairs> {
        let distance = Tensor::f_cdist(x, y, 2.0, EXPLICIT_DIFFERENCES)?;
        let (value, mut slope) = self.evaluate(&distance.f_square()?, unit)?;
        // d k(d^2) / dd = 2 d k'; where d = 0 its gradient in x is taken as 0.
        let slope = slope.f_mul_(&distance)?.times_(2.0)?;
        Ok(Pairs { sum: value.f_sum(Kind::Double)?, slope, distance })
    }
}

/// The kernel over pairs of rows.
struct Pairs {
    /// Its sum, in float64.
    sum: Tensor,
    /// Its derivative in the distance, a number a pair.
    slope: Tensor,
    distance: Tensor,
}

impl Pairs {
    /// The gradient of the sum in the rows of x, for pairs of a row of x and a row of y.
    fn slope_in_rows(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        Ok(Tensor::f_internal_cdist_backward(&self.slope, x, y, 2.0, &self.distance)?)
    }

    /// The same pairs seen from the other side.
    fn turned(&self) -> Result<Self> {
        let turn = |tensor: &Tensor| tensor.f_transpose(0, 1)?.f_contiguous();
        Ok(Self {
            sum: self.sum.shallow_clone(),
            slope: turn(&self.slope)?,
            distance: turn(&self.distance)?,
        })
    }
}

/// The number of rows of a block against `count` other rows of `numbers` numbers in all.
fn rows_in_block(device: Device, count: i64, numbers: usize) -> i64 {
    let rows = |block: i64, row: i64| block.checked_div(row).unwrap_or(1).max(1);
    if device == Device::Cpu {
        return rows(CPU_PAIRS, count);
    }
    let differences = i64::try_from(numbers).unwrap_or(i64::MAX);
    rows(PAIRS, count).min(rows(DIFFERENCES, differences))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fit_the_cache_of_a_cpu_and_the_memory_of_a_gpu() {
        // On a CPU the width does not matter.
        assert_eq!(rows_in_block(Device::Cpu, 1024, 1024), 128);
        assert_eq!(rows_in_block(Device::Cpu, 1024, 1024 * 65_536), 128);
        // Elsewhere 4.2 million pairs, or 67 million numbers of their differences.
        assert_eq!(rows_in_block(Device::Cuda(0), 1024, 1024), 4096);
        assert_eq!(rows_in_block(Device::Cuda(0), 1024, 1024 * 64), 1024);
        // One row at least.
        for device in [Device::Cpu, Device::Cuda(0)] {
            assert_eq!(rows_in_block(device, i64::MAX, usize::MAX), 1);
        }
    }
}
