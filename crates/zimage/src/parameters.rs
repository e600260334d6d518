//! Tensors by name: parameters of a model, states of an optimizer, contents of a file.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use tch::Tensor;

/// Tensors by their diffusers name.
pub type Parameters = BTreeMap<String, Tensor>;

/// A handle on the named tensor; storage is shared.
pub(crate) fn parameter(parameters: &Parameters, name: &str) -> Result<Tensor> {
    let tensor = parameters.get(name).with_context(|| format!("parameter {name} is missing"))?;
    Ok(tensor.shallow_clone())
}

/// Copies `saved` into tensors of the same names, whose storage others share.
///
/// # Errors
/// Names what is missing, unexpected, or of another shape or dtype; nothing is changed then.
pub fn restore(tensors: &Parameters, saved: &Parameters) -> Result<()> {
    let expected: Vec<_> = tensors.iter().map(|(name, t)| (name.clone(), t.size())).collect();
    check_shapes(&expected, saved.iter().map(|(name, tensor)| (name.as_str(), tensor.size())))?;
    for (name, tensor) in tensors {
        let (found, expected) = (saved[name].f_kind()?, tensor.f_kind()?);
        ensure!(found == expected, "{name} is {found:?}, expected {expected:?}");
    }
    let _guard = tch::no_grad_guard();
    for (name, tensor) in tensors {
        tensor.shallow_clone().f_copy_(&saved[name])?;
    }
    Ok(())
}

/// `tensors` with `prefix` and a dot before their names.
pub fn prefixed(prefix: &str, tensors: Parameters) -> impl Iterator<Item = (String, Tensor)> {
    tensors.into_iter().map(move |(name, tensor)| (format!("{prefix}.{name}"), tensor))
}

/// Compares names and shapes, each name once.
///
/// # Errors
/// Names every tensor that is missing, unexpected or mis-shaped.
pub fn check_shapes<'a, S: AsRef<[i64]>>(
    expected: &[(String, Vec<i64>)],
    found: impl Iterator<Item = (&'a str, S)>,
) -> Result<()> {
    let mut found: BTreeMap<&str, S> = found.collect();
    let mut faults = Vec::new();
    for (name, shape) in expected {
        match found.remove(name.as_str()) {
            None => faults.push(format!("{name} is missing")),
            Some(size) if size.as_ref() != shape => {
                faults.push(format!("{name} has shape {:?}, expected {shape:?}", size.as_ref()))
            }
            Some(_) => {}
        }
    }
    faults.extend(found.keys().map(|name| format!("{name} is unexpected")));
    ensure!(faults.is_empty(), "tensors do not fit the model: {}", faults.join("; "));
    Ok(())
}
