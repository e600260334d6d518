//! The noise angle of a path, and derivatives of coefficients and angle by time.

use tch::{Kind, Tensor, with_grad};

use crate::error::{Error, Result};
use crate::numeric::{per_sample, widen_like};
use crate::path::{Coefficients, NoisePath, coefficients_at};
use crate::prediction::Prediction;
use crate::time::PostShift;
use crate::value::checked;

/// The least sine of the noise angle by which a direction is divided.
const LEAST_SINE: f64 = 1e-4;

/// The noise angle `phi = atan2(s, a d)` at given times, `[B]` in float64: 0 at clean data, pi/2 at pure
/// noise, TrigFlow's own time. d is the standard deviation of the data. Lu & Song, arXiv 2410.11081.
#[derive(Debug)]
pub(crate) struct Angle {
    /// phi.
    phi: Tensor,
    /// a d and s over their norm.
    cosine: Tensor,
    sine: Tensor,
}

impl Angle {
    pub(crate) fn at(path: &dyn NoisePath, time: &PostShift, data_std: f64) -> Result<Self> {
        let Coefficients { data, noise } = path.coefficients(time)?;
        let data = data.f_to_kind(Kind::Double)?.f_mul_scalar(data_std)?;
        let noise = noise.f_to_kind(Kind::Double)?;
        let norm = data.f_hypot(&noise)?;
        Ok(Self {
            phi: noise.f_atan2(&data)?,
            cosine: data.f_div(&norm)?,
            sine: noise.f_div(&norm)?,
        })
    }

    /// cos phi as a factor of `like`.
    pub(crate) fn cosine(&self, like: &Tensor) -> Result<Tensor> {
        per_sample(&widen_like(&self.cosine, like)?, like)
    }

    /// sin phi as a factor of `like`.
    pub(crate) fn sine(&self, like: &Tensor) -> Result<Tensor> {
        per_sample(&widen_like(&self.sine, like)?, like)
    }

    /// This angle less another, `[B]`.
    pub(crate) fn minus(&self, other: &Self) -> Result<Tensor> {
        Ok(self.phi.f_sub(&other.phi)?)
    }

    /// Refuses times whose cleanest has a vanishing sine, evaluated on the host.
    pub(crate) fn check_clean_end(path: &dyn NoisePath, time: &PostShift) -> Result<()> {
        let (a, s) = coefficients_at(path, time.range().1)?;
        let sine = s / a.hypot(s);
        let requirement = "at least 1e-4: keep the student's input off the clean end";
        checked("sine of the noise angle", requirement, sine, sine >= LEAST_SINE)?;
        Ok(())
    }

    /// Refuses a path whose angle is the same before and after `step`, evaluated at a few times on the host.
    pub(crate) fn check_changes(path: &dyn NoisePath, step: f64) -> Result<()> {
        let angle = |time: f64| -> Result<f64> {
            let (a, s) = coefficients_at(path, time.min(1.0))?;
            Ok(s.atan2(a))
        };
        for time in [0.25, 0.5, 0.75] {
            let change = angle(time)? - angle(time + step)?;
            let requirement =
                "long enough to change the noise angle: a table has no time between two levels";
            checked("step along the teacher's ODE", requirement, step, change > 0.0)?;
        }
        Ok(())
    }
}

/// Derivatives by time, `[B]` in float64, of the coefficients of a path, of the conversion
/// `f = A x + B o` from a network's output to the clean sample, and of the noise angle. They are taken
/// by automatic differentiation.
#[derive(Debug)]
pub(crate) struct Derivatives {
    /// a'.
    pub(crate) data: Tensor,
    /// s'.
    pub(crate) noise: Tensor,
    /// A and A'.
    pub(crate) of_input: (Tensor, Tensor),
    /// B and B'.
    pub(crate) of_output: (Tensor, Tensor),
    /// phi'.
    pub(crate) angle: Tensor,
}

impl Derivatives {
    /// Refuses a path that does not depend on time differentiably, such as a table of levels.
    pub(crate) fn at(
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
            let angle = at.noise.f_atan2(&at.data.f_mul_scalar(data_std)?)?;
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
                    let angle = Angle::at(path, &time, 0.7)?.phi;
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
    fn a_table_has_no_derivative_and_no_short_step() -> Result<()> {
        let table = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
        let time = PostShift::all(0.5, 2, (Kind::Double, Device::Cpu))?;
        let derivatives = Derivatives::at(&table, Prediction::Noise, &time, 1.0);
        assert!(matches!(derivatives, Err(Error::NotDifferentiable)));
        assert!(matches!(Angle::check_changes(&table, 1e-4), Err(Error::OutOfRange { .. })));
        assert!(Angle::check_changes(&table, 0.02).is_ok());
        for path in paths() {
            assert!(Angle::check_changes(&*path, 1e-6).is_ok());
        }
        Ok(())
    }
}
