//! Checked numbers: a value of these types is in range, wherever it came from.

use crate::{Error, Result};

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

/// Whether a number is finite and positive as float32 too, in which most samples are computed.
pub(crate) fn is_positive(value: f64) -> bool {
    (f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&value)
}

/// Makes a newtype over `f64` (de)serialise through its checked constructor.
macro_rules! checked_conversions {
    ($type:ty) => {
        impl TryFrom<f64> for $type {
            type Error = Error;
            fn try_from(value: f64) -> Result<Self> {
                Self::new(value)
            }
        }
        impl From<$type> for f64 {
            fn from(value: $type) -> f64 {
                value.get()
            }
        }
    };
}

/// Guidance scale in the alpha-form, `null + alpha (cond - null)`: finite and at least 1.
///
/// 1 is neutral: the conditional prediction alone, no call of the null branch.
/// Codebases that write `cond + w (cond - null)` (CausVid, Self-Forcing, the Z-Image pipeline) state
/// `w = alpha - 1`: use [`Guidance::from_w`] for their numbers, or every one is off by one.
///
/// ```
/// # use decoupled_dmd::Guidance;
/// assert_eq!(Guidance::new(4.0)?, Guidance::from_w(3.0)?);
/// assert!(Guidance::new(0.5).is_err());
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "f64", into = "f64"))]
pub struct Guidance(f64);

impl Guidance {
    /// No guidance: the conditional prediction as it is.
    pub const NEUTRAL: Self = Self(1.0);

    /// From the alpha-form (Ho & Salimans; DMD2, FastGen, Eq. 4 of the paper).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `alpha` is finite and at least 1.
    pub fn new(alpha: f64) -> Result<Self> {
        let valid = alpha.is_finite() && alpha >= 1.0;
        checked("guidance scale alpha", "finite and at least 1", alpha, valid).map(Self)
    }

    /// From the w-form, `alpha = w + 1` (CausVid, Self-Forcing, the Z-Image pipeline).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `w` is finite and at least 0.
    pub fn from_w(w: f64) -> Result<Self> {
        let valid = w.is_finite() && w >= 0.0;
        checked("guidance scale w", "finite and at least 0", w, valid).map(|w| Self(w + 1.0))
    }

    /// The scale in the alpha-form.
    pub fn get(self) -> f64 {
        self.0
    }

    /// `alpha - 1`: the scale in the w-form, and the weight of CFG Augmentation (Eq. 6).
    pub fn w(self) -> f64 {
        self.0 - 1.0
    }

    /// Whether the null branch has no weight.
    pub fn is_neutral(self) -> bool {
        self.w() <= 0.0
    }
}

checked_conversions!(Guidance);

/// Smallest value that a normaliser may take, in units of the data: finite and positive.
///
/// Near the clean end of the path the teacher returns its input almost unchanged; difference and
/// normaliser both go to zero and their ratio is rounding noise. The floor bounds that ratio.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "f64", into = "f64"))]
pub struct Floor(f64);

impl Floor {
    /// A floor at `value`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `value` is finite and positive, as float32 too.
    pub fn new(value: f64) -> Result<Self> {
        checked("normaliser floor", "finite and positive", value, is_positive(value)).map(Self)
    }

    /// The floor.
    pub fn get(self) -> f64 {
        self.0
    }
}

impl Default for Floor {
    /// 0.1, the clamp of CDM (arXiv 2605.06376), for data of unit scale.
    fn default() -> Self {
        Self(0.1)
    }
}

checked_conversions!(Floor);

/// A finite and positive number; what it stands for is said where it is made.
#[derive(Debug, Clone, Copy, PartialEq, PartialOrd)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "f64", into = "f64"))]
pub(crate) struct Positive(f64);

impl Positive {
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
    fn out_of_range_numbers_are_named() {
        for alpha in [0.999, -1.0, f64::NAN, f64::INFINITY] {
            let error = Guidance::new(alpha).unwrap_err();
            assert!(matches!(error, Error::OutOfRange { what: "guidance scale alpha", value, .. }
                    if value.to_bits() == alpha.to_bits()));
        }
        for w in [-0.1, f64::NAN, f64::INFINITY] {
            assert!(matches!(Guidance::from_w(w), Err(Error::OutOfRange { .. })));
        }
        for floor in [0.0, -1e-9, f64::NAN, f64::INFINITY] {
            assert!(matches!(Floor::new(floor), Err(Error::OutOfRange { .. })));
        }
    }

    #[test]
    fn the_two_guidance_forms_differ_by_one() -> Result<()> {
        let guidance = Guidance::from_w(3.0)?;
        approx::assert_abs_diff_eq!(guidance.get(), 4.0);
        approx::assert_abs_diff_eq!(guidance.w(), 3.0);
        assert_eq!(Guidance::from_w(0.0)?, Guidance::NEUTRAL);
        assert!(Guidance::NEUTRAL.is_neutral() && !guidance.is_neutral());
        Ok(())
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_config_cannot_bypass_the_check() {
        assert_eq!(serde_json::from_str::<Guidance>("7.5").unwrap(), Guidance(7.5));
        assert!(serde_json::from_str::<Guidance>("0.5").is_err());
        assert!(serde_json::from_str::<Floor>("0.0").is_err());
    }
}
