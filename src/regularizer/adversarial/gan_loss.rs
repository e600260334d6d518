//! GAN losses of critic and generator, and penalties of the critic.

use tch::{Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::value::{checked, is_finite, is_positive};

/// The losses of critic and generator from logits, each a mean over samples and heads. D is the critic, r a
/// real sample, f a generated one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum GanLoss {
    /// Critic `softplus(D(f)) + softplus(-D(r))`, generator `softplus(-D(f))` (Goodfellow et al.
    /// 2014; DMD2, FastGen). The generator's gradient is bounded, and strongest where it loses.
    #[default]
    NonSaturating,
    /// Critic `relu(1 - D(r)) + relu(1 + D(f))`, generator `-D(f)` (Lim & Ye 2017; LADD, ADM). The
    /// generator's loss has no lower bound.
    Hinge,
    /// Critic `softplus(D(f) - D(r))`, generator `softplus(D(r) - D(f))` (Jolicoeur-Martineau 2018;
    /// R3GAN, AAPT): every sample is judged against the real one at its place in the batch. Costs the
    /// generator a second forward, and R3GAN wants a gradient penalty with it.
    Relativistic,
}

impl GanLoss {
    /// The critic's loss, a scalar, of logits `[B, K]` of real and generated samples.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails, as for logits that do not fit each other.
    pub fn critic(self, real: &Tensor, fake: &Tensor) -> Result<Tensor> {
        match self {
            Self::Relativistic => mean(&self.of_fake(&fake.f_sub(real)?)?),
            _ => Ok(mean(&self.of_fake(fake)?)?.f_add(&mean(&self.of_real(real)?)?)?),
        }
    }

    /// The generator's loss, a scalar, from the logits `[B, K]` of generated samples; `real` is called only
    /// where the loss needs the logits of real samples.
    ///
    /// # Errors
    /// As [`critic`](Self::critic); errors of `real`.
    pub fn generator(self, fake: &Tensor, real: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        mean(&self.of_generator(fake, real)?)
    }

    /// The critic's loss of each logit of real samples, but for the relativistic form.
    pub(super) fn of_real(self, real: &Tensor) -> Result<Tensor> {
        self.of_fake(&real.f_neg()?)
    }

    /// The critic's loss of each logit of generated samples; in the relativistic form of each difference from
    /// a real one.
    pub(super) fn of_fake(self, fake: &Tensor) -> Result<Tensor> {
        match self {
            Self::NonSaturating | Self::Relativistic => softplus(fake),
            Self::Hinge => Ok(fake.plus(1.0)?.f_relu()?),
        }
    }

    /// The generator's loss of each logit.
    pub(super) fn of_generator(
        self,
        fake: &Tensor,
        real: impl FnOnce() -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self {
            Self::NonSaturating => softplus(&fake.f_neg()?),
            Self::Hinge => Ok(fake.f_neg()?),
            Self::Relativistic => softplus(&real()?.f_sub(fake)?),
        }
    }
}

/// A penalty on the slope of the critic, added to its loss at the *noised* real samples x_t.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum CriticPenalty {
    /// `gamma / 2  mean over samples of |grad D(x_t)|^2`, D being the mean logit of a sample (Mescheder
    /// et al. 2018). Differentiates twice: fused attention kernels and gradient checkpointing refuse.
    /// There is no default that fits all: gamma scales with the number of elements of a sample.
    R1 {
        /// The strength, finite and at least 0.
        gamma: f64,
    },
    /// `weight  mean over samples and logits of (D(x_t) - D(x_t + sigma n))^2`, n unit noise: the
    /// finite difference of APT (Lin et al. 2025), with any network, for one more forward. For
    /// a single logit its expectation over n is, to first order, `weight sigma^2 |grad D(x_t)|^2`:
    /// R1 with `gamma = 2 weight sigma^2`. With several, each logit is held, not their mean.
    ///
    /// Self-Forcing divides by sigma^2: its `r1_weight` is `weight = r1_weight / sigma^2` here. FastGen and
    /// DiffSynth-Studio perturb the clean sample in place of x_t, which this penalty cannot.
    ApproximateR1 {
        /// The strength, at least 0; re-implementations of APT use 100.
        weight: f64,
        /// The standard deviation of the perturbation in units of x_t, positive; 0.01 in APT.
        sigma: f64,
    },
}

impl CriticPenalty {
    pub(super) fn check(self) -> Result<Self> {
        let (what, strength) = match self {
            Self::R1 { gamma } => ("gamma of R1", gamma),
            Self::ApproximateR1 { weight, sigma } => {
                let valid = is_positive(sigma);
                checked("sigma of the approximate R1", "finite and positive", sigma, valid)?;
                ("weight of the approximate R1", weight)
            }
        };
        let valid = is_finite(strength) && strength >= 0.0;
        checked(what, "finite and at least 0", strength, valid)?;
        Ok(self)
    }
}

fn mean(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_mean(None::<Kind>)?)
}

/// `ln(1 + e^x)`, exact for large x too, where `f_softplus` switches to x.
fn softplus(x: &Tensor) -> Result<Tensor> {
    Ok(x.f_neg()?.f_log_sigmoid()?.f_neg()?)
}
