//! One look at the student's samples: re-noised once, the teacher's answers remembered.

use std::cell::{OnceCell, RefCell};

use tch::{Tensor, no_grad_guard};

use crate::answer::Answer;
use crate::diagnostics::{Role, TermDiagnostics};
use crate::normalizer::{Distance, Reference};
use crate::numeric::{check_like, check_per_sample, masked, noise_like, once, per_sample, widen};
use crate::{Batch, Denoiser, Normalizer, Path, PostShift, Renoising, Result, surrogate};

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
    cond: OnceCell<Answer>,
    null: OnceCell<Answer>,
    distance: OnceCell<Option<Distance>>,
    diagnostics: Option<RefCell<TermDiagnostics>>,
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
        check_per_sample("tau", tau.tensor(), batch.x())?;
        check_like("noise", &noise, batch.x())?;
        let _no_grad = no_grad_guard();
        let noised = teacher.path().renoise(batch.wide()?, &tau, &noise)?;
        Ok(Self {
            teacher,
            batch,
            tau,
            noise,
            noised,
            normalizer: Normalizer::default(),
            cond: OnceCell::new(),
            null: OnceCell::new(),
            distance: OnceCell::new(),
            diagnostics: None,
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

    /// Collects diagnostics.
    #[must_use]
    pub(crate) fn observed(mut self) -> Self {
        self.diagnostics = Some(RefCell::new(self.no_diagnostics()));
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

    /// The teacher's conditional clean prediction at [`noised`](Self::noised), `[B, ..]`. Under a
    /// normaliser with a guided reference, which needs both, the unconditional one is computed with it.
    ///
    /// # Errors
    /// What the teacher's closure returns.
    pub fn teacher_cond(&self) -> Result<&Tensor> {
        let _no_grad = no_grad_guard();
        self.cond()?.sample()
    }

    /// The teacher's conditional and unconditional clean predictions, `[B, ..]` each; in one
    /// forward where the teacher offers it and neither is known yet.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if the batch has no null condition, or what the
    /// teacher's closure returns.
    pub fn teacher_pair(&self) -> Result<(&Tensor, &Tensor)> {
        let _no_grad = no_grad_guard();
        let (cond, null) = self.pair()?;
        Ok((cond.sample()?, null.sample()?))
    }

    /// The path on which the samples were re-noised.
    pub(crate) fn teacher_path(&self) -> &dyn Path {
        self.teacher.path()
    }

    /// The teacher's answer with the condition.
    pub(crate) fn cond(&self) -> Result<&Answer> {
        let is_guided = matches!(self.normalizer.reference(), Reference::Guided(_));
        if is_guided && self.batch.null_condition().is_ok() {
            // The normaliser will ask for both: one forward may do.
            return Ok(self.pair()?.0);
        }
        self.cond_alone()
    }

    fn cond_alone(&self) -> Result<&Answer> {
        once(&self.cond, || {
            let _no_grad = no_grad_guard();
            self.teacher.answer(&self.noised, &self.tau, self.batch.cond())
        })
    }

    /// The teacher's answers with the condition and without.
    pub(crate) fn pair(&self) -> Result<(&Answer, &Answer)> {
        let null = self.batch.null_condition()?;
        let _no_grad = no_grad_guard();
        if self.cond.get().is_none() && self.null.get().is_none() {
            let pair =
                self.teacher.answer_pair(&self.noised, &self.tau, self.batch.cond(), null)?;
            return Ok((self.cond.get_or_init(|| pair.0), self.null.get_or_init(|| pair.1)));
        }
        let null = once(&self.null, || self.teacher.answer(&self.noised, &self.tau, null))?;
        Ok((self.cond_alone()?, null))
    }

    /// Scales a difference of clean predictions `[B, ..]` into a direction, per sample, in float32
    /// or wider; zero where the batch's [`mask`](Batch::mask) leaves an element out. See
    /// [`Normalizer`].
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `difference` is like x; what the
    /// teacher's closure returns, if its prediction is needed and not known yet.
    pub fn normalize(&self, difference: &Tensor) -> Result<Tensor> {
        check_like("difference", difference, self.x())?;
        let difference = widen(difference)?;
        match self.divisor()? {
            Some(n) => self.masked(&difference.f_div(&per_sample(n, &difference)?)?),
            None => self.masked(&difference),
        }
    }

    /// [`normalize`](Self::normalize) of `weight (x0 of one - x0 of other)`, in two passes: all that is
    /// one number a sample is multiplied first.
    pub(crate) fn direction(&self, one: &Answer, other: &Answer, weight: f64) -> Result<Tensor> {
        let (mut difference, slope) = one.minus(other)?;
        let factor = match self.divisor()? {
            Some(n) => per_sample(&n.f_reciprocal()?, &difference)?.f_mul_scalar(weight)?,
            None => Tensor::f_full([1], weight, (difference.f_kind()?, difference.device()))?,
        };
        let factor = match slope {
            Some(slope) => factor.f_mul(&slope)?,
            None => factor,
        };
        self.masked(&difference.f_mul_(&factor)?)
    }

    /// `tensor`, shaped like x, with zeros where the batch's [`mask`](Batch::mask) leaves an element
    /// out; no gradient passes there. Without a mask, the tensor as it is.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `tensor` is like x.
    pub fn masked(&self, tensor: &Tensor) -> Result<Tensor> {
        check_like("tensor to mask", tensor, self.x())?;
        masked(tensor, self.batch.kept())
    }

    /// Records a number, a scalar or one for each sample, under `name` if anyone listens; `value`
    /// runs only then, without a graph. It appears in [`TermDiagnostics::observations`].
    ///
    /// # Errors
    /// What `value` returns.
    pub fn observe(
        &self,
        name: &'static str,
        value: impl FnOnce() -> Result<Tensor>,
    ) -> Result<()> {
        if self.diagnostics.is_none() {
            return Ok(());
        }
        let value = {
            let _no_grad = no_grad_guard();
            // It may have been there before, with a graph.
            value()?.f_detach()?
        };
        self.record(|term| {
            term.observations.push((name, value));
            Ok(())
        })
    }

    /// The surrogate loss of a direction, whose size is recorded.
    pub(crate) fn descend(&self, direction: &Tensor) -> Result<Tensor> {
        check_like("direction", direction, self.x())?;
        let direction = self.masked(direction)?;
        self.record(|term| term.set_direction(&direction))?;
        surrogate(&self.masked(self.batch.wide()?)?, &direction)
    }

    /// Records how the score of a fake prediction compares with the teacher's.
    pub(crate) fn observe_scores(&self, real: &Answer, fake: &Answer) -> Result<()> {
        self.record(|term| {
            let at = self.teacher.path().coefficients(&self.tau)?.like(&self.noised)?;
            let scale = at.data.f_add(&at.noise)?;
            let flow = |x0: &Tensor| self.noised.f_sub(&x0.f_mul(&scale)?);
            term.set_scores(&self.noised, &flow(real.sample()?)?, &flow(fake.sample()?)?)
        })
    }

    /// `set` must not record by itself.
    fn record(&self, set: impl FnOnce(&mut TermDiagnostics) -> Result<()>) -> Result<()> {
        let Some(diagnostics) = &self.diagnostics else { return Ok(()) };
        let _no_grad = no_grad_guard();
        set(&mut diagnostics.borrow_mut())
    }

    /// What the term that just ran has left; the next one starts afresh.
    pub(crate) fn take_diagnostics(&self, role: Role) -> Option<TermDiagnostics> {
        let mut term = self.diagnostics.as_ref()?.replace(self.no_diagnostics());
        term.role = role;
        Some(term)
    }

    fn no_diagnostics(&self) -> TermDiagnostics {
        TermDiagnostics::new(self.tau.tensor(), self.batch.kept())
    }

    /// n, `[B]`; `None` where there is no normaliser.
    fn divisor(&self) -> Result<Option<&Tensor>> {
        let Some(distance) = once(&self.distance, || self.distance())? else { return Ok(None) };
        self.record(|term| term.set_distance(distance))?;
        Ok(Some(&distance.n))
    }

    fn distance(&self) -> Result<Option<Distance>> {
        let _no_grad = no_grad_guard();
        let guided;
        let reference = match self.normalizer.reference() {
            Reference::Off => return Ok(None),
            Reference::Guided(guidance) => {
                let (cond, null) = self.pair()?;
                guided = cond.guided(null, guidance)?;
                guided.sample()?
            }
            Reference::Conditional => self.teacher_cond()?,
        };
        self.normalizer.distance(self.batch.wide()?, reference, self.batch.kept()).map(Some)
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
