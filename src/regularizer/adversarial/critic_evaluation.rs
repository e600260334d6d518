//! The critic's loss with its logits on both sides.

use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::numbers;

/// The critic's loss with its logits;
/// [`Adversarial::critic_evaluation`](crate::Adversarial::critic_evaluation) returns it.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "a loss does nothing until it is propagated"]
pub struct CriticEvaluation {
    /// The loss, penalty included, a scalar with a graph to the critic's parameters.
    pub loss: Tensor,
    /// The logits of the re-noised real samples, `[B, K]`, without a graph.
    pub real_logits: Tensor,
    /// The logits of the re-noised samples, `[B, K]`, without a graph.
    pub fake_logits: Tensor,
}

impl CriticEvaluation {
    /// The health of the game as named numbers, for a log, read with one wait for the device:
    ///
    /// | name | definition | how to read it |
    /// |---|---|---|
    /// | `real_logit`, `fake_logit` | mean D(y_t), mean D(x_t) | |
    /// | `logit_gap` | `real_logit` - `fake_logit` | far above earlier values: the critic has won; around 0: it sees no difference |
    /// | `real_accuracy`, `fake_accuracy` | share of D(y_t) > 0, of D(x_t) < 0 | both above 0.95, or below 0.55: likewise |
    ///
    /// The bounds are a rule of thumb of a trainer with the hinge loss, which names a gap of 15 for the
    /// *sum* of six heads. In the relativistic form D may gain any constant: only the gap has a meaning.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn report(&self) -> Result<Vec<(&'static str, f64)>> {
        let _no_grad = no_grad_guard();
        let mean = |tensor: &Tensor| tensor.f_mean(Kind::Double);
        let (real, fake) = (mean(&self.real_logits)?, mean(&self.fake_logits)?);
        let gap = real.f_sub(&fake)?;
        let real_right = mean(&self.real_logits.above(0.0)?)?;
        let fake_right = mean(&self.fake_logits.below(0.0)?)?;
        let values = numbers([real, fake, gap, real_right, fake_right])?;
        let names = ["real_logit", "fake_logit", "logit_gap", "real_accuracy", "fake_accuracy"];
        Ok(names.into_iter().zip(values).collect())
    }
}
