//! The raw output of a network, and the difference of two.

use std::cell::OnceCell;

use tch::Tensor;

use crate::arithmetic::{Arithmetic, filled, number};
use crate::error::Result;
use crate::guidance::Guidance;
use crate::numeric::{norm, once, per_sample, widen};
use crate::path::{Coefficients, NoisePath};
use crate::prediction::Prediction;
use crate::time::PostShift;
use crate::value::checked;

/// The raw output of a network at one noised sample, converted to a clean-sample prediction on first
/// use. [`Denoiser::predict`](crate::Denoiser::predict) returns it.
///
/// Terms compare two outputs by [`minus`](Self::minus) rather than by their clean samples: where both
/// networks predict the same quantity the noised sample cancels, and no digits are lost to it.
pub struct ModelOutput {
    prediction: Prediction,
    at: Coefficients,
    noised: Tensor,
    output: Tensor,
    time: PostShift,
    sample: OnceCell<Tensor>,
    is_straight: bool,
}

impl ModelOutput {
    /// The checked `output` in float32 or wider, with the coefficients at its time.
    pub(crate) fn new(
        prediction: Prediction,
        path: &dyn NoisePath,
        time: &PostShift,
        noised: &Tensor,
        output: Tensor,
    ) -> Result<Self> {
        Ok(Self {
            prediction,
            at: path.coefficients(time)?.like(noised)?,
            noised: widen(noised)?,
            output,
            time: time.shallow_clone(),
            sample: OnceCell::new(),
            is_straight: path.is_straight(),
        })
    }

    /// x0-hat, the clean sample that the output implies, `[B, ..]` in float32 or wider.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn sample(&self) -> Result<&Tensor> {
        once(&self.sample, || {
            self.prediction.sample(self.is_straight, &self.at, &self.noised, &self.output)
        })
    }

    /// [`sample`](Self::sample), as a tensor of its own.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn into_sample(self) -> Result<Tensor> {
        Ok(self.sample()?.shallow_clone())
    }

    /// The flow velocity `eps - x0` that the output implies, `[B, ..]` in float32 or wider; infinite at the
    /// clean end, unless the network itself predicts it:
    /// [`Prediction::check_velocity`] refuses such times before the network runs.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn flow_velocity(&self) -> Result<Tensor> {
        if self.prediction == Prediction::FlowVelocity {
            return Ok(self.output.shallow_clone());
        }
        let Coefficients { data: a, noise: s } = &self.at;
        Ok(self.noised.f_sub(&self.sample()?.f_mul(&a.f_add(s)?)?)?.f_div(s)?)
    }

    /// Classifier-free guidance of two outputs of one network at one noised sample, this one with the
    /// condition: `null + alpha (this - null)`, rescaled and within an interval as the [`Guidance`] says.
    /// The clean sample is affine in the output, so the outputs are combined; of two networks that predict different
    /// quantities, the clean samples are.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) for a rescaled guidance where axis 1, whose norm it takes, has
    /// the frames.
    pub fn guided(&self, null: &Self, guidance: Guidance) -> Result<Self> {
        if self.prediction != null.prediction {
            return self.as_sample()?.guided(&null.as_sample()?, guidance);
        }
        let mut output = null.output.toward(&self.output, guidance.get())?;
        if guidance.is_rescaled() {
            let requirement = "not 1, the axis of the channels, for a rescaled guidance";
            checked("axis of the frames", requirement, 1.0, self.time.tensor().dim() != 2)?;
            // Where the guided output vanishes it stays zero.
            let least = f64::from(f32::MIN_POSITIVE);
            let factor = norm(&self.output, 1)?.f_div(&norm(&output, 1)?.at_least(least)?)?;
            output = output.f_mul(&factor)?;
        }
        if let Some((low, high)) = guidance.interval() {
            let time = self.time.tensor();
            let inside = time
                .f_ge_tensor(&number(low, time)?)?
                .f_logical_and(&time.f_le_tensor(&number(high, time)?)?)?;
            output = output.f_where_self(&per_sample(&inside, &self.output)?, &self.output)?;
        }
        Ok(self.with_output(self.prediction, output))
    }

    /// The same prediction, as one of the clean sample.
    fn as_sample(&self) -> Result<Self> {
        Ok(self.with_output(Prediction::Sample, self.sample()?.shallow_clone()))
    }

    /// Another output at the same noised sample.
    fn with_output(&self, prediction: Prediction, output: Tensor) -> Self {
        Self {
            prediction,
            at: self.at.shallow_clone(),
            noised: self.noised.shallow_clone(),
            output,
            time: self.time.shallow_clone(),
            sample: OnceCell::new(),
            is_straight: self.is_straight,
        }
    }

    /// x0-hat of this output less x0-hat of `other` at the same noised sample.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn minus(&self, other: &Self) -> Result<Difference> {
        let (tensor, slope) = if self.prediction == other.prediction {
            let slope = self.prediction.slope(self.is_straight, &self.at)?;
            (self.output.f_sub(&other.output)?, slope)
        } else {
            (self.sample()?.f_sub(other.sample()?)?, None)
        };
        Ok(Difference { tensor, is_own: true, slope, weight: 1.0 })
    }
}

impl std::fmt::Debug for ModelOutput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ModelOutput")
            .field("prediction", &self.prediction)
            .field("size", &self.output.size())
            .finish_non_exhaustive()
    }
}

/// A difference of clean samples `[B, ..]` with factors that are still to be multiplied in, which
/// [`Probe::normalize`](crate::Probe::normalize) does in one pass. It comes from two outputs by
/// [`ModelOutput::minus`], or from a tensor.
#[derive(Debug)]
pub struct Difference {
    tensor: Tensor,
    /// Whether this is the only handle on the tensor, so that it may be written to.
    is_own: bool,
    /// One factor for each sample or frame, of the rank of the samples; `None` for 1.
    slope: Option<Tensor>,
    weight: f64,
}

impl Difference {
    /// The difference times `weight`.
    #[must_use]
    pub fn times(mut self, weight: f64) -> Self {
        self.weight *= weight;
        self
    }

    /// Its tensor, before the factors.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.tensor
    }

    /// The difference over `n`, `[B]` or per frame, in float32 or wider. The factors of each sample are multiplied with
    /// one another first, so that one pass over the samples does.
    pub(crate) fn over(self, n: Option<&Tensor>) -> Result<Tensor> {
        let mut tensor = widen(&self.tensor)?;
        let factor = match n {
            Some(n) => Some(per_sample(&n.f_reciprocal()?, &tensor)?.times(self.weight)?),
            None if (self.weight - 1.0).abs() > 0.0 => {
                Some(filled(&[1], self.weight, (tensor.f_kind()?, tensor.device()))?)
            }
            None => None,
        };
        let factor = match (factor, &self.slope) {
            (Some(factor), Some(slope)) => factor.f_mul(slope)?,
            (Some(factor), None) => factor,
            (None, Some(slope)) => slope.shallow_clone(),
            (None, None) => return Ok(tensor),
        };
        Ok(if self.is_own { tensor.f_mul_(&factor)? } else { tensor.f_mul(&factor)? })
    }
}

impl From<&Tensor> for Difference {
    fn from(tensor: &Tensor) -> Self {
        Self { tensor: tensor.shallow_clone(), is_own: false, slope: None, weight: 1.0 }
    }
}

impl From<Tensor> for Difference {
    fn from(tensor: Tensor) -> Self {
        Self { tensor, is_own: false, slope: None, weight: 1.0 }
    }
}
