//! Conformance checks for engines and regularizers, with the feature `testing`.
//!
//! One line for each term, on a batch and a teacher of yours:
//!
//! ```
//! # use decoupled_dmd::{Batch, CfgAugmentation, Condition, Denoiser, Guidance, Prediction, RectifiedFlow};
//! # use tch::{Device, Kind, Tensor};
//! use decoupled_dmd::testing::check_engine;
//!
//! # let network = |x: &Tensor, _: &Tensor, c: &Condition| x * &c[0];
//! # let teacher = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
//! # let x = Tensor::linspace(-1.0, 1.0, 24, (Kind::Float, Device::Cpu)).view([2, 3, 4]);
//! # let (cond, null) = (Condition::from(Tensor::from(0.5f32)), Condition::from(Tensor::from(0.4f32)));
//! let batch = Batch::new(&x, &cond)?.with_null(&null);
//! check_engine(&CfgAugmentation::new(Guidance::new(4.0)?), &teacher, &batch)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | check | engine | regularizer | its own loss |
//! |---|---|---|---|
//! | shape, type and device of the result; all of it finite | [`check_engine`] | [`check_regularizer`] | [`check_own_loss`] |
//! | the samples are unchanged | yes | yes | yes |
//! | no graph on a direction; a gradient that reaches x, finite and not all zero | the first | the second | |
//! | no gradient to a network | | yes | |
//! | a graph to a network, and no gradient in x | | | yes |
//! | the same probe gives the same result | yes | yes | |
//! | samples in another order give the result in that order | yes | yes | |
//! | one NaN sample does not change the others | yes | [`check_independence`], where samples do not meet | |
//! | the gradient is the gradient of the value | | [`check_gradient`], for a plain loss | |
//!
//! [`check_denoiser`] asks of a teacher, a student or a fake score that it denoises, and so finds a turned sign.
//!
//! Checks use times spread over 0.1 to 0.9 and a fixed noise. Only [`check_own_loss`] draws, from
//! libtorch's global generator. The batch needs two samples or more. A tensor of a condition, or of real
//! samples, whose first axis has as many entries as the batch is taken to hold one entry for each sample.

mod trial;

use tch::{Kind, Tensor, no_grad_guard};

use crate::batch::{Batch, Condition};
use crate::checks::check_samples;
use crate::denoiser::Denoiser;
use crate::engine::Engine;
use crate::error::Error;
use crate::numeric::{batch_size, widen};
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::time::PostShift;
use trial::Trial;

/// The types of results: float32 or wider.
const WIDE: &[Kind] = &[Kind::Float, Kind::Double];

/// A property that the checks require of a term.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Check {
    /// The batch is fit to check with.
    SetUp,
    /// A direction has the shape of x, a loss is a scalar.
    Shape,
    /// A direction or a loss is in float32 or float64, an own loss in a floating-point type.
    Kind,
    /// The result is on the device of x.
    Device,
    /// The result, and the gradient of a loss, are finite.
    Finite,
    /// x is unchanged.
    Unchanged,
    /// A direction has no graph.
    NoGraph,
    /// The gradient of a loss reaches x and is not all zero.
    ReachesSamples,
    /// The loss sends no gradient to a network of the regularizer.
    SparesNetwork,
    /// There is an own loss, and it has a graph to a network.
    ReachesNetwork,
    /// The own loss sends no gradient to x.
    SparesSamples,
    /// The same probe gives the same result.
    Deterministic,
    /// Samples in another order give the result in that order.
    Permutation,
    /// A NaN sample does not change the others.
    BadSample,
    /// The gradient of a loss agrees with its value.
    Gradient,
    /// A clean prediction is nearer to the data than the noised sample is.
    Denoises,
    /// The output of a network has the sign of its [`Prediction`](crate::Prediction).
    Sign,
}

/// The failure of a check.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The term lacks a property.
    #[error("{check:?}: {found}")]
    Broken {
        /// The missing property.
        check: Check,
        /// The finding, in words.
        found: String,
    },
    /// The term, or the teacher, returned an error.
    #[error("the term failed")]
    Term(#[from] Error),
}

impl From<tch::TchError> for Failure {
    fn from(error: tch::TchError) -> Self {
        Self::Term(error.into())
    }
}

type Result<T> = std::result::Result<T, Failure>;

fn require(check: Check, kept: bool, found: impl FnOnce() -> String) -> Result<()> {
    if kept { Ok(()) } else { Err(Failure::Broken { check, found: found() }) }
}

/// Checks an engine; see the table of this [module](self).
///
/// # Errors
/// [`Failure::Broken`] with the first check that fails, [`Failure::Term`] if the engine does.
pub fn check_engine<E: Engine + ?Sized>(
    engine: &E,
    teacher: &Denoiser<'_>,
    batch: &Batch<'_>,
) -> Result<()> {
    let trial = Trial::new(batch)?;
    let direction_of = |trial: &Trial| {
        trial.run(teacher, |probe| {
            let _no_grad = no_grad_guard();
            Ok(engine.direction(probe)?)
        })
    };
    let direction = direction_of(&trial)?;
    check_answer(&direction, trial.x(), &trial.x().size(), WIDE)?;
    require(Check::NoGraph, !direction.requires_grad(), || "the direction has a graph".into())?;
    check_unchanged(&trial, batch)?;
    check_same(Check::Deterministic, &direction_of(&trial)?, &direction)?;
    let turned = direction_of(&trial.reversed()?)?;
    check_same(Check::Permutation, &turned, &direction.f_flip([0])?)?;
    let beside_bad = direction_of(&trial.with_bad_first()?)?;
    check_same(Check::BadSample, &others(&beside_bad)?, &others(&direction)?)
}

/// Checks a regularizer; see the table of this [module](self). The batch should be one at which the
/// gradient does not vanish, unless the loss does: a fake score that is still the teacher has nothing to send.
///
/// A loss that runs through a network of the regularizer must not train it:
/// [`gradient_only_in`](crate::gradient_only_in) ends its gradient in x.
///
/// # Errors
/// [`Failure::Broken`] with the first check that fails, [`Failure::Term`] if the regularizer does.
pub fn check_regularizer<R: Regularizer + ?Sized>(
    regularizer: &R,
    teacher: &Denoiser<'_>,
    batch: &Batch<'_>,
) -> Result<()> {
    let trial = Trial::new(batch)?;
    let answer_of = |trial: &Trial| trial.run(teacher, |probe| answer(regularizer, probe));
    let (loss, gradient) = answer_of(&trial)?;
    check_answer(&loss, trial.x(), &[], WIDE)?;
    require(Check::Finite, all_finite(&gradient)?, || "the gradient in x is not finite".into())?;
    let largest = gradient.f_abs()?.f_max()?.f_double_value(&[])?;
    let at_rest = loss.f_double_value(&[])? == 0.0;
    let reaches = largest > 0.0 || at_rest;
    require(Check::ReachesSamples, reaches, || "the gradient in x is all zero".into())?;
    let elsewhere = trial.without_gradient()?.run(teacher, |probe| Ok(regularizer.loss(probe)?))?;
    require(Check::SparesNetwork, !elsewhere.requires_grad(), || {
        "the loss sends a gradient to another tensor than x: see gradient_only_in".into()
    })?;
    check_unchanged(&trial, batch)?;
    let (again, gradient_again) = answer_of(&trial)?;
    check_same(Check::Deterministic, &again, &loss)?;
    check_same(Check::Deterministic, &gradient_again, &gradient)?;
    let (turned, turned_gradient) = answer_of(&trial.reversed()?)?;
    check_same(Check::Permutation, &turned, &loss)?;
    check_same(Check::Permutation, &turned_gradient, &gradient.f_flip([0])?)
}

/// Checks that a network denoises `data` `[B, ..]` under the condition of these samples, at the time 0.9 with a fixed
/// noise: its clean prediction is nearer to the data than the noised sample is. A teacher passes on its own data, and so do
/// the student and the fake score that start as its copies; a network that was not trained does not.
///
/// Near the data the loss of a network of the wrong sign is small, and it never learns.
///
/// # Errors
/// [`Failure::Broken`] with [`Check::Sign`] if the output would denoise with its sign turned, with
/// [`Check::Denoises`] if neither would; [`Failure::Term`] if the network fails.
pub fn check_denoiser(denoiser: &Denoiser<'_>, data: &Tensor, cond: &Condition) -> Result<()> {
    check_samples("data", data, 1)?;
    let _no_grad = no_grad_guard();
    let data = widen(&data.f_detach()?)?;
    let time = PostShift::all(0.9, batch_size(&data), (data.f_kind()?, data.device()))?;
    let noised = denoiser.path().renoise(&data, &time, &trial::noise_like(&data)?)?;
    let distance = |sample: &Tensor| -> Result<f64> {
        Ok(sample.f_sub(&data)?.f_square()?.f_mean(Kind::Double)?.f_sqrt()?.f_double_value(&[])?)
    };
    let given = distance(&noised)?;
    let share = |denoiser: &Denoiser<'_>| -> Result<f64> {
        Ok(distance(&denoiser.denoise(&noised, &time, cond)?)? / given)
    };
    let (plain, turned) = (share(denoiser)?, share(&denoiser.turned())?);
    let check = if turned < 1.0 { Check::Sign } else { Check::Denoises };
    require(check, plain < 1.0, || {
        format!(
            "the clean prediction is {plain:.2} times as far from the data as the noised sample, and \
             {turned:.2} times with the sign of the output turned"
        )
    })
}

/// Checks that a NaN sample does not change the gradients of the others, for a regularizer that does not
/// compare samples with one another.
///
/// # Errors
/// [`Failure::Broken`] if it does not, [`Failure::Term`] if the regularizer fails.
pub fn check_independence<R: Regularizer + ?Sized>(
    regularizer: &R,
    teacher: &Denoiser<'_>,
    batch: &Batch<'_>,
) -> Result<()> {
    let trial = Trial::new(batch)?;
    let gradient_of = |trial: &Trial| trial.run(teacher, |probe| Ok(answer(regularizer, probe)?.1));
    let (beside_bad, gradient) = (gradient_of(&trial.with_bad_first()?)?, gradient_of(&trial)?);
    check_same(Check::BadSample, &others(&beside_bad)?, &others(&gradient)?)
}

/// Checks the gradient of a plain loss against central differences in float64, in up to 16 elements
/// of x spread over the batch. Not for a [`surrogate`](crate::surrogate), whose gradient differs from the
/// gradient of its value by design.
///
/// # Errors
/// [`Failure::Broken`] if they differ or x is not in float64, [`Failure::Term`] if the regularizer
/// fails.
pub fn check_gradient<R: Regularizer + ?Sized>(
    regularizer: &R,
    teacher: &Denoiser<'_>,
    batch: &Batch<'_>,
) -> Result<()> {
    const STEP: f64 = 1e-5;
    let trial = Trial::new(batch)?;
    let kind = trial.x().f_kind()?;
    require(Check::SetUp, kind == Kind::Double, || format!("x is {kind:?}, needed in float64"))?;
    let (loss, gradient) = trial.run(teacher, |probe| answer(regularizer, probe))?;
    let gradient = gradient.f_flatten(0, -1)?;
    let largest = gradient.f_abs()?.f_max()?.f_double_value(&[])?;
    let loss = loss.f_double_value(&[])?;
    // Errors of the second order, and of rounding in the difference.
    let tolerance = 1e-5 * largest + 1e-10 * loss.abs().max(1.0);
    let count = trial.x().numel() as i64;
    let elements = count.min(16);
    for index in (0..elements).filter_map(|k| k.checked_mul(count)?.checked_div(elements)) {
        let value_at = |offset| -> Result<f64> {
            let moved = trial.moved(index, offset)?;
            let loss = moved.run(teacher, |probe| Ok(regularizer.loss(probe)?))?;
            Ok(loss.f_double_value(&[])?)
        };
        let slope = (value_at(STEP)? - value_at(-STEP)?) / (2.0 * STEP);
        let found = gradient.f_double_value(&[index])?;
        require(Check::Gradient, (slope - found).abs() <= tolerance, || {
            format!("element {index}: gradient {found:e}, central difference {slope:e}")
        })?;
    }
    Ok(())
}

/// Checks the loss of a regularizer's own network, at a draw of its own; see the table of this
/// [module](self). A regularizer without an own loss fails: a wrapper has to forward the own loss.
///
/// # Errors
/// [`Failure::Broken`] with the first check that fails, [`Failure::Term`] if the regularizer does.
pub fn check_own_loss<R: Regularizer + ?Sized>(regularizer: &R, batch: &Batch<'_>) -> Result<()> {
    const FLOATING: &[Kind] = &[Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half];
    let trial = Trial::new(batch)?;
    let loss = trial.with_batch(|batch| Ok(regularizer.own_loss(batch)?))?;
    let Some(loss) = loss else {
        let found = "there is no own loss".into();
        return Err(Failure::Broken { check: Check::ReachesNetwork, found });
    };
    check_answer(&loss, trial.x(), &[], FLOATING)?;
    require(Check::ReachesNetwork, loss.requires_grad(), || "the loss has no graph".into())?;
    let in_x = gradient_in(&loss, trial.x())?;
    require(Check::SparesSamples, in_x.is_none(), || "the loss depends on x".into())?;
    check_unchanged(&trial, batch)
}

/// The loss without its graph, and its gradient in x.
fn answer<R: Regularizer + ?Sized>(regularizer: &R, probe: &Probe<'_>) -> Result<(Tensor, Tensor)> {
    let loss = regularizer.loss(probe)?;
    let unreached = || "the loss does not depend on x".to_owned();
    require(Check::ReachesSamples, loss.requires_grad(), unreached)?;
    let gradient = gradient_in(&loss, probe.x())?
        .ok_or_else(|| Failure::Broken { check: Check::ReachesSamples, found: unreached() })?;
    Ok((loss.f_detach()?, gradient))
}

/// The gradient of a loss with a graph in x, if it has one there.
fn gradient_in(loss: &Tensor, x: &Tensor) -> Result<Option<Tensor>> {
    let gradients = Tensor::f_run_backward(&[loss], &[x], false, false)?;
    Ok(gradients.into_iter().next().filter(Tensor::defined))
}

fn check_answer(answer: &Tensor, x: &Tensor, size: &[i64], kinds: &[Kind]) -> Result<()> {
    let found = answer.size();
    require(Check::Shape, found == size, || format!("expected {size:?}, found {found:?}"))?;
    let kind = answer.f_kind()?;
    let fits = kinds.contains(&kind);
    require(Check::Kind, fits, || format!("expected one of {kinds:?}, found {kind:?}"))?;
    let (expected, found) = (x.device(), answer.device());
    require(Check::Device, expected == found, || {
        format!("expected {expected:?}, found {found:?}")
    })?;
    require(Check::Finite, all_finite(answer)?, || "the answer is not finite".into())
}

fn check_unchanged(trial: &Trial, batch: &Batch<'_>) -> Result<()> {
    let same = trial.x().f_equal(batch.x())?;
    require(Check::Unchanged, same, || "the term changed x in place".into())
}

/// Equal but for the rounding of another order of summation.
fn check_same(check: Check, found: &Tensor, expected: &Tensor) -> Result<()> {
    let tolerance = if expected.f_kind()? == Kind::Double { 1e-10 } else { 1e-4 };
    let size = expected.f_abs()?.f_max()?.f_double_value(&[])?;
    let worst = found.f_sub(expected)?.f_abs()?.f_max()?.f_double_value(&[])?;
    let of = match check {
        Check::BadSample => "the first sample is NaN here on purpose, and changes the others: ",
        _ => "",
    };
    require(check, worst <= tolerance * size, || {
        format!("{of}largest difference {worst:e}, where numbers go up to {size:e}")
    })
}

/// All samples but the first.
fn others(tensor: &Tensor) -> Result<Tensor> {
    let count = tensor.size().first().copied().unwrap_or_default().saturating_sub(1);
    Ok(tensor.f_narrow(0, 1, count)?)
}

fn all_finite(tensor: &Tensor) -> Result<bool> {
    Ok(tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1)
}
