//! Pairs of noise and the guided teacher's sample, for arms that regress.

use std::path::Path;

use anyhow::{Context, Result};
use decoupled_dmd::{Guidance, Shift, Transition};
use serde::{Deserialize, Serialize};
use zimage::ZImageTransformer;
use zimage::distil::{PairSettings, Pairs, Prompts, Sampling};

use super::arm::Arm;

/// How the pairs of an arm are made.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairSource {
    /// Captions at even distances, one pair each.
    pub count: usize,
    /// Of the teacher, by DDIM.
    pub steps: usize,
    /// Guidance scale alpha.
    pub guidance: f64,
}

impl PairSource {
    /// Of all arms.
    pub const ALL_ARMS: Self = Self { count: 256, steps: 25, guidance: 3.0 };
    /// For a smoke test.
    pub const QUICK: Self = Self { count: 4, steps: 2, guidance: 3.0 };

    /// The settings of pairs for captions out of `items`, of samples of `size` `[C, H, W]`.
    ///
    /// # Errors
    /// If the guidance scale is out of range.
    pub fn settings(self, items: &[i64], size: [i64; 3], shift: Shift) -> Result<PairSettings> {
        let distance = (items.len() / self.count.max(1)).max(1);
        Ok(PairSettings {
            items: items.iter().copied().step_by(distance).take(self.count).collect(),
            size,
            sampling: Sampling {
                steps: self.steps,
                guidance: Guidance::new(self.guidance)?,
                transition: Transition::Ddim,
            },
            shift,
            seed: 0,
        })
    }

    /// The folder of these pairs in `parent`.
    fn folder(self, parent: &Path) -> std::path::PathBuf {
        let Self { count, steps, guidance } = self;
        parent.join(format!("ablation-pairs-{count}-{steps}-{guidance}"))
    }
}

/// The pairs that arms ask for, by how they are made.
#[derive(Debug, Default)]
pub struct PairSets(Vec<(PairSource, Pairs)>);

impl PairSets {
    /// The pairs of all `arms`, in folders of `parent`, made where they are not there yet.
    ///
    /// # Errors
    /// As [`Pairs::make`].
    pub fn make<'a>(
        arms: impl Iterator<Item = &'a Arm>,
        parent: &Path,
        teacher: &ZImageTransformer,
        prompts: &Prompts,
        settings: impl Fn(PairSource) -> Result<PairSettings>,
    ) -> Result<Self> {
        let mut sets: Vec<(PairSource, Pairs)> = Vec::new();
        for source in arms.filter_map(|arm| arm.pairs) {
            if sets.iter().all(|(of, _)| *of != source) {
                let folder = source.folder(parent);
                sets.push((source, Pairs::make(&folder, teacher, prompts, &settings(source)?)?));
            }
        }
        Ok(Self(sets))
    }

    /// The pairs of an arm.
    ///
    /// # Errors
    /// If the arm has none, or they were not made.
    pub fn of(&self, arm: &Arm) -> Result<&Pairs> {
        let source = arm.pairs.with_context(|| format!("arm {} has no pairs", arm.name))?;
        let found = self.0.iter().find(|(of, _)| *of == source);
        let (_, pairs) = found.with_context(|| format!("the pairs of {source:?} were not made"))?;
        Ok(pairs)
    }
}
