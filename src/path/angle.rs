//! The noise angle of a path, and derivatives of coefficients and angle by time.

use tch::{Kind, Tensor};

use crate::error::Result;
use crate::numeric::{per_sample, widen_like};
use crate::path::{Coefficients, NoisePath, coefficients_at};
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::path::{Edm, RectifiedFlow, TrigFlow, VariancePreserving};

    #[test]
    fn a_table_has_no_short_step() -> Result<()> {
        let table = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
        assert!(matches!(Angle::check_changes(&table, 1e-4), Err(Error::OutOfRange { .. })));
        assert!(Angle::check_changes(&table, 0.02).is_ok());
        let linear = VariancePreserving::linear(0.1, 20.0)?;
        let paths: [&dyn NoisePath; 4] = [&RectifiedFlow, &TrigFlow, &Edm::default(), &linear];
        for path in paths {
            assert!(Angle::check_changes(path, 1e-6).is_ok());
        }
        Ok(())
    }
}
