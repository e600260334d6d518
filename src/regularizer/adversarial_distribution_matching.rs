//! Adversarial distribution matching (ADM): a critic tells the teacher's step from the fake score's.

use tch::{Tensor, no_grad_guard};

use crate::batch::{Batch, Condition};
use crate::checks::{check_like, check_per_sample};
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::gradient::gradient_only_in;
use crate::guidance::Guidance;
use crate::network::IntoOutput;
use crate::numeric::noise_like;
use crate::probe::Probe;
use crate::regularizer::critic::Critic;
use crate::regularizer::{DistributionMatching, GanLoss, Regularizer};
use crate::renoising::{Renoising, Uniform};
use crate::time::PostShift;
use crate::value::checked;

/// Adversarial distribution matching: moves the samples so that, from the same noised sample, one step
/// of the fake score cannot be told from one step of the guided teacher.
///
/// ```text
/// x'_teacher, x'_fake:  one step of each from x_t, made of x, to the cleaner t' = t + step
/// generator:            GAN loss of D(x'_fake, t')            gradient through x'_fake into x
/// critic:               GAN loss of D(x'_fake, t') against D(x'_teacher, t')      no real data
/// ```
/// Adversarial Distribution Matching (arXiv 2507.18569). No code of its authors was found: this follows
/// pages about the paper. Unverified are whether the paper's gradient passes through the fake score's
/// Jacobian (here it does, unless [`detached_fake`](Self::detached_fake)), and in which clock its step of
/// 1/64 is taken (here in the time that the network sees). Its critic, a frozen teacher with heads, is the
/// caller's closure; [`CriticHeads`](crate::CriticHeads) are smaller than its heads.
///
/// Both steps differ by kappa (x0_teacher - x0_fake), kappa = a' - a s'/s: 0.016 at sigma 0.98 on
/// rectified flow. They are formed in float32 or wider; a critic in bfloat16 sees little of it near the
/// noise. With a critic near zero the first updates are the updates of Distribution Matching.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | `dm` | the term whose fake score steps; its `denoising_loss` trains it | |
/// | `teacher` | the teacher, for the critic's loss, which has no objective | |
/// | `critic` | D(x', t', condition) to logits `[B, K]` | |
/// | [`step`](Self::step) | t' - t | 1/64 |
/// | [`guided`](Self::guided) | guidance of the teacher's step alone | neutral |
/// | [`gan_loss`](Self::gan_loss) | form of the losses | hinge |
/// | [`renoising`](Self::renoising) | times at which the critic is trained | U(0, 1 - step), then the shift; ours |
///
/// # Shapes
/// x `[B, ..]` to a scalar in float32 or wider.
///
/// # Forwards
/// Generator: fake score 1 with a graph, critic 1, and its backward to x; the relativistic form runs teacher
/// and critic once more. Critic: teacher 1 (2 with guidance), fake score 1, critic 2.
///
/// **Gradients.** The generator's ends in x: critic, fake score and teacher receive none. The critic's
/// ends in the parameters of the critic.
///
/// # Processes
/// Nothing is gathered: the critic looks at every sample alone, in the relativistic form at every pair of
/// steps.
///
/// # Errors
/// [`Error::OutOfRange`] if a time may be at the clean end, where there is no step to take, if fake score
/// and teacher are on different paths, or, with a detached fake score, if t' may be the clean end;
/// [`Error::Missing`] without the null condition under guidance; [`Error::Shape`] unless the logits start
/// with B; [`Error::NoGradient`] if the critic cuts the graph; errors of the networks.
///
/// # Example
/// ```
/// use decoupled_dmd::{AdversarialDistributionMatching, Condition, DistributionMatching};
/// # use decoupled_dmd::{Denoiser, Prediction, RectifiedFlow};
/// # use tch::Tensor;
/// # let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
/// # let (teacher, fake) = (Denoiser::new(RectifiedFlow, Prediction::Sample, network), Denoiser::new(RectifiedFlow, Prediction::Sample, network));
/// let dm = DistributionMatching::new(fake);
/// let critic = |x: &Tensor, _t: &Tensor, _cond: &Condition| x.flatten(1, -1);
/// let adm = AdversarialDistributionMatching::new(&dm, teacher, critic);
/// ```
///
/// [`Error::Missing`]: crate::Error::Missing
/// [`Error::NoGradient`]: crate::Error::NoGradient
/// [`Error::OutOfRange`]: crate::Error::OutOfRange
/// [`Error::Shape`]: crate::Error::Shape
pub struct AdversarialDistributionMatching<'a> {
    dm: &'a DistributionMatching<'a>,
    teacher: Denoiser<'a>,
    critic: Critic<'a>,
    step: f64,
    guidance: Guidance,
    gan_loss: GanLoss,
    renoising: Option<Renoising<'a>>,
    is_fake_detached: bool,
}

impl<'a> AdversarialDistributionMatching<'a> {
    /// With the fake score of `dm`, the teacher, and a critic.
    pub fn new<O: IntoOutput<Tensor>>(
        dm: &'a DistributionMatching<'a>,
        teacher: Denoiser<'a>,
        critic: impl Fn(&Tensor, &Tensor, &Condition) -> O + 'a,
    ) -> Self {
        Self {
            dm,
            teacher: teacher.in_role("teacher"),
            critic: Critic::new(critic),
            step: 1.0 / 64.0,
            guidance: Guidance::NEUTRAL,
            gan_loss: GanLoss::Hinge,
            renoising: None,
            is_fake_detached: false,
        }
    }

    /// Sets the length of the step, in the time that the network sees.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless in (0, 1).
    pub fn step(mut self, length: f64) -> Result<Self> {
        let valid = length > 0.0 && length < 1.0;
        self.step = checked("length of the step", "in (0, 1)", length, valid)?;
        Ok(self)
    }

    /// Guides the teacher's step.
    #[must_use]
    pub fn guided(mut self, guidance: Guidance) -> Self {
        self.guidance = guidance;
        self
    }

    /// Sets the form of the losses.
    #[must_use]
    pub fn gan_loss(mut self, gan_loss: GanLoss) -> Self {
        self.gan_loss = gan_loss;
        self
    }

    /// Replaces the times at which the critic is trained.
    #[must_use]
    pub fn renoising(mut self, renoising: Renoising<'a>) -> Self {
        self.renoising = Some(renoising);
        self
    }

    /// Keeps the generator's gradient out of the fake score: it reaches x through x_t alone.
    #[must_use]
    pub fn detached_fake(mut self) -> Self {
        self.is_fake_detached = true;
        self
    }

    /// The loss that trains the critic, a scalar; times from [`renoising`](Self::renoising), fresh noise.
    ///
    /// # Errors
    /// As the term.
    pub fn critic_loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        let (path, x, student) = (self.teacher.path(), batch.x(), batch.student_time());
        let time = match &self.renoising {
            Some(renoising) => renoising.draw(path, x, student)?,
            None => Renoising::new(Uniform::new(0.0, 1.0 - self.step)?).draw(path, x, student)?,
        };
        self.critic_loss_at(batch, &time, &noise_like(x)?)
    }

    /// [`critic_loss`](Self::critic_loss) at given times (B of them) and noise (shaped like x).
    ///
    /// # Errors
    /// As the term, and [`Error::Shape`](crate::Error::Shape) and the like if times or noise do not fit.
    pub fn critic_loss_at(
        &self,
        batch: &Batch<'_>,
        time: &PostShift,
        noise: &Tensor,
    ) -> Result<Tensor> {
        batch.check_none_given()?;
        check_per_sample("time", time.tensor(), batch.x())?;
        check_like("noise", noise, batch.x())?;
        let to = self.target_time(time)?;
        let (real, fake) = {
            let _no_grad = no_grad_guard();
            let noised = self.teacher.path().renoise(&batch.as_data()?, time, noise)?;
            let real = self.teachers_step(batch, &noised, time, &to)?;
            (real, self.fakes_step(batch, &noised, time, &to)?)
        };
        let real = self.critic.logits(&real, &to, batch.cond())?;
        self.gan_loss.critic(&real, &self.critic.logits(&fake, &to, batch.cond())?)
    }

    /// t', checked.
    fn target_time(&self, time: &PostShift) -> Result<PostShift> {
        self.dm.check_path(&self.teacher)?;
        let to = time.moved(self.step)?;
        if self.is_fake_detached {
            let end = to.range().1;
            let requirement = "below 1 with a detached fake score: no gradient would be left";
            checked("time after the step", requirement, end, end < 1.0)?;
        }
        Ok(to)
    }

    fn teachers_step(
        &self,
        batch: &Batch<'_>,
        noised: &Tensor,
        time: &PostShift,
        to: &PostShift,
    ) -> Result<Tensor> {
        let output = self.teacher.predict_guided(noised, time, batch, self.guidance)?;
        let clean = output.into_sample()?;
        self.advance(noised, &clean, time, to)
    }

    fn fakes_step(
        &self,
        batch: &Batch<'_>,
        noised: &Tensor,
        time: &PostShift,
        to: &PostShift,
    ) -> Result<Tensor> {
        let clean = self.dm.fake().denoise(noised, time, batch.cond())?;
        let clean = if self.is_fake_detached { clean.f_detach()? } else { clean };
        self.advance(noised, &clean, time, to)
    }

    /// The deterministic step from `noised` to `to` with a clean prediction.
    fn advance(
        &self,
        noised: &Tensor,
        clean: &Tensor,
        time: &PostShift,
        to: &PostShift,
    ) -> Result<Tensor> {
        let path = self.teacher.path();
        path.renoise(clean, to, &path.implied_noise(noised, clean, time)?)
    }
}

impl Regularizer for AdversarialDistributionMatching<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        self.dm.check_path(probe.teacher())?;
        let (batch, time) = (probe.batch(), probe.tau_of_samples()?);
        let to = self.target_time(time)?;
        gradient_only_in("critic logits", probe.x(), |x| {
            let noised = self.teacher.path().renoise(x, time, probe.noise())?;
            let step = self.fakes_step(batch, &noised, time, &to)?;
            let fake = self.critic.logits(&step, &to, batch.cond())?;
            probe.observe("logit", || Ok(fake.f_mean(None::<tch::Kind>)?))?;
            self.gan_loss.generator(&fake, || {
                let _no_grad = no_grad_guard();
                let real = self.teachers_step(batch, probe.noised(), time, &to)?;
                self.critic.logits(&real, &to, batch.cond())
            })
        })
    }

    fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
        self.critic_loss(batch).map(Some)
    }
}

impl std::fmt::Debug for AdversarialDistributionMatching<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AdversarialDistributionMatching")
            .field("step", &self.step)
            .field("guidance", &self.guidance)
            .field("gan_loss", &self.gan_loss)
            .field("is_fake_detached", &self.is_fake_detached)
            .finish_non_exhaustive()
    }
}
