//! Flow maps: students of two times, which jump along the teacher's ODE.

mod mean_flow;

use std::rc::Rc;

pub use mean_flow::{FlowRule, MeanFlow, MeanFlowEvaluation};
use tch::{Device, Kind, Tensor, no_grad_guard};

use crate::batch::Condition;
use crate::checks::{check_like, check_per_sample, check_samples};
use crate::denoiser::Denoiser;
use crate::error::{Error, Result};
use crate::grid::FewStepGrid;
use crate::network::IntoOutput;
use crate::numeric::{batch_size, compute_kind, per_sample, widen, widen_like};
use crate::path::{NoisePath, RectifiedFlow};
use crate::prediction::Prediction;
use crate::time::{PostShift, Shift};
use crate::value::checked;

type TwoTimes<'a> = dyn Fn(&Tensor, &Tensor, &Tensor, &Condition) -> Result<Tensor> + 'a;
type TwoTimesTangent<'a> =
    dyn Fn(&Tensor, (&Tensor, &Tensor), &Condition, &Tensor) -> Result<(Tensor, Tensor)> + 'a;

/// A network of two times: the average flow velocity u between the noised sample at t and the point of
/// the teacher's ODE at a cleaner r, on the straight path.
///
/// ```text
/// M(x; t -> r) = x - (r - t) u(x; t -> r)
/// ```
/// MeanFlow (arXiv 2505.13447), AlphaFlow (arXiv 2510.20771) and Shortcut models are flow maps; at r = 1
/// a flow map is a consistency function. u has the sign of diffusers' flow models, `eps - x0`, so a
/// pretrained velocity network that ignores r is a start: at r = t both are the same.
///
/// The closure gets the noised sample `[B, ..]`, t and r `[B]` each on the crate's clock (0 noise, 1
/// data), and the condition. The official MeanFlow network is fed `1 - t` and `r - t`.
///
/// ```
/// # use decoupled_dmd::{Condition, FewStepGrid, FlowMap};
/// # use tch::{Device, Kind, Tensor};
/// # struct Net; impl Net { fn forward(&self, x: &Tensor, t: &Tensor, length: &Tensor, _: &[Tensor]) -> Tensor { x * 0.5 } }
/// # let net = Net;
/// let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, cond: &Condition| {
///     net.forward(x, t, &(r - t), cond)
/// });
/// let noise = Tensor::randn([2, 4], (Kind::Float, Device::Cpu));
/// let samples = map.sample(&noise, &Condition::none(), &FewStepGrid::even(2)?)?;
/// # assert_eq!(samples.size(), [2, 4]);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Clone)]
pub struct FlowMap<'a> {
    network: Rc<TwoTimes<'a>>,
    tangent: Option<Rc<TwoTimesTangent<'a>>>,
    shift: Shift,
}

impl<'a> FlowMap<'a> {
    /// Wraps a network of two times.
    pub fn new<O: IntoOutput<Tensor>>(
        network: impl Fn(&Tensor, &Tensor, &Tensor, &Condition) -> O + 'a,
    ) -> Self {
        Self {
            network: Rc::new(move |x, t, r, cond| network(x, t, r, cond).into_result()),
            tangent: None,
            shift: Shift::NONE,
        }
    }

    /// Sets the timestep shift that the model is run with.
    #[must_use]
    pub fn shifted(mut self, shift: Shift) -> Self {
        self.shift = shift;
        self
    }

    /// Adds a closure for the derivative of the network while x moves by a given velocity and t by 1, r
    /// staying: it gets the noised sample, (t, r), the condition and the velocity of x, and returns the
    /// output and its derivative, `[B, ..]` each.
    #[must_use]
    pub fn tangent<O: IntoOutput<(Tensor, Tensor)>>(
        mut self,
        network: impl Fn(&Tensor, (&Tensor, &Tensor), &Condition, &Tensor) -> O + 'a,
    ) -> Self {
        self.tangent = Some(Rc::new(move |x, times, cond, along| {
            network(x, times, cond, along).into_result()
        }));
        self
    }

    /// The shift of the model.
    pub fn shift(&self) -> Shift {
        self.shift
    }

    /// u, the average flow velocity `[B, ..]` from the noised sample `x` `[B, ..]` at `from` to `to`, in
    /// float32, or in float64 where `x` is.
    ///
    /// # Errors
    /// [`Error::Network`] from the closure; [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] unless `x`
    /// are floating-point samples with two times each, and the output is like them.
    pub fn velocity(
        &self,
        x: &Tensor,
        from: &PostShift,
        to: &PostShift,
        cond: &Condition,
    ) -> Result<Tensor> {
        check_input(x, from, to)?;
        let output = (self.network)(x, &from.for_network(x)?, &to.for_network(x)?, cond)?;
        check_like("network output", &output, x)?;
        widen_like(&output, x)
    }

    /// [`velocity`](Self::velocity) and its derivative while x moves by `along` in a unit of time, by the closure
    /// of [`tangent`](Self::tangent).
    ///
    /// # Errors
    /// [`Error::NoTangent`] without that closure; as [`velocity`](Self::velocity).
    pub fn velocity_along(
        &self,
        x: &Tensor,
        (from, to): (&PostShift, &PostShift),
        cond: &Condition,
        along: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let network = self.tangent.as_ref().ok_or(Error::NoTangent)?;
        check_input(x, from, to)?;
        check_like("direction of x", along, x)?;
        let times = (&from.for_network(x)?, &to.for_network(x)?);
        let (output, tangent) = network(x, times, cond, along)?;
        check_like("network output", &output, x)?;
        check_like("derivative of the network output", &tangent, x)?;
        Ok((widen_like(&output, x)?, widen_like(&tangent, x)?))
    }

    /// M, the point `[B, ..]` at `to` of the ODE through the noised sample `x` `[B, ..]` at `from`.
    ///
    /// # Errors
    /// As [`velocity`](Self::velocity).
    pub fn jump(
        &self,
        x: &Tensor,
        from: &PostShift,
        to: &PostShift,
        cond: &Condition,
    ) -> Result<Tensor> {
        let velocity = self.velocity(x, from, to, cond)?;
        let length = per_sample(&widen_like(&to.tensor().f_sub(from.tensor())?, x)?, x)?;
        Ok(widen(x)?.f_sub(&velocity.f_mul(&length)?)?)
    }

    /// The flow map at r = 1 as a student of an [`Objective`](crate::Objective): a predictor of the clean
    /// sample at the end of the ODE. Hierarchical Distillation (arXiv 2511.08930) goes on from there with
    /// Distribution Matching.
    #[must_use]
    pub fn denoiser(&self) -> Denoiser<'a> {
        let network = Rc::clone(&self.network);
        let path = RectifiedFlow.shifted(self.shift);
        Denoiser::new(
            path,
            Prediction::FlowVelocity,
            move |x: &Tensor, t: &Tensor, cond: &Condition| network(x, t, &t.f_ones_like()?, cond),
        )
    }

    /// Samples `[B, ..]` from unit noise of that shape, by jumps from each time of the grid to the next and
    /// from the last to the data, without a graph.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] if `noise` is not a batch of samples; [`Error::OutOfRange`] if the
    /// shift moves the last time of the grid to 1 as float32; as [`velocity`](Self::velocity).
    pub fn sample(&self, noise: &Tensor, cond: &Condition, grid: &FewStepGrid) -> Result<Tensor> {
        check_samples("noise", noise, 2)?;
        let _no_grad = no_grad_guard();
        let shift = grid.shift(self.shift)?;
        let options = (compute_kind(noise.f_kind()?), noise.device());
        let time = |time: f64| PostShift::all(time, batch_size(noise), options);
        let times: Vec<f64> = grid.times().iter().map(|&time| shift.of(time)).collect();
        let ends = times.iter().skip(1).copied().chain([1.0]);
        let mut x = widen(noise)?;
        for (from, to) in times.iter().copied().zip(ends) {
            x = self.jump(&x, &time(from)?, &time(to)?, cond)?;
        }
        Ok(x)
    }
}

fn check_input(x: &Tensor, from: &PostShift, to: &PostShift) -> Result<()> {
    check_samples("x", x, 1)?;
    check_per_sample("time to jump from", from.tensor(), x)?;
    check_per_sample("time to jump to", to.tensor(), x)
}

/// Whether two times are in order, on the device and read from it once.
fn check_order(from: &PostShift, to: &PostShift) -> Result<()> {
    let least = to.tensor().f_sub(from.tensor())?.f_min()?.f_to_kind(Kind::Double)?;
    let least = least.f_to_device(Device::Cpu)?.f_double_value(&[])?;
    let requirement = "at least 0: jumps lead toward the data";
    checked("length of a jump", requirement, least, least >= 0.0)?;
    Ok(())
}

impl std::fmt::Debug for FlowMap<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FlowMap")
            .field("shift", &self.shift)
            .field("tangent", &self.tangent.is_some())
            .finish_non_exhaustive()
    }
}
