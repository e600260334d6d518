//! Regularizers: losses that keep the samples of the student in place while an engine moves them.

mod adversarial;
mod adversarial_distribution_matching;
mod critic;
mod distribution_matching;
mod divergence;
mod maximum_mean_discrepancy;
mod mean_variance;
mod paired_regression;
mod reward;
mod score_identity;

pub use adversarial::{
    Adversarial, CriticDraw, CriticEvaluation, CriticHeads, CriticPenalty, GanLoss,
};
pub use adversarial_distribution_matching::AdversarialDistributionMatching;
pub use distribution_matching::DistributionMatching;
pub use divergence::Divergence;
pub use maximum_mean_discrepancy::{Bandwidth, Estimator, Kernel, MaximumMeanDiscrepancy};
pub use mean_variance::{MeanVariance, Statistics};
pub use paired_regression::{Distance, PairedRegression, Perceptual, PseudoHuber};
pub use reward::Reward;
pub use score_identity::ScoreIdentity;
use tch::Tensor;

use crate::batch::Batch;
use crate::error::Result;
use crate::probe::Probe;

/// A scalar loss on the samples, differentiable in x.
///
/// Losses are means over all elements of the batch, in the convention of
/// [`surrogate`](crate::surrogate). The smallest regularizer is a closure, see [`regularizer_fn`].
///
/// The trait is the form of a term, not its role: an engine that is given as a loss, such as a reward, goes
/// into [`Group::engine_loss`](crate::Group::engine_loss), a regularizer that is given as a direction into
/// [`Group::regularizer_direction`](crate::Group::regularizer_direction).
pub trait Regularizer {
    /// The loss at this probe, a scalar in float32 or wider.
    ///
    /// # Errors
    /// Errors of the networks; [`Error::Missing`](crate::Error::Missing) if the batch lacks something that
    /// the regularizer needs.
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor>;

    /// The loss of the regularizer's own network (a fake score, a critic): a floating-point scalar with
    /// a graph to that network, on the detached samples, so that x gets no gradient. `None` where there
    /// is no such network. `testing::check_own_loss` checks all of it.
    ///
    /// # Errors
    /// As [`loss`](Self::loss).
    fn own_loss(&self, _batch: &Batch<'_>) -> Result<Option<Tensor>> {
        Ok(None)
    }
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
