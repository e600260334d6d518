//! The ratio of updates of the fake score and of the student.

use crate::error::{Error, Result};
use crate::value::checked;

/// Updates of the fake score for each update of the student.
///
/// Both are counted as steps of an optimizer. Codebases state the same ratio by different numbers:
///
/// | codebase | rule | its number | here |
/// |---|---|---|---|
/// | DMD2, Self-Forcing, FastVideo | the fake on every iteration, the student too on each k-th | 5 | [`every_iteration(5)`](Self::every_iteration), 5 to 1 |
/// | FastGen, rCM, DiffSynth-Studio | on each k-th iteration the student in place of the fake | 5 | [`alternating(5)`](Self::alternating), 4 to 1 |
/// | CDM | | 2 to 1 | [`new(2)`](Self::new) |
///
/// The default is 5, DMD2's for SDXL.
///
/// ```
/// # use decoupled_dmd::UpdateRatio;
/// let ratio = UpdateRatio::every_iteration(5)?;
/// assert_ne!(ratio, UpdateRatio::alternating(5)?);
/// let student_steps: Vec<u64> = (1..=10).filter(|&fakes| ratio.student_due(fakes)).collect();
/// assert_eq!(student_steps, [5, 10]);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "u64", into = "u64"))]
pub struct UpdateRatio(u64);

impl UpdateRatio {
    /// `fakes` updates of the fake score for each of the student.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if 0.
    pub fn new(fakes: u64) -> Result<Self> {
        let what = "fake updates per student update";
        checked(what, "at least 1", fakes as f64, fakes >= 1).map(|_| Self(fakes))
    }

    /// DMD2's count: the fake on every iteration, the student too on each `k`-th; `k` to 1.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if 0.
    pub fn every_iteration(k: u64) -> Result<Self> {
        Self::new(k)
    }

    /// FastGen's count: on each `k`-th iteration the student in place of the fake; `k - 1` to 1.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if below 2, where the fake would never be trained.
    pub fn alternating(k: u64) -> Result<Self> {
        checked("iterations per student update", "at least 2", k as f64, k >= 2)?;
        Self::new(k.saturating_sub(1))
    }

    /// Updates of the fake score for each of the student.
    pub fn get(self) -> u64 {
        self.0
    }

    /// Whether the student is to be updated now that the fake has had `fakes` updates in all.
    pub fn student_due(self, fakes: u64) -> bool {
        fakes > 0 && fakes.is_multiple_of(self.0)
    }
}

impl Default for UpdateRatio {
    fn default() -> Self {
        Self(5)
    }
}

impl TryFrom<u64> for UpdateRatio {
    type Error = Error;
    fn try_from(fakes: u64) -> Result<Self> {
        Self::new(fakes)
    }
}

impl From<UpdateRatio> for u64 {
    fn from(ratio: UpdateRatio) -> u64 {
        ratio.get()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_ways_of_counting_differ_by_one() -> Result<()> {
        assert_eq!(UpdateRatio::every_iteration(3)?.get(), 3);
        assert_eq!(UpdateRatio::alternating(5)?.get(), 4);
        assert!(UpdateRatio::new(0).is_err() && UpdateRatio::alternating(1).is_err());
        let due = |ratio: UpdateRatio| -> Vec<u64> {
            (0..=6).filter(|&fakes| ratio.student_due(fakes)).collect()
        };
        assert_eq!(due(UpdateRatio::default()), [5]);
        assert_eq!(due(UpdateRatio::new(3)?), [3, 6]);
        Ok(())
    }
}
