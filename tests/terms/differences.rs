//! The orders in which differences approach the exact tangent.

use decoupled_dmd::{Result, Tangent};

/// Central differences are of the second order, one-sided ones of the first; `error` is the distance from the exact
/// tangent.
pub fn check_orders(error: impl Fn(Tangent) -> Result<f64>) -> Result<()> {
    let central = |step| error(Tangent::Central { step });
    let ahead = |step| error(Tangent::Ahead { step });
    let (two, one) = (central(2e-3)? / central(1e-3)?, ahead(2e-4)? / ahead(1e-4)?);
    assert!((3.9..4.1).contains(&two) && (1.95..2.05).contains(&one), "{two} {one}");
    Ok(())
}
