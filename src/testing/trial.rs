//! A batch of one's own copy, with a noise level and a noise, that can be turned and spoilt.

use tch::{Kind, Tensor, no_grad_guard};

use super::{Check, Result, require};
use crate::{Batch, Condition, Denoiser, PostShift, PreShift, Probe};

pub(super) struct Trial {
    x: Tensor,
    cond: Condition,
    null: Option<Condition>,
    real: Option<Tensor>,
    real_cond: Condition,
    student_time: Option<PreShift>,
    mask: Option<Tensor>,
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
        let numel = x.numel() as i64;
        let phase = Tensor::f_arange(numel, (Kind::Double, x.device()))?.f_mul_scalar(2.4)?;
        // Without a period, and of unit variance.
        let noise =
            phase.f_sin()?.f_mul_scalar(std::f64::consts::SQRT_2)?.f_view(x.size().as_slice())?;
        Ok(Self {
            cond: shared(batch.cond()),
            null: batch.null_condition().ok().map(shared),
            real: batch.real_samples().ok().map(Tensor::shallow_clone),
            real_cond: shared(batch.real_condition()),
            student_time: batch.student_times().map(PreShift::shallow_clone),
            mask: batch.kept().map(Tensor::shallow_clone),
            tau: Tensor::f_linspace(0.1, 0.9, count, (tau_kind, x.device()))?,
            noise: noise.f_to_kind(kind)?,
            x: leaf(&x)?,
        })
    }

    pub(super) fn x(&self) -> &Tensor {
        &self.x
    }

    /// Shows a term this trial's probe.
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

    /// Shows a term this trial's batch.
    pub(super) fn with_batch<T>(&self, look: impl FnOnce(&Batch<'_>) -> Result<T>) -> Result<T> {
        let mut batch = Batch::new(&self.x, &self.cond)?;
        if let Some(null) = &self.null {
            batch = batch.null(null);
        }
        if let Some(real) = &self.real {
            batch = batch.real(real)?.real_cond(&self.real_cond);
        }
        if let Some(time) = &self.student_time {
            batch = batch.student_time(time)?;
        }
        if let Some(mask) = &self.mask {
            batch = batch.mask(mask)?;
        }
        look(&batch)
    }

    /// The samples, and all that belongs to them one by one, from last to first.
    pub(super) fn reversed(&self) -> Result<Self> {
        let flip = |tensor: &Tensor| -> Result<Tensor> { Ok(tensor.f_flip([0])?) };
        let of_samples = |tensor: &Tensor| {
            let belongs = tensor.size().first() == self.x.size().first();
            if belongs { flip(tensor) } else { Ok(tensor.shallow_clone()) }
        };
        let condition = |condition: &Condition| -> Result<Condition> {
            Ok(condition.iter().map(of_samples).collect::<Result<Vec<_>>>()?.into())
        };
        let time = self.student_time.as_ref().map(|time| flip(time.tensor())).transpose()?;
        Ok(Self {
            cond: condition(&self.cond)?,
            null: self.null.as_ref().map(condition).transpose()?,
            // A term may pair samples with real ones, as the relativistic loss does.
            real: self.real.as_ref().map(of_samples).transpose()?,
            real_cond: condition(&self.real_cond)?,
            student_time: time.map(PreShift::new).transpose()?,
            mask: self.mask.as_ref().map(flip).transpose()?,
            tau: flip(&self.tau)?,
            noise: flip(&self.noise)?,
            x: leaf(&flip(&self.x)?)?,
        })
    }

    /// The first sample all NaN.
    pub(super) fn with_bad_first(&self) -> Result<Self> {
        self.altered(|x| {
            let _ = x.f_narrow(0, 0, 1)?.f_fill_(f64::NAN)?;
            Ok(())
        })
    }

    /// One element, counted over the whole batch, moved by `offset`.
    pub(super) fn moved(&self, element: i64, offset: f64) -> Result<Self> {
        self.altered(|x| {
            let _ = x.f_view([-1])?.f_narrow(0, element, 1)?.f_add_scalar_(offset)?;
            Ok(())
        })
    }

    fn altered(&self, alter: impl FnOnce(&Tensor) -> Result<()>) -> Result<Self> {
        let x = leaf(&self.x)?;
        {
            let _no_grad = no_grad_guard();
            alter(&x)?;
        }
        Ok(Self {
            x,
            cond: shared(&self.cond),
            null: self.null.as_ref().map(shared),
            real: self.real.as_ref().map(Tensor::shallow_clone),
            real_cond: shared(&self.real_cond),
            student_time: self.student_time.as_ref().map(PreShift::shallow_clone),
            mask: self.mask.as_ref().map(Tensor::shallow_clone),
            tau: self.tau.shallow_clone(),
            noise: self.noise.shallow_clone(),
        })
    }
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
