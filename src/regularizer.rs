//! The shield: what keeps the samples of the student in place while an engine pulls them.

mod adversarial;
mod distribution_matching;
mod maximum_mean_discrepancy;
mod mean_variance;

pub use adversarial::{Adversarial, CriticEvaluation, CriticHeads, CriticPenalty, GanLoss};
pub use distribution_matching::DistributionMatching;
pub use maximum_mean_discrepancy::{Bandwidth, Estimator, Kernel, MaximumMeanDiscrepancy};
pub use mean_variance::{MeanVariance, Statistics};
use tch::{Kind, Tensor};

use crate::numeric::{check_like, check_samples, row_squares, widen};
use crate::{Batch, Probe, Result};

/// A scalar loss on the samples, differentiable in x.
///
/// Losses are means over all elements of the batch, in the convention of [`surrogate`].
/// The smallest regularizer is a closure, see [`regularizer_fn`].
pub trait Regularizer {
    /// The loss at this probe, a scalar in float32 or wider.
    ///
    /// # Errors
    /// What the networks return, or [`Error::Missing`](crate::Error::Missing) if the batch lacks
    /// something that the regularizer needs.
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor>;

    /// The loss of the regularizer's own network (a fake score, a critic): a floating-point scalar with
    /// a graph to that network, on the detached samples, so that x gets no gradient. `None` where there
    /// is no such network. `testing::check_own_loss` asks for all of it.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    fn own_loss(&self, _batch: &Batch<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }
}

/// A loss whose gradient in x is exactly `-direction / numel`, a scalar:
///
/// ```text
/// value 0.5 mean (direction^2)  =  0.5 mean (x - sg(x + direction))^2
/// ```
/// the form of DMD2 and FastGen. Here x and its target are never subtracted from one another, so the
/// gradient keeps its full precision in bfloat16 too, where that difference would lose most bits of
/// a small direction. The value measures the gap and need not fall while training succeeds.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
/// [`Error::Device`](crate::Error::Device) if `x` is not floating point or has no elements or axes,
/// or `direction` is not like it.
pub fn surrogate(x: &Tensor, direction: &Tensor) -> Result<Tensor> {
    check_samples("x", x, 1)?;
    check_like("direction", direction, x)?;
    let x = widen(x)?;
    let direction = direction.f_detach()?.f_to_kind(x.f_kind()?)?;
    let squares = row_squares(&direction)?.f_sum(None::<Kind>)?;
    let value = squares.f_mul_scalar(0.5 / x.numel() as f64)?;
    // Only the gradient of the slope is used. A dot product makes no temporary.
    let slope = x.f_flatten(0, -1)?.f_dot(&direction.f_flatten(0, -1)?)?;
    let slope = slope.f_div_scalar(x.numel() as f64)?;
    // The bracket is exactly zero, so the value keeps all its bits.
    Ok(value.f_add(&slope.f_detach()?.f_sub(&slope)?)?)
}

macro_rules! forward_regularizer {
    ($type:ty) => {
        impl<R: Regularizer + ?Sized> Regularizer for $type {
            fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
                (**self).loss(probe)
            }
            fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
                (**self).own_loss(batch)
            }
        }
    };
}

forward_regularizer!(&R);
forward_regularizer!(Box<R>);
forward_regularizer!(std::rc::Rc<R>);

/// A [`Regularizer`] from a closure, made by [`regularizer_fn`].
#[derive(Clone, Copy)]
pub struct RegularizerFn<F>(F);

/// Makes a closure a [`Regularizer`] without a network of its own.
///
/// ```
/// # use decoupled_dmd::regularizer_fn;
/// let small = regularizer_fn(|probe| Ok(probe.x().f_square()?.f_mean(tch::Kind::Float)?));
/// ```
pub fn regularizer_fn<F: Fn(&Probe<'_>) -> Result<Tensor>>(loss: F) -> RegularizerFn<F> {
    RegularizerFn(loss)
}

impl<F: Fn(&Probe<'_>) -> Result<Tensor>> Regularizer for RegularizerFn<F> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        (self.0)(probe)
    }
}

impl<F> std::fmt::Debug for RegularizerFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RegularizerFn")
    }
}
