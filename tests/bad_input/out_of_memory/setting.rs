//! The batch, the networks and the critic of these tests, whose own calls are fallible too.

use decoupled_dmd::*;
use tch::{Device, Kind, Tensor};

use super::super::common::wave;

pub const SHAPE: [i64; 4] = [2, 2, 4, 4];
pub const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A batch and all that its terms may ask for.
pub struct Setting {
    pub x: Tensor,
    pub real: Tensor,
    pub noise: Tensor,
    pub cond: Condition,
    pub null: Condition,
    pub student: PreShift,
    pub time: PostShift,
    pub mask: Tensor,
    /// Draws, `[B]`.
    pub u: Tensor,
}

pub fn setting() -> Setting {
    let float = |phase| wave(&SHAPE, phase, Kind::Float);
    let u = Tensor::from_slice(&[0.3f32, 0.6]);
    Setting {
        // In bfloat16, so that the copy in float32 is made too.
        x: wave(&SHAPE, 0.3, Kind::BFloat16).set_requires_grad(true),
        real: float(4.0),
        noise: float(5.0),
        cond: float(1.1).into(),
        null: float(2.9).into(),
        student: PreShift::new(u.shallow_clone()).unwrap(),
        time: PostShift::new(u.shallow_clone()).unwrap(),
        mask: Tensor::from_slice(&[true, false]),
        u,
    }
}

impl Setting {
    pub fn plain(&self) -> Result<Batch<'_>> {
        Batch::new(&self.x, &self.cond)?
            .with_null(&self.null)
            .with_real(&self.real)?
            .with_target(&self.real)?
            .with_student_time(&self.student)?
            .with_student_input(&self.noise, &self.time)
    }

    pub fn batch(&self) -> Result<Batch<'_>> {
        self.plain()?.with_mask(&self.mask)
    }

    pub fn draw(&self) -> Draw {
        Draw { u: self.u.shallow_clone(), noise: self.noise.shallow_clone() }
    }
}

/// A teacher or a fake score in the given prediction; its own calls are fallible too.
pub fn network<'a>(path: impl NoisePath + 'a, prediction: Prediction) -> Denoiser<'a> {
    let network = |x: &Tensor, _: &Tensor, cond: &Condition| -> Result<Tensor> {
        Ok(x.f_tanh()?.f_mul(&cond[0])?)
    };
    Denoiser::new(path, prediction, network).tangent(
        |x: &Tensor, _: &Tensor, cond: &Condition, along: &Tensor, _: &Tensor| -> Result<_> {
            Ok((x.f_tanh()?.f_mul(&cond[0])?, along.f_mul(&cond[0])?))
        },
    )
}

pub fn flow<'a>() -> Denoiser<'a> {
    network(RectifiedFlow, Prediction::FlowVelocity)
}

pub fn critic(x: &Tensor, t: &Tensor, _: &Condition) -> Result<Tensor> {
    let scores = x.f_sin()?.f_flatten(1, -1)?.f_mean_dim(&[1i64][..], true, None::<Kind>)?;
    Ok(scores.f_add(&t.f_unsqueeze(1)?)?)
}
