//! Divergences of f-distill, each a weight on the direction of Distribution Matching.

use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::error::Result;

/// The divergence D_f that Distribution Matching descends, with r = p_teacher / p_student at the noised
/// sample:
///
/// ```text
/// D_f = E_student f(r)        direction of Distribution Matching times h(r),   h = f''(r) r^2
/// ```
/// | divergence | f(r) | h(r) |
/// |---|---|---|
/// | [`ReverseKl`](Self::ReverseKl) | -ln r | 1 |
/// | [`ForwardKl`](Self::ForwardKl) | r ln r | r |
/// | [`JensenShannon`](Self::JensenShannon) | r ln r - (r + 1) ln((r + 1) / 2) | r / (r + 1) |
/// | [`SoftenedReverseKl`](Self::SoftenedReverseKl) | (r + 1) ln(1 + 1 / r) | 1 / (1 + r) |
/// | [`Neyman`](Self::Neyman) | (1 - r)^2 / r | 2 / r |
/// | [`SquaredHellinger`](Self::SquaredHellinger) | (1 - sqrt r)^2 | sqrt(r) / 2 |
/// | [`Jeffreys`](Self::Jeffreys) | (r - 1) ln r | 1 + r |
///
/// Xu et al., One-step Diffusion Models with f-Divergence Distribution Matching (arXiv 2502.15681), as
/// FastGen's code has it; FastGen's normalisation of r by bins of time is not built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Divergence {
    /// Distribution Matching as it is.
    #[default]
    ReverseKl,
    /// Covers the teacher's modes.
    ForwardKl,
    /// FastGen's default.
    JensenShannon,
    /// Reverse, with less weight where the teacher is far likelier.
    SoftenedReverseKl,
    /// Neyman's chi-squared.
    Neyman,
    /// Between forward and reverse.
    SquaredHellinger,
    /// The sum of forward and reverse.
    Jeffreys,
}

impl Divergence {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ReverseKl,
        Self::ForwardKl,
        Self::JensenShannon,
        Self::SoftenedReverseKl,
        Self::Neyman,
        Self::SquaredHellinger,
        Self::Jeffreys,
    ];

    /// h(r) of ratios r `[B]`; `None` for 1.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn weight(self, ratio: &Tensor) -> Result<Option<Tensor>> {
        let above = || ratio.plus(1.0);
        Ok(Some(match self {
            Self::ReverseKl => return Ok(None),
            Self::ForwardKl => ratio.shallow_clone(),
            Self::JensenShannon => ratio.f_div(&above()?)?,
            Self::SoftenedReverseKl => above()?.f_reciprocal()?,
            Self::Neyman => ratio.f_reciprocal()?.times(2.0)?,
            Self::SquaredHellinger => ratio.f_sqrt()?.times(0.5)?,
            Self::Jeffreys => above()?,
        }))
    }
}
