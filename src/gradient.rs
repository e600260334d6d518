//! Losses whose gradient is given: the surrogate of a direction, and losses through networks that must not
//! learn from them.

use tch::{Device, Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_like, check_samples};
use crate::error::{Error, Result};
use crate::numeric::{row_squares, widen};

/// A loss whose gradient in x is exactly `-direction / numel`, a scalar:
///
/// ```text
/// value 0.5 mean (direction^2)  =  0.5 mean (x - sg(x + direction))^2
/// ```
/// the form of DMD2 and FastGen. Here x and its target are never subtracted from one another, so the
/// gradient has its full precision in bfloat16 too, where their difference would lose most bits of
/// a small direction. The value measures the gap and need not fall while training succeeds.
///
/// Terms use [`Probe::loss_of`](crate::Probe::loss_of), which minds the mask and the diagnostics too.
///
/// # Errors
/// [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] if `x` is not floating point or has no
/// elements or axes, or `direction` is not like it.
pub fn surrogate(x: &Tensor, direction: &Tensor) -> Result<Tensor> {
    check_samples("x", x, 1)?;
    check_like("direction", direction, x)?;
    let x = widen(x)?;
    let direction = direction.f_detach()?.f_to_kind(x.f_kind()?)?;
    let squares = row_squares(&direction)?.f_sum(None::<Kind>)?;
    let value = squares.times(0.5 / x.numel() as f64)?;
    // Only the gradient of the slope is used. A dot product makes no temporary.
    let slope = x.f_flatten(0, -1)?.f_dot(&direction.f_flatten(0, -1)?)?;
    let slope = slope.over(x.numel() as f64)?;
    // The bracket is exactly zero, so the value keeps all its bits.
    Ok(value.f_add(&slope.f_detach()?.f_sub(&slope)?)?)
}

/// The scalar `value`, with `gradient` as its gradient in `at` and no other gradient.
pub(crate) fn with_gradient(value: &Tensor, at: &Tensor, gradient: &Tensor) -> Result<Tensor> {
    let gradient = widen(&gradient.f_detach()?)?;
    // A dot product makes no temporary.
    let slope = widen(at)?.f_flatten(0, -1)?.f_dot(&gradient.f_flatten(0, -1)?)?;
    // The bracket is exactly zero, so the value keeps all its bits.
    Ok(value.f_detach()?.f_add(&slope.f_sub(&slope.f_detach()?)?)?)
}

/// The scalar `loss(x)` with its gradient in `x` and in nothing else.
///
/// The loss of a regularizer often runs through a network that must not learn from it: a critic, a
/// classifier, features. Propagated as usual, it would leave gradients in the parameters of that
/// network, and the network's own next step would add them up. This function takes the gradient at
/// once, on a copy of `x` without a past, and returns a scalar with that value and that gradient; so
/// there is no second derivative in `x`.
///
/// `what` names the result of the closure in errors.
///
/// ```
/// # use decoupled_dmd::gradient_only_in;
/// # use tch::{Device, Kind, Tensor};
/// # let options = (Kind::Float, Device::Cpu);
/// let classifier = Tensor::ones([1, 6], options).set_requires_grad(true);
/// let x = Tensor::randn([4, 6], options).set_requires_grad(true);
/// let loss = gradient_only_in("logits", &x, |x| {
///     Ok(x.f_linear(&classifier, None::<&Tensor>)?.f_mean(Kind::Float)?)
/// })?;
/// loss.backward();
/// assert!(x.grad().defined() && !classifier.grad().defined());
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
///
/// # Errors
/// [`Error::NoGradient`] if `x` has a gradient to receive and the closure sends none, as when it
/// detaches; [`Error::Torch`] if the loss is no scalar; errors of the closure.
pub fn gradient_only_in(
    what: &'static str,
    x: &Tensor,
    loss: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let leaf = x.f_detach()?.f_set_requires_grad(x.requires_grad())?;
    let value = loss(&leaf)?;
    if !(leaf.requires_grad() && is_recording()?) {
        return Ok(value.f_detach()?);
    }
    if !value.requires_grad() {
        return Err(Error::NoGradient { what });
    }
    let gradients = Tensor::f_run_backward(&[&value], &[&leaf], false, false)?;
    match gradients.into_iter().next().filter(Tensor::defined) {
        Some(gradient) => with_gradient(&value, x, &gradient),
        None => Err(Error::NoGradient { what }),
    }
}

/// Whether autograd records what is computed: not under no_grad.
pub(crate) fn is_recording() -> Result<bool> {
    let leaf = Tensor::f_zeros([0i64], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
    Ok(leaf.f_neg()?.requires_grad())
}
