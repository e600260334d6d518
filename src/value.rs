//! Checked numbers: a value of these types is in range, also one from a configuration.

use crate::error::{Error, Result};

/// More steps than anyone takes, and few enough for memory.
pub(crate) const MOST_STEPS: usize = 1_000_000;

/// `value` if `valid`, which must be false for NaN.
pub(crate) fn checked(
    what: &'static str,
    requirement: &'static str,
    value: f64,
    valid: bool,
) -> Result<f64> {
    if valid { Ok(value) } else { Err(Error::OutOfRange { what, requirement, value }) }
}

/// Whether a number is finite as float32 too, in which most samples are computed.
pub(crate) fn is_finite(value: f64) -> bool {
    value.abs() <= f64::from(f32::MAX)
}

/// Whether a number is finite and positive as float32 too, in which most samples are computed.
pub(crate) fn is_positive(value: f64) -> bool {
    (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&value)
}

/// A finite and positive number; the constructor is told its name.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "f64", into = "f64"))]
pub(crate) struct Positive(f64);

impl Positive {
    pub(crate) const ONE: Self = Self(1.0);
    pub(crate) const CDM: Self = Self(0.1);
    pub(crate) const FASTGEN: Self = Self(1e-6);
    pub(crate) const PORT: Self = Self(1e-8);

    pub(crate) fn new(what: &'static str, value: f64) -> Result<Self> {
        checked(what, "finite and positive", value, is_positive(value)).map(Self)
    }

    pub(crate) fn get(self) -> f64 {
        self.0
    }
}

impl TryFrom<f64> for Positive {
    type Error = Error;
    fn try_from(value: f64) -> Result<Self> {
        Self::new("number", value)
    }
}

impl From<Positive> for f64 {
    fn from(value: Positive) -> f64 {
        value.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_range_numbers_are_refused() {
        for number in [0.0, -1e-9, 1e-39, 1e39, f64::NAN, f64::INFINITY] {
            assert!(matches!(Positive::new("number", number), Err(Error::OutOfRange { .. })));
        }
        assert!(is_finite(-1e38) && !is_finite(1e39) && !is_finite(f64::NAN));
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_config_cannot_bypass_the_check() {
        assert_eq!(serde_json::from_str::<Positive>("7.5").unwrap(), Positive(7.5));
        assert!(serde_json::from_str::<Positive>("0.0").is_err());
    }
}
