//! Uniform re-noising times: over a fixed range, or above the student.

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::error::{Error, Result};
use crate::numeric::{of_one_rank, widen};
use crate::renoising::TimeDistribution;
use crate::time::PreShift;
use crate::value::checked;

/// Uniform times between two pre-shift times: tau_DM over the full range by default (Algorithm 1).
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "super::config::Uniform"))]
pub struct Uniform {
    low: f64,
    high: f64,
}

impl Uniform {
    /// All of [0, 1].
    pub const FULL: Self = Self { low: 0.0, high: 1.0 };

    /// Between `low` and `high`. DMD2's clip to the timesteps 20 to 980 of 1000 is (0.019, 0.979) on a
    /// [`VariancePreserving`](crate::VariancePreserving) table.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless 0 <= low <= high <= 1.
    pub fn new(low: f64, high: f64) -> Result<Self> {
        check_bounds(low, high)?;
        Ok(Self { low, high })
    }
}

impl TimeDistribution for Uniform {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        let times = widen(u)?.times(self.high - self.low)?.plus(self.low)?;
        Ok(PreShift::within(times, (self.low, self.high)))
    }
}

/// Uniform times above the student's own time, `tau ~ U(t + gap, high)`: the constrained schedule of
/// tau_CA (Section 4.1 and Algorithm 1), drawn before the shift.
///
/// Where `t + gap` exceeds `high` the range is empty and tau is `high`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "super::config::AboveStudent"))]
pub struct AboveStudent {
    gap: f64,
    high: f64,
}

impl AboveStudent {
    /// Up to the clean end, with no gap: the paper's U(t, 1).
    pub const FULL: Self = Self { gap: 0.0, high: 1.0 };

    /// At least `gap` above the student and at most `high`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless both are in [0, 1].
    pub fn new(gap: f64, high: f64) -> Result<Self> {
        checked("gap above the student", "in [0, 1]", gap, (0.0..=1.0).contains(&gap))?;
        check_bounds(0.0, high)?;
        Ok(Self { gap, high })
    }
}

impl TimeDistribution for AboveStudent {
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift> {
        let missing = Error::Missing { what: "student time", setter: "Batch::with_student_time" };
        let student = student.ok_or(missing)?;
        // A draw for each sample may meet a time for each frame, and the other way round.
        let (u, student_time) = of_one_rank(&widen(u)?, &widen(student.tensor())?)?;
        let low = student_time.plus(self.gap)?.at_most(self.high)?;
        let width = low.f_neg()?.plus(self.high)?;
        let noisiest = (student.range().0 + self.gap).min(self.high);
        Ok(PreShift::within(low.f_add(&u.f_mul(&width)?)?, (noisiest, self.high)))
    }
}

fn check_bounds(low: f64, high: f64) -> Result<()> {
    checked("lower bound of the time", "in [0, 1]", low, (0.0..=1.0).contains(&low))?;
    checked("upper bound of the time", "in [low, 1]", high, (low..=1.0).contains(&high))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn values(tensor: &Tensor) -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double)).unwrap()
    }

    #[test]
    fn above_the_student_is_cleaner_than_the_student() -> Result<()> {
        let student = PreShift::new(Tensor::from_slice(&[0.0, 0.5, 0.875, 0.99]))?;
        let distribution = AboveStudent::new(0.05, 0.98)?;
        let lowest =
            distribution.times(&Tensor::zeros([4], (Kind::Double, Device::Cpu)), Some(&student))?;
        assert_eq!(values(lowest.tensor()), [0.05, 0.55, 0.925, 0.98]);
        let highest =
            distribution.times(&Tensor::ones([4], (Kind::Double, Device::Cpu)), Some(&student))?;
        for value in values(highest.tensor()) {
            approx::assert_abs_diff_eq!(value, 0.98, epsilon = 1e-12);
        }
        assert!(matches!(
            distribution.times(student.tensor(), None),
            Err(Error::Missing { what: "student time", .. })
        ));
        Ok(())
    }

    #[test]
    fn every_sample_has_its_own_student_time() -> Result<()> {
        let student = PreShift::new(Tensor::from_slice(&[0.75, 0.0, 0.5, 1.0]))?;
        let u = Tensor::from_slice(&[0.5, 0.25, 0.0, 0.9]);
        let times = AboveStudent::FULL.times(&u, Some(&student))?;
        assert_eq!(values(times.tensor()), [0.875, 0.25, 0.5, 1.0]);
        assert_eq!(times.range(), (0.0, 1.0));
        // 1 + gap > high: the range is empty, and tau is its upper end.
        let times = AboveStudent::new(0.1, 0.9)?.times(&u, Some(&student))?;
        approx::assert_abs_diff_eq!(values(times.tensor())[3], 0.9, epsilon = 1e-15);
        Ok(())
    }
}
