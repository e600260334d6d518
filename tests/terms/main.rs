//! The terms one by one: identities, laws, errors, and a training of seconds for each.

#[path = "../common/mod.rs"]
mod common;

mod adversarial;
mod adversarial_distribution_matching;
mod augmentation;
mod cfg_augmentation;
mod consistency;
mod differences;
mod distribution_matching;
mod divergence;
mod flow_map;
mod guidance;
mod maximum_mean_discrepancy;
mod mean_variance;
mod own_losses;
mod paired_regression;
mod rcm;
mod recipes;
mod reward;
mod score_identity;
mod segments;
mod training;

use common::{gradient, loss_of, max_difference, value};
use decoupled_dmd::Result;
use tch::{Kind, Tensor};

/// The gradient of `f` at `x` by central differences, in float64.
fn central_differences(x: &Tensor, f: impl Fn(&Tensor) -> f64) -> Tensor {
    let step = 1e-5;
    let at = common::values(x);
    let slopes: Vec<f64> = (0..at.len())
        .map(|i| {
            let moved = |by: f64| {
                let mut values = at.clone();
                values[i] += by;
                f(&Tensor::from_slice(&values).view(x.size().as_slice()))
            };
            (moved(step) - moved(-step)) / (2.0 * step)
        })
        .collect();
    Tensor::from_slice(&slopes).view(x.size().as_slice()).to_kind(Kind::Double)
}

/// Rows of `t` in another order.
fn reorder(t: &Tensor, order: &[i64]) -> Tensor {
    t.index_select(0, &Tensor::from_slice(order))
}

/// Compares the gradient of `loss` in parameters at `values` with central differences.
fn check_parameter_gradient(
    case: &str,
    values: &Tensor,
    loss: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<()> {
    let parameters = values.detach().set_requires_grad(true);
    let found = gradient(&loss(&parameters)?, &parameters);
    let expected = central_differences(values, |at| value(&loss(at).unwrap()));
    let error = max_difference(&found, &expected) / value(&expected.abs().max());
    // NaN is above every tolerance.
    assert!(error < 1e-7, "{case}: {error:e}");
    Ok(())
}
