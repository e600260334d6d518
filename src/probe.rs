//! Probes: the samples re-noised once, with the teacher's predictions there, computed once for all terms.

use std::cell::{OnceCell, RefCell};

use tch::{Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::batch::Batch;
use crate::checks::{check_like, check_numbers, check_per_sample, check_times};
use crate::collective::{Collective, gather};
use crate::denoiser::Denoiser;
use crate::diagnostics::{Role, TermDiagnostics};
use crate::error::Result;
use crate::gradient::surrogate;
use crate::normalizer::{Distance, Normalizer, Reference};
use crate::numeric::{masked, masked_mean, noise_like, once, widen_like};
use crate::output::{Difference, ModelOutput};
use crate::renoising::Renoising;
use crate::time::PostShift;

/// The samples re-noised to one tau with one noise, and the teacher's predictions there.
///
/// Terms call for the predictions they need; the teacher runs at most once for each condition, without a
/// graph. Terms of one [`Group`](crate::Group) get the same probe: that is the meaning of "coupled".
pub struct Probe<'a> {
    teacher: Denoiser<'a>,
    batch: &'a Batch<'a>,
    x: Tensor,
    tau: PostShift,
    noise: Tensor,
    noised: Tensor,
    normalizer: Normalizer,
    processes: Option<&'a Collective<'a>>,
    cond: OnceCell<ModelOutput>,
    null: OnceCell<ModelOutput>,
    distance: OnceCell<Option<Distance>>,
    diagnostics: Option<RefCell<TermDiagnostics>>,
}

impl<'a> Probe<'a> {
    /// Re-noises the batch to `tau`, B times or one for each frame, with `noise` (shaped like x). The
    /// [given frames](Batch::with_given_frames) of the batch stay at 1.
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
        check_times("tau", tau.tensor(), batch.x())?;
        check_like("noise", &noise, batch.x())?;
        let tau = batch.keep_given(&tau)?;
        let _no_grad = no_grad_guard();
        let x = batch.trained()?;
        let noised = teacher.path().renoise(&x, &tau, &noise)?;
        Ok(Self {
            teacher: teacher.in_role("teacher"),
            batch,
            x,
            tau,
            noise,
            noised,
            normalizer: Normalizer::default(),
            processes: None,
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
        let tau = renoising.draw(teacher.path(), batch.x(), batch.student_time())?;
        Self::at(teacher, batch, tau, noise_like(batch.x())?)
    }

    /// Sets the normaliser of [`normalize`](Self::normalize).
    #[must_use]
    pub fn normalizer(mut self, normalizer: Normalizer) -> Self {
        self.normalizer = normalizer;
        self
    }

    /// Makes the batch a part of the batch of several processes, for the terms that look at the whole of it; see
    /// [`Collective`].
    #[must_use]
    pub fn among(mut self, processes: &'a Collective<'a>) -> Self {
        self.processes = Some(processes);
        self
    }

    /// The processes that share the batch, where there are others.
    pub fn processes(&self) -> Option<&'a Collective<'a>> {
        self.processes
    }

    /// A tensor `[B, ..]` with the rows of all processes, `[N B, ..]`, rank 0 first: what a term calls that looks
    /// at several samples at once. The mean over the processes of the gradients of its loss is then the gradient
    /// of the whole batch. Without other processes, the tensor as it is.
    ///
    /// # Errors
    /// As [`Collective::gather`].
    pub fn gather(&self, part: &Tensor) -> Result<Tensor> {
        gather(self.processes, part)
    }

    /// Collects diagnostics.
    #[must_use]
    pub(crate) fn observed(mut self) -> Self {
        self.diagnostics = Some(RefCell::new(self.no_diagnostics()));
        self
    }

    /// The samples `[B, ..]` in float32 or wider, carrying the student's gradient. Terms that share a
    /// batch share this copy of a half-precision x: their gradients are added up in float32 and rounded
    /// once. Where the batch's [`mask`](Batch::with_mask) leaves an element out, no gradient passes, and what is not
    /// finite is zero.
    pub fn x(&self) -> &Tensor {
        &self.x
    }

    /// The teacher, for predictions at other samples than [`noised`](Self::noised).
    pub fn teacher(&self) -> &Denoiser<'a> {
        &self.teacher
    }

    /// The batch behind the samples.
    pub fn batch(&self) -> &'a Batch<'a> {
        self.batch
    }

    /// The noise level of this probe, B times, or one for each frame where the group draws them so, or the batch has
    /// given frames.
    pub fn tau(&self) -> &PostShift {
        &self.tau
    }

    /// [`tau`](Self::tau) for a term that looks at whole samples: B times.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) if frames have times of their own.
    pub fn tau_of_samples(&self) -> Result<&PostShift> {
        check_per_sample("tau of a term over whole samples", self.tau.tensor(), &self.x)?;
        Ok(&self.tau)
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
    /// Errors of the teacher's closure.
    pub fn teacher_cond(&self) -> Result<&Tensor> {
        let _no_grad = no_grad_guard();
        self.teacher_output()?.sample()
    }

    /// The teacher's conditional and unconditional clean predictions, `[B, ..]` each; in one
    /// forward where the teacher offers it and neither is known yet.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if the batch has no null condition; errors of the teacher's
    /// closure.
    pub fn teacher_pair(&self) -> Result<(&Tensor, &Tensor)> {
        let _no_grad = no_grad_guard();
        let (cond, null) = self.teacher_outputs()?;
        Ok((cond.sample()?, null.sample()?))
    }

    /// [`teacher_cond`](Self::teacher_cond) as the network's raw output, from which
    /// [`ModelOutput::minus`] takes an exact difference.
    ///
    /// # Errors
    /// As [`teacher_cond`](Self::teacher_cond).
    pub fn teacher_output(&self) -> Result<&ModelOutput> {
        let is_guided = matches!(self.normalizer.reference(), Reference::Guided(_));
        if is_guided && self.batch.null().is_ok() {
            // The normaliser needs both: one paired forward may do.
            return Ok(self.teacher_outputs()?.0);
        }
        self.cond_alone()
    }

    /// [`teacher_pair`](Self::teacher_pair) as the network's raw outputs.
    ///
    /// # Errors
    /// As [`teacher_pair`](Self::teacher_pair).
    pub fn teacher_outputs(&self) -> Result<(&ModelOutput, &ModelOutput)> {
        let null = self.batch.null()?;
        let _no_grad = no_grad_guard();
        if self.cond.get().is_none() && self.null.get().is_none() {
            let pair =
                self.teacher.predict_pair(&self.noised, &self.tau, self.batch.cond(), null)?;
            return Ok((self.cond.get_or_init(|| pair.0), self.null.get_or_init(|| pair.1)));
        }
        let null = once(&self.null, || self.teacher.predict(&self.noised, &self.tau, null))?;
        Ok((self.cond_alone()?, null))
    }

    fn cond_alone(&self) -> Result<&ModelOutput> {
        once(&self.cond, || {
            let _no_grad = no_grad_guard();
            self.teacher.predict(&self.noised, &self.tau, self.batch.cond())
        })
    }

    /// Scales a difference of clean predictions `[B, ..]`, a tensor or [`ModelOutput::minus`], into a
    /// direction, per sample, in float32 or wider; zero where the batch's
    /// [`mask`](Batch::with_mask) leaves an element out. See [`Normalizer`].
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `difference` is like x; errors of the
    /// teacher's closure, if its prediction is needed and not known yet.
    pub fn normalize(&self, difference: impl Into<Difference>) -> Result<Tensor> {
        let difference = difference.into();
        check_like("difference", difference.tensor(), &self.x)?;
        self.masked(&difference.over(self.divisor()?)?)
    }

    /// `tensor`, shaped like x, with zeros where the batch's [`mask`](Batch::with_mask) leaves an element
    /// out; no gradient passes there. Without a mask, the tensor as it is.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `tensor` is like x.
    pub fn masked(&self, tensor: &Tensor) -> Result<Tensor> {
        check_like("tensor to mask", tensor, &self.x)?;
        masked(tensor, self.batch.mask())
    }

    /// The mean of each sample's elements that the batch's [`mask`](Batch::with_mask) leaves in, `[B]`; 0 for a
    /// sample without any.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `tensor` is like x.
    pub fn masked_mean(&self, tensor: &Tensor) -> Result<Tensor> {
        check_like("tensor to average", tensor, &self.x)?;
        masked_mean(tensor, self.batch.mask())
    }

    /// Records a number, a scalar or one for each sample, under `name` if diagnostics are taken; `value`
    /// runs only then, without a graph. It appears in [`TermDiagnostics::observations`].
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) unless the tensor is `[]` or `[B]`,
    /// [`Error::Kind`](crate::Error::Kind) if it is complex, with `name`; errors of `value`.
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
            let value = value()?;
            check_numbers(name, &value, self.batch.batch_size())?;
            // The tensor may be an older one, with a graph.
            value.f_detach()?
        };
        self.record(|term| {
            term.observations.push((name, value));
            Ok(())
        })
    }

    /// The loss of a direction `[B, ..]`, a scalar whose gradient in x is `-direction / numel`: the
    /// [`surrogate`](crate::surrogate) on the elements that the mask does not leave out. The size of the
    /// direction is recorded if diagnostics are taken.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like unless `direction` is like x.
    pub fn loss_of(&self, direction: &Tensor) -> Result<Tensor> {
        check_like("direction", direction, &self.x)?;
        let direction = self.masked(direction)?;
        self.record(|term| term.set_direction(&direction))?;
        surrogate(&self.x, &direction)
    }

    /// Records the update that a `loss` makes, if diagnostics are taken and the term has recorded none: the direction of
    /// which the loss would be the surrogate, `- numel` times its gradient in x.
    pub(crate) fn observe_update(&self, loss: &Tensor) -> Result<()> {
        let Some(diagnostics) = &self.diagnostics else { return Ok(()) };
        let is_known = diagnostics.borrow().direction.is_some();
        if is_known || !(loss.requires_grad() && self.x.requires_grad()) {
            return Ok(());
        }
        let gradients = Tensor::f_run_backward(&[loss], &[&self.x], true, false)?;
        let Some(gradient) = gradients.into_iter().find(Tensor::defined) else { return Ok(()) };
        let update = gradient.times(-(self.x.numel() as f64))?;
        self.record(|term| term.set_direction(&self.masked(&update)?))
    }

    /// Records how the score of a fake prediction compares with the teacher's, if diagnostics are taken;
    /// `predictions` runs only then, without a graph, and returns the clean predictions of teacher and
    /// fake at [`noised`](Self::noised), `[B, ..]` each. It appears in [`TermDiagnostics::scores`].
    ///
    /// # Errors
    /// Errors of `predictions`; [`Error::Shape`](crate::Error::Shape) and the like unless its tensors are
    /// like x.
    pub fn observe_scores(
        &self,
        predictions: impl FnOnce() -> Result<(Tensor, Tensor)>,
    ) -> Result<()> {
        if self.diagnostics.is_none() {
            return Ok(());
        }
        let _no_grad = no_grad_guard();
        let (real, fake) = predictions()?;
        check_like("teacher's prediction", &real, &self.x)?;
        check_like("fake prediction", &fake, &self.x)?;
        let at = self.teacher.path().coefficients(&self.tau)?.like(&self.noised)?;
        let scale = at.data.f_add(&at.noise)?;
        let flow = |x0: &Tensor| self.noised.f_sub(&x0.f_mul(&scale)?);
        let own = flow(&widen_like(&self.x.f_detach()?, &self.noised)?)?;
        let (real, fake) = (flow(&real)?, flow(&fake)?);
        self.record(|term| term.set_scores(&self.noised, [&real, &fake, &own]))
    }

    /// Calls `set` on the diagnostics. Their `RefCell` is borrowed meanwhile: `set` must not call `record`.
    fn record(&self, set: impl FnOnce(&mut TermDiagnostics) -> Result<()>) -> Result<()> {
        let Some(diagnostics) = &self.diagnostics else { return Ok(()) };
        let _no_grad = no_grad_guard();
        set(&mut diagnostics.borrow_mut())
    }

    /// The diagnostics of the term that just ran, replaced by empty ones for the next term.
    pub(crate) fn take_diagnostics(&self, role: Role) -> Option<TermDiagnostics> {
        let mut term = self.diagnostics.as_ref()?.replace(self.no_diagnostics());
        term.role = role;
        Some(term)
    }

    fn no_diagnostics(&self) -> TermDiagnostics {
        TermDiagnostics::new(self.tau.tensor(), self.batch.mask())
    }

    /// n, `[B]` or per frame; `None` where there is no normaliser.
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
                let (cond, null) = self.teacher_outputs()?;
                guided = cond.guided(null, guidance)?;
                guided.sample()?
            }
            Reference::Conditional => self.teacher_cond()?,
        };
        let (times, mask) = (self.tau.tensor(), self.batch.mask());
        self.normalizer.distance(&self.x, reference, times, mask, self.processes).map(Some)
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
