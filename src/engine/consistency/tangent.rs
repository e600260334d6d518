//! How the derivative along the teacher's ODE is taken.

use tch::Tensor;

use super::derivatives::Derivatives;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::numeric::per_sample;
use crate::probe::Probe;
use crate::time::PostShift;

/// How the derivative of the student's prediction along the teacher's ODE is taken. Steps are in the
/// time that the network sees.
///
/// | way | forwards of the student | error | use |
/// |---|---|---|---|
/// | [`Central`](Self::Central) | 2 | second order in the step | float32 networks; 1e-3, or 1e-4 where the network embeds 1000 t |
/// | [`Ahead`](Self::Ahead) | 1, and x itself | first order | bfloat16 networks with a large step, such as 1/48 |
/// | [`Exact`](Self::Exact) | 1 call of [`Denoiser::tangent`] | rounding | networks with a Jacobian-vector product |
///
/// In bfloat16 a difference over less than about 0.05 is rounding noise: the diagnostic `roughness`
/// shows it. Both evaluations of a difference come from the same closure; that closure may run the
/// same weights in float32.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Tangent {
    /// The difference between one step ahead and one step behind.
    Central {
        /// The step, in (0, 1].
        step: f64,
    },
    /// The difference between one step ahead and x itself.
    Ahead {
        /// The step, in (0, 1].
        step: f64,
    },
    /// The Jacobian-vector product of the student, by [`Denoiser::tangent`]. A student with fused attention has
    /// none: it takes the math kernel in that closure, or a difference here.
    Exact,
}

impl Tangent {
    /// The step of a difference.
    pub(crate) fn step(self) -> Option<f64> {
        match self {
            Self::Central { step } | Self::Ahead { step } => Some(step),
            Self::Exact => None,
        }
    }
}

/// df/dphi along the teacher's ODE by the student's own Jacobian-vector product, `[B, ..]`.
///
/// The clean prediction is `f = A x + B o` of the network's output o, with A and B functions of time:
/// `df/dt = A' x + A dx/dt + B' o + B do/dt`, and `dx/dt = a' X + s' E`.
pub(super) fn exact(
    student: &Denoiser<'_>,
    probe: &Probe<'_>,
    (input, time): (&Tensor, &PostShift),
    (clean, noise): (&Tensor, &Tensor),
    data_std: f64,
) -> Result<Tensor> {
    let kind = clean.f_kind()?;
    let at = Derivatives::at(student.path(), student.prediction(), time, data_std)?;
    let factor = |values: &Tensor| per_sample(&values.f_to_kind(kind)?, clean);
    let input = input.f_to_kind(kind)?;
    let velocity = clean.f_mul(&factor(&at.data)?)?.f_addcmul(noise, &factor(&at.noise)?)?;
    let (output, tangent) = student.predict_along(&input, time, probe.batch().cond(), &velocity)?;
    let slope = input
        .f_mul(&factor(&at.of_input.1)?)?
        .f_addcmul(&velocity, &factor(&at.of_input.0)?)?
        .f_addcmul(&output.f_to_kind(kind)?, &factor(&at.of_output.1)?)?
        .f_addcmul(&tangent.f_to_kind(kind)?, &factor(&at.of_output.0)?)?;
    Ok(slope.f_div(&factor(&at.angle)?)?)
}
