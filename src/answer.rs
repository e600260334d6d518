//! What a network answered, before and after it is taken for a clean sample.

use std::cell::OnceCell;

use tch::Tensor;

use crate::numeric::{once, widen};
use crate::path::Coefficients;
use crate::{Guidance, Path, Prediction, Result};

/// The output of a network at one noised sample. The clean sample that it implies is made when someone
/// asks: a difference of two answers does without.
pub(crate) struct Answer {
    prediction: Prediction,
    at: Coefficients,
    noised: Tensor,
    output: Tensor,
    sample: OnceCell<Tensor>,
    is_straight: bool,
}

impl Answer {
    /// The checked `output` in the type that is computed in, with the coefficients at its time.
    pub(crate) fn new(
        prediction: Prediction,
        path: &dyn Path,
        at: Coefficients,
        noised: &Tensor,
        output: Tensor,
    ) -> Result<Self> {
        Ok(Self {
            prediction,
            at,
            noised: widen(noised)?,
            output,
            sample: OnceCell::new(),
            is_straight: path.is_straight(),
        })
    }

    /// x0-hat, `[B, ..]`.
    pub(crate) fn sample(&self) -> Result<&Tensor> {
        once(&self.sample, || {
            self.prediction.sample(self.is_straight, &self.at, &self.noised, &self.output)
        })
    }

    /// [`sample`](Self::sample), as a tensor of its own.
    pub(crate) fn into_sample(self) -> Result<Tensor> {
        Ok(self.sample()?.shallow_clone())
    }

    /// `null + alpha (this - null)`, of two answers of one network at one noised sample: since what it
    /// predicts leads to the clean sample in a straight line, the outputs may be combined before.
    pub(crate) fn guided(&self, null: &Self, guidance: Guidance) -> Result<Self> {
        let at = Coefficients {
            data: self.at.data.shallow_clone(),
            noise: self.at.noise.shallow_clone(),
        };
        Ok(Self {
            prediction: self.prediction,
            at,
            noised: self.noised.shallow_clone(),
            output: null.output.f_lerp(&self.output, guidance.get())?,
            sample: OnceCell::new(),
            is_straight: self.is_straight,
        })
    }

    /// x0-hat of this answer less that of `other` at the same noised sample, as a new tensor
    /// `[B, ..]` and a factor `[B, 1, ..]` that is still to be multiplied in; `None` stands for 1.
    ///
    /// Where both networks predict the same quantity, the noised sample cancels: the difference is
    /// then that of the outputs, and no digits are lost to what the clean samples have in common.
    pub(crate) fn minus(&self, other: &Self) -> Result<(Tensor, Option<Tensor>)> {
        if self.prediction == other.prediction {
            let slope = self.prediction.slope(self.is_straight, &self.at)?;
            return Ok((self.output.f_sub(&other.output)?, slope));
        }
        Ok((self.sample()?.f_sub(other.sample()?)?, None))
    }
}
