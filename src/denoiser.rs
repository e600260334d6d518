//! Denoisers: networks as predictors of clean samples, the boundary between a user's model and the terms.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Reduction, Tensor};

use crate::batch::{Batch, Condition};
use crate::checks::{check_like, check_samples, check_times};
use crate::error::{Error, NETWORK, Result};
use crate::guidance::Guidance;
use crate::network::IntoOutput;
use crate::numeric::{finite_where_masked, masked, mean, widen, widen_like};
use crate::output::ModelOutput;
use crate::path::{Coefficients, NoisePath, Subinterval};
use crate::prediction::Prediction;
use crate::time::PostShift;

type Network<'a> = dyn Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor> + 'a;
type TangentNetwork<'a> =
    dyn Fn(&Tensor, &Tensor, &Condition, &Tensor, &Tensor) -> Result<(Tensor, Tensor)> + 'a;
type PairedNetwork<'a> =
    dyn Fn(&Tensor, &Tensor, &Condition, &Condition) -> Result<(Tensor, Tensor)> + 'a;

/// A network with its noise path and its prediction type. Every term asks it for clean samples.
///
/// The network is a closure of the noised sample `[B, ..]`, the time `[B]` on the crate's clock (0 noise, 1 data) and
/// the condition. Where frames have times of their own, the closure is handed those as they are, `[B, F]` or
/// `[B, 1, F]` ([`PostShift`]); no term makes such times unless it was asked to. A model with another clock or sign is
/// adapted in its closure and nowhere else. Of diffusers' flow models, FLUX and Qwen-Image are fed `1 - t`, SD3 and
/// Wan `1000 * (1 - t)`, and Z-Image `t`, with its output negated.
///
/// Terms and samplers hand the closure x and t in float32, or float64 where the samples have it, also
/// when the samples are bfloat16: a network of another type casts inside. Clocks of a path, such as
/// [`Edm::sigma`](crate::Edm::sigma), are float64 and cast there too. The output may be of any
/// floating-point type: it is converted to float32, or to float64 where the sample is.
///
/// ```
/// # use decoupled_dmd::{Condition, Denoiser, Prediction, RectifiedFlow};
/// # use tch::Tensor;
/// # struct Net; impl Net { fn forward(&self, x: &Tensor, sigma: &Tensor, _: &Tensor) -> Tensor { x * sigma } }
/// # let net = Net;
/// let teacher = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, |x, t, cond: &Condition| {
///     net.forward(x, &(1.0 - t), &cond[0])
/// });
/// ```
///
/// The closure may borrow the network, so a denoiser stays on the thread that trains: `tch` tensors
/// are not `Sync`. Clones share the path and the closures, so that one network, wrapped once, is sampled
/// from and distilled.
#[derive(Clone)]
pub struct Denoiser<'a> {
    /// One number for all clones.
    id: u64,
    /// Who it is where its closure fails.
    role: &'static str,
    path: Rc<dyn NoisePath + 'a>,
    prediction: Prediction,
    network: Rc<Network<'a>>,
    paired: Option<Rc<PairedNetwork<'a>>>,
    tangent: Option<Rc<TangentNetwork<'a>>>,
}

/// The teacher that a term was found to fit, so that it is checked once for each and not at every evaluation.
#[derive(Debug, Default)]
pub(crate) struct FitsTeacher(Cell<Option<u64>>);

impl FitsTeacher {
    /// Runs `check` unless `teacher` is the one that passed it last.
    pub(crate) fn check(
        &self,
        teacher: &Denoiser<'_>,
        check: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        if self.0.get() != Some(teacher.id) {
            check()?;
            self.0.set(Some(teacher.id));
        }
        Ok(())
    }
}

impl<'a> Denoiser<'a> {
    /// Wraps a network that outputs `prediction` on `path`.
    pub fn new<O: IntoOutput<Tensor>>(
        path: impl NoisePath + 'a,
        prediction: Prediction,
        network: impl Fn(&Tensor, &Tensor, &Condition) -> O + 'a,
    ) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            role: NETWORK,
            path: Rc::new(path),
            prediction,
            network: Rc::new(move |x, t, cond| network(x, t, cond).into_result()),
            paired: None,
            tangent: None,
        }
    }

    /// Adds a closure that evaluates two conditions in one batched forward. It gets the noised sample, the
    /// time and both conditions, and returns both outputs in that order.
    #[must_use]
    pub fn paired<O: IntoOutput<(Tensor, Tensor)>>(
        mut self,
        network: impl Fn(&Tensor, &Tensor, &Condition, &Condition) -> O + 'a,
    ) -> Self {
        self.paired = Some(Rc::new(move |x, t, one, two| network(x, t, one, two).into_result()));
        self
    }

    /// Adds a closure for the derivative of the network along a line in (x, t), its Jacobian-vector product.
    /// The closure gets the noised sample `[B, ..]`, the time `[B]`, the condition, and the directions of
    /// both, shaped like them; it returns the output and its derivative, `[B, ..]` each.
    /// [`Consistency`](crate::Consistency) asks for it with [`Tangent::Exact`](crate::Tangent::Exact).
    ///
    /// | way to the derivative | cost beside the output | memory |
    /// |---|---|---|
    /// | forward mode, in an open dual level of libtorch | about 2 forwards | twice that of a forward |
    /// | the network's own product, written beside each layer | about 1 forward | twice that of a forward |
    /// | reverse mode twice: `<y, u>` by x, and that by u | 2 backwards, with gradients on | the graph of a backward |
    ///
    /// The example `exact_tangent` has all three. The fused kernels of scaled-dot-product attention have
    /// neither a forward derivative nor a second one: the closure takes the math kernel
    /// (`internal_scaled_dot_product_attention_math`, whose mask is to be a float), or the engine takes
    /// differences.
    #[must_use]
    pub fn tangent<O: IntoOutput<(Tensor, Tensor)>>(
        mut self,
        network: impl Fn(&Tensor, &Tensor, &Condition, &Tensor, &Tensor) -> O + 'a,
    ) -> Self {
        self.tangent = Some(Rc::new(move |x, t, cond, along_x, along_t| {
            network(x, t, cond, along_x, along_t).into_result()
        }));
        self
    }

    /// This network as a predictor of the noisy samples at the end of a part of its path, in the type
    /// [`Prediction::Sample`]: the expectation of x_end given x_t, by its expectation of x0. A teacher and a
    /// fake score of [`Subinterval`]s are made so, and a loss of the fake score reaches the network through
    /// the conversion.
    ///
    /// The network is handed the times of its own path. Where the end has no noise the two expectations are
    /// one. An exact [`tangent`](Self::tangent) is not carried over.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] as [`Subinterval::new`]; from the network if its prediction is singular at an end
    /// of the subinterval, whatever the time.
    pub fn on_subinterval(self, end: f64) -> Result<Self> {
        let path = Rc::new(Subinterval::new(Rc::clone(&self.path), end)?);
        let on = Rc::clone(&path);
        let base_time = move |time: &Tensor| -> Result<_> {
            let time = PostShift::within(time.shallow_clone(), (0.0, 1.0));
            Ok((on.base_time(&time)?, on.weights_of_end(&time)?))
        };
        let at_end = |sample: Tensor, noised: &Tensor, weights: Option<&Coefficients>| {
            let Some(weights) = weights else { return Ok(sample) };
            let weights = weights.like(&sample)?;
            Result::Ok(sample.f_mul(&weights.data)?.f_addcmul(&widen(noised)?, &weights.noise)?)
        };
        let (base, times) = (self.clone(), base_time.clone());
        let network = move |noised: &Tensor, time: &Tensor, cond: &Condition| -> Result<Tensor> {
            let (time, weights) = times(time)?;
            at_end(base.denoise(noised, &time, cond)?, noised, weights.as_ref())
        };
        let wrapped = Self::new(path, Prediction::Sample, network);
        if self.paired.is_none() {
            return Ok(wrapped);
        }
        let both = move |noised: &Tensor,
                         time: &Tensor,
                         one: &Condition,
                         two: &Condition|
              -> Result<(Tensor, Tensor)> {
            let (time, weights) = base_time(time)?;
            let (one, two) = self.denoise_pair(noised, &time, one, two)?;
            let to_end = |sample| at_end(sample, noised, weights.as_ref());
            Ok((to_end(one)?, to_end(two)?))
        };
        Ok(wrapped.paired(both))
    }

    /// The same network, of which errors say that it is the teacher, say.
    pub(crate) fn in_role(&self, role: &'static str) -> Self {
        Self { role, ..self.clone() }
    }

    /// The noise path of the network.
    pub fn path(&self) -> &(dyn NoisePath + 'a) {
        &*self.path
    }

    /// The quantity that the network outputs.
    pub fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// x0-hat: the clean sample that the network predicts, `[B, ..]` in float32, or in float64 where
    /// `noised` is. The network is handed `noised` and `time` in the types that they have, but no time
    /// in float64 with a sample that is not.
    ///
    /// # Errors
    /// [`Error::Network`] from the closure; [`Error::Shape`], [`Error::Kind`] or [`Error::Device`]
    /// unless `noised` are floating-point samples with a time each, or one a frame, and the output is like them;
    /// [`Error::OutOfRange`] if times may be at a singular end of the [`Prediction`].
    pub fn denoise(&self, noised: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        self.predict(noised, time, cond)?.into_sample()
    }

    /// x0-hat for two conditions, in one forward where [`paired`](Self::paired) was given.
    ///
    /// # Errors
    /// As [`denoise`](Self::denoise).
    pub fn denoise_pair(
        &self,
        noised: &Tensor,
        time: &PostShift,
        one: &Condition,
        two: &Condition,
    ) -> Result<(Tensor, Tensor)> {
        let (one, two) = self.predict_pair(noised, time, one, two)?;
        Ok((one.into_sample()?, two.into_sample()?))
    }

    /// The network's raw output at `noised` `[B, ..]`; [`denoise`](Self::denoise) converts it to a clean
    /// sample.
    ///
    /// # Errors
    /// As [`denoise`](Self::denoise).
    pub fn predict(
        &self,
        noised: &Tensor,
        time: &PostShift,
        cond: &Condition,
    ) -> Result<ModelOutput> {
        self.check_input(noised, time)?;
        let output = self.run(noised, time, cond)?;
        self.checked(noised, time, &output)
    }

    /// What the closure returns.
    fn run(&self, noised: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        let output = (self.network)(noised, &time.for_network(noised)?, cond);
        output.map_err(|error| error.of(self.role))
    }

    /// The network's raw outputs for two conditions, in one forward where [`paired`](Self::paired) was given.
    ///
    /// # Errors
    /// As [`denoise`](Self::denoise).
    pub fn predict_pair(
        &self,
        noised: &Tensor,
        time: &PostShift,
        one: &Condition,
        two: &Condition,
    ) -> Result<(ModelOutput, ModelOutput)> {
        let Some(paired) = &self.paired else {
            return Ok((self.predict(noised, time, one)?, self.predict(noised, time, two)?));
        };
        self.check_input(noised, time)?;
        let both = paired(noised, &time.for_network(noised)?, one, two);
        let (one, two) = both.map_err(|error| error.of(self.role))?;
        Ok((self.checked(noised, time, &one)?, self.checked(noised, time, &two)?))
    }

    /// The network's guided output at `noised` `[B, ..]` for the conditions of `batch`; the null branch is
    /// asked only where `guidance` acts at one of the times.
    ///
    /// # Errors
    /// [`Error::Missing`] if the guidance acts and the batch has no null condition; as
    /// [`denoise`](Self::denoise).
    pub fn predict_guided(
        &self,
        noised: &Tensor,
        time: &PostShift,
        batch: &Batch<'_>,
        guidance: Guidance,
    ) -> Result<ModelOutput> {
        if !guidance.acts_within(time.range()) {
            return self.predict(noised, time, batch.cond());
        }
        let (cond, null) = self.predict_pair(noised, time, batch.cond(), batch.null()?)?;
        cond.guided(&null, guidance)
    }

    /// The network's output `[B, ..]` and its derivative while the noised sample moves by `velocity`
    /// `[B, ..]` in a unit of time, by the closure of [`tangent`](Self::tangent).
    ///
    /// # Errors
    /// [`Error::NoTangent`](crate::Error::NoTangent) without that closure; as [`denoise`](Self::denoise), for
    /// `velocity` and the derivative too.
    pub fn predict_along(
        &self,
        noised: &Tensor,
        time: &PostShift,
        cond: &Condition,
        velocity: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        let network = self.tangent.as_ref().ok_or(Error::NoTangent)?;
        self.check_input(noised, time)?;
        check_like("velocity", velocity, noised)?;
        let times = time.for_network(noised)?;
        let both = network(noised, &times, cond, velocity, &times.f_ones_like()?);
        let (output, tangent) = both.map_err(|error| error.of(self.role))?;
        check_like("network output", &output, noised)?;
        check_like("derivative of the network output", &tangent, noised)?;
        Ok((output, tangent))
    }

    /// The denoising loss that trains this network on samples `x`, a scalar:
    ///
    /// ```text
    /// mean (target(x, eps) - output(x_t))^2,    x_t = a x + s eps
    /// ```
    /// in the network's own prediction type, over all elements. `x` `[B, ..]` is detached, `noise`
    /// has its shape and `time` holds B times, or one for each frame; the gradient flows into the network alone.
    ///
    /// # Errors
    /// As [`denoise`](Self::denoise), for `noise` and `time` too.
    pub fn denoising_loss(
        &self,
        x: &Tensor,
        time: &PostShift,
        noise: &Tensor,
        cond: &Condition,
    ) -> Result<Tensor> {
        mean(&self.denoising_error(x, time, noise, cond, None)?)
    }

    /// The squares `[B, ..]` whose mean is [`denoising_loss`](Self::denoising_loss), zero where `mask`, a
    /// boolean shaped like x as [`Batch::mask`](crate::Batch::mask) gives it, is false. A masked value that
    /// is not finite is set to zero before it enters the network: the gradient of a layer's weight
    /// multiplies its input, and zero times NaN is NaN.
    ///
    /// # Errors
    /// As [`denoising_loss`](Self::denoising_loss).
    pub fn denoising_error(
        &self,
        x: &Tensor,
        time: &PostShift,
        noise: &Tensor,
        cond: &Condition,
        mask: Option<&Tensor>,
    ) -> Result<Tensor> {
        check_samples("x", x, 1)?;
        check_times("time", time.tensor(), x)?;
        check_like("noise", noise, x)?;
        self.prediction.check_target(&*self.path, time)?;
        let x = finite_where_masked(&x.f_detach()?, mask)?;
        let noised = self.path.renoise(&x, time, noise)?;
        let coefficients = self.path.coefficients(time)?.like(&x)?;
        let target = self.prediction.target(&coefficients, &widen(&x)?, &widen_like(noise, &x)?)?;
        let output = self.run(&noised, time, cond)?;
        check_like("network output", &output, &noised)?;
        let output = widen_like(&output, &x)?;
        Ok(match mask {
            Some(_) => masked(&output.f_sub(&target)?, mask)?.f_square()?,
            None => output.f_mse_loss(&target, Reduction::None)?,
        })
    }

    /// This network with the sign of its output turned.
    #[cfg(feature = "testing")]
    pub(crate) fn turned(&self) -> Denoiser<'a> {
        let network = Rc::clone(&self.network);
        let turned = move |x: &Tensor, t: &Tensor, cond: &Condition| -> Result<Tensor> {
            Ok(network(x, t, cond)?.f_neg()?)
        };
        Denoiser::new(Rc::clone(&self.path), self.prediction, turned)
    }

    fn check_input(&self, noised: &Tensor, time: &PostShift) -> Result<()> {
        check_samples("noised sample", noised, 1)?;
        check_times("time", time.tensor(), noised)?;
        self.prediction.check_sample(&*self.path, time)
    }

    fn checked(&self, noised: &Tensor, time: &PostShift, output: &Tensor) -> Result<ModelOutput> {
        check_like("network output", output, noised)?;
        ModelOutput::new(self.prediction, &*self.path, time, noised, widen_like(output, noised)?)
    }
}

impl std::fmt::Debug for Denoiser<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Denoiser")
            .field("prediction", &self.prediction)
            .field("paired", &self.paired.is_some())
            .finish_non_exhaustive()
    }
}
