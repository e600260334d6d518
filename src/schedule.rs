//! The paper's four re-noising schedules, ready-made.

use crate::{
    AboveStudent, CfgAugmentation, Denoiser, Group, Guidance, Normalizer, Objective, Regularizer,
    Renoising, Shift, Uniform,
};

/// Where CFG Augmentation and the regularizer look at the samples (Section 4.3 and Table 1 of
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
    /// Independent tau, both cleaner than what the student was given.
    DecoupledConstrained,
    /// The paper's choice: the engine only where the student has yet to go, the shield everywhere.
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
    /// usually `&dm`, under the name `dm`, both of weight 1.
    ///
    /// `shifts` is usually the one [`Shift`] that the model is run with at inference; [`Shifts`] gives
    /// the regularizer another.
    #[must_use]
    pub fn objective<'a>(
        self,
        teacher: Denoiser<'a>,
        guidance: Guidance,
        regularizer: impl Regularizer + 'a,
        shifts: impl Into<Shifts>,
    ) -> Objective<'a> {
        let Shifts { engine, regularizer: shield } = shifts.into();
        let full = |shift| Group::new(Renoising::new(Uniform::FULL).shifted(shift));
        let above = |shift| Group::new(Renoising::new(AboveStudent::FULL).shifted(shift));
        let (ca, dm) = match self {
            Self::CoupledShared => {
                let normalizer = Normalizer::guided(guidance);
                let group = full(engine)
                    .normalizer(normalizer)
                    .engine("ca", 1.0, CfgAugmentation::new(guidance))
                    .regularizer("dm", 1.0, regularizer);
                return Objective::new(teacher).with(group);
            }
            Self::DecoupledFull => (full(engine), full(shield)),
            Self::DecoupledConstrained => (above(engine), above(shield)),
            Self::DecoupledHybrid => (above(engine), full(shield)),
        };
        Objective::new(teacher)
            .with(ca.engine("ca", 1.0, CfgAugmentation::new(guidance)))
            .with(dm.regularizer("dm", 1.0, regularizer))
    }
}

/// The shifts applied to what engine and regularizer draw, before they look at the samples there.
///
/// A smaller shift of the regularizer lets it look at less noise, where it corrects detail rather than
/// contrast. A schedule with a shared tau has the engine's.
///
/// What looks above the student's time is cleaner than what the student was given only if its shift is
/// at most that of the student's grid: a larger one takes tau below t.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shifts {
    /// Of tau_CA.
    pub engine: Shift,
    /// Of tau_DM.
    pub regularizer: Shift,
}

impl From<Shift> for Shifts {
    fn from(shift: Shift) -> Self {
        Self { engine: shift, regularizer: shift }
    }
}
