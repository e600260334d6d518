//! Paired regression: each sample is pulled to its own target.

mod distance;

pub use distance::{Distance, Perceptual, PseudoHuber};
use tch::Tensor;

use crate::checks::{check_like, check_samples};
use crate::error::Result;
use crate::numeric::{widen, widen_like};
use crate::probe::Probe;
use crate::regularizer::Regularizer;

/// Paired regression: moves each sample to the target at its place in the batch
/// ([`Batch::with_target`](crate::Batch::with_target)), such as the end of the teacher's ODE from the same
/// noise and condition.
///
/// ```text
/// loss = distance(x, target)
/// ```
/// | use | distance | source |
/// |---|---|---|
/// | regression to the teacher's ODE | [`Distance::Perceptual`] | Diffusion2GAN, arXiv 2405.05967; DMD, arXiv 2311.18828, with LPIPS |
/// | intra-segment guidance | [`Distance::PseudoHuber`] | SenseFlow, arXiv 2506.00523 |
/// | pre-training on pairs | [`Distance::Squared`] | ADM's first stage, by a page of notes |
///
/// As an engine it is added with [`Group::engine_loss`](crate::Group::engine_loss). It is a mean that
/// forgets which targets are likely: alone it blurs where pairs are ambiguous.
///
/// Of Diffusion2GAN this is the form alone: its feature network and weights are not part of the crate,
/// and its augmentations are not built.
///
/// # Shapes
/// x and target `[B, ..]` to a scalar in float32 or wider. Elements that the mask leaves out count as
/// equal to their targets, but for [`Distance::Perceptual`], whose features see whole samples.
///
/// # Forwards
/// None; features of x and of the target for [`Distance::Perceptual`].
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) without a target; as the distance.
///
/// # Example
/// ```
/// use decoupled_dmd::{Distance, PairedRegression};
/// let regression = PairedRegression::new(Distance::pseudo_huber(1e-3)?);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct PairedRegression<'a> {
    distance: Distance<'a>,
}

impl<'a> PairedRegression<'a> {
    /// With a distance.
    #[must_use]
    pub fn new(distance: Distance<'a>) -> Self {
        Self { distance }
    }

    /// The distance between samples `x` and targets, `[B, ..]` each, a scalar, differentiable in x.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless both are alike; as the distance.
    pub fn between(&self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        check_samples("x", x, 2)?;
        check_like("target", target, x)?;
        self.distance.between(&widen(x)?, &widen_like(&target.f_detach()?, x)?)
    }
}

impl Regularizer for PairedRegression<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let target = probe.batch().target()?;
        let (x, target) = (probe.masked(probe.x())?, probe.masked(target)?);
        self.between(&x, &target)
    }
}
