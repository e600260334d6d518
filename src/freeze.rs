//! Freezing a part of a network by the names of its parameters.

use tch::Tensor;
use tch::nn::{self, OptimizerConfig};

use crate::error::Result;
use crate::value::checked;

/// What [`freeze_matching`] froze.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub struct Frozen {
    /// The number of parameters frozen, a matrix counting as one.
    pub tensors: usize,
    /// The number of their elements.
    pub elements: i64,
    /// The share of these among the elements that were trainable before.
    pub share: f64,
}

/// Freezes the trainable parameters of `store` whose names match, so that only the others learn: the
/// gradients of the frozen are neither computed nor kept.
///
/// D2O (arXiv 2506.09376) trains a one-step student by its critic alone and freezes four fifths of it. The
/// rule of its optimizer, by its code at 9f8124d:
///
/// ```
/// # use decoupled_dmd::freeze_matching;
/// # use tch::{Device, nn};
/// # let mut store = nn::VarStore::new(Device::Cpu);
/// # for name in ["block", "up"] { let _ = nn::conv2d(store.root() / name / "conv0", 3, 3, 1, Default::default()); }
/// # let _ = nn::linear(store.root() / "block" / "affine", 3, 3, Default::default());
/// let holds = |name: &str, parts: &[&str]| parts.iter().any(|part| name.contains(part));
/// let frozen = freeze_matching(&mut store, |name| {
///     holds(name, &["block", "up", "down", "in"]) && holds(name, &["conv", "proj"])
/// })?;
/// println!("{:.1} % frozen", 100.0 * frozen.share);
/// # assert_eq!(frozen.tensors, 4);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
/// Names are those of [`VarStore::variables`](nn::VarStore::variables), parts joined by `.`. Call it before
/// the optimizer is made: momentum that an optimizer has gathered would go on moving the frozen. All
/// gradients of the store are cleared.
///
/// # Errors
/// [`Error::OutOfRange`](crate::Error::OutOfRange) if no trainable parameter matches, or all do: both are how
/// a mistake in a name shows; nothing is frozen then. [`Error::Torch`](crate::Error::Torch) if libtorch
/// fails.
pub fn freeze_matching(store: &mut nn::VarStore, matches: impl Fn(&str) -> bool) -> Result<Frozen> {
    let trainable = store.variables().into_iter().filter(|(_, tensor)| tensor.requires_grad());
    let (frozen, kept): (Vec<_>, Vec<_>) = trainable.partition(|(name, _)| matches(name));
    let (tensors, rest) = (frozen.len(), kept.len());
    let requirement = "at least 1, and not all of the trainable ones";
    let valid = tensors > 0 && rest > 0;
    checked("number of parameters that match", requirement, tensors as f64, valid)?;
    for (_, parameter) in &frozen {
        let _ = parameter.f_set_requires_grad(false)?;
    }
    // A gradient that stays would be taken for one of the next step. Only an optimizer can undefine one.
    nn::Sgd::default().build(store, 0.0)?.zero_grad();
    let count = |parameters: &[(String, Tensor)]| -> i64 {
        parameters.iter().map(|(_, tensor)| i64::try_from(tensor.numel()).unwrap_or(i64::MAX)).sum()
    };
    let elements = count(&frozen);
    let all = elements.saturating_add(count(&kept));
    Ok(Frozen { tensors, elements, share: elements as f64 / all as f64 })
}
