//! One look at the student's samples: re-noised once, the teacher's answers remembered.

use std::cell::{OnceCell, RefCell};

use tch::{Tensor, no_grad_guard};

use crate::numeric::{check_like, check_size, noise_like, per_sample, sample_mean, widen};
use crate::{Batch, Denoiser, Floor, Guidance, PostShift, Renoising, Result};

/// How a difference of clean predictions is scaled, sample by sample, into a direction.
///
/// Dividing by the mean distance between the sample and the teacher's prediction makes directions
/// comparable across noise levels (DMD, Eq. 8; `weight_factor` in DMD2's code).
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Normalizer {
    /// No scaling.
    Off,
    /// 1 / max(mean |x - x0_cond|, floor): each term by the conditional prediction at its own tau.
    Conditional(Floor),
    /// 1 / max(mean |x - x0_guided|, floor), x0_guided = null + alpha (cond - null), as in DMD2.
    /// Common to the terms of a group, it makes coupled CA + DM equal to DMD2.
    Guided(Guidance, Floor),
}

impl Default for Normalizer {
    fn default() -> Self {
        Self::Conditional(Floor::default())
    }
}

/// The samples re-noised to one tau with one noise, and the teacher's predictions there.
///
/// Terms pull what they need; the teacher runs at most once for each condition, without a graph.
/// Terms of one [`Group`](crate::Group) get the same probe: that is all that "coupled" means.
pub struct Probe<'a> {
    teacher: &'a Denoiser<'a>,
    batch: &'a Batch<'a>,
    tau: PostShift,
    noise: Tensor,
    noised: Tensor,
    normalizer: Normalizer,
    cond: OnceCell<Tensor>,
    null: OnceCell<Tensor>,
    scale: OnceCell<Option<Tensor>>,
    observations: Option<RefCell<Vec<(&'static str, Tensor)>>>,
}

impl<'a> Probe<'a> {
    /// Re-noises the batch to `tau` (B times) with `noise` (shaped like x).
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
    /// [`Error::Device`](crate::Error::Device) if `tau` or `noise` does not fit the samples.
    pub fn at(
        teacher: &'a Denoiser<'a>,
        batch: &'a Batch<'a>,
        tau: PostShift,
        noise: Tensor,
    ) -> Result<Self> {
        check_size("tau", tau.tensor(), &[batch.len()])?;
        check_like("noise", &noise, batch.x())?;
        let _no_grad = no_grad_guard();
        let noised = teacher.path().renoise(batch.x(), &tau, &noise)?;
        Ok(Self {
            teacher,
            batch,
            tau,
            noise,
            noised,
            normalizer: Normalizer::default(),
            cond: OnceCell::new(),
            null: OnceCell::new(),
            scale: OnceCell::new(),
            observations: None,
        })
    }

    /// Re-noises the batch with a tau from `renoising` and fresh noise.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if the schedule needs the student's times and the
    /// batch has none.
    pub fn draw(
        teacher: &'a Denoiser<'a>,
        batch: &'a Batch<'a>,
        renoising: &Renoising<'_>,
    ) -> Result<Self> {
        let tau = renoising.draw(batch.x(), batch.student_times())?;
        Self::at(teacher, batch, tau, noise_like(batch.x())?)
    }

    /// Sets how [`normalize`](Self::normalize) scales.
    #[must_use]
    pub fn normalizer(mut self, normalizer: Normalizer) -> Self {
        self.normalizer = normalizer;
        self
    }

    /// Keeps what terms [`observe`](Self::observe).
    #[must_use]
    pub fn observed(mut self) -> Self {
        self.observations = Some(RefCell::default());
        self
    }

    /// The samples, `[B, ..]`, carrying the student's gradient.
    pub fn x(&self) -> &'a Tensor {
        self.batch.x()
    }

    /// The batch behind the samples.
    pub fn batch(&self) -> &'a Batch<'a> {
        self.batch
    }

    /// The noise level of this probe, B times.
    pub fn tau(&self) -> &PostShift {
        &self.tau
    }

    /// The noise of this probe, shaped like x.
    pub fn noise(&self) -> &Tensor {
        &self.noise
    }

    /// `a(tau) x + s(tau) noise`, `[B, ..]`, without a graph.
    pub fn noised(&self) -> &Tensor {
        &self.noised
    }

    /// The teacher's conditional clean prediction at [`noised`](Self::noised), `[B, ..]`.
    ///
    /// # Errors
    /// What the teacher's closure returns.
    pub fn teacher_cond(&self) -> Result<&Tensor> {
        once(&self.cond, || {
            let _no_grad = no_grad_guard();
            self.teacher.denoise(&self.noised, &self.tau, self.batch.cond())
        })
    }

    /// The teacher's conditional and unconditional clean predictions, `[B, ..]` each; in one
    /// forward where the teacher offers it and neither is known yet.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if the batch has no null condition, or what the
    /// teacher's closure returns.
    pub fn teacher_pair(&self) -> Result<(&Tensor, &Tensor)> {
        let null = self.batch.null_condition()?;
        let _no_grad = no_grad_guard();
        if self.cond.get().is_none() && self.null.get().is_none() {
            let pair =
                self.teacher.denoise_pair(&self.noised, &self.tau, self.batch.cond(), null)?;
            return Ok((self.cond.get_or_init(|| pair.0), self.null.get_or_init(|| pair.1)));
        }
        let null = once(&self.null, || self.teacher.denoise(&self.noised, &self.tau, null))?;
        Ok((self.teacher_cond()?, null))
    }

    /// Scales a difference of clean predictions `[B, ..]` into a direction, per sample, in float32
    /// or wider; see [`Normalizer`].
    ///
    /// # Errors
    /// What the teacher's closure returns, if its prediction is needed and not known yet.
    pub fn normalize(&self, difference: &Tensor) -> Result<Tensor> {
        match once(&self.scale, || self.residual())? {
            Some(residual) => Ok(difference.f_div(&per_sample(residual, difference)?)?),
            None => Ok(difference.shallow_clone()),
        }
    }

    /// Records a number under `name` if anyone listens; `value` runs only then, without a graph.
    ///
    /// # Errors
    /// What `value` returns.
    pub fn observe(
        &self,
        name: &'static str,
        value: impl FnOnce() -> Result<Tensor>,
    ) -> Result<()> {
        if let Some(observations) = &self.observations {
            let _no_grad = no_grad_guard();
            let value = value()?;
            observations.borrow_mut().push((name, value));
        }
        Ok(())
    }

    pub(crate) fn take_observations(&self) -> Vec<(&'static str, Tensor)> {
        self.observations.as_ref().map(RefCell::take).unwrap_or_default()
    }

    /// Mean distance between the samples and the teacher's prediction, floored, `[B]`.
    fn residual(&self) -> Result<Option<Tensor>> {
        let _no_grad = no_grad_guard();
        let (prediction, floor) = match self.normalizer {
            Normalizer::Off => return Ok(None),
            Normalizer::Guided(guidance, floor) if !guidance.is_neutral() => {
                let (cond, null) = self.teacher_pair()?;
                (null.f_add(&cond.f_sub(null)?.f_mul_scalar(guidance.get())?)?, floor)
            }
            Normalizer::Conditional(floor) | Normalizer::Guided(_, floor) => {
                (self.teacher_cond()?.shallow_clone(), floor)
            }
        };
        let distance = sample_mean(&widen(self.x())?.f_sub(&prediction)?.f_abs()?)?;
        self.observe("share_on_floor", || {
            Ok(distance.f_lt(floor.get())?.f_mean(tch::Kind::Float)?)
        })?;
        Ok(Some(distance.f_clamp_min(floor.get())?))
    }
}

impl std::fmt::Debug for Probe<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Probe")
            .field("tau", &self.tau)
            .field("normalizer", &self.normalizer)
            .field("knows_cond", &self.cond.get().is_some())
            .field("knows_null", &self.null.get().is_some())
            .finish_non_exhaustive()
    }
}

/// `OnceCell::get_or_try_init`, which is not stable yet.
fn once<T>(cell: &OnceCell<T>, compute: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = compute()?;
    Ok(cell.get_or_init(|| value))
}
