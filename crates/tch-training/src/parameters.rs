//! Tensors by name: parameters of a model, states of an optimizer, contents of a file.

use std::collections::BTreeMap;
use std::fmt::Display;

use tch::Tensor;

use crate::error::{Error, Fault, Result};

/// Tensors by name, sorted.
pub type Parameters = BTreeMap<String, Tensor>;

/// A handle on the tensor of a name; storage is shared.
///
/// # Errors
/// [`Error::NoTensor`] if there is none.
pub fn parameter(parameters: &Parameters, name: &str) -> Result<Tensor> {
    parameters.get(name).map(Tensor::shallow_clone).ok_or_else(|| Error::NoTensor {
        name: name.to_owned(),
        place: "the parameters".to_owned(),
    })
}

/// Whether all numbers of a tensor are finite. The device is waited for.
///
/// # Errors
/// [`Error::Torch`] if libtorch fails.
pub fn is_finite(tensor: &Tensor) -> Result<bool> {
    Ok(bool::try_from(tensor.f_isfinite()?.f_all()?)?)
}

/// `tensors` with `prefix` and a dot before their names, so that several lists fit into one file.
pub fn prefixed(prefix: &str, tensors: Parameters) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
}

/// Compares names and shapes, each name once. `place` is where errors say that the tensors were found.
///
/// # Errors
/// [`Error::Tensors`] with every tensor that is missing, unexpected or of another shape.
pub fn check_shapes<'a, S: AsRef<[i64]>>(
    place: impl Display,
    expected: &[(String, Vec<i64>)],
    found: impl Iterator<Item = (&'a str, S)>,
) -> Result<()> {
    let mut found: BTreeMap<&str, S> = found.collect();
    let mut faults = Vec::new();
    for (name, shape) in expected {
        match found.remove(name.as_str()) {
            None => faults.push(Fault::Missing { name: name.clone() }),
            Some(size) if size.as_ref() != shape => faults.push(Fault::Shape {
                name: name.clone(),
                expected: shape.clone(),
                found: size.as_ref().to_vec(),
            }),
            Some(_) => {}
        }
    }
    let unexpected = found.keys().map(|name| Fault::Unexpected { name: (*name).to_owned() });
    faults.extend(unexpected);
    no_faults(place, faults)
}

/// Copies `saved` into tensors of the same names, whose storage others share: a model and its optimizer go on
/// from what is restored.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_training::parameters::{Parameters, restore};
///
/// # fn main() -> tch_training::Result<()> {
/// let weight = Tensor::f_zeros([2], (Kind::Float, Device::Cpu))?;
/// let live = Parameters::from([("weight".to_owned(), weight.shallow_clone())]);
/// let saved = Parameters::from([("weight".to_owned(), Tensor::from_slice(&[1f32, 2.0]))]);
/// restore(&live, &saved)?;
/// assert_eq!(weight, Tensor::from_slice(&[1f32, 2.0]));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Tensors`] with all that is missing, unexpected, or of another shape or element type; nothing is
/// changed then.
pub fn restore(tensors: &Parameters, saved: &Parameters) -> Result<()> {
    let expected: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t.size())).collect();
    let place = "the saved state";
    check_shapes(
        place,
        &expected,
        saved.iter().map(|(name, tensor)| (name.as_str(), tensor.size())),
    )?;
    let mut faults = Vec::new();
    for (name, tensor) in tensors {
        let (expected, found) = (tensor.f_kind()?, saved[name].f_kind()?);
        if found != expected {
            faults.push(Fault::Kind { name: name.clone(), expected, found });
        }
    }
    no_faults(place, faults)?;
    let _guard = tch::no_grad_guard();
    for (name, tensor) in tensors {
        tensor.shallow_clone().f_copy_(&saved[name])?;
    }
    Ok(())
}

/// An error if there are faults.
pub(crate) fn no_faults(place: impl Display, faults: Vec<Fault>) -> Result<()> {
    if faults.is_empty() {
        return Ok(());
    }
    Err(Error::Tensors { place: place.to_string(), faults })
}
