//! Score identity (SiD): the gradient of a Fisher divergence, through teacher and fake score.

use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::gradient::gradient_only_in;
use crate::guidance::Guidance;
use crate::numeric::{mean, row_squares, sample_sum};
use crate::probe::Probe;
use crate::regularizer::{DistributionMatching, Regularizer};
use crate::value::{Positive, checked, is_finite};

/// Score identity distillation: moves the samples down a divergence of Fisher's kind between the noised
/// laws of student and teacher.
///
/// ```text
/// SiD:  loss = mean delta ((x0_teacher - x) - alpha delta) / n     delta = x0_teacher - x0_fake
/// SIM:  loss = delta / sqrt(|delta|^2 + c^2) (x0_fake - x)         of each sample, over its elements
/// ```
/// Zhou et al., Score identity Distillation (arXiv 2404.04057), whose code has alpha 1.2 or 1, and Luo et
/// al., One-Step Diffusion Distillation through Score Implicit Matching (arXiv 2410.16794), whose c could
/// not be verified. n is the probe's [`Normalizer`](crate::Normalizer); [`Normalizer::unguarded`] of the
/// conditional one is SiD's, but for its clip at 1e-5.
///
/// Nothing but n is detached: the gradient passes through x, the noised samples, and both networks,
/// whose parameters receive none. With the predictions detached, SiD would be Distribution Matching for
/// every alpha. The value may be negative: with an exact fake score it is (1 - alpha) E |delta|^2.
///
/// The fake score belongs to a [`DistributionMatching`], whose
/// [`denoising_loss`](DistributionMatching::denoising_loss) trains it; that term need not be part of the
/// objective.
///
/// | parameter | meaning | range |
/// |---|---|---|
/// | `alpha` | the share of delta squared that is taken off | finite; 1.2 or 1 in SiD, 1 in Self-Forcing |
/// | [`guided`](Self::guided) | guidance of the teacher | neutral |
///
/// [`Normalizer::unguarded`]: crate::Normalizer::unguarded
///
/// # Shapes
/// x `[B, ..]` to a scalar in float32 or wider: a mean over all elements. SiD sums over the elements and
/// multiplies by 100: its weight here is 100 times the number of elements of a sample.
///
/// # Forwards
/// Teacher: one with a graph (two with guidance), and one without for the normaliser, unless it is off.
/// Fake score: one with a graph.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, unless the normaliser is
/// [`over_batch`](crate::Normalizer::over_batch).
///
/// # Errors
/// As [`DistributionMatching`]; [`Error::Missing`](crate::Error::Missing) without the null condition under
/// guidance; [`Error::NoGradient`](crate::Error::NoGradient) if both networks cut the graph.
///
/// # Example
/// ```
/// use decoupled_dmd::{Denoiser, DistributionMatching, Prediction, RectifiedFlow, ScoreIdentity};
/// # let network = |x: &tch::Tensor, _: &tch::Tensor, _: &decoupled_dmd::Condition| x * 0.5;
/// let dm = DistributionMatching::new(Denoiser::new(RectifiedFlow, Prediction::Sample, network));
/// let sid = ScoreIdentity::new(&dm, 1.0)?;
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct ScoreIdentity<'a> {
    dm: &'a DistributionMatching<'a>,
    form: Form,
    guidance: Guidance,
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Alpha(f64),
    PseudoHuber(f64),
}

impl<'a> ScoreIdentity<'a> {
    /// SiD with the fake score of `dm`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `alpha` is finite.
    pub fn new(dm: &'a DistributionMatching<'a>, alpha: f64) -> Result<Self> {
        let alpha = checked("alpha of the score identity", "finite", alpha, is_finite(alpha))?;
        Ok(Self { dm, form: Form::Alpha(alpha), guidance: Guidance::NEUTRAL })
    }

    /// SIM with a pseudo-Huber distance over whole samples, linear beyond `c`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `c` is finite and positive.
    pub fn pseudo_huber(dm: &'a DistributionMatching<'a>, c: f64) -> Result<Self> {
        let c = Positive::new("width of the pseudo-Huber distance", c)?.get();
        Ok(Self { dm, form: Form::PseudoHuber(c), guidance: Guidance::NEUTRAL })
    }

    /// Guides the teacher.
    #[must_use]
    pub fn guided(mut self, guidance: Guidance) -> Self {
        self.guidance = guidance;
        self
    }

    /// Clean predictions of teacher and fake score at the noised `x`, with a graph.
    fn predictions(&self, probe: &Probe<'_>, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (batch, tau, teacher) = (probe.batch(), probe.tau(), probe.teacher());
        let noised = teacher.path().renoise(x, tau, probe.noise())?;
        let real = teacher.predict_guided(&noised, tau, batch, self.guidance)?.into_sample()?;
        Ok((real, self.dm.fake().denoise(&noised, tau, batch.cond())?))
    }
}

impl Regularizer for ScoreIdentity<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        self.dm.check_path(probe.teacher())?;
        gradient_only_in("clean predictions", probe.x(), |x| {
            let (real, fake) = self.predictions(probe, x)?;
            probe.observe_scores(|| Ok((real.f_detach()?, fake.f_detach()?)))?;
            let delta = real.f_sub(&fake)?;
            match self.form {
                Form::Alpha(alpha) => {
                    let scale = {
                        let _no_grad = no_grad_guard();
                        probe.normalize(x.f_ones_like()?)?
                    };
                    let rest = real.f_sub(x)?.f_sub(&delta.times(alpha)?)?;
                    mean(&probe.masked(&delta.f_mul(&rest)?)?.f_mul(&scale)?)
                }
                Form::PseudoHuber(c) => {
                    let delta = probe.masked(&delta)?;
                    let rest = probe.masked(&fake.f_sub(x)?)?;
                    let product = sample_sum(&delta.f_mul(&rest)?)?;
                    let square = row_squares(&delta.f_flatten(1, -1)?)?;
                    let length = square.plus(c * c)?.f_sqrt()?;
                    let elements = x.numel() as f64;
                    let sum = product.f_div(&length)?.f_sum(None::<Kind>)?;
                    Ok(sum.over(elements)?)
                }
            }
        })
    }
}
