//! The regularizers one by one: identities, laws, errors, and a training of seconds for each.

#[path = "../common/mod.rs"]
mod common;

mod adversarial;
mod adversarial_distribution_matching;
mod consistency;
mod convergence;
mod critic_evaluation;
mod divergence;
mod flow_map;
mod maximum_mean_discrepancy;
mod mean_variance;
mod paired_regression;
mod parameter_gradients;
mod score_identity;

use common::loss_of;
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
