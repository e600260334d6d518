//! Distribution Matching (DM): the teacher's score against the score of the student's samples.

use tch::{Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::batch::Batch;
use crate::checks::check_per_sample;
use crate::denoiser::{Denoiser, FitsTeacher};
use crate::error::Result;
use crate::network::IntoOutput;
use crate::numeric::{masked, mean, noise_like, per_sample, sample_mean, widen_like};
use crate::path::check_same_path;
use crate::probe::Probe;
use crate::regularizer::{Divergence, Regularizer};
use crate::renoising::{Renoising, Uniform};
use crate::time::PostShift;
use crate::weighting::Weighting;

type LogRatio<'a> = dyn Fn(&Probe<'_>) -> Result<Tensor> + 'a;

/// Distribution Matching: moves the samples to where the teacher finds them likelier than they are.
///
/// ```text
/// direction = (x0_cond - x0_fake) / n        at tau_DM
/// ```
/// Eq. 2 and Algorithm 1 of Decoupled DMD (arXiv 2511.22677), in clean-sample space; n is the
/// probe's [`Normalizer`](crate::Normalizer). The *fake score* is a denoiser of the student's samples. The
/// caller trains it on every step with [`denoising_loss`](Self::denoising_loss), usually several times for
/// each update of the student.
///
/// | parameter | meaning | default |
/// |---|---|---|
/// | `fake` | the fake score, a copy of the teacher at first, without guidance | |
/// | [`renoising`](Self::renoising) | the times at which the fake score is trained | U(0, 1), then the shift; Algorithm 1 |
/// | [`weighting`](Self::weighting) | how much each time counts in its training | uniform in its own prediction type; DMD2, Self-Forcing, CDM |
/// | [`divergence`](Self::divergence) | the divergence that is descended | reverse Kullback-Leibler; others by f-distill |
///
/// The loop decides how often the fake score is trained; [`UpdateRatio`](crate::UpdateRatio) counts.
///
/// # Shapes
/// x `[B, ..]` to a scalar, whose gradient in x is `-direction / numel`; see
/// [`surrogate`](crate::surrogate).
///
/// # Forwards
/// Teacher: conditional. Fake score: one, without a graph. Its own loss: one, with a graph.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, the ratio of a [`divergence`](Self::divergence) included,
/// unless the normaliser is [`over_batch`](crate::Normalizer::over_batch).
///
/// # Errors
/// [`Error::OutOfRange`](crate::Error::OutOfRange) if the fake is on another path than the teacher,
/// checked on the first evaluation with each teacher, or times may be at a singular end of a
/// [`Prediction`](crate::Prediction); errors of the networks.
///
/// # Example
/// ```
/// use decoupled_dmd::{Denoiser, DistributionMatching, NoisePath, Prediction, RectifiedFlow, Shift};
/// # let network = |x: &tch::Tensor, _: &tch::Tensor, _: &decoupled_dmd::Condition| x * 0.5;
/// let path = RectifiedFlow.shifted(Shift::new(3.0)?);
/// let fake = Denoiser::new(path, Prediction::FlowVelocity, network);
/// let dm = DistributionMatching::new(fake);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
pub struct DistributionMatching<'a> {
    fake: Denoiser<'a>,
    renoising: Renoising<'a>,
    weighting: Weighting,
    divergence: Option<(Divergence, Box<LogRatio<'a>>)>,
    /// Whose path was found to be that of the fake score.
    fits: FitsTeacher,
}

impl<'a> DistributionMatching<'a> {
    /// With the fake score. Its path must be the teacher's, shift included: it is handed the same noised
    /// samples, and it is trained at times with that shift.
    #[must_use]
    pub fn new(fake: Denoiser<'a>) -> Self {
        let renoising = Renoising::new(Uniform::FULL);
        Self {
            fake: fake.in_role("fake score"),
            renoising,
            weighting: Weighting::UNIFORM,
            divergence: None,
            fits: FitsTeacher::default(),
        }
    }

    /// Replaces the times at which the fake score is trained.
    #[must_use]
    pub fn renoising(mut self, renoising: Renoising<'a>) -> Self {
        self.renoising = renoising;
        self
    }

    /// Sets how much each time counts in the training of the fake score.
    #[must_use]
    pub fn weighting(mut self, weighting: Weighting) -> Self {
        self.weighting = weighting;
        self
    }

    /// Descends another divergence than the reverse one of Kullback and Leibler: the direction of each
    /// sample is multiplied by its h(r), where r is the exponential of `log_ratio`, `[B]`, clamped to
    /// [0.1, 20]. The closure estimates ln p_teacher / p_student at the noised samples of the probe, such as
    /// [`Adversarial::log_ratio`](crate::Adversarial::log_ratio) of a critic whose real samples are the
    /// teacher's. It is not called for [`Divergence::ReverseKl`].
    #[must_use]
    pub fn divergence<O: IntoOutput<Tensor>>(
        mut self,
        divergence: Divergence,
        log_ratio: impl Fn(&Probe<'_>) -> O + 'a,
    ) -> Self {
        let log_ratio = Box::new(move |probe: &Probe<'_>| log_ratio(probe).into_result());
        self.divergence = Some((divergence, log_ratio));
        self
    }

    /// h(r) of the probe's samples, `[B]`; `None` for 1.
    fn weights(&self, probe: &Probe<'_>) -> Result<Option<Tensor>> {
        let Some((divergence, log_ratio)) = &self.divergence else { return Ok(None) };
        if *divergence == Divergence::ReverseKl {
            return Ok(None);
        }
        let log_ratio = log_ratio(probe)?;
        check_per_sample("log ratio", &log_ratio, probe.x())?;
        let ratio = widen_like(&log_ratio, probe.x())?.f_exp()?.within(0.1, 20.0)?;
        probe.observe("ratio", || Ok(ratio.shallow_clone()))?;
        divergence.weight(&ratio)
    }

    /// The fake score.
    pub fn fake(&self) -> &Denoiser<'a> {
        &self.fake
    }

    /// Refuses a fake score on another path than that of `teacher`, once for each teacher.
    pub(crate) fn check_path(&self, teacher: &Denoiser<'_>) -> Result<()> {
        self.fits.check(teacher, || check_same_path(self.fake.path(), teacher.path()))
    }

    /// The direction `(x0_cond - x0_fake) / n`, `[B, ..]`, without a graph.
    ///
    /// # Errors
    /// As the term.
    pub fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        self.check_path(probe.teacher())?;
        let real = probe.teacher_output()?;
        let fake = self.fake.predict(probe.noised(), probe.tau(), probe.batch().cond())?;
        probe.observe_scores(|| {
            Ok((real.sample()?.shallow_clone(), fake.sample()?.shallow_clone()))
        })?;
        let direction = probe.normalize(real.minus(&fake)?)?;
        match self.weights(probe)? {
            Some(weights) => probe.masked(&direction.f_mul(&per_sample(&weights, &direction)?)?),
            None => Ok(direction),
        }
    }

    /// The loss that trains the fake score on the samples of the batch, a scalar; x is detached.
    ///
    /// The mean of w(t) (target - output)^2 in the fake score's own prediction type
    /// ([`Denoiser::denoising_loss`]), w from [`weighting`](Self::weighting), times from
    /// [`renoising`](Self::renoising) and fresh noise. Algorithm 1 prints the error of the clean sample
    /// in its place: [`Weighting::measured_as`] with [`Prediction::Sample`](crate::Prediction::Sample).
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if [`renoising`](Self::renoising) needs the student's
    /// times and there are none; as [`Denoiser::denoising_loss`].
    pub fn denoising_loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let time = self.renoising.draw(self.fake.path(), batch.x(), batch.student_time())?;
        self.denoising_loss_at(batch, &time, &noise_like(batch.x())?)
    }

    /// The loss of each sample, `[B]`, to be binned by noise level; over all frames where they have times of their own.
    /// Its mean is
    /// [`denoising_loss_at`](Self::denoising_loss_at).
    ///
    /// # Errors
    /// As [`denoising_loss_at`](Self::denoising_loss_at).
    pub fn denoising_loss_per_sample_at(
        &self,
        batch: &Batch<'_>,
        time: &PostShift,
        noise: &Tensor,
    ) -> Result<Tensor> {
        sample_mean(&self.error_at(batch, time, noise)?)
    }

    /// [`denoising_loss`](Self::denoising_loss) at given times, B of them or one for each frame, and noise (shaped like
    /// x). The [given frames](Batch::with_given_frames) stay at 1.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and the like if they do not fit; as
    /// [`Denoiser::denoising_loss`].
    pub fn denoising_loss_at(
        &self,
        batch: &Batch<'_>,
        time: &PostShift,
        noise: &Tensor,
    ) -> Result<Tensor> {
        mean(&self.error_at(batch, time, noise)?)
    }

    /// The weighted squares `[B, ..]`, zero where the batch's mask leaves an element out.
    fn error_at(&self, batch: &Batch<'_>, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        let (mask, time) = (batch.mask(), batch.keep_given(time)?);
        let mut error = self.fake.denoising_error(batch.x(), &time, noise, batch.cond(), mask)?;
        let at = self.fake.path().coefficients(&time)?;
        if let Some(factor) = self.weighting.factor(self.fake.prediction(), &at)? {
            // Paths return float64; the error stays in its type.
            error = error.f_mul(&per_sample(&widen_like(&factor, &error)?, &error)?)?;
            // The factor may be infinite at the time of a masked sample.
            error = masked(&error, mask)?;
        }
        Ok(error)
    }
}

impl Regularizer for DistributionMatching<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        probe.loss_of(&self.direction(probe)?)
    }

    fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
        self.denoising_loss(batch).map(Some)
    }
}

impl std::fmt::Debug for DistributionMatching<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DistributionMatching")
            .field("fake", &self.fake)
            .field("renoising", &self.renoising)
            .field("weighting", &self.weighting)
            .field("divergence", &self.divergence.as_ref().map(|(divergence, _)| divergence))
            .finish_non_exhaustive()
    }
}
