//! Closed-form networks for the tests: the exact denoisers of Gaussian data.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod paper;
pub mod reference;
mod tensors;

use std::cell::RefCell;

use decoupled_dmd::{
    Batch, Condition, Denoiser, Edm, NoisePath, PostShift, Prediction, Probe, RectifiedFlow,
    Regularizer, Result, TrigFlow, VariancePreserving,
};
use tch::{Device, Tensor};
pub use tensors::*;

/// E[x0 | x_t] of data N(mean, variance I) on rectified flow, with t [B] and x_t [B, ..].
pub fn gaussian_denoiser(x: &Tensor, t: &Tensor, mean: &Tensor, variance: f64) -> Tensor {
    let mut shape = vec![1i64; x.dim()];
    shape[0] = x.size()[0];
    let a = t.view(shape.as_slice());
    let s: Tensor = 1.0 - &a;
    let gain = &a * variance / (a.square() * variance + s.square());
    mean + gain * (x - a * mean)
}

/// A teacher of N(condition, variance I), which predicts the clean sample itself.
pub fn gaussian_teacher<'a>(variance: f64) -> Denoiser<'a> {
    Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        move |x: &Tensor, t: &Tensor, c: &Condition| gaussian_denoiser(x, t, &c[0], variance),
    )
}

/// The table of SDXL.
pub fn sdxl() -> VariancePreserving {
    VariancePreserving::scaled_linear(0.00085, 0.012, 1000).unwrap()
}

/// Every path.
pub fn paths() -> [Box<dyn NoisePath>; 5] {
    [
        Box::new(RectifiedFlow),
        Box::new(VariancePreserving::linear(0.1, 20.0).unwrap()),
        Box::new(sdxl()),
        Box::new(Edm::default()),
        Box::new(TrigFlow),
    ]
}

/// The recorded calls of a network.
#[derive(Default)]
pub struct Calls {
    /// The times of each forward, one vector a call.
    pub times: RefCell<Vec<Vec<f64>>>,
    pub paired: RefCell<usize>,
}

impl Calls {
    pub fn record(&self, t: &Tensor) {
        self.times.borrow_mut().push(values(t));
    }
    pub fn count(&self) -> usize {
        self.times.borrow().len()
    }
}

/// [`gaussian_teacher`] that records its calls.
pub fn counting_teacher(calls: &Calls, variance: f64) -> Denoiser<'_> {
    Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        move |x: &Tensor, t: &Tensor, c: &Condition| {
            calls.record(t);
            gaussian_denoiser(x, t, &c[0], variance)
        },
    )
}

/// The loss of a term at tau = 0.5 with a fixed noise.
pub fn loss_of(term: &dyn Regularizer, batch: &Batch<'_>) -> Result<Tensor> {
    let (x, teacher) = (batch.x(), gaussian_teacher(1.0));
    let tau = PostShift::all(0.5, batch.batch_size(), (x.kind(), Device::Cpu))?;
    term.loss(&Probe::at(&teacher, batch, tau, wave(&x.size(), 5.0, x.kind()))?)
}
