//! What an evaluation of an objective gives.

use tch::{Kind, Tensor, no_grad_guard};

use crate::diagnostics::{Diagnostics, read_together};
use crate::error::Result;

/// The value of an objective. It holds tensors: reading a number, which synchronises a GPU, is the caller's
/// choice.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "a loss does nothing until it is propagated"]
pub struct Evaluation {
    /// The weighted sum of all terms, a scalar with a graph back to x.
    pub loss: Tensor,
    /// The value of each term before its weight, without a graph; those of weight 0 are not computed.
    pub terms: Vec<(String, Tensor)>,
    /// The diagnostics; `None` unless [`Objective::observed`](crate::Objective::observed) was called.
    pub diagnostics: Option<Diagnostics>,
}

impl Evaluation {
    /// The loss as `loss`, each term under its name, and all diagnostics, as numbers for a log; names as
    /// in [`Diagnostics::report`]. A diagnostic that is undefined, or not finite, is left out; the loss and the terms
    /// are always there, NaN if they are. All are read together, so that a GPU is waited for once.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn report(&self) -> Result<Vec<(String, f64)>> {
        read_together(self.scalars()?, self.terms.len().saturating_add(1))
    }

    /// What [`report`](Self::report) reads, the loss, the terms and the diagnostics in this order, as scalar tensors in
    /// float64 without a graph, NaN or infinite where undefined. No device is waited for: a loop can read them together
    /// with numbers of its own.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn scalars(&self) -> Result<Vec<(String, Tensor)>> {
        let _no_grad = no_grad_guard();
        let double = |value: &Tensor| value.f_detach()?.f_to_kind(Kind::Double);
        let mut named = vec![("loss".to_owned(), double(&self.loss)?)];
        for (name, value) in &self.terms {
            named.push((name.clone(), double(value)?));
        }
        if let Some(diagnostics) = &self.diagnostics {
            diagnostics.named(&mut named)?;
        }
        Ok(named)
    }
}
