//! Keeping the fake score close to the student: how often it is trained, and pulling it along.

use tch::{Kind, Tensor, no_grad_guard};

use crate::numeric::check_size;
use crate::value::checked;
use crate::{Error, Result};

/// Updates of the fake score for each update of the student.
///
/// Both are counted as steps of an optimizer. Codebases state the same ratio by different numbers:
///
/// | codebase | rule | its number | here |
/// |---|---|---|---|
/// | DMD2, Self-Forcing, FastVideo | the fake on every iteration, the student besides on each k-th | 5 | [`every_iteration(5)`](Self::every_iteration), 5 to 1 |
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

    /// DMD2's count: the fake on every iteration, the student besides on each `k`-th; `k` to 1.
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

/// Pulls the parameters phi of the fake score toward those of the student, theta, in place:
///
/// ```text
/// phi <- keep phi + (1 - keep) theta
/// ```
/// The implicit distribution alignment of SenseFlow (arXiv 2506.00523), after each update of the
/// student; CDM does it after each update of the fake with `keep` 0.999. It means something only if
/// both networks have one architecture and one prediction type.
///
/// `pairs` are (phi, theta) of one shape. phi are the master weights, float32 or float64: in bfloat16
/// a step of 0.001 rounds to none at all. theta may be of another floating-point type or on another
/// device. Nothing is recorded for autograd, and nothing is changed unless all pairs fit.
///
/// ```
/// # use decoupled_dmd::align_fake;
/// # use tch::Tensor;
/// let (fake, student) = (Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[3.0, 2.0]));
/// align_fake([(&fake, &student)], 0.5)?;
/// assert_eq!(Vec::<f64>::try_from(&fake).unwrap(), [2.0, 2.0]);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
///
/// # Errors
/// [`Error::OutOfRange`] unless `keep` is in [0, 1]; [`Error::Shape`] if a pair is undefined or its
/// shapes differ; [`Error::Kind`] unless phi is float32 or float64 and theta floating point.
pub fn align_fake<'t>(
    pairs: impl IntoIterator<Item = (&'t Tensor, &'t Tensor)>,
    keep: f64,
) -> Result<()> {
    checked("share of the fake to keep", "in [0, 1]", keep, (0.0..=1.0).contains(&keep))?;
    let _no_grad = no_grad_guard();
    let mut fitting = Vec::new();
    for (fake, student) in pairs {
        let what = "parameter of the fake";
        if !fake.defined() {
            return Err(Error::shape(what, "of a defined tensor", &fake.size()));
        }
        let kind = fake.f_kind()?;
        if !matches!(kind, Kind::Float | Kind::Double) {
            let expected = "Float or Double, the master weights";
            return Err(Error::Kind { what, expected, found: kind });
        }
        check_size("parameter of the student", student, &fake.size())?;
        fitting.push((fake.shallow_clone(), student));
    }
    for (mut fake, student) in fitting {
        // One at a time: a copy of all would be as large as the network.
        let moved = student.f_to_device(fake.device())?.f_to_kind(fake.f_kind()?)?;
        let _ = fake.f_lerp_(&moved, 1.0 - keep)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    #[test]
    fn alignment_is_in_place_under_no_grad_and_all_or_nothing() -> Result<()> {
        let fake = Tensor::from_slice(&[1.0, 5.0]).set_requires_grad(true);
        let student = Tensor::from_slice(&[2.0f32, 1.0]).set_requires_grad(true);
        align_fake([(&fake, &student)], 0.75)?;
        assert_eq!(Vec::<f64>::try_from(fake.detach()).unwrap(), [1.25, 4.0]);
        assert!(fake.is_leaf() && fake.requires_grad());
        let wrong = Tensor::zeros([3], (Kind::Double, tch::Device::Cpu));
        let result = align_fake([(&fake, &student), (&fake, &wrong)], 0.5);
        assert!(matches!(result, Err(Error::Shape { what: "parameter of the student", .. })));
        assert_eq!(Vec::<f64>::try_from(fake.detach()).unwrap(), [1.25, 4.0]);
        for keep in [-0.1, 1.1, f64::NAN] {
            assert!(matches!(align_fake([], keep), Err(Error::OutOfRange { .. })));
        }
        Ok(())
    }

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
