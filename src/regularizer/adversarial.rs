//! Adversarial regularization: a critic learns to tell samples from data, and the student learns to pass.

mod critic_evaluation;
mod critic_heads;
mod gan_loss;

pub use critic_evaluation::CriticEvaluation;
pub use critic_heads::CriticHeads;
pub use gan_loss::{CriticPenalty, GanLoss};
use std::cell::OnceCell;

use tch::{Kind, Tensor, no_grad_guard};

use crate::batch::{Batch, Condition};
use crate::checks::{check_floating, check_like, check_per_sample, check_size};
use crate::error::{Error, Result};
use crate::gradient::gradient_only_in;
use crate::network::IntoOutput;
use crate::numeric::{batch_size, noise_like, once, sample_mean, widen};
use crate::path::{NoisePath, check_same_path};
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::renoising::{Renoising, Uniform};
use crate::time::PostShift;
use crate::value::checked;

type Critic<'a> = dyn Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor> + 'a;

/// Adversarial loss: moves the samples to where a critic, trained along with the student, takes them for
/// real.
///
/// ```text
/// generator:  mean softplus(-D(x_t))                                at tau of the probe
/// critic:     mean softplus(D(x_t)) + mean softplus(-D(y_t))        [`critic_loss`]
/// ```
/// in the non-saturating form; others in [`GanLoss`]. x_t and y_t are a sample and a real one
/// re-noised to the *same* tau with the *same* noise, as in the GAN losses of DMD2 (Yin et al. 2024),
/// LADD (Sauer et al. 2024) and APT (Lin et al. 2025), which draw them apart: the expectation of the
/// first two forms is unchanged, and the difference in the third varies less.
///
/// The critic is a closure of the noised sample `[B, ..]`, the time `[B]` and the condition that
/// returns logits `[B, K]` (any shape that starts with B). It may be a network of its own, or
/// [`CriticHeads`] on features of the frozen teacher or of the fake score, at several depths.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | `path` | the teacher's noise path, shift included | |
/// | `critic` | D | |
/// | [`gan_loss`](Self::gan_loss) | form of the losses | non-saturating; DMD2 |
/// | [`penalty`](Self::penalty) | R1 or its finite difference | none; DMD2 |
/// | [`renoising`](Self::renoising) | the times at which the critic is trained | U(0, 1), then the shift; ours |
///
/// Weights of the generator's loss in public recipes are small: 5e-3 (SDXL, DMD2), 3e-2 (large
/// models, FastGen). Give the generator's group the same renoising as the critic's training: at other
/// times the critic is untrained.
///
/// # Shapes
/// x and real samples `[B, ..]`, as many of one as of the other, to a scalar in float32 or wider.
///
/// # Forwards
/// Generator: critic 1, and its backward to x; 2 in the relativistic form. Critic: 2, with the
/// approximate R1 3; R1 differentiates twice, and takes a graph for that under `tch::no_grad` too.
/// Teacher: none.
///
/// **Gradients.** The generator's gradient is computed when the loss is, runs through the critic and
/// its frozen trunk, and ends in x alone: parameters of the critic receive none, also those with
/// `requires_grad`. The critic's loss sees detached samples: its gradient ends in the parameters of the
/// critic.
///
/// # Errors
/// [`Error::Missing`] without [`Batch::with_real`], which the critic needs, and the generator in the
/// relativistic form; [`Error::Shape`] if there are not as many real samples as samples, or the
/// logits do not start with B; [`Error::NoGradient`] if the generator's logits have no graph to x, as
/// when the closure detaches or checkpoints by hand; [`Error::Missing`] if
/// [`renoising`](Self::renoising) needs the student's times and there are none; [`Error::Network`] from
/// the closure.
///
/// # Example
/// ```
/// use decoupled_dmd::{
///     Adversarial, Batch, Condition, CriticPenalty, GanLoss, NoisePath, RectifiedFlow, Shift,
/// };
/// # use tch::{Device, Kind, Tensor};
/// # let options = (Kind::Float, Device::Cpu);
/// # let weight = Tensor::ones([1, 6], options).set_requires_grad(true);
/// let critic = |x: &Tensor, _t: &Tensor, _cond: &Condition| x.f_linear(&weight, None::<&Tensor>);
/// let gan = Adversarial::new(RectifiedFlow.shifted(Shift::new(3.0)?), critic)
///     .gan_loss(GanLoss::Hinge)
///     .penalty(CriticPenalty::ApproximateR1 { weight: 100.0, sigma: 0.01 })?;
///
/// // Group::regularizer("gan", 5e-3, &gan) for the student; and, on every step, for the critic:
/// # let (x, images) = (Tensor::randn([4, 6], options), Tensor::randn([4, 6], options));
/// # let cond = Condition::none();
/// let batch = Batch::new(&x, &cond)?.with_real(&images)?;
/// gan.critic_loss(&batch)?.backward();
/// # assert!(weight.grad().defined());
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
///
/// [`critic_loss`]: Self::critic_loss
pub struct Adversarial<'a> {
    path: Box<dyn NoisePath + 'a>,
    renoising: Renoising<'a>,
    critic: Box<Critic<'a>>,
    gan_loss: GanLoss,
    penalty: Option<CriticPenalty>,
    /// Set once the path of the critic was compared with the teacher's.
    shares_path: OnceCell<()>,
}

impl<'a> Adversarial<'a> {
    /// With a critic on `path`, trained at times with the shift of the path.
    pub fn new<O: IntoOutput<Tensor>>(
        path: impl NoisePath + 'a,
        critic: impl Fn(&Tensor, &Tensor, &Condition) -> O + 'a,
    ) -> Self {
        Self {
            path: Box::new(path),
            renoising: Renoising::new(Uniform::FULL),
            critic: Box::new(move |x, t, cond| critic(x, t, cond).into_result()),
            gan_loss: GanLoss::default(),
            penalty: None,
            shares_path: OnceCell::new(),
        }
    }

    /// Sets the form of the losses.
    #[must_use]
    pub fn gan_loss(mut self, gan_loss: GanLoss) -> Self {
        self.gan_loss = gan_loss;
        self
    }

    /// Adds a penalty on the slope of the critic to its loss.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless its strength is finite and not negative, and sigma positive.
    pub fn penalty(mut self, penalty: CriticPenalty) -> Result<Self> {
        self.penalty = Some(penalty.check()?);
        Ok(self)
    }

    /// Replaces the times at which the critic is trained.
    #[must_use]
    pub fn renoising(mut self, renoising: Renoising<'a>) -> Self {
        self.renoising = renoising;
        self
    }

    /// An estimate of ln p_real / p_student at the noised samples of a probe, `[B]`, without a graph: the mean
    /// logit of each sample, which is this ratio for a non-saturating critic at its optimum. For
    /// [`DistributionMatching::divergence`](crate::DistributionMatching::divergence), real samples have to be
    /// the teacher's.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] for another form of the losses, whose logits are no such ratio; as the term.
    pub fn log_ratio(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let estimates = self.gan_loss == GanLoss::NonSaturating;
        let requirement = "1: logits of hinge and relativistic critics are no log ratios";
        checked("non-saturating form", requirement, f64::from(u8::from(estimates)), estimates)?;
        let _no_grad = no_grad_guard();
        let logits = self.logits(probe.noised(), probe.tau(), probe.batch().cond())?;
        sample_mean(&logits)
    }

    /// The loss that trains the critic, penalty included, a scalar; times from
    /// [`renoising`](Self::renoising), fresh noise.
    ///
    /// # Errors
    /// As the term.
    pub fn critic_loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        Ok(self.critic_evaluation(batch)?.loss)
    }

    /// [`critic_loss`](Self::critic_loss) at given times (B of them) and noise; `perturbation` is the
    /// unit noise n of the approximate R1; other penalties do not read it. Both are shaped like x.
    ///
    /// # Errors
    /// As the term, and [`Error::Shape`] and the like if times or noise do not fit.
    pub fn critic_loss_at(
        &self,
        batch: &Batch<'_>,
        time: &PostShift,
        noise: &Tensor,
        perturbation: &Tensor,
    ) -> Result<Tensor> {
        Ok(self.critic_evaluation_at(batch, time, noise, perturbation)?.loss)
    }

    /// [`critic_loss`](Self::critic_loss) with its logits, for a log.
    ///
    /// # Errors
    /// As the term.
    pub fn critic_evaluation(&self, batch: &Batch<'_>) -> Result<CriticEvaluation> {
        let x = batch.x();
        let time = self.renoising.draw(&*self.path, x, batch.student_time())?;
        self.critic_evaluation_at(batch, &time, &noise_like(x)?, &noise_like(x)?)
    }

    /// [`critic_evaluation`](Self::critic_evaluation) at given times and noise, as
    /// [`critic_loss_at`](Self::critic_loss_at).
    ///
    /// # Errors
    /// As [`critic_loss_at`](Self::critic_loss_at).
    pub fn critic_evaluation_at(
        &self,
        batch: &Batch<'_>,
        time: &PostShift,
        noise: &Tensor,
        perturbation: &Tensor,
    ) -> Result<CriticEvaluation> {
        check_per_sample("time", time.tensor(), batch.x())?;
        check_like("noise", noise, batch.x())?;
        check_like("perturbation", perturbation, batch.x())?;
        let real_cond = batch.real_cond();
        let fake = self.renoise(batch.x(), time, noise)?;
        let real = self.renoise(&paired_real(batch)?, time, noise)?;
        let fake_logits = self.logits(&fake, time, batch.cond())?;
        let (real_logits, penalty) = match self.penalty {
            None => (self.logits(&real, time, real_cond)?, None),
            // The slope needs a graph, also under the caller's no_grad.
            Some(CriticPenalty::R1 { gamma }) => tch::with_grad(|| -> Result<_> {
                let real = real.f_set_requires_grad(true)?;
                let logits = self.logits(&real, time, real_cond)?;
                let slope = slope(&logits, &real)?.f_mul_scalar(0.5 * gamma)?;
                Ok((logits, Some(slope)))
            })?,
            Some(CriticPenalty::ApproximateR1 { weight, sigma }) => {
                let logits = self.logits(&real, time, real_cond)?;
                let shift = widen(perturbation)?.f_mul_scalar(sigma)?;
                let moved = self.logits(&real.f_add(&shift)?, time, real_cond)?;
                let square = logits.f_sub(&moved)?.f_square()?.f_mean(None::<Kind>)?;
                (logits, Some(square.f_mul_scalar(weight)?))
            }
        };
        check_size("critic logits", &real_logits, &fake_logits.size())?;
        let loss = self.gan_loss.critic(&real_logits, &fake_logits)?;
        let loss = match penalty {
            Some(penalty) => loss.f_add(&penalty)?,
            None => loss,
        };
        let (fake_logits, real_logits) = (fake_logits.f_detach()?, real_logits.f_detach()?);
        Ok(CriticEvaluation { loss, fake_logits, real_logits })
    }

    /// Detached, so that the critic's loss leaves the student alone.
    fn renoise(&self, x: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        Ok(self.path.renoise(&x.f_detach()?, time, noise)?.f_detach()?)
    }

    /// `[B, K]`, in float32 or wider.
    fn logits(&self, noised: &Tensor, time: &PostShift, cond: &Condition) -> Result<Tensor> {
        let logits = (self.critic)(noised, &time.for_network(noised)?, cond)?;
        let (found, batch) = (logits.size(), batch_size(noised));
        if batch_size(&logits) != batch || logits.numel() == 0 {
            return Err(Error::shape("critic logits", format!("[{batch}, K]"), &found));
        }
        check_floating("critic logits", logits.f_kind()?)?;
        Ok(widen(&logits)?.f_reshape([batch, -1])?)
    }
}

/// The real samples in the type of x, one for each sample.
fn paired_real(batch: &Batch<'_>) -> Result<Tensor> {
    let real = batch.real()?;
    check_size("real samples", real, &batch.x().size())?;
    Ok(real.f_to_kind(batch.x().f_kind()?)?)
}

/// Mean over samples of the squared slope of their mean logit, with a graph.
fn slope(logits: &Tensor, at: &Tensor) -> Result<Tensor> {
    // Samples do not mix, so the slope of the sum holds the slope of each.
    let sum = logits.f_mean_dim(&[1i64][..], false, None::<Kind>)?.f_sum(None::<Kind>)?;
    if !sum.requires_grad() {
        // The logits depend on neither sample nor parameters: there is no graph to differentiate.
        return Ok(sum.f_zeros_like()?);
    }
    let gradients = Tensor::f_run_backward(&[&sum], &[at], true, true)?;
    match gradients.into_iter().next().filter(Tensor::defined) {
        Some(slope) => {
            let squared = widen(&slope)?.f_flatten(1, -1)?.f_square()?;
            let per_sample = squared.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?;
            Ok(per_sample.f_mean(None::<Kind>)?)
        }
        // The logits do not depend on the sample.
        None => Ok(sum.f_zeros_like()?),
    }
}

impl Regularizer for Adversarial<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let (batch, tau) = (probe.batch(), probe.tau());
        once(&self.shares_path, || check_same_path(&*self.path, probe.teacher().path()))?;
        gradient_only_in("critic logits", probe.x(), |x| {
            let noised = self.path.renoise(x, tau, probe.noise())?;
            let fake = self.logits(&noised, tau, batch.cond())?;
            probe.observe("logit", || Ok(fake.f_mean(None::<Kind>)?))?;
            self.gan_loss.generator(&fake, || {
                let _no_grad = no_grad_guard();
                let real = self.renoise(&paired_real(batch)?, tau, probe.noise())?;
                let real = self.logits(&real, tau, batch.real_cond())?;
                check_size("critic logits", &real, &fake.size())?;
                Ok(real)
            })
        })
    }

    fn own_loss(&self, batch: &Batch<'_>) -> Result<Option<Tensor>> {
        self.critic_loss(batch).map(Some)
    }
}

impl std::fmt::Debug for Adversarial<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Adversarial")
            .field("gan_loss", &self.gan_loss)
            .field("penalty", &self.penalty)
            .field("renoising", &self.renoising)
            .finish_non_exhaustive()
    }
}
