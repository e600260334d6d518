//! Paired regression: each sample is pulled to its own target.

mod distance;

pub use distance::{Distance, Perceptual, PseudoHuber};
use tch::Tensor;

use crate::arithmetic::Arithmetic;
use crate::augmentation::{Augmentation, AugmentationDraw};
use crate::checks::{check_like, check_samples};
use crate::error::Result;
use crate::numeric::{mean, widen, widen_like};
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::value::{checked, is_finite};

/// Paired regression: moves each sample to the target at its place in the batch
/// ([`Batch::with_target`](crate::Batch::with_target)), such as the end of the teacher's ODE from the same
/// noise and condition.
///
/// ```text
/// loss = distance(T x, T target) + weight mean |x - target|        T: one draw of the augmentation
/// ```
/// By default T changes nothing and the weight is 0.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | `distance` | the distance | |
/// | [`augmented`](Self::augmented) | T, drawn anew for each loss | none; Diffusion2GAN |
/// | [`with_absolute`](Self::with_absolute) | the weight of the plain distance | 0; 1 in E-LatentLPIPS |
///
/// | use | distance | source |
/// |---|---|---|
/// | regression to the teacher's ODE | [`Distance::Perceptual`] | Diffusion2GAN, arXiv 2405.05967; DMD, arXiv 2311.18828, with LPIPS |
/// | intra-segment guidance | [`Distance::PseudoHuber`] | SenseFlow, arXiv 2506.00523 |
/// | pre-training on pairs | [`Distance::Squared`] | ADM's first stage, by a page of notes |
///
/// As an engine it is added with [`Group::engine_loss`](crate::Group::engine_loss). It is a mean that
/// forgets which targets are likely: alone it blurs where pairs are ambiguous.
///
/// Of Diffusion2GAN this is the form alone: its feature network and weights are not part of the crate.
/// With an augmentation the loss is random: compare trainings by it without one, or at a given draw.
///
/// # Shapes
/// x and target `[B, ..]` to a scalar in float32 or wider. Elements that the mask leaves out count as
/// equal to their targets; features see whole samples, those of the target with x there.
///
/// # Forwards
/// None; features of x and of the target for [`Distance::Perceptual`]. **Gradients** end in x: the target and
/// the features receive none.
///
/// # Processes
/// Nothing is gathered: every pair is looked at alone.
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) without a target; [`Error::Shape`](crate::Error::Shape) if an
/// augmentation is given samples that are no planes; as the distance.
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
    augmentation: Option<Augmentation>,
    absolute: f64,
}

impl<'a> PairedRegression<'a> {
    /// With a distance.
    #[must_use]
    pub fn new(distance: Distance<'a>) -> Self {
        Self { distance, augmentation: None, absolute: 0.0 }
    }

    /// Changes sample and target by one draw of an augmentation before they are compared.
    #[must_use]
    pub fn augmented(mut self, augmentation: Augmentation) -> Self {
        self.augmentation = Some(augmentation);
        self
    }

    /// Adds `weight mean |x - target|` of samples and targets as they are.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `weight` is finite and at least 0.
    pub fn with_absolute(mut self, weight: f64) -> Result<Self> {
        let valid = is_finite(weight) && weight >= 0.0;
        let what = "weight of the absolute distance";
        self.absolute = checked(what, "finite and at least 0", weight, valid)?;
        Ok(self)
    }

    /// The loss of samples `x` and targets, `[B, ..]` each, a scalar, differentiable in x; with a fresh draw
    /// of the augmentation, where there is one.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless both are alike; as the term.
    pub fn between(&self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        check_samples("x", x, 2)?;
        let draw = self.augmentation.map(|augmentation| augmentation.draw(x)).transpose()?;
        self.compared(x, target, draw.as_ref())
    }

    /// [`between`](Self::between) for a given draw of an augmentation, whatever
    /// [`augmented`](Self::augmented) has set.
    ///
    /// # Errors
    /// As [`between`](Self::between); [`Error::Shape`](crate::Error::Shape) or
    /// [`Error::Device`](crate::Error::Device) if the draw does not fit the samples.
    pub fn between_at(
        &self,
        x: &Tensor,
        target: &Tensor,
        draw: &AugmentationDraw,
    ) -> Result<Tensor> {
        check_samples("x", x, 2)?;
        self.compared(x, target, Some(draw))
    }

    fn compared(
        &self,
        x: &Tensor,
        target: &Tensor,
        draw: Option<&AugmentationDraw>,
    ) -> Result<Tensor> {
        check_like("target", target, x)?;
        let (x, target) = (widen(x)?, widen_like(&target.f_detach()?, x)?);
        let loss = match draw {
            Some(draw) => self.distance.between(&draw.apply(&x)?, &draw.apply(&target)?)?,
            None => self.distance.between(&x, &target)?,
        };
        if self.absolute <= 0.0 {
            return Ok(loss);
        }
        let absolute = mean(&x.f_sub(&target)?.f_abs()?)?.times(self.absolute)?;
        Ok(loss.f_add(&absolute)?)
    }
}

impl Regularizer for PairedRegression<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let (x, target) = (probe.x(), probe.batch().target()?);
        match probe.batch().mask() {
            Some(mask) => {
                // Equal where the mask leaves an element out.
                let target = widen_like(target, x)?.f_where_self(mask, &x.f_detach()?)?;
                self.between(x, &target)
            }
            None => self.between(x, target),
        }
    }
}
