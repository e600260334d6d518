//! Schedules: the paper's four arrangements of CFG Augmentation and a regularizer.

use crate::denoiser::Denoiser;
use crate::engine::CfgAugmentation;
use crate::guidance::Guidance;
use crate::normalizer::Normalizer;
use crate::objective::{Group, Objective};
use crate::regularizer::Regularizer;
use crate::renoising::{AboveStudent, Renoising, Uniform};
use crate::time::Shift;

/// The re-noising times of CFG Augmentation and the regularizer (Section 4.3 and Table 1 of
/// arXiv 2511.22677), with the network forwards of one update of the student:
///
/// | schedule | tau_CA | tau_DM | normaliser | teacher | fake |
/// |---|---|---|---|---|---|
/// | [`CoupledShared`](Self::CoupledShared) | = tau_DM | U(0, 1) | guided prediction, common | 2 | 1 |
/// | [`DecoupledFull`](Self::DecoupledFull) | U(0, 1) | U(0, 1) | conditional, each its own | 3 | 1 |
/// | [`DecoupledConstrained`](Self::DecoupledConstrained) | U(t, 1) | U(t, 1) | conditional, each its own | 3 | 1 |
/// | [`DecoupledHybrid`](Self::DecoupledHybrid) | U(t, 1) | U(0, 1) | conditional, each its own | 3 | 1 |
///
/// t is the student's own time, which the batch must carry for the last two. All times are drawn
/// before the shift. A neutral guidance leaves one teacher forward in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
pub enum Schedule {
    /// Both terms at one tau with one noise: DMD and DMD2, whose gradient it equals wherever the
    /// normaliser is above its floor of 0.1, which [`Normalizer::dmd2`] lacks.
    CoupledShared,
    /// Independent tau, both over the full range.
    DecoupledFull,
    /// Independent tau, both cleaner than the student's input.
    DecoupledConstrained,
    /// The paper's choice: the engine above the student's time only, the regularizer everywhere.
    #[default]
    DecoupledHybrid,
}

impl Schedule {
    /// All four, in the order of the paper's table.
    pub const ALL: [Self; 4] = [
        Self::CoupledShared,
        Self::DecoupledFull,
        Self::DecoupledConstrained,
        Self::DecoupledHybrid,
    ];

    /// The objective of this schedule: CFG Augmentation under the name `ca` and `regularizer`,
    /// usually `&dm`, under the name `dm`, both of weight 1. Times are shifted by the shift of the
    /// teacher's path.
    #[must_use]
    pub fn objective<'a>(
        self,
        teacher: Denoiser<'a>,
        guidance: Guidance,
        regularizer: impl Regularizer + 'a,
    ) -> Objective<'a> {
        self.objective_with_shifts(teacher, guidance, regularizer, Shifts::default())
    }

    /// [`objective`](Self::objective) with a shift of its own for the engine, for the regularizer, or
    /// for both.
    #[must_use]
    pub fn objective_with_shifts<'a>(
        self,
        teacher: Denoiser<'a>,
        guidance: Guidance,
        regularizer: impl Regularizer + 'a,
        shifts: impl Into<Shifts>,
    ) -> Objective<'a> {
        let shifts = shifts.into();
        let group = |renoising: Renoising<'a>, shift: Option<Shift>| {
            Group::new(match shift {
                Some(shift) => renoising.shifted(shift),
                None => renoising,
            })
        };
        let full = |shift| group(Renoising::new(Uniform::FULL), shift);
        let above = |shift| group(Renoising::new(AboveStudent::FULL), shift);
        let (ca, dm) = match self {
            Self::CoupledShared => {
                let group = full(shifts.engine)
                    .normalizer(Normalizer::guided(guidance))
                    .engine("ca", 1.0, CfgAugmentation::new(guidance))
                    .regularizer("dm", 1.0, regularizer);
                return Objective::new(teacher).with(group);
            }
            Self::DecoupledFull => (full(shifts.engine), full(shifts.regularizer)),
            Self::DecoupledConstrained => (above(shifts.engine), above(shifts.regularizer)),
            Self::DecoupledHybrid => (above(shifts.engine), full(shifts.regularizer)),
        };
        Objective::new(teacher)
            .with(ca.engine("ca", 1.0, CfgAugmentation::new(guidance)))
            .with(dm.regularizer("dm", 1.0, regularizer))
    }
}

/// Shifts of tau_CA and tau_DM that override the shift of the model; `None` is the shift of the model.
///
/// With a smaller shift the regularizer sees less noise, where it corrects detail rather than contrast. A
/// schedule with a shared tau has the engine's.
///
/// With [`AboveStudent`], keep a shift at or below the grid's. A larger shift can map tau below the
/// student's time, so that the term sees *noisier* samples than the student did.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Shifts {
    /// The shift of tau_CA.
    pub engine: Option<Shift>,
    /// The shift of tau_DM.
    pub regularizer: Option<Shift>,
}

impl From<Shift> for Shifts {
    /// One shift for both, in place of the shift of the model.
    fn from(shift: Shift) -> Self {
        Self { engine: Some(shift), regularizer: Some(shift) }
    }
}
