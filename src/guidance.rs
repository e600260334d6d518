//! Classifier-free guidance: its scale, rescaling and interval.

use crate::error::{Error, Result};
use crate::value::{checked, is_finite};

/// Classifier-free guidance in the alpha-form, `null + alpha (cond - null)`, alpha at least 1.
///
/// 1 is neutral: the conditional prediction alone, no call of the null branch.
/// Codebases that write `cond + w (cond - null)` (CausVid, Self-Forcing, the Z-Image pipeline) state
/// `w = alpha - 1`: use [`Guidance::from_w`] for their numbers, or every one is off by one.
///
/// The null branch sees the null condition of the batch ([`Batch::with_null`](crate::Batch::with_null)):
/// the encoded empty prompt, or an explicit negative prompt.
///
/// | option | guided output | used by |
/// |---|---|---|
/// | plain | null + alpha (cond - null) | most |
/// | [`rescaled`](Self::rescaled) | the plain one, brought to the norm of cond over the channels | Qwen-Image's pipeline |
/// | [`within`](Self::within) | cond where the time is outside an interval | Kynkaanniemi et al., arXiv 2404.07724; FastGen's MeanFlow |
///
/// ```
/// # use decoupled_dmd::Guidance;
/// assert_eq!(Guidance::new(4.0)?, Guidance::from_w(3.0)?);
/// assert!(Guidance::new(0.5).is_err());
/// let qwen = Guidance::new(4.0)?.rescaled();
/// let early = Guidance::new(4.0)?.within(0.0, 0.7)?;
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "config::Guidance", into = "config::Guidance"))]
pub struct Guidance {
    alpha: f64,
    is_rescaled: bool,
    interval: Option<(f64, f64)>,
}

impl Guidance {
    /// No guidance: the conditional prediction as it is.
    pub const NEUTRAL: Self = Self { alpha: 1.0, is_rescaled: false, interval: None };

    /// From the alpha-form (Ho & Salimans; DMD2, FastGen, Eq. 4 of the paper).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `alpha` is finite, as float32 too, and at least 1.
    pub fn new(alpha: f64) -> Result<Self> {
        let valid = is_finite(alpha) && alpha >= 1.0;
        let alpha = checked("guidance scale alpha", "finite and at least 1", alpha, valid)?;
        Ok(Self { alpha, ..Self::NEUTRAL })
    }

    /// From the w-form, `alpha = w + 1` (CausVid, Self-Forcing, the Z-Image pipeline).
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `w` is finite, as float32 too, and at least 0.
    pub fn from_w(w: f64) -> Result<Self> {
        let valid = is_finite(w) && w >= 0.0;
        let w = checked("guidance scale w", "finite and at least 0", w, valid)?;
        Ok(Self { alpha: w + 1.0, ..Self::NEUTRAL })
    }

    /// Brings the guided output of the network back to the norm of the conditional one, taken over axis 1
    /// (the channels of `[B, C, ..]`) at each place, as the pipeline of Qwen-Image does for each token. Samples whose
    /// axis 1 has frames with times of their own are refused.
    #[must_use]
    pub fn rescaled(mut self) -> Self {
        self.is_rescaled = true;
        self
    }

    /// Guides only where the post-shift time is in `[low, high]`, 0 being noise and 1 data.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless 0 <= low <= high <= 1.
    pub fn within(mut self, low: f64, high: f64) -> Result<Self> {
        checked("lower end of the interval", "in [0, 1]", low, (0.0..=1.0).contains(&low))?;
        checked("upper end of the interval", "in [low, 1]", high, (low..=1.0).contains(&high))?;
        self.interval = Some((low, high));
        Ok(self)
    }

    /// The scale in the alpha-form.
    pub fn get(self) -> f64 {
        self.alpha
    }

    /// `alpha - 1`: the scale in the w-form, and the weight of CFG Augmentation (Eq. 6).
    pub fn w(self) -> f64 {
        self.alpha - 1.0
    }

    /// Whether the null branch has no weight.
    pub fn is_neutral(self) -> bool {
        self.w() <= 0.0
    }

    /// Whether guided outputs are brought back to the norm of the conditional ones.
    pub fn is_rescaled(self) -> bool {
        self.is_rescaled
    }

    /// The interval of post-shift times in which this guides; `None` for all.
    pub fn interval(self) -> Option<(f64, f64)> {
        self.interval
    }

    /// Whether the guided output is the plain combination, at every time.
    pub(crate) fn is_plain(self) -> bool {
        !self.is_rescaled && self.interval.is_none()
    }

    /// Whether this guides at any of the post-shift times from `least` to `most`.
    pub(crate) fn acts_within(self, (least, most): (f64, f64)) -> bool {
        let meets = self.interval.is_none_or(|(low, high)| least <= high && most >= low);
        meets && !self.is_neutral()
    }
}

impl TryFrom<f64> for Guidance {
    type Error = Error;
    fn try_from(alpha: f64) -> Result<Self> {
        Self::new(alpha)
    }
}

/// The form of a guidance in a configuration: a number, or a table with options.
#[cfg(feature = "serde")]
mod config {
    use crate::error::{Error, Result};

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(untagged)]
    pub(super) enum Guidance {
        Scale(f64),
        Options(Options),
    }

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Options {
        scale: f64,
        #[serde(default)]
        rescaled: bool,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interval: Option<(f64, f64)>,
    }

    impl TryFrom<Guidance> for super::Guidance {
        type Error = Error;
        fn try_from(raw: Guidance) -> Result<Self> {
            let Options { scale, rescaled, interval } = match raw {
                Guidance::Scale(scale) => return Self::new(scale),
                Guidance::Options(options) => options,
            };
            let mut guidance = Self::new(scale)?;
            if let Some((low, high)) = interval {
                guidance = guidance.within(low, high)?;
            }
            Ok(if rescaled { guidance.rescaled() } else { guidance })
        }
    }

    impl From<super::Guidance> for Guidance {
        fn from(guidance: super::Guidance) -> Self {
            if guidance.is_plain() {
                return Self::Scale(guidance.alpha);
            }
            let super::Guidance { alpha: scale, is_rescaled: rescaled, interval } = guidance;
            Self::Options(Options { scale, rescaled, interval })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn out_of_range_numbers_are_named() {
        for alpha in [0.999, -1.0, f64::NAN, f64::INFINITY, 1e39] {
            let error = Guidance::new(alpha).unwrap_err();
            assert!(matches!(error, Error::OutOfRange { what: "guidance scale alpha", value, .. }
                    if value.to_bits() == alpha.to_bits()));
        }
        for w in [-0.1, f64::NAN, f64::INFINITY, 1e39] {
            assert!(matches!(Guidance::from_w(w), Err(Error::OutOfRange { .. })));
        }
        for (low, high) in [(-0.1, 1.0), (0.5, 0.4), (0.0, 1.1), (f64::NAN, 1.0), (0.0, f64::NAN)] {
            let interval = Guidance::NEUTRAL.within(low, high);
            assert!(matches!(interval, Err(Error::OutOfRange { .. })), "{low} {high}");
        }
    }

    #[test]
    fn the_two_forms_differ_by_one() -> Result<()> {
        let guidance = Guidance::from_w(3.0)?;
        approx::assert_abs_diff_eq!(guidance.get(), 4.0);
        approx::assert_abs_diff_eq!(guidance.w(), 3.0);
        assert_eq!(Guidance::from_w(0.0)?, Guidance::NEUTRAL);
        assert!(Guidance::NEUTRAL.is_neutral() && !guidance.is_neutral());
        Ok(())
    }

    #[test]
    fn an_interval_is_closed() -> Result<()> {
        let guidance = Guidance::new(3.0)?.within(0.25, 0.5)?;
        let acts = [0.2, 0.25, 0.4, 0.5, 0.6].map(|time| guidance.acts_within((time, time)));
        assert_eq!(acts, [false, true, true, true, false]);
        assert!(guidance.acts_within((0.0, 0.3)) && guidance.acts_within((0.3, 1.0)));
        assert!(!Guidance::NEUTRAL.acts_within((0.0, 1.0)));
        Ok(())
    }

    #[cfg(feature = "serde")]
    #[test]
    fn a_config_cannot_bypass_the_check() -> Result<()> {
        let plain = Guidance::new(7.5)?;
        assert_eq!(serde_json::from_str::<Guidance>("7.5").unwrap(), plain);
        assert_eq!(serde_json::to_string(&plain).unwrap(), "7.5");
        assert!(serde_json::from_str::<Guidance>("0.5").is_err());
        let options = Guidance::new(4.0)?.rescaled().within(0.0, 0.7)?;
        let text = serde_json::to_string(&options).unwrap();
        assert_eq!(text, r#"{"scale":4.0,"rescaled":true,"interval":[0.0,0.7]}"#);
        assert_eq!(serde_json::from_str::<Guidance>(&text).unwrap(), options);
        for bad in [r#"{"scale":0.5}"#, r#"{"scale":4.0,"interval":[0.7,0.0]}"#] {
            assert!(serde_json::from_str::<Guidance>(bad).is_err(), "{bad}");
        }
        Ok(())
    }
}
