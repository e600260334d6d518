//! The critic of the adversarial terms: a closure, and what is asked of its logits.

use tch::Tensor;

use crate::batch::Condition;
use crate::checks::check_floating;
use crate::error::{Error, Result};
use crate::network::IntoOutput;
use crate::numeric::{batch_size, widen};
use crate::time::PostShift;

type Closure<'a> = dyn Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor> + 'a;

/// A closure of noised sample `[B, ..]`, time `[B]` and condition to logits.
pub(crate) struct Critic<'a>(Box<Closure<'a>>);

impl<'a> Critic<'a> {
    pub(crate) fn new<O: IntoOutput<Tensor>>(
        critic: impl Fn(&Tensor, &Tensor, &Condition) -> O + 'a,
    ) -> Self {
        Self(Box::new(move |x, t, cond| critic(x, t, cond).into_result()))
    }

    /// `[B, K]`, in float32 or wider.
    ///
    /// # Errors
    /// [`Error::Shape`] unless the logits start with B and are not empty, [`Error::Kind`] unless they are of a
    /// floating-point type; errors of the closure.
    pub(crate) fn logits(&self, x: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        let logits =
            (self.0)(x, &time.for_network(x)?, cond).map_err(|error| error.of("critic"))?;
        let batch = batch_size(x);
        if batch_size(&logits) != batch || logits.numel() == 0 {
            return Err(Error::shape("critic logits", format!("[{batch}, K]"), &logits.size()));
        }
        check_floating("critic logits", logits.f_kind()?)?;
        Ok(widen(&logits)?.f_reshape([batch, -1])?)
    }
}
