//! Exponential moving average of weights.

use anyhow::{Result, ensure};
use tch::Tensor;

/// Moves the tensors of `average` towards those of `current`, which are the same in name and order;
/// `step` counts from 1. Early steps move further, so that the start is soon forgotten.
///
/// # Errors
/// If the two lists differ in names or shapes.
pub fn update_average(
    average: &[(String, Tensor)],
    current: &[(String, Tensor)],
    decay: f64,
    step: u64,
) -> Result<()> {
    ensure!(
        average.len() == current.len(),
        "{} tensors cannot be averaged into {}",
        current.len(),
        average.len()
    );
    let _guard = tch::no_grad_guard();
    let decay = decay.min((1 + step) as f64 / (10 + step) as f64);
    for ((name, average), (other, current)) in average.iter().zip(current) {
        ensure!(name == other, "{other} cannot be averaged into {name}");
        let _ = average.shallow_clone().f_lerp_(current, 1.0 - decay)?;
    }
    Ok(())
}
