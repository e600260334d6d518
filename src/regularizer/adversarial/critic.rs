//! The critic's turn: its loss, its draws, and the penalty alone.

use tch::{Kind, Tensor};

use super::{Adversarial, changed, paired_real};
use crate::arithmetic::Arithmetic;
use crate::augmentation::AugmentationDraw;
use crate::batch::{Batch, Condition};
use crate::checks::{check_like, check_per_sample, check_size};
use crate::error::Result;
use crate::numeric::{batch_size, noise_like, widen};
use crate::regularizer::{CriticEvaluation, CriticPenalty, GanLoss};
use crate::time::PostShift;
use crate::value::checked;

/// The random numbers of one evaluation of the critic; [`Adversarial::draw`] makes them, and any may be
/// replaced before [`Adversarial::critic_evaluation_with`] takes them.
#[derive(Debug)]
#[non_exhaustive]
pub struct CriticDraw {
    /// Times of the samples, and of the real ones too unless `real` says otherwise, B of them.
    pub time: PostShift,
    /// Unit noise of the same, shaped like x.
    pub noise: Tensor,
    /// Times and unit noise of the real samples where they are [`independent`](Adversarial::independent).
    pub real: Option<(PostShift, Tensor)>,
    /// The unit noise n of the approximate R1, shaped like x.
    pub perturbation: Tensor,
    /// The change of both sides; `None` changes nothing.
    pub augmentation: Option<AugmentationDraw>,
}

impl Adversarial<'_> {
    /// The loss that trains the critic, penalty included, a scalar; times from
    /// [`renoising`](Self::renoising), fresh noise.
    ///
    /// # Errors
    /// As the term.
    pub fn critic_loss(&self, batch: &Batch<'_>) -> Result<Tensor> {
        Ok(self.critic_evaluation(batch)?.loss)
    }

    /// [`critic_loss`](Self::critic_loss) at given times (B of them) and noise; `perturbation` is the
    /// unit noise n of the approximate R1; other penalties do not read it. Both are shaped like x. Times and
    /// noise serve both kinds of samples, also where they are [`independent`](Self::independent); an
    /// augmentation is drawn.
    ///
    /// # Errors
    /// As the term, and [`Error::Shape`](crate::Error::Shape) and the like if times or noise do not fit.
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
        self.critic_evaluation_with(batch, &self.draw(batch)?)
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
        let draw = CriticDraw {
            time: time.shallow_clone(),
            noise: noise.shallow_clone(),
            real: None,
            perturbation: perturbation.shallow_clone(),
            augmentation: self.draw_augmentation(batch.x())?,
        };
        self.critic_evaluation_with(batch, &draw)
    }

    /// The random numbers of one evaluation of the critic, from libtorch's global generator.
    ///
    /// # Errors
    /// [`Error::Missing`](crate::Error::Missing) if [`renoising`](Self::renoising) needs the student's times
    /// and there are none.
    pub fn draw(&self, batch: &Batch<'_>) -> Result<CriticDraw> {
        let x = batch.x();
        let times = || self.renoising.draw(&*self.path, x, batch.student_time());
        let (time, noise, perturbation) = (times()?, noise_like(x)?, noise_like(x)?);
        let real = if self.independent { Some((times()?, noise_like(x)?)) } else { None };
        let augmentation = self.draw_augmentation(x)?;
        Ok(CriticDraw { time, noise, real, perturbation, augmentation })
    }

    fn draw_augmentation(&self, x: &Tensor) -> Result<Option<AugmentationDraw>> {
        self.augmentation.map(|augmentation| augmentation.draw(x)).transpose()
    }

    /// [`critic_evaluation`](Self::critic_evaluation) for given random numbers.
    ///
    /// # Errors
    /// As [`critic_loss_at`](Self::critic_loss_at).
    pub fn critic_evaluation_with(
        &self,
        batch: &Batch<'_>,
        draw: &CriticDraw,
    ) -> Result<CriticEvaluation> {
        let CriticDraw { time, noise, perturbation, augmentation, .. } = draw;
        let (real_time, real_noise) = match &draw.real {
            Some((time, noise)) => (time, noise),
            None => (time, noise),
        };
        self.check_form()?;
        batch.check_none_given()?;
        for (time, noise) in [(time, noise), (real_time, real_noise)] {
            check_per_sample("time", time.tensor(), batch.x())?;
            check_like("noise", noise, batch.x())?;
        }
        check_like("perturbation", perturbation, batch.x())?;
        let real_cond = batch.real_cond();
        let renoise = |x: &Tensor, time: &PostShift, noise: &Tensor| {
            self.renoise(&changed(&x.f_detach()?, augmentation.as_ref())?, time, noise)
        };
        let fake = renoise(&batch.as_data()?, time, noise)?;
        let clean = paired_real(batch)?;
        let real = renoise(&clean, real_time, real_noise)?;
        let fake_logits = self.critic.logits(&fake, time, batch.cond())?;
        let (real_logits, penalty) = match self.penalty {
            None => (self.critic.logits(&real, real_time, real_cond)?, None),
            Some(penalty) => {
                let (logits, penalty) =
                    self.penalised(penalty, &real, real_time, real_cond, perturbation)?;
                (logits, Some(penalty))
            }
        };
        check_size("critic logits", &real_logits, &fake_logits.size())?;
        let mut loss = if self.gan_loss == GanLoss::Relativistic {
            let difference = fake_logits.f_sub(&real_logits)?;
            self.average(&self.gan_loss.of_fake(&difference)?, time)?
        } else {
            let mut fakes = self.average(&self.gan_loss.of_fake(&fake_logits)?, time)?;
            if self.mismatched > 0.0 {
                let count = batch_size(&clean);
                let what = "number of samples to mismatch";
                checked(what, "at least 2", count as f64, count > 1)?;
                let others = renoise(&clean.f_roll([1], [0])?, real_time, real_noise)?;
                let logits = self.critic.logits(&others, real_time, real_cond)?;
                let others = self.average(&self.gan_loss.of_fake(&logits)?, real_time)?;
                fakes = fakes.toward(&others, self.mismatched)?;
            }
            fakes.f_add(&self.average(&self.gan_loss.of_real(&real_logits)?, real_time)?)?
        };
        if let Some(penalty) = penalty {
            loss = loss.f_add(&penalty)?;
        }
        let (fake_logits, real_logits) = (fake_logits.f_detach()?, real_logits.f_detach()?);
        Ok(CriticEvaluation { loss, fake_logits, real_logits })
    }

    /// A penalty alone, a scalar, at the real samples of a batch; times from [`renoising`](Self::renoising),
    /// fresh noise, no augmentation. Taken every k-th step with the weight k, without
    /// [`penalty`](Self::penalty), it is the *lazy* R1 of StyleGAN2 and D2O (16 in both):
    ///
    /// ```no_run
    /// # use decoupled_dmd::{Adversarial, Batch, Condition, CriticPenalty, RectifiedFlow, Result};
    /// # use tch::Tensor;
    /// # fn step(gan: &Adversarial<'_>, batch: &Batch<'_>, step: usize) -> Result<()> {
    /// let mut loss = gan.critic_loss(batch)?;
    /// if step % 16 == 0 {
    ///     loss += gan.penalty_loss(batch, CriticPenalty::R1 { gamma: 0.1 })? * 16.0;
    /// }
    /// # Ok(()) }
    /// ```
    /// The number of real samples need not be that of the samples: Diffusion2GAN penalises one random row of
    /// the batch. A condition cannot be cut into rows here, so such a batch is the caller's to make; its
    /// expectation is the penalty of all rows. A penalty on the *sum* of the K logits of a sample, as in D2O,
    /// has the gamma `K^2` times as large here.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) as [`penalty`](Self::penalty); as the term.
    pub fn penalty_loss(&self, batch: &Batch<'_>, penalty: CriticPenalty) -> Result<Tensor> {
        let real = batch.real()?;
        // The student's times are those of the samples.
        let is_paired = batch_size(real) == batch.batch_size();
        let student = batch.student_time().filter(|_| is_paired);
        let time = self.renoising.draw(&*self.path, real, student)?;
        self.penalty_loss_at(batch, penalty, &time, &noise_like(real)?, &noise_like(real)?)
    }

    /// [`penalty_loss`](Self::penalty_loss) at given times, one for each real sample, noise and perturbation,
    /// shaped like the real samples, as [`critic_loss_at`](Self::critic_loss_at).
    ///
    /// # Errors
    /// As [`penalty_loss`](Self::penalty_loss), and [`Error::Shape`](crate::Error::Shape) and the like if
    /// times or noise do not fit.
    pub fn penalty_loss_at(
        &self,
        batch: &Batch<'_>,
        penalty: CriticPenalty,
        time: &PostShift,
        noise: &Tensor,
        perturbation: &Tensor,
    ) -> Result<Tensor> {
        let penalty = penalty.check()?;
        let real = batch.real()?;
        check_per_sample("time", time.tensor(), real)?;
        check_like("noise", noise, real)?;
        check_like("perturbation", perturbation, real)?;
        let real = self.renoise(&real.f_to_kind(batch.x().f_kind()?)?, time, noise)?;
        Ok(self.penalised(penalty, &real, time, batch.real_cond(), perturbation)?.1)
    }

    /// The logits `[B, K]` of noised real samples, and their penalty.
    fn penalised(
        &self,
        penalty: CriticPenalty,
        real: &Tensor,
        time: &PostShift,
        cond: &Condition,
        perturbation: &Tensor,
    ) -> Result<(Tensor, Tensor)> {
        match penalty {
            // The slope needs a graph, also under the caller's no_grad.
            CriticPenalty::R1 { gamma } => tch::with_grad(|| {
                let real = real.f_set_requires_grad(true)?;
                let logits = self.critic.logits(&real, time, cond)?;
                let slope = slope(&logits, &real)?.times(0.5 * gamma)?;
                Ok((logits, slope))
            }),
            CriticPenalty::ApproximateR1 { weight, sigma } => {
                let logits = self.critic.logits(real, time, cond)?;
                let shift = widen(perturbation)?.times(sigma)?;
                let moved = self.critic.logits(&real.f_add(&shift)?, time, cond)?;
                let square = logits.f_sub(&moved)?.f_square()?.f_mean(None::<Kind>)?;
                Ok((logits, square.times(weight)?))
            }
        }
    }
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
