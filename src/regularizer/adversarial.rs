//! Adversarial regularization: a critic learns to tell samples from data, and the student learns to pass.

mod critic;
mod critic_evaluation;
mod critic_heads;
mod gan_loss;

pub use critic::CriticDraw;
pub use critic_evaluation::CriticEvaluation;
pub use critic_heads::CriticHeads;
pub use gan_loss::{CriticPenalty, GanLoss};

use tch::{Kind, Tensor, no_grad_guard};

use crate::augmentation::{Augmentation, AugmentationDraw};
use crate::batch::{Batch, Condition};
use crate::checks::{check_per_sample, check_size};
use crate::denoiser::FitsTeacher;
use crate::error::Result;
use crate::gradient::gradient_only_in;
use crate::network::IntoOutput;
use crate::numeric::{per_sample, sample_mean, widen_like};
use crate::path::{NoisePath, check_same_path};
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::regularizer::critic::Critic;
use crate::renoising::{Renoising, Uniform};
use crate::time::PostShift;
use crate::value::checked;

type Weight<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

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
/// | [`independent`](Self::independent) | times and noise of their own for real samples | off; on in LADD |
/// | [`mismatched`](Self::mismatched) | share of real samples under another's condition, as fakes | 0; Diffusion2GAN |
/// | [`weighted`](Self::weighted) | w(t) of both losses | 1; SenseFlow has t^2 |
/// | [`augmented`](Self::augmented) | one random change of both sides | none |
///
/// Weights of the generator's loss in public recipes are small: 5e-3 (SDXL, DMD2), 3e-2 (large
/// models, FastGen). Give the generator's group the same renoising as the critic's training: at other
/// times the critic is untrained.
///
/// # Shapes
/// x and real samples `[B, ..]`, as many of one as of the other, to a scalar in float32 or wider. The critic sees whole
/// samples, also those that a mask leaves out, and is trained on them; no gradient reaches what is left out.
///
/// # Forwards
/// Generator: critic 1, and its backward to x; 2 in the relativistic form. Critic: 2, one more with the
/// approximate R1, one more with mismatched samples; R1 differentiates twice, and takes a graph for that
/// under `tch::no_grad` too. Teacher: none.
///
/// **Gradients.** The generator's gradient is computed when the loss is, runs through the critic and
/// its frozen trunk, and ends in x alone: parameters of the critic receive none, also those with
/// `requires_grad`. The critic's loss sees detached samples: its gradient ends in the parameters of the
/// critic.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, in the relativistic form with the real sample at its place,
/// which is on its process. [`mismatched`](Self::mismatched) pairs are of the process too, so that each needs two samples;
/// they are other pairs than those of the whole batch, of the same law.
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) without [`Batch::with_real`], which the critic needs, and the generator in the
/// relativistic form; [`Error::Shape`](crate::Error::Shape) if there are not as many real samples as samples, or the
/// logits do not start with B, or samples to augment are no planes; [`Error::OutOfRange`](crate::Error::OutOfRange) for independent or
/// mismatched samples in the relativistic form, which compares pairs, and for mismatched samples in a batch
/// of one; [`Error::NoGradient`](crate::Error::NoGradient) if the generator's logits have no graph to x, as
/// when the closure detaches or checkpoints by hand; [`Error::Missing`](crate::Error::Missing) if
/// [`renoising`](Self::renoising) needs the student's times and there are none; [`Error::Network`](crate::Error::Network) from
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
    critic: Critic<'a>,
    gan_loss: GanLoss,
    penalty: Option<CriticPenalty>,
    independent: bool,
    mismatched: f64,
    weight: Option<Box<Weight<'a>>>,
    augmentation: Option<Augmentation>,
    /// Whose path was found to be that of the critic.
    fits: FitsTeacher,
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
            critic: Critic::new(critic),
            gan_loss: GanLoss::default(),
            penalty: None,
            independent: false,
            mismatched: 0.0,
            weight: None,
            augmentation: None,
            fits: FitsTeacher::default(),
        }
    }

    /// Sets the form of the losses.
    #[must_use]
    pub fn gan_loss(mut self, gan_loss: GanLoss) -> Self {
        self.gan_loss = gan_loss;
        self
    }

    /// Adds a penalty on the slope of the critic to its loss. [`penalty_loss`](Self::penalty_loss) is the
    /// penalty alone, for every k-th step.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless its strength is finite and not negative, and sigma positive.
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

    /// Draws times and noise for the real samples apart from those of the samples, as LADD's code in FastGen
    /// does unless told otherwise. The expectation of the critic's loss stays; not in the relativistic form.
    #[must_use]
    pub fn independent(mut self) -> Self {
        self.independent = true;
        self
    }

    /// Trains the critic on mismatched samples too, which it is to refuse: real ones with the condition of
    /// another real one, the next in the batch. They take the share `share` of the generated samples' part:
    ///
    /// ```text
    /// critic:  (1 - share) of the generated + share of the mismatched + the real        each a mean
    /// ```
    /// Diffusion2GAN's mix-and-match (arXiv 2405.05967), whose share is not known; 0.5 in AMD's code of LADD.
    /// Where samples follow the data, the best critic is `- ln(1 - share + share p(y) / p(y given c))`, not 0:
    /// it favours samples that are typical of their condition, as guidance does. Conditions of neighbours in
    /// the batch must differ, or true pairs are called false.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `share` is at least 0 and below 1.
    pub fn mismatched(mut self, share: f64) -> Result<Self> {
        let valid = (0.0..1.0).contains(&share);
        self.mismatched =
            checked("share of mismatched samples", "at least 0 and below 1", share, valid)?;
        Ok(self)
    }

    /// Weighs the losses of both players by w(t), `[B]` of post-shift times `[B]`, each sample by its own time.
    /// The penalty is not weighed. SenseFlow (arXiv 2506.00523) means `t^2`, that is (1 - noise level)^2; its
    /// code has this only without a shift.
    #[must_use]
    pub fn weighted<O: IntoOutput<Tensor>>(mut self, weight: impl Fn(&Tensor) -> O + 'a) -> Self {
        self.weight = Some(Box::new(move |time: &Tensor| weight(time).into_result()));
        self
    }

    /// Changes the clean samples of both sides by one draw of an augmentation before they are re-noised, so
    /// that the noise stays what the trunk knows. The gradient passes through it. The loss of a probe is then
    /// random; [`generator_loss_at`](Self::generator_loss_at) takes the draw.
    #[must_use]
    pub fn augmented(mut self, augmentation: Augmentation) -> Self {
        self.augmentation = Some(augmentation);
        self
    }

    /// An estimate of ln p_real / p_student at the noised samples of a probe, `[B]`, without a graph: the mean
    /// logit of each sample, which is this ratio for a non-saturating critic at its optimum. For
    /// [`DistributionMatching::divergence`](crate::DistributionMatching::divergence), real samples have to be
    /// the teacher's.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) for another form of the losses, for
    /// [`mismatched`](Self::mismatched) and for [`augmented`](Self::augmented) samples, whose logits are no such
    /// ratio; as the term.
    pub fn log_ratio(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let estimates = self.gan_loss == GanLoss::NonSaturating;
        let requirement = "1: logits of hinge and relativistic critics are no log ratios";
        checked("non-saturating form", requirement, f64::from(u8::from(estimates)), estimates)?;
        let (share, requirement) = (self.mismatched, "0: the ratio would be of other laws");
        checked("share of mismatched samples", requirement, share, share <= 0.0)?;
        let augmented = f64::from(u8::from(self.augmentation.is_some()));
        checked("augmentation of the critic", requirement, augmented, augmented <= 0.0)?;
        self.check_path(probe)?;
        let _no_grad = no_grad_guard();
        let tau = probe.tau_of_samples()?;
        let logits = self.critic.logits(probe.noised(), tau, probe.batch().cond())?;
        sample_mean(&logits)
    }

    /// The generator's loss at a probe for a given draw of an augmentation, whatever
    /// [`augmented`](Self::augmented) has set; `None` changes nothing.
    ///
    /// # Errors
    /// As the term.
    pub fn generator_loss_at(
        &self,
        probe: &Probe<'_>,
        augmentation: Option<&AugmentationDraw>,
    ) -> Result<Tensor> {
        let (batch, tau) = (probe.batch(), probe.tau_of_samples()?);
        self.check_path(probe)?;
        self.check_form()?;
        gradient_only_in("critic logits", probe.x(), |x| {
            let noised = self.path.renoise(&changed(x, augmentation)?, tau, probe.noise())?;
            let fake = self.critic.logits(&noised, tau, batch.cond())?;
            probe.observe("logit", || Ok(fake.f_mean(None::<Kind>)?))?;
            let each = self.gan_loss.of_generator(&fake, || {
                let _no_grad = no_grad_guard();
                let real = changed(&paired_real(batch)?, augmentation)?;
                let real = self.renoise(&real, tau, probe.noise())?;
                let real = self.critic.logits(&real, tau, batch.real_cond())?;
                check_size("critic logits", &real, &fake.size())?;
                Ok(real)
            })?;
            self.average(&each, tau)
        })
    }

    fn check_path(&self, probe: &Probe<'_>) -> Result<()> {
        let teacher = probe.teacher();
        self.fits.check(teacher, || check_same_path(&*self.path, teacher.path()))
    }

    /// The relativistic form compares pairs, which the options for unpaired samples would tear apart.
    fn check_form(&self) -> Result<()> {
        if self.gan_loss != GanLoss::Relativistic {
            return Ok(());
        }
        let requirement = "off in the relativistic form, which compares pairs";
        checked("independent draws", requirement, 1.0, !self.independent)?;
        let share = self.mismatched;
        checked("share of mismatched samples", requirement, share, share <= 0.0).map(|_| ())
    }

    /// The weighted mean of losses `[B, K]` at their times.
    fn average(&self, each: &Tensor, time: &PostShift) -> Result<Tensor> {
        let Some(weight) = &self.weight else { return Ok(each.f_mean(None::<Kind>)?) };
        let weight = weight(time.tensor())?;
        check_per_sample("weight of a time", &weight, each)?;
        let weight = per_sample(&widen_like(&weight, each)?, each)?;
        Ok(each.f_mul(&weight)?.f_mean(None::<Kind>)?)
    }

    /// Detached, so that the critic's loss leaves the student alone.
    fn renoise(&self, x: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        Ok(self.path.renoise(&x.f_detach()?, time, noise)?.f_detach()?)
    }
}

/// The real samples in the type of x, one for each sample.
fn paired_real(batch: &Batch<'_>) -> Result<Tensor> {
    let real = batch.real()?;
    check_size("real samples", real, &batch.x().size())?;
    Ok(real.f_to_kind(batch.x().f_kind()?)?)
}

/// The samples after a draw of an augmentation.
fn changed(x: &Tensor, augmentation: Option<&AugmentationDraw>) -> Result<Tensor> {
    augmentation.map_or_else(|| Ok(x.shallow_clone()), |draw| draw.apply(x))
}

impl Regularizer for Adversarial<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let draw = |augmentation: Augmentation| augmentation.draw(probe.x());
        let draw = self.augmentation.map(draw).transpose()?;
        self.generator_loss_at(probe, draw.as_ref())
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
            .field("independent", &self.independent)
            .field("mismatched", &self.mismatched)
            .field("augmentation", &self.augmentation)
            .finish_non_exhaustive()
    }
}
