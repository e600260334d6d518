//! A private copy of a batch with fixed times and noise, which the checks reverse or corrupt.

use tch::{Kind, Tensor, no_grad_guard};

use super::{Check, Result, require};
use crate::arithmetic::{Arithmetic, counting};
use crate::batch::{Batch, Condition};
use crate::denoiser::Denoiser;
use crate::probe::Probe;
use crate::time::{PostShift, PreShift};

pub(super) struct Trial {
    x: Tensor,
    cond: Condition,
    null: Option<Condition>,
    real: Option<Tensor>,
    real_cond: Condition,
    target: Option<Tensor>,
    student_time: Option<PreShift>,
    student_input: Option<(Tensor, PostShift)>,
    mask: Option<Tensor>,
    given: Option<Tensor>,
    tau: Tensor,
    noise: Tensor,
}

impl Trial {
    pub(super) fn new(batch: &Batch<'_>) -> Result<Self> {
        let count = batch.batch_size();
        require(Check::SetUp, count > 1, || format!("{count} sample, needed are two or more"))?;
        let x = batch.x().f_detach()?;
        let kind = x.f_kind()?;
        let tau_kind = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        // From 0.1 to 0.9.
        let places = counting(count, (tau_kind, x.device()))?;
        let tau = places.times(0.8 / (count as f64 - 1.0))?.plus(0.1)?;
        let input = batch.student_input().ok();
        Ok(Self {
            cond: shared(batch.cond()),
            null: batch.null().ok().map(shared),
            real: batch.real().ok().map(Tensor::shallow_clone),
            real_cond: shared(batch.real_cond()),
            target: batch.target().ok().map(Tensor::shallow_clone),
            student_time: batch.student_time().map(PreShift::shallow_clone),
            student_input: input.map(|(input, time)| (input.shallow_clone(), time.shallow_clone())),
            mask: batch.mask().map(Tensor::shallow_clone),
            given: batch.given_frames().map(Tensor::shallow_clone),
            tau,
            noise: noise_like(&x)?,
            x: leaf(&x)?,
        })
    }

    pub(super) fn x(&self) -> &Tensor {
        &self.x
    }

    /// Calls `look` with the probe of this trial.
    pub(super) fn run<T>(
        &self,
        teacher: &Denoiser<'_>,
        look: impl FnOnce(&Probe<'_>) -> Result<T>,
    ) -> Result<T> {
        self.with_batch(|batch| {
            let tau = PostShift::new(self.tau.shallow_clone())?;
            look(&Probe::at(teacher, batch, tau, self.noise.shallow_clone())?)
        })
    }

    /// Calls `look` with the batch of this trial.
    pub(super) fn with_batch<T>(&self, look: impl FnOnce(&Batch<'_>) -> Result<T>) -> Result<T> {
        let mut batch = Batch::new(&self.x, &self.cond)?;
        if let Some(null) = &self.null {
            batch = batch.with_null(null);
        }
        if let Some(real) = &self.real {
            batch = batch.with_real(real)?.with_real_cond(&self.real_cond);
        }
        if let Some(target) = &self.target {
            batch = batch.with_target(target)?;
        }
        if let Some(time) = &self.student_time {
            batch = batch.with_student_time(time)?;
        }
        if let Some((input, time)) = &self.student_input {
            batch = batch.with_student_input(input, time)?;
        }
        if let Some(mask) = &self.mask {
            batch = batch.with_mask(mask)?;
        }
        if let Some(given) = &self.given {
            batch = batch.with_given_frames(given)?;
        }
        look(&batch)
    }

    /// The trial with samples, and all tensors with one entry for each sample, from last to first.
    pub(super) fn reversed(&self) -> Result<Self> {
        let belongs = |tensor: &Tensor| tensor.size().first() == self.x.size().first();
        self.map(|tensor| {
            Ok(if belongs(tensor) { tensor.f_flip([0])? } else { tensor.shallow_clone() })
        })
    }

    /// The trial with NaN in the first sample and in the student's input for it.
    pub(super) fn with_bad_first(&self) -> Result<Self> {
        let spoil = |tensor: &Tensor| -> Result<()> {
            let _no_grad = no_grad_guard();
            let _ = tensor.f_narrow(0, 0, 1)?.times_(f64::NAN)?;
            Ok(())
        };
        let mut spoilt = self.same()?;
        spoil(&spoilt.x)?;
        if let Some((input, _)) = &mut spoilt.student_input {
            *input = input.f_detach_copy()?;
            spoil(input)?;
        }
        Ok(spoilt)
    }

    /// The trial with one element, counted over the whole batch, moved by `offset`.
    pub(super) fn moved(&self, element: i64, offset: f64) -> Result<Self> {
        let moved = self.same()?;
        let _no_grad = no_grad_guard();
        let _ = moved.x.f_view([-1])?.f_narrow(0, element, 1)?.plus_(offset)?;
        Ok(moved)
    }

    /// The trial with samples that no gradient is asked of.
    pub(super) fn without_gradient(&self) -> Result<Self> {
        Ok(Self { x: self.x.f_detach()?, ..self.same()? })
    }

    /// A copy of the trial with samples of its own.
    fn same(&self) -> Result<Self> {
        self.map(|tensor| Ok(tensor.shallow_clone()))
    }

    /// The trial with every tensor changed by `change`; the samples are copied.
    fn map(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let condition = |condition: &Condition| -> Result<Condition> {
            Ok(condition.iter().map(&change).collect::<Result<Vec<_>>>()?.into())
        };
        let student_time = self.student_time.as_ref().map(|time| change(time.tensor()));
        let student_input = match &self.student_input {
            Some((input, time)) => Some((change(input)?, PostShift::new(change(time.tensor())?)?)),
            None => None,
        };
        Ok(Self {
            cond: condition(&self.cond)?,
            null: self.null.as_ref().map(condition).transpose()?,
            // A term may pair samples with real ones, as the relativistic loss does.
            real: self.real.as_ref().map(&change).transpose()?,
            real_cond: condition(&self.real_cond)?,
            target: self.target.as_ref().map(&change).transpose()?,
            student_time: student_time.transpose()?.map(PreShift::new).transpose()?,
            student_input,
            mask: self.mask.as_ref().map(&change).transpose()?,
            given: self.given.as_ref().map(&change).transpose()?,
            tau: change(&self.tau)?,
            noise: change(&self.noise)?,
            x: leaf(&change(&self.x)?)?,
        })
    }
}

/// A wave without a period, of unit variance, with the shape, type and device of `x`.
pub(super) fn noise_like(x: &Tensor) -> Result<Tensor> {
    let count = x.numel() as i64;
    let places = counting(count, (Kind::Double, x.device()))?.plus(1.0)?;
    let wave = places.times(2.4)?.f_sin()?.times(std::f64::consts::SQRT_2)?;
    Ok(wave.f_view(x.size().as_slice())?.f_to_kind(x.f_kind()?)?)
}

fn shared(condition: &Condition) -> Condition {
    condition.iter().map(Tensor::shallow_clone).collect::<Vec<_>>().into()
}

/// A contiguous copy that collects a gradient.
fn leaf(x: &Tensor) -> Result<Tensor> {
    let size = x.size();
    let mut copy = Tensor::f_empty(size, (x.f_kind()?, x.device()))?;
    copy.f_copy_(&x.f_detach()?)?;
    Ok(copy.f_set_requires_grad(true)?)
}
