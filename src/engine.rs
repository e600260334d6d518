//! Engines: directions that turn a many-step model into a few-step one.

mod cfg_augmentation;
mod consistency;

pub use cfg_augmentation::CfgAugmentation;
pub use consistency::{Consistency, Tangent};
use tch::Tensor;

use crate::error::Result;
use crate::probe::Probe;

/// The direction in which the samples of the student get better.
///
/// A direction is a difference of clean samples, shaped like x: `x + direction` is better than x.
/// The objective turns it into a loss with [`surrogate`](crate::surrogate) and evaluates it without
/// a graph; an engine that differentiates inside wraps itself in `tch::with_grad`.
///
/// The trait is the form of a term, not its role: a regularizer that is given as a direction goes into
/// [`Group::regularizer_direction`](crate::Group::regularizer_direction), an engine that is given as a loss
/// into [`Group::engine_loss`](crate::Group::engine_loss).
///
/// The smallest engine is a closure, see [`engine_fn`]. A custom engine is a struct and one
/// method; here auto-guidance (Karras et al. 2024), with a weaker model in place of the null branch:
///
/// ```
/// use decoupled_dmd::arithmetic::Arithmetic;
/// use decoupled_dmd::{Denoiser, Engine, Guidance, Probe, Result};
/// use tch::Tensor;
///
/// struct AutoGuidance<'a> {
///     weak: Denoiser<'a>,
///     guidance: Guidance,
/// }
///
/// impl Engine for AutoGuidance<'_> {
///     fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
///         let weak = self.weak.denoise(probe.noised(), probe.tau(), probe.batch().cond())?;
///         let difference = probe.teacher_cond()?.f_sub(&weak)?.times(self.guidance.w())?;
///         probe.normalize(&difference)
///     }
/// }
/// ```
pub trait Engine {
    /// The direction at this probe, `[B, ..]`, in float32 or wider.
    ///
    /// # Errors
    /// Errors of the networks; [`Error::Missing`](crate::Error::Missing) if the batch lacks something that
    /// the engine needs.
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor>;
}

macro_rules! forward_engine {
    ($type:ty) => {
        impl<E: Engine + ?Sized> Engine for $type {
            fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
                (**self).direction(probe)
            }
        }
    };
}

forward_engine!(&E);
forward_engine!(Box<E>);
forward_engine!(std::rc::Rc<E>);

/// An [`Engine`] from a closure, made by [`engine_fn`].
#[derive(Clone, Copy)]
pub struct EngineFn<F>(F);

/// Makes a closure an [`Engine`].
///
/// ```
/// # use decoupled_dmd::engine_fn;
/// // Guidance without a normaliser of any kind.
/// let engine = engine_fn(|probe| {
///     let (cond, null) = probe.teacher_pair()?;
///     Ok(cond.f_sub(null)?)
/// });
/// ```
pub fn engine_fn<F: Fn(&Probe<'_>) -> Result<Tensor>>(direction: F) -> EngineFn<F> {
    EngineFn(direction)
}

impl<F: Fn(&Probe<'_>) -> Result<Tensor>> Engine for EngineFn<F> {
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        (self.0)(probe)
    }
}

impl<F> std::fmt::Debug for EngineFn<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineFn")
    }
}
