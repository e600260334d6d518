//! Losses that train a flow map from a teacher.

use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::batch::Batch;
use crate::checks::{check_like, check_per_sample};
use crate::denoiser::Denoiser;
use crate::engine::Tangent;
use crate::error::Result;
use crate::flow_map::{FlowMap, check_order};
use crate::guidance::Guidance;
use crate::numeric::{masked, noise_like, per_sample, sample_mean, slope, widen, widen_like};
use crate::renoising::{LogitNormal, TimeDistribution, unit_uniform};
use crate::time::{PostShift, PreShift};
use crate::value::{Positive, checked};

/// The target of the average velocity u(x; t -> r), with the teacher's velocity v in the sign of u.
///
/// | rule | target | what it is |
/// |---|---|---|
/// | [`Fraction`](Self::Fraction) | share v + (1 - share) u(x_l; l -> r), l = t + share (r - t) | AlphaFlow; share 1/2 averages two halves, as Shortcut does; at r = 1 a discrete consistency model |
/// | [`Eulerian`](Self::Eulerian) | v + (r - t) du/dt along the teacher's ODE | MeanFlow |
/// | [`Lagrangian`](Self::Lagrangian) | v(M, r) - (r - t) du/dr, the teacher asked at the student's own jump M | FreeFlow and TVM by second-hand descriptions, not their papers |
///
/// All targets are without a graph. The fraction's target goes to MeanFlow's as the share goes to 0.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum FlowRule {
    /// A teacher's step over a share of the jump, and the student's own jump for the rest.
    Fraction {
        /// The share, in (0, 1].
        share: f64,
    },
    /// MeanFlow's identity, by a derivative along the teacher's ODE.
    Eulerian(Tangent),
    /// The end of the jump follows the teacher's ODE, by a central difference in r.
    Lagrangian {
        /// The step of the difference, in (0, 1].
        step: f64,
    },
}

/// MeanFlow distillation: trains a [`FlowMap`] on a teacher's velocity.
///
/// ```text
/// loss = mean_i w_i m_i,    m_i = mean (u(x_t; t -> r) - sg target)^2,    w_i = sg 1 / (m_i + c)^p
/// ```
/// Geng et al., arXiv 2505.13447, with the guided teacher's velocity in place of the conditional one of
/// the data, as FastGen distils; [`FlowRule`] has its relatives. The samples of the batch are data, or
/// samples of the teacher.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | [`rule`](Self::rule) | the target | Eulerian by central differences of 1e-3; ours |
/// | [`guided`](Self::guided) | guidance of the teacher, baked in | neutral |
/// | [`adaptive`](Self::adaptive) | p and c | p = 0, a plain mean; MeanFlow has p = 1 |
/// | [`times`](Self::times) | where t and r are drawn: two draws in order | `LogitNormal::new(0.4, 1.0)`, MeanFlow's |
/// | [`instantaneous`](Self::instantaneous) | share of samples with r = t | 0; MeanFlow without a teacher has 0.75 |
/// | [`from_noise`](Self::from_noise) | t = 0 for all samples: no data are looked at | off |
///
/// **The adaptive weight.** With p = 1 the weighted loss is about 1 whatever the error, and its gradient
/// *falls* as the error grows: log [`MeanFlowEvaluation::squares`]. p = 1/2 normalises the error.
///
/// # Shapes
/// Samples `[B, ..]` of the batch to a scalar in float32 or wider with a graph to the network.
///
/// # Forwards
/// Flow map with a graph: 1. Teacher: 1, with guidance 2, or one paired. Flow map without a graph: 1
/// (fraction, [`Tangent::Ahead`]), 2 ([`Tangent::Central`], Lagrangian), or one call of the tangent
/// closure.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, its adaptive weight included.
///
/// # Errors
/// [`Error::OutOfRange`](crate::Error::OutOfRange) if the teacher is on a path that is not straight, its
/// shift is not the flow map's, or a jump leads away from the data;
/// [`Error::Missing`](crate::Error::Missing) without the null condition under
/// guidance; [`Error::NoTangent`](crate::Error::NoTangent) for [`Tangent::Exact`] without [`FlowMap::tangent`]; whatever the
/// networks return.
///
/// # Example
/// ```
/// use decoupled_dmd::{Batch, Condition, Denoiser, FlowMap, MeanFlow, Prediction, RectifiedFlow};
/// # use tch::{Device, Kind, Tensor};
/// # let weight = Tensor::from(0.3f32).set_requires_grad(true);
/// # let network = |x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| x * &weight;
/// # let teacher_net = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
/// # let (images, cond) = (Tensor::randn([4, 3], (Kind::Float, Device::Cpu)), Condition::none());
/// let map = FlowMap::new(network);
/// let teacher = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, teacher_net);
/// let mean_flow = MeanFlow::new(map.clone(), teacher)?.adaptive(1.0, 1e-3)?;
/// mean_flow.evaluate(&Batch::new(&images, &cond)?)?.loss.backward();
/// # assert!(weight.grad().defined());
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct MeanFlow<'a> {
    map: FlowMap<'a>,
    teacher: Denoiser<'a>,
    rule: FlowRule,
    guidance: Guidance,
    power: f64,
    constant: Positive,
    times: Distribution<'a>,
    instantaneous: f64,
    from_noise: bool,
}

struct Distribution<'a>(Box<dyn TimeDistribution + 'a>);

impl std::fmt::Debug for Distribution<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("..")
    }
}

/// The value of a [`MeanFlow`] loss.
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "a loss does nothing until it is propagated"]
pub struct MeanFlowEvaluation {
    /// The weighted loss, a scalar with a graph to the flow map.
    pub loss: Tensor,
    /// m of each sample, `[B]`, without a graph: the number that training lowers.
    pub squares: Tensor,
}

impl<'a> MeanFlow<'a> {
    /// Trains `map` on `teacher`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if the teacher's path is not straight, or its shift is not the flow map's.
    pub fn new(map: FlowMap<'a>, teacher: Denoiser<'a>) -> Result<Self> {
        let path = teacher.path();
        let is_straight = f64::from(u8::from(path.is_straight()));
        let requirement = "1: straight, as rectified flow";
        checked(
            "straightness of the teacher's path",
            requirement,
            is_straight,
            path.is_straight(),
        )?;
        let (found, expected) = (path.shift().get(), map.shift().get());
        let same = (found - expected).abs() <= 1e-6 * expected;
        checked("shift of the teacher's path", "the shift of the flow map", found, same)?;
        Ok(Self {
            map,
            teacher: teacher.in_role("teacher"),
            rule: FlowRule::Eulerian(Tangent::Central { step: 1e-3 }),
            guidance: Guidance::NEUTRAL,
            power: 0.0,
            constant: Positive::ONE,
            times: Distribution(Box::new(LogitNormal::MEAN_FLOW)),
            instantaneous: 0.0,
            from_noise: false,
        })
    }

    /// Sets the rule of the target.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless a share or step is in (0, 1].
    pub fn rule(mut self, rule: FlowRule) -> Result<Self> {
        let number = match rule {
            FlowRule::Fraction { share } => Some(("share of the jump", share)),
            FlowRule::Eulerian(tangent) => tangent.step().map(|step| ("step of the tangent", step)),
            FlowRule::Lagrangian { step } => Some(("step in the end of the jump", step)),
        };
        if let Some((what, number)) = number {
            checked(what, "in (0, 1]", number, number > 0.0 && number <= 1.0)?;
        }
        self.rule = rule;
        Ok(self)
    }

    /// Guides the teacher, and so bakes the guidance in.
    #[must_use]
    pub fn guided(mut self, guidance: Guidance) -> Self {
        self.guidance = guidance;
        self
    }

    /// Weighs each sample by `(m + constant)^-power`. m is a mean over elements; where a codebase sums
    /// them, divide its constant by their number.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `power` is in [0, 2] and `constant` finite and positive.
    pub fn adaptive(mut self, power: f64, constant: f64) -> Result<Self> {
        let valid = (0.0..=2.0).contains(&power);
        self.power = checked("power of the adaptive weight", "in [0, 2]", power, valid)?;
        self.constant = Positive::new("constant of the adaptive weight", constant)?;
        Ok(self)
    }

    /// Sets where both times are drawn, before the shift.
    #[must_use]
    pub fn times(mut self, distribution: impl TimeDistribution + 'a) -> Self {
        self.times = Distribution(Box::new(distribution));
        self
    }

    /// Sets the share of samples with r = t, which regress the teacher's own velocity.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless in [0, 1].
    pub fn instantaneous(mut self, share: f64) -> Result<Self> {
        let valid = (0.0..=1.0).contains(&share);
        self.instantaneous = checked("share of samples with r = t", "in [0, 1]", share, valid)?;
        Ok(self)
    }

    /// Starts all jumps from pure noise: the samples of the batch give shape and condition alone. Sample
    /// such a map in one step.
    #[must_use]
    pub fn from_noise(mut self) -> Self {
        self.from_noise = true;
        self
    }

    /// Draws t and r, `[B]` each after the shift, with libtorch's global generator.
    fn draw(&self, batch: &Batch<'_>) -> Result<(PostShift, PostShift)> {
        let x = batch.x();
        let draw = || self.times.0.times(&unit_uniform(x)?, batch.student_time());
        let (one, two) = (draw()?, draw()?);
        let (least, most) = (one.range().0.min(two.range().0), one.range().1.max(two.range().1));
        let least = if self.from_noise { 0.0 } else { least };
        let within = |times: Tensor| PreShift::within(times, (least, most));
        let earlier = one.tensor().f_minimum(two.tensor())?;
        let from = if self.from_noise { earlier.f_zeros_like()? } else { earlier };
        let mut to = one.tensor().f_maximum(two.tensor())?;
        if self.instantaneous > 0.0 {
            let same = unit_uniform(x)?.below(self.instantaneous)?;
            to = from.f_where_self(&same, &to)?;
        }
        let from = if self.from_noise { PreShift::within(from, (0.0, 0.0)) } else { within(from) };
        let shift = self.map.shift();
        Ok((shift.apply(&from)?, shift.apply(&within(to))?))
    }

    /// The loss on a batch, with fresh times and noise.
    ///
    /// # Errors
    /// As those of this type.
    pub fn evaluate(&self, batch: &Batch<'_>) -> Result<MeanFlowEvaluation> {
        let (from, to) = self.draw(batch)?;
        self.evaluate_with(batch, &noise_like(batch.x())?, &from, &to)
    }

    /// The loss on a batch for given noise `[B, ..]` and times `from` and `to`, `[B]` each, none of `to`
    /// before its `from`. One number is read from the device.
    ///
    /// # Errors
    /// As those of this type; [`Error::Shape`](crate::Error::Shape) and the like unless noise and times fit the samples.
    pub fn evaluate_at(
        &self,
        batch: &Batch<'_>,
        noise: &Tensor,
        from: &PostShift,
        to: &PostShift,
    ) -> Result<MeanFlowEvaluation> {
        check_like("noise", noise, batch.x())?;
        check_per_sample("time to jump from", from.tensor(), batch.x())?;
        check_per_sample("time to jump to", to.tensor(), batch.x())?;
        check_order(from, to)?;
        self.evaluate_with(batch, noise, from, to)
    }

    fn evaluate_with(
        &self,
        batch: &Batch<'_>,
        noise: &Tensor,
        from: &PostShift,
        to: &PostShift,
    ) -> Result<MeanFlowEvaluation> {
        batch.check_none_given()?;
        let x = batch.as_data()?;
        let input = self.teacher.path().renoise(&x, from, noise)?;
        let velocity = self.map.velocity(&input, from, to, batch.cond())?;
        let target = {
            let _no_grad = no_grad_guard();
            self.target(batch, &input, &velocity.f_detach()?, from, to)?
        };
        let error = masked(&velocity.f_sub(&target.f_detach()?)?, batch.mask())?.f_square()?;
        let squares = sample_mean(&error)?;
        let raw = squares.f_detach()?;
        let weighted = if self.power > 0.0 {
            let weight = raw.plus(self.constant.get())?.power(-self.power)?;
            squares.f_mul(&weight)?
        } else {
            squares
        };
        Ok(MeanFlowEvaluation { loss: weighted.f_mean(None::<Kind>)?, squares: raw })
    }

    /// The target of u, `[B, ..]`, where `own` is u itself.
    fn target(
        &self,
        batch: &Batch<'_>,
        x: &Tensor,
        own: &Tensor,
        from: &PostShift,
        to: &PostShift,
    ) -> Result<Tensor> {
        let (cond, length) = (batch.cond(), length_of(from, to, x)?);
        let u = |x: &Tensor, from: &PostShift, to: &PostShift| self.map.velocity(x, from, to, cond);
        match self.rule {
            FlowRule::Fraction { share } => {
                let v = self.velocity(batch, x, from)?;
                let middle = from.between(to, share)?;
                let point = x.f_sub(&v.f_mul(&length.times(share)?)?)?;
                let rest = u(&point, &middle, to)?;
                Ok(rest.toward(&v, share)?)
            }
            FlowRule::Eulerian(tangent) => {
                let v = self.velocity(batch, x, from)?;
                let slope = match tangent {
                    Tangent::Exact => self.map.velocity_along(x, (from, to), cond, &v.f_neg()?)?.1,
                    Tangent::Ahead { step } | Tangent::Central { step } => {
                        // No further than the end of the jump, and no further back than pure noise.
                        let later = from.moved(step)?.at_most(to)?;
                        let earlier = match tangent {
                            Tangent::Central { .. } => from.moved(-step)?,
                            _ => from.shallow_clone(),
                        };
                        let along = |at: &PostShift| -> Result<Tensor> {
                            Ok(x.f_sub(&v.f_mul(&length_of(from, at, x)?)?)?)
                        };
                        let ahead = u(&along(&later)?, &later, to)?;
                        let behind = match tangent {
                            Tangent::Central { .. } => u(&along(&earlier)?, &earlier, to)?,
                            _ => own.shallow_clone(),
                        };
                        slope(&ahead.f_sub(&behind)?, &time_between(&earlier, &later)?)?
                    }
                };
                Ok(v.f_add(&slope.f_mul(&length)?)?)
            }
            FlowRule::Lagrangian { step } => {
                let end = x.f_sub(&own.f_mul(&length)?)?;
                let v = self.velocity(batch, &end, to)?;
                let (later, earlier) = (to.moved(step)?, to.moved(-step)?.at_least(from)?);
                let difference = u(x, from, &later)?.f_sub(&u(x, from, &earlier)?)?;
                Ok(v.f_sub(&slope(&difference, &time_between(&earlier, &later)?)?.f_mul(&length)?)?)
            }
        }
    }

    /// The guided teacher's flow velocity, `[B, ..]`.
    fn velocity(&self, batch: &Batch<'_>, x: &Tensor, time: &PostShift) -> Result<Tensor> {
        self.teacher.prediction().check_velocity(self.teacher.path(), time)?;
        self.teacher.predict_guided(x, time, batch, self.guidance)?.flow_velocity()
    }
}

/// The time from one to another, `[B]`.
fn time_between(from: &PostShift, to: &PostShift) -> Result<Tensor> {
    Ok(widen(to.tensor())?.f_sub(from.tensor())?)
}

/// The time from one to another, as a factor of `like`.
fn length_of(from: &PostShift, to: &PostShift, like: &Tensor) -> Result<Tensor> {
    per_sample(&widen_like(&time_between(from, to)?, like)?, like)
}
