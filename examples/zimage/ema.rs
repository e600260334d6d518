//! Exponential moving average of a model's weights.

use anyhow::Result;

use super::transformer::ZImageTransformer;

/// The average, itself a model.
#[derive(Debug)]
pub struct Ema {
    pub model: ZImageTransformer,
    decay: f64,
}

impl Ema {
    /// Starts at a copy of `model`.
    ///
    /// # Errors
    /// If libtorch cannot allocate it.
    pub fn new(model: &ZImageTransformer, decay: f64) -> Result<Self> {
        Ok(Self { model: model.duplicate()?, decay })
    }

    /// Moves the average towards `model`; `step` counts from 1. Early steps decay faster, so that the
    /// random start is soon forgotten.
    ///
    /// # Errors
    /// If the two models differ in shape.
    pub fn update(&mut self, model: &ZImageTransformer, step: u64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let decay = self.decay.min((1 + step) as f64 / (10 + step) as f64);
        for (average, current) in self.model.parameters().values().zip(model.parameters().values())
        {
            let _ = average.shallow_clone().f_lerp_(current, 1.0 - decay)?;
        }
        Ok(())
    }
}
