//! The setting in which the equations of the paper are checked: Gaussians, and one draw.

use decoupled_dmd::{Batch, Condition, Draw};
use tch::{Kind, Tensor};

use super::{gaussian_denoiser, wave};

pub const SHAPE: [i64; 4] = [3, 2, 4, 4];
pub const TEACHER_VARIANCE: f64 = 0.5;
pub const FAKE_VARIANCE: f64 = 0.8;
pub const ALPHA: f64 = 4.0;

pub struct Setting {
    pub x: Tensor,
    pub cond: Condition,
    pub null: Condition,
    pub u: Tensor,
    pub noise: Tensor,
}

/// Samples with a gradient, and one draw, away from both ends of the path.
pub fn setting(kind: Kind) -> Setting {
    Setting {
        x: wave(&SHAPE, 0.3, kind).set_requires_grad(true),
        cond: wave(&SHAPE, 1.1, kind).into(),
        null: wave(&SHAPE, 2.9, kind).into(),
        u: Tensor::from_slice(&[0.2, 0.5, 0.7]).to_kind(kind),
        noise: wave(&SHAPE, 5.0, kind),
    }
}

impl Setting {
    pub fn batch(&self) -> Batch<'_> {
        Batch::new(&self.x, &self.cond).unwrap().with_null(&self.null)
    }
    pub fn draw(&self) -> Draw {
        Draw { u: self.u.shallow_clone(), noise: self.noise.shallow_clone() }
    }
    /// Noised samples, and the clean predictions: conditional, null, fake.
    pub fn predictions(&self) -> [Tensor; 4] {
        let t = self.u.view([3, 1, 1, 1]);
        let level: Tensor = 1.0 - &t;
        let noised = (&t * &self.x + level * &self.noise).detach();
        let predict = |c: &Condition, v| gaussian_denoiser(&noised, &self.u, &c[0], v);
        let cond = predict(&self.cond, TEACHER_VARIANCE);
        let null = predict(&self.null, TEACHER_VARIANCE);
        let fake = predict(&self.cond, FAKE_VARIANCE);
        [noised, cond, null, fake]
    }
}

pub fn mean_abs(tensor: &Tensor) -> Tensor {
    tensor.abs().mean_dim(&[1i64, 2, 3][..], true, None)
}
