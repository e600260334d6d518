//! Exponential moving average of weights.

use tch::Tensor;

use crate::error::{Error, Fault, Result};
use crate::number::number;
use crate::parameters::no_faults;

/// Moves the tensors of `average` towards those of `current`, which are the same in name and order:
/// `average <- d average + (1 - d) current` with `d = min(decay, (1 + step) / (10 + step))`, so that the start
/// is soon forgotten. `step` counts from 1, `decay` is in [0, 1). The type of an average rounds `1 - d`: keep averages
/// in float32 or wider.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_training::ema::update_average;
///
/// # fn main() -> tch_training::Result<()> {
/// let options = (Kind::Double, Device::Cpu);
/// let average = [("weight".to_owned(), Tensor::f_zeros([1], options)?)];
/// let current = [("weight".to_owned(), Tensor::f_ones([1], options)?)];
/// update_average(&average, &current, 0.999, 1)?;
/// // d = 2 / 11 at the first step.
/// assert!((average[0].1.double_value(&[0]) - 9.0 / 11.0).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::OutOfRange`] for the decay, [`Error::Tensors`] if the two lists differ in length or names,
/// [`Error::Torch`] if their shapes do.
pub fn update_average(
    average: &[(String, Tensor)],
    current: &[(String, Tensor)],
    decay: f64,
    step: u64,
) -> Result<()> {
    if !(0.0..1.0).contains(&decay) {
        let found = decay.to_string();
        return Err(Error::OutOfRange { what: "decay", requirement: "in [0, 1)", found });
    }
    no_faults("the current weights", differences(average, current))?;
    let _guard = tch::no_grad_guard();
    let decay = decay.min((1 + step) as f64 / (10 + step) as f64);
    // One for all tensors of a type and device, as that of the last, which nearly always is that of the next.
    let mut share: Option<Tensor> = None;
    for ((_, average), (_, current)) in average.iter().zip(current) {
        let (kind, device) = (average.f_kind()?, average.device());
        let fits = |share: &Tensor| share.kind() == kind && share.device() == device;
        let share = match share.take().filter(fits) {
            Some(same) => share.insert(same),
            None => {
                let number = number(1.0 - decay, kind)?;
                share.insert(number.f_to_device_(device, kind, true, false)?)
            }
        };
        let _ = average.shallow_clone().f_lerp_tensor_(current, share)?;
    }
    Ok(())
}

/// Names that are not in the same places of both lists.
fn differences(average: &[(String, Tensor)], current: &[(String, Tensor)]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for index in 0..average.len().max(current.len()) {
        let [expected, found] =
            [average, current].map(|list| list.get(index).map(|(name, _)| name.clone()));
        if expected != found {
            faults.extend(expected.map(|name| Fault::Missing { name }));
            faults.extend(found.map(|name| Fault::Unexpected { name }));
        }
    }
    faults
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;

    fn list(names: &[&str], value: f64) -> Vec<(String, Tensor)> {
        let tensor = || Tensor::full([2], value, (Kind::Double, Device::Cpu));
        names.iter().map(|name| ((*name).to_owned(), tensor())).collect()
    }

    /// Against the sum written out: 1 - d1 d2 d3 of the constant 1.
    #[test]
    fn three_steps_are_the_weighted_sum() -> Result<()> {
        let (average, current) = (list(&["a"], 0.0), list(&["a"], 1.0));
        for step in 1..=3 {
            update_average(&average, &current, 0.24, step)?;
        }
        // (1 + n) / (10 + n) is 2/11 and 3/12 = 0.25: the decay takes over at the second step.
        let expected = 1.0 - 2.0 / 11.0 * 0.24 * 0.24;
        assert!((average[0].1.double_value(&[0]) - expected).abs() < 1e-15);
        Ok(())
    }

    #[test]
    fn lists_that_differ_are_refused_and_nothing_moves() {
        let average = list(&["a", "b"], 0.0);
        for other in [&["a"][..], &["a", "c"], &["b", "a"], &["a", "b", "c"]] {
            let error = update_average(&average, &list(other, 1.0), 0.5, 1).unwrap_err();
            assert!(matches!(error, Error::Tensors { .. }), "{other:?}: {error}");
            assert_eq!(average[0].1.double_value(&[0]), 0.0);
        }
        for decay in [-0.1, 1.0, f64::NAN] {
            let error = update_average(&average, &average, decay, 1).unwrap_err();
            assert!(matches!(error, Error::OutOfRange { what: "decay", .. }), "{error}");
        }
    }
}
