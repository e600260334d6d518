//! A network as a predictor of clean samples: the boundary between the user's model and the terms.

use tch::{Reduction, Tensor};

use crate::answer::Answer;
use crate::numeric::{
    check_like, check_per_sample, check_samples, finite_where_masked, masked, mean, widen,
    widen_like,
};
use crate::{Condition, Error, Path, PostShift, Prediction, Result};

type Network<'a> = dyn Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor> + 'a;
type PairedNetwork<'a> =
    dyn Fn(&Tensor, &Tensor, &Condition, &Condition) -> Result<(Tensor, Tensor)> + 'a;

/// What a network closure may return: a value, or a `Result` with any error.
pub trait NetworkOutput<T> {
    /// The value, the error boxed as [`Error::Network`].
    ///
    /// # Errors
    /// The closure's own error.
    fn into_result(self) -> Result<T>;
}

impl NetworkOutput<Tensor> for Tensor {
    fn into_result(self) -> Result<Tensor> {
        Ok(self)
    }
}

impl NetworkOutput<(Tensor, Tensor)> for (Tensor, Tensor) {
    fn into_result(self) -> Result<(Tensor, Tensor)> {
        Ok(self)
    }
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> NetworkOutput<T> for Result<T, E> {
    fn into_result(self) -> Result<T> {
        self.map_err(|error| Error::Network(error.into()))
    }
}

/// A network, the path it lives on and what it predicts; every term speaks to it in clean samples.
///
/// The network is a closure of the noised sample `[B, ..]`, the time `[B]` on the crate's clock
/// (0 noise, 1 data) and the condition. What a model does differently is undone in its closure and
/// nowhere else. Of diffusers' flow models, FLUX and Qwen-Image are fed `1 - t`, SD3 and Wan
/// `1000 * (1 - t)`, and Z-Image `t`, with its output negated.
///
/// Terms and samplers hand the closure x and t in float32, or float64 where the samples have it, also
/// when these are bfloat16: a network of another type casts inside. Clocks of a path, such as
/// [`Edm::sigma`](crate::Edm::sigma), are float64 and cast there too. The answer may be of any
/// floating-point type; it is computed with in that of the sample.
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
/// are not `Sync`.
pub struct Denoiser<'a> {
    path: Box<dyn Path + 'a>,
    prediction: Prediction,
    network: Box<Network<'a>>,
    paired: Option<Box<PairedNetwork<'a>>>,
}

impl<'a> Denoiser<'a> {
    /// Wraps a network that outputs `prediction` on `path`.
    pub fn new<O: NetworkOutput<Tensor>>(
        path: impl Path + 'a,
        prediction: Prediction,
        network: impl Fn(&Tensor, &Tensor, &Condition) -> O + 'a,
    ) -> Self {
        Self {
            path: Box::new(path),
            prediction,
            network: Box::new(move |x, t, cond| network(x, t, cond).into_result()),
            paired: None,
        }
    }

    /// Adds a closure that answers for two conditions in one batched forward; it gets the noised
    /// sample, the time, both conditions, and returns both outputs in that order.
    #[must_use]
    pub fn paired<O: NetworkOutput<(Tensor, Tensor)>>(
        mut self,
        network: impl Fn(&Tensor, &Tensor, &Condition, &Condition) -> O + 'a,
    ) -> Self {
        self.paired = Some(Box::new(move |x, t, one, two| network(x, t, one, two).into_result()));
        self
    }

    /// The path on which the network lives.
    pub fn path(&self) -> &dyn Path {
        &*self.path
    }

    /// What the network predicts.
    pub(crate) fn prediction(&self) -> Prediction {
        self.prediction
    }

    /// x0-hat: the clean sample that the network predicts, `[B, ..]` in float32, or in float64 where
    /// `noised` is. The network is handed `noised` and `time` in the types that they have, but no time
    /// in float64 with a sample that is not.
    ///
    /// # Errors
    /// [`Error::Network`] from the closure; [`Error::Shape`], [`Error::Kind`] or [`Error::Device`]
    /// unless `noised` are floating-point samples with a time each, and the output is like them;
    /// [`Error::OutOfRange`] if times may be at a singular end of the [`Prediction`].
    pub fn denoise(&self, noised: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        self.answer(noised, time, cond)?.into_sample()
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
        let (one, two) = self.answer_pair(noised, time, one, two)?;
        Ok((one.into_sample()?, two.into_sample()?))
    }

    /// What [`denoise`](Self::denoise) makes a clean sample of.
    pub(crate) fn answer(
        &self,
        noised: &Tensor,
        time: &PostShift,
        cond: &Condition,
    ) -> Result<Answer> {
        self.check_input(noised, time)?;
        let output = (self.network)(noised, &time.for_network(noised)?, cond)?;
        self.checked(noised, time, &output)
    }

    /// What [`denoise_pair`](Self::denoise_pair) makes clean samples of.
    pub(crate) fn answer_pair(
        &self,
        noised: &Tensor,
        time: &PostShift,
        one: &Condition,
        two: &Condition,
    ) -> Result<(Answer, Answer)> {
        let Some(paired) = &self.paired else {
            return Ok((self.answer(noised, time, one)?, self.answer(noised, time, two)?));
        };
        self.check_input(noised, time)?;
        let (one, two) = paired(noised, &time.for_network(noised)?, one, two)?;
        Ok((self.checked(noised, time, &one)?, self.checked(noised, time, &two)?))
    }

    /// The denoising loss that trains this network on samples `x`, a scalar:
    ///
    /// ```text
    /// mean (target(x, eps) - output(x_t))^2,    x_t = a x + s eps
    /// ```
    /// in the network's own prediction type, over all elements. `x` `[B, ..]` is detached, `noise`
    /// has its shape and `time` holds B times; the gradient flows into the network alone.
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

    /// The squares `[B, ..]` whose mean is [`denoising_loss`](Self::denoising_loss), zero where `kept`,
    /// a boolean shaped like x, is false. What is not finite there sends no gradient to the network.
    pub(crate) fn denoising_error(
        &self,
        x: &Tensor,
        time: &PostShift,
        noise: &Tensor,
        cond: &Condition,
        kept: Option<&Tensor>,
    ) -> Result<Tensor> {
        check_samples("x", x, 1)?;
        check_per_sample("time", time.tensor(), x)?;
        check_like("noise", noise, x)?;
        self.prediction.check_target(&*self.path, time)?;
        // Zero times NaN is NaN, also in the gradient of a network that was given one.
        let x = finite_where_masked(&x.f_detach()?, kept)?;
        let noised = self.path.renoise(&x, time, noise)?;
        let coefficients = self.path.coefficients(time)?.like(&x)?;
        let target = self.prediction.target(&coefficients, &widen(&x)?, &widen_like(noise, &x)?)?;
        let output = (self.network)(&noised, &time.for_network(&noised)?, cond)?;
        check_like("network output", &output, &noised)?;
        let output = widen_like(&output, &x)?;
        Ok(match kept {
            Some(_) => masked(&output.f_sub(&target)?, kept)?.f_square()?,
            None => output.f_mse_loss(&target, Reduction::None)?,
        })
    }

    fn check_input(&self, noised: &Tensor, time: &PostShift) -> Result<()> {
        check_samples("noised sample", noised, 1)?;
        check_per_sample("time", time.tensor(), noised)?;
        self.prediction.check_sample(&*self.path, time)
    }

    fn checked(&self, noised: &Tensor, time: &PostShift, output: &Tensor) -> Result<Answer> {
        check_like("network output", output, noised)?;
        let at = self.path.coefficients(time)?.like(noised)?;
        Answer::new(self.prediction, &*self.path, at, noised, widen_like(output, noised)?)
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
