//! The noise angle of a path.

use tch::{Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::numeric::{of_one_rank, per_sample, widen_like};
use crate::path::{Coefficients, NoisePath, coefficients_at};
use crate::time::PostShift;
use crate::value::{Positive, checked};

/// The least sine of the noise angle by which a direction is divided.
const LEAST_SINE: f64 = 1e-4;

/// The noise angle of a path at given times, `phi = atan2(s, a d)`: 0 at clean data, pi/2 at pure noise,
/// TrigFlow's own time. d is the standard deviation of the data. Lu & Song, arXiv 2410.11081.
///
/// Along an ODE, derivatives by the angle are the same on every path of one data distribution, which those by
/// time are not: [`Consistency`](crate::Consistency) takes its tangent by it.
///
/// # Example
/// ```
/// use decoupled_dmd::{NoiseAngle, PostShift, RectifiedFlow};
/// # let options = (tch::Kind::Double, tch::Device::Cpu);
/// let (time, later) = (PostShift::all(0.5, 4, options)?, PostShift::all(0.501, 4, options)?);
/// let angle = NoiseAngle::at(&RectifiedFlow, &time, 1.0)?;
/// let step = NoiseAngle::at(&RectifiedFlow, &later, 1.0)?.minus(&angle)?;
/// # assert!((angle.radians().double_value(&[0]) - std::f64::consts::FRAC_PI_4).abs() < 1e-12);
/// # assert!(step.double_value(&[0]) < 0.0);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct NoiseAngle {
    /// phi.
    phi: Tensor,
    /// a d and s over their norm.
    cosine: Tensor,
    sine: Tensor,
}

impl NoiseAngle {
    /// The angle at `time` for data of standard deviation `data_std`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `data_std` is finite and positive;
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn at(path: &dyn NoisePath, time: &PostShift, data_std: f64) -> Result<Self> {
        let data_std = Positive::new("standard deviation of the data", data_std)?.get();
        let Coefficients { data, noise } = path.coefficients(time)?;
        let data = data.f_to_kind(Kind::Double)?.times(data_std)?;
        let noise = noise.f_to_kind(Kind::Double)?;
        let norm = data.f_hypot(&noise)?;
        Ok(Self {
            phi: noise.f_atan2(&data)?,
            cosine: data.f_div(&norm)?,
            sine: noise.f_div(&norm)?,
        })
    }

    /// phi, in float64 and shaped like the times, `[B]` or per frame.
    pub fn radians(&self) -> &Tensor {
        &self.phi
    }

    /// cos phi as a factor of `like`, `[B, 1, ..]` or `[B, F, 1, ..]`, in float32, or in float64 where `like` is.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) unless `like` is `[B, ..]`.
    pub fn cosine(&self, like: &Tensor) -> Result<Tensor> {
        per_sample(&widen_like(&self.cosine, like)?, like)
    }

    /// sin phi as a factor of `like`, as [`cosine`](Self::cosine).
    ///
    /// # Errors
    /// As [`cosine`](Self::cosine).
    pub fn sine(&self, like: &Tensor) -> Result<Tensor> {
        per_sample(&widen_like(&self.sine, like)?, like)
    }

    /// This angle less another, `[B]` or per frame.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) unless both are of as many times.
    pub fn minus(&self, other: &Self) -> Result<Tensor> {
        let (own, other) = of_one_rank(&self.phi, &other.phi)?;
        Ok(own.f_sub(&other)?)
    }

    /// Refuses times whose cleanest has a sine below 1e-4, for data of standard deviation 1, by which a direction
    /// could not be divided. It is evaluated on the host.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) for such times.
    pub fn check_clean_end(path: &dyn NoisePath, time: &PostShift) -> Result<()> {
        let (a, s) = coefficients_at(path, time.range().1)?;
        let sine = s / a.hypot(s);
        let requirement = "at least 1e-4: keep the student's input off the clean end";
        checked("sine of the noise angle", requirement, sine, sine >= LEAST_SINE)?;
        Ok(())
    }

    /// Refuses a path whose angle is the same before and after `step` at one of three times, evaluated on the host: a
    /// table of levels has no derivative by differences. A step of about one level of a table may pass, and is still
    /// without a change at some times, where a difference is to count as 0.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) for such a path, or a step that is not in (0, 1].
    pub fn check_changes(path: &dyn NoisePath, step: f64) -> Result<()> {
        const WHAT: &str = "step along the teacher's ODE";
        checked(WHAT, "in (0, 1]", step, step > 0.0 && step <= 1.0)?;
        let angle = |time: f64| -> Result<f64> {
            let (a, s) = coefficients_at(path, time.min(1.0))?;
            Ok(s.atan2(a))
        };
        for time in [0.25, 0.5, 0.75] {
            let change = angle(time)? - angle(time + step)?;
            let requirement =
                "long enough to change the noise angle: a table has no time between two levels";
            checked(WHAT, requirement, step, change > 0.0)?;
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
        assert!(matches!(NoiseAngle::check_changes(&table, 1e-4), Err(Error::OutOfRange { .. })));
        assert!(NoiseAngle::check_changes(&table, 0.02).is_ok());
        let linear = VariancePreserving::linear(0.1, 20.0)?;
        let paths: [&dyn NoisePath; 4] = [&RectifiedFlow, &TrigFlow, &Edm::default(), &linear];
        for path in paths {
            assert!(NoiseAngle::check_changes(path, 1e-6).is_ok());
        }
        Ok(())
    }
}
