//! Derivatives by time of a path's coefficients and of the conversion to a clean sample.

use tch::{Kind, Tensor, with_grad};

use crate::arithmetic::Arithmetic;
use crate::error::{Error, Result};
use crate::path::{Coefficients, NoisePath};
use crate::prediction::Prediction;
use crate::time::PostShift;

/// Derivatives by time, `[B]` in float64, of the coefficients of a path, of the conversion
/// `f = A x + B o` from a network's output to the clean sample, and of the noise angle. They are taken
/// by automatic differentiation.
#[derive(Debug)]
pub(super) struct Derivatives {
    /// a'.
    pub(super) data: Tensor,
    /// s'.
    pub(super) noise: Tensor,
    /// A and A'.
    pub(super) of_input: (Tensor, Tensor),
    /// B and B'.
    pub(super) of_output: (Tensor, Tensor),
    /// phi'.
    pub(super) angle: Tensor,
}

impl Derivatives {
    /// Refuses a path that does not depend on time differentiably, such as a table of levels.
    pub(super) fn at(
        path: &dyn NoisePath,
        prediction: Prediction,
        time: &PostShift,
        data_std: f64,
    ) -> Result<Self> {
        with_grad(|| {
            let leaf = time.tensor().f_detach()?.f_to_kind(Kind::Double)?;
            let leaf = leaf.f_set_requires_grad(true)?;
            let coefficients = path.coefficients(&time.with_times(leaf.shallow_clone()))?;
            if !coefficients.noise.requires_grad() {
                return Err(Error::NotDifferentiable);
            }
            let double = |tensor: &Tensor| tensor.f_to_kind(Kind::Double);
            let at = Coefficients {
                data: double(&coefficients.data)?,
                noise: double(&coefficients.noise)?,
            };
            let (of_input, of_output) = prediction.conversion(&at)?;
            let angle = at.noise.f_atan2(&at.data.times(data_std)?)?;
            let by_time = |value: &Tensor| -> Result<Tensor> {
                if !value.requires_grad() {
                    return Ok(leaf.f_zeros_like()?.f_detach()?);
                }
                let gradients = Tensor::f_run_backward(&[value], &[&leaf], true, false)?;
                match gradients.into_iter().next().filter(Tensor::defined) {
                    Some(gradient) => Ok(gradient.f_detach()?),
                    None => Ok(leaf.f_zeros_like()?.f_detach()?),
                }
            };
            let with_slope = |value: &Tensor| -> Result<(Tensor, Tensor)> {
                Ok((value.f_detach()?, by_time(value)?))
            };
            Ok(Self {
                data: by_time(&at.data)?,
                noise: by_time(&at.noise)?,
                of_input: with_slope(&of_input)?,
                of_output: with_slope(&of_output)?,
                angle: by_time(&angle)?,
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::path::{Edm, RectifiedFlow, TrigFlow, VariancePreserving};

    fn paths() -> Vec<Box<dyn NoisePath>> {
        vec![
            Box::new(RectifiedFlow),
            Box::new(TrigFlow),
            Box::new(Edm::default()),
            Box::new(VariancePreserving::linear(0.1, 20.0).unwrap()),
        ]
    }

    #[test]
    fn derivatives_are_those_of_central_differences() -> Result<()> {
        let times = |shift: f64| {
            PostShift::new(Tensor::from_slice(&[0.2 + shift, 0.5 + shift, 0.9 + shift]))
        };
        let h = 1e-6;
        for path in paths() {
            let path = &*path;
            for prediction in Prediction::ALL {
                let found = Derivatives::at(path, prediction, &times(0.0)?, 0.7)?;
                let values = |shift: f64| -> Result<[Tensor; 5]> {
                    let time = times(shift)?;
                    let at = path.coefficients(&time)?;
                    let (input, output) = prediction.conversion(&at)?;
                    let angle = at
                        .noise
                        .f_to_kind(Kind::Double)?
                        .f_atan2(&at.data.f_to_kind(Kind::Double)?.times(0.7)?)?;
                    Ok([at.data, at.noise, input, output, angle])
                };
                let (later, earlier) = (values(h)?, values(-h)?);
                let found =
                    [found.data, found.noise, found.of_input.1, found.of_output.1, found.angle];
                for ((later, earlier), found) in later.iter().zip(&earlier).zip(&found) {
                    let expected = (later - earlier) / (2.0 * h);
                    let size = expected.abs().max().double_value(&[]).max(1.0);
                    let error = (found - expected).abs().max().double_value(&[]);
                    assert!(error < 1e-7 * size, "{prediction:?}: {error} of {size}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_table_has_no_derivative() -> Result<()> {
        let table = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
        let time = PostShift::all(0.5, 2, (Kind::Double, Device::Cpu))?;
        let derivatives = Derivatives::at(&table, Prediction::Noise, &time, 1.0);
        assert!(matches!(derivatives, Err(Error::NotDifferentiable)));
        Ok(())
    }
}
