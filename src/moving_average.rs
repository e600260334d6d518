//! Moving averages of parameters.

use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_size, check_strided};
use crate::error::{Error, Result};
use crate::value::checked;

/// Moves parameters toward others by a share of the distance, in place:
///
/// ```text
/// parameter <- (1 - share) parameter + share target
/// ```
/// | use | parameters | targets | share |
/// |---|---|---|---|
/// | exponential moving average of the student, after each of its updates | the average | the student | 1 - decay, such as 0.001 |
/// | implicit distribution alignment of SenseFlow (arXiv 2506.00523), after each update of the student | the fake score | the student | SenseFlow's 1 - lambda |
/// | the same in CDM (arXiv 2605.06376), after each update of the fake score | the fake score | the student | 0.001 |
///
/// Both networks must have one architecture and, for the fake score, one prediction type.
///
/// `pairs` are (parameter, target) of one shape. Parameters are master weights, float32 or float64: in
/// bfloat16 a step of 0.001 rounds to none at all. Targets may be of another floating-point type or on
/// another device. Nothing is recorded for autograd, and nothing is changed unless all pairs fit.
///
/// ```
/// # use decoupled_dmd::move_toward;
/// # use tch::Tensor;
/// let (average, student) = (Tensor::from_slice(&[1.0, 2.0]), Tensor::from_slice(&[3.0, 2.0]));
/// move_toward([(&average, &student)], 0.5)?;
/// assert_eq!(Vec::<f64>::try_from(&average).unwrap(), [2.0, 2.0]);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
///
/// # Errors
/// [`Error::OutOfRange`] unless `share` is in [0, 1]; [`Error::Shape`] if a pair is undefined or its
/// shapes differ; [`Error::Layout`] unless both are strided; [`Error::Kind`] unless parameters are float32 or float64 and targets floating point.
pub fn move_toward<'t>(
    pairs: impl IntoIterator<Item = (&'t Tensor, &'t Tensor)>,
    share: f64,
) -> Result<()> {
    checked("share to move", "in [0, 1]", share, (0.0..=1.0).contains(&share))?;
    let _no_grad = no_grad_guard();
    let mut fitting = Vec::new();
    for (parameter, target) in pairs {
        let what = "parameter to move";
        if !parameter.defined() {
            return Err(Error::shape(what, "of a defined tensor", &parameter.size()));
        }
        check_strided(what, parameter)?;
        let kind = parameter.f_kind()?;
        if !matches!(kind, Kind::Float | Kind::Double) {
            let expected = "Float or Double, the master weights";
            return Err(Error::Kind { what, expected, found: kind });
        }
        check_size("target of a parameter", target, &parameter.size())?;
        fitting.push((parameter.shallow_clone(), target));
    }
    for (mut parameter, target) in fitting {
        // One at a time: a copy of all would be as large as the network.
        let target = target.f_to_device(parameter.device())?.f_to_kind(parameter.f_kind()?)?;
        let _ = parameter.toward_(&target, share)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_move_is_in_place_under_no_grad_and_all_or_nothing() -> Result<()> {
        let average = Tensor::from_slice(&[1.0, 5.0]).set_requires_grad(true);
        let student = Tensor::from_slice(&[2.0f32, 1.0]).set_requires_grad(true);
        move_toward([(&average, &student)], 0.25)?;
        assert_eq!(Vec::<f64>::try_from(average.detach()).unwrap(), [1.25, 4.0]);
        assert!(average.is_leaf() && average.requires_grad());
        let wrong = Tensor::zeros([3], (Kind::Double, tch::Device::Cpu));
        let result = move_toward([(&average, &student), (&average, &wrong)], 0.5);
        assert!(matches!(result, Err(Error::Shape { what: "target of a parameter", .. })));
        assert_eq!(Vec::<f64>::try_from(average.detach()).unwrap(), [1.25, 4.0]);
        for share in [-0.1, 1.1, f64::NAN] {
            assert!(matches!(move_toward([], share), Err(Error::OutOfRange { .. })));
        }
        Ok(())
    }
}
