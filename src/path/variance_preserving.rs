//! The variance-preserving path of DDPM, in continuous time or over a table.

use tch::{Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_clock, check_samples};
use crate::error::{Error, Result};
use crate::numeric::widen;
use crate::path::levels::Levels;
use crate::path::{Coefficients, NoisePath, wide_time};
use crate::time::PostShift;
use crate::value::{MOST_STEPS, checked, is_finite};

/// Variance preserving: a = sqrt(abar), s = sqrt(1 - abar).
///
/// | form | abar at the crate's t | a network is fed |
/// |---|---|---|
/// | [`linear`](Self::linear), continuous | exp(-beta_min r - (beta_max - beta_min) r^2 / 2), r = 1 - t | r; score_sde multiplies by 999 |
/// | table of N levels | abar_n, n = round(N (1 - t)) - 1, between 0 and N - 1 | n |
///
/// A table is **snapped to, not interpolated**: its networks have seen whole timesteps only. The
/// times of [`FewStepGrid::even`](crate::FewStepGrid::even) with 4 steps fall on n = 999, 749, 499,
/// 249 of a table of 1000, DMD2's grid (diffusers' "trailing" spacing). Its clip to 20..980 is
/// `Uniform::new(0.019, 0.979)`. The closure gets n from [`timestep`](Self::timestep), which
/// snaps as the coefficients do:
///
/// ```
/// # use decoupled_dmd::{Condition, Denoiser, Prediction, VariancePreserving, Result};
/// # use tch::Tensor;
/// # struct Unet; impl Unet { fn forward(&self, x: &Tensor, n: &Tensor, _: &Tensor) -> Tensor { x * n.view([-1, 1]) } }
/// # let unet = Unet;
/// let path = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?; // SD 1.5 and SDXL
/// let teacher = Denoiser::new(&path, Prediction::Noise, |x, t, cond: &Condition| -> Result<Tensor> {
///     Ok(unet.forward(x, &path.timestep(t)?, &cond[0]))
/// });
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
///
/// **Start.** Neither form reaches pure noise: a(0) is 0.0066 with the defaults of score_sde and
/// 0.0683 for SDXL. Few-step students are nevertheless sampled from pure noise, so that is what they
/// must be trained on (DMD2 replaces the noised sample by noise at n = 999). Hence
/// [`start`](NoisePath::start) returns unit noise, the marginal of data of unit variance, unscaled.
///
/// **Ends.** With a(0) above zero, [`Noise`](crate::Prediction::Noise) has no singular end, but it
/// magnifies the network's error by s/a: 14.6 times at SDXL's n = 999.
///
/// DDPM, arXiv 2006.11239, Eq. 4; Song et al., arXiv 2011.13456, Appendix C.
#[derive(Debug, Clone, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "config::Form", into = "config::Form"))]
pub struct VariancePreserving(Form);

#[derive(Debug, Clone, PartialEq)]
enum Form {
    Linear { beta_min: f64, beta_max: f64 },
    Table(Levels),
}

impl VariancePreserving {
    /// The continuous form, whose rate of noise rises linearly in time; score_sde has 0.1 and 20.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless 0 <= `beta_min` <= `beta_max`, `beta_max` > 0, both finite.
    pub fn linear(beta_min: f64, beta_max: f64) -> Result<Self> {
        let valid = is_finite(beta_min) && beta_min >= 0.0;
        checked("beta_min", "finite and at least 0", beta_min, valid)?;
        let valid = is_finite(beta_max) && beta_max > 0.0 && beta_max >= beta_min;
        checked("beta_max", "finite, positive and at least beta_min", beta_max, valid)?;
        Ok(Self(Form::Linear { beta_min, beta_max }))
    }

    /// A table of `steps` levels whose sqrt(beta) is evenly spaced, diffusers' `scaled_linear`; SD 1.5
    /// and SDXL have 0.00085, 0.012 and 1000.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless 0 < `beta_start` <= `beta_end` < 1 and `steps` is from
    /// 2 to 1e6.
    pub fn scaled_linear(beta_start: f64, beta_end: f64, steps: usize) -> Result<Self> {
        let valid = beta_start > 0.0 && beta_start < 1.0;
        checked("beta_start", "in (0, 1)", beta_start, valid)?;
        let valid = beta_end >= beta_start && beta_end < 1.0;
        checked("beta_end", "at least beta_start and below 1", beta_end, valid)?;
        let valid = (2..=MOST_STEPS).contains(&steps);
        checked("number of levels", "from 2 to 1e6", steps as f64, valid)?;
        let (low, high) = (beta_start.sqrt(), beta_end.sqrt());
        let last = steps.saturating_sub(1) as f64;
        let mut product = 1.0;
        let table = (0..steps).map(|n| {
            product *= 1.0 - (low + (high - low) * n as f64 / last).powi(2);
            product
        });
        Self::from_alphas_cumprod(table.collect())
    }

    /// A table of abar from the cleanest level to the noisiest, as `alphas_cumprod` of diffusers'
    /// schedulers.
    ///
    /// # Errors
    /// [`Error::Shape`] if it is empty; [`Error::OutOfRange`] unless its numbers fall and lie in [0, 1):
    /// at 1 there would be no noise left for a sampler to follow.
    pub fn from_alphas_cumprod(table: Vec<f64>) -> Result<Self> {
        if table.is_empty() {
            return Err(Error::shape("alphas_cumprod", "[N] with N >= 1", &[0]));
        }
        for &abar in &table {
            checked("alphas_cumprod", "in [0, 1)", abar, (0.0..1.0).contains(&abar))?;
        }
        for (previous, &next) in table.iter().zip(table.iter().skip(1)) {
            checked("alphas_cumprod", "below the one before", next, next < *previous)?;
        }
        Ok(Self(Form::Table(Levels::new(table))))
    }

    /// The time in the network's own clock for times `t` `[B]` in [0, 1] on the crate's, or per frame, as a
    /// network closure receives them: the index n in int64 of a table, else `1 - t` in float64, shaped like them.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless `t` is `[B]` or of frames, as [`PostShift`], and floating point.
    pub fn timestep(&self, t: &Tensor) -> Result<Tensor> {
        check_clock("t", t)?;
        let reversed = wide_time(t)?.complement()?;
        let Form::Table(table) = &self.0 else { return Ok(reversed) };
        let levels = table.len() as f64;
        let index = reversed.times(levels)?.f_round()?.minus(1.0)?;
        Ok(index.within(0.0, levels - 1.0)?.f_to_kind(Kind::Int64)?)
    }

    /// The crate's time at which [`timestep`](Self::timestep) is `timestep`: an index in [0, N - 1] of
    /// a table, else a number in [0, 1].
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `timestep` is outside that range or not a number.
    pub fn time_of(&self, timestep: f64) -> Result<f64> {
        let Form::Table(table) = &self.0 else {
            let valid = (0.0..=1.0).contains(&timestep);
            return checked("timestep", "in [0, 1]", timestep, valid).map(|r| 1.0 - r);
        };
        let levels = table.len() as f64;
        let valid = (0.0..=levels - 1.0).contains(&timestep);
        checked("timestep", "an index of the table", timestep, valid)?;
        Ok(1.0 - (timestep + 1.0) / levels)
    }
}

/// The form of the path in a configuration.
#[cfg(feature = "serde")]
mod config {
    use crate::error::{Error, Result};

    #[derive(serde::Serialize, serde::Deserialize)]
    #[serde(rename_all = "snake_case", deny_unknown_fields)]
    pub(super) enum Form {
        Linear { beta_min: f64, beta_max: f64 },
        ScaledLinear { beta_start: f64, beta_end: f64, steps: usize },
        AlphasCumprod(Vec<f64>),
    }

    impl TryFrom<Form> for super::VariancePreserving {
        type Error = Error;
        fn try_from(form: Form) -> Result<Self> {
            match form {
                Form::Linear { beta_min, beta_max } => Self::linear(beta_min, beta_max),
                Form::ScaledLinear { beta_start, beta_end, steps } => {
                    Self::scaled_linear(beta_start, beta_end, steps)
                }
                Form::AlphasCumprod(table) => Self::from_alphas_cumprod(table),
            }
        }
    }

    impl From<super::VariancePreserving> for Form {
        fn from(path: super::VariancePreserving) -> Self {
            match path.0 {
                super::Form::Linear { beta_min, beta_max } => Self::Linear { beta_min, beta_max },
                super::Form::Table(table) => Self::AlphasCumprod(table.into_vec()),
            }
        }
    }
}

impl NoisePath for VariancePreserving {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        let timestep = self.timestep(time.tensor())?;
        match &self.0 {
            Form::Linear { beta_min, beta_max } => {
                let slope = timestep.times((beta_max - beta_min) / 2.0)?;
                let log_abar = slope.plus(*beta_min)?.f_mul(&timestep)?.f_neg()?;
                Ok(Coefficients {
                    data: log_abar.times(0.5)?.f_exp()?,
                    // 1 - abar without the cancellation near the clean end.
                    noise: log_abar.f_expm1()?.f_neg()?.f_sqrt()?,
                })
            }
            Form::Table(table) => {
                let levels = table.on(timestep.device())?;
                let abar = levels.f_index_select(0, &timestep.f_flatten(0, -1)?)?;
                let abar = abar.f_view_as(&timestep)?;
                let noise = abar.complement()?.f_sqrt()?;
                Ok(Coefficients { data: abar.f_sqrt()?, noise })
            }
        }
    }

    fn start(&self, noise: &Tensor) -> Result<Tensor> {
        check_samples("noise", noise, 1)?;
        widen(noise)
    }
}
