//! Three small networks and the tensors of a step, the same on every device.

use decoupled_dmd::{
    Batch, Condition, Denoiser, Draw, Evaluation, NoisePath, Objective, Prediction, RectifiedFlow,
    Result, Shift, Shifted,
};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};

use crate::common::wave;
use crate::device::float32;
pub use crate::device::{device, drawn, waits};

pub const SHAPE: [i64; 4] = [3, 4, 6, 6];

/// Compares what the library does in float32 on the CPU and on the device.
pub fn compare(what: &str, work: impl Fn(Device) -> Result<Vec<Tensor>>) {
    crate::device::compare(what, float32(), work);
}

/// A tensor that is the same on every device.
pub fn on(device: Device, shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Float).to_device(device)
}

/// An evaluation with given draws, whose numbers are read once for each of so many groups.
pub fn evaluate_at(
    device: Device,
    objective: &Objective<'_>,
    batch: &Batch<'_>,
    groups: usize,
) -> Result<Evaluation> {
    let draw = |group| {
        let u = Tensor::full([SHAPE[0]], 0.4 + 0.1 * group as f64, (Kind::Float, device));
        Draw { u, noise: on(device, &SHAPE, 7.0) }
    };
    let draws = (0..groups).map(draw).collect();
    waits(device, "given draws", groups, || objective.evaluate_at(batch, draws))
}

/// Fills parameters with numbers that are the same on every device.
pub fn fill(vs: &nn::VarStore, phase: f64) {
    let _no_grad = tch::no_grad_guard();
    for (index, (_, mut tensor)) in sorted(vs).into_iter().enumerate() {
        tensor.copy_(&(on(vs.device(), &tensor.size(), phase + index as f64) * 0.2));
    }
}

fn sorted(vs: &nn::VarStore) -> Vec<(String, Tensor)> {
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|one, two| one.0.cmp(&two.0));
    variables
}

/// The gradients of parameters, those that there are.
pub fn gradients(vs: &nn::VarStore) -> Vec<Tensor> {
    sorted(vs).iter().map(|(_, tensor)| tensor.grad()).filter(Tensor::defined).collect()
}

/// Copies of the parameters.
pub fn parameters(vs: &nn::VarStore) -> Vec<Tensor> {
    sorted(vs).iter().map(|(_, tensor)| tensor.detach().copy()).collect()
}

/// A network of a convolution and a linear layer.
pub struct Net {
    conv: nn::Conv2D,
    linear: nn::Linear,
    pub vs: nn::VarStore,
}

impl Net {
    pub fn new(device: Device, phase: f64) -> Self {
        let vs = nn::VarStore::new(device);
        let config = nn::ConvConfig { padding: 1, ..Default::default() };
        let conv = nn::conv2d(vs.root() / "conv", 4, 4, 3, config);
        let linear = nn::linear(vs.root() / "linear", 6, 6, Default::default());
        fill(&vs, phase);
        Self { conv, linear, vs }
    }

    pub fn run(&self, x: &Tensor, t: &Tensor, cond: &Condition) -> Tensor {
        let x = x.to_kind(Kind::Float) + t.to_kind(Kind::Float).view([-1, 1, 1, 1]);
        self.linear.forward(&self.conv.forward(&x).silu()) + &cond[0]
    }

    pub fn denoiser(&self) -> Denoiser<'_> {
        let network = |x: &Tensor, t: &Tensor, c: &Condition| self.run(x, t, c);
        Denoiser::new(path(), Prediction::FlowVelocity, network)
    }
}

pub fn path() -> Shifted<RectifiedFlow> {
    RectifiedFlow.shifted(Shift::new(3.0).unwrap())
}

/// The networks and the tensors of a step.
pub struct World {
    pub teacher: Net,
    pub student: Net,
    pub fake: Net,
    pub cond: Condition,
    pub null: Condition,
    pub noise: Tensor,
    pub real: Tensor,
}

impl World {
    pub fn new(device: Device) -> Self {
        let tensor = |phase| on(device, &SHAPE, phase);
        Self {
            teacher: Net::new(device, 0.1),
            student: Net::new(device, 0.5),
            fake: Net::new(device, 0.9),
            cond: tensor(1.0).into(),
            null: tensor(2.0).into(),
            noise: tensor(3.0),
            real: tensor(4.0),
        }
    }

    /// Samples to take a gradient in.
    pub fn x(&self) -> Tensor {
        self.noise.detach().set_requires_grad(true)
    }
}
