//! Diagnostics of one term.

use tch::{Kind, Tensor};

use super::PerSample;
use crate::arithmetic::Arithmetic;
use crate::error::Result;
use crate::normalizer::Distance;
use crate::numeric::{any_kept, compute_kind, masked_mean, per_sample, sample_mean};

/// The diagnostics of one term of an objective at its probe.
#[derive(Debug)]
#[non_exhaustive]
pub struct TermDiagnostics {
    /// The post-shift time tau of each sample at the term's probe, `[B]`, to bin the other numbers by; per frame where
    /// frames have times of their own, while the other numbers stay those of samples.
    pub tau: Tensor,
    /// rms(d), the size of the update: direction after the normaliser, before the weight. That of a plain loss is
    /// the direction of which it would be the surrogate, `- numel` times its gradient in x: so the updates of all terms
    /// compare. `None` where nothing has a gradient.
    pub update_rms: Option<PerSample>,
    /// n, the normaliser after its guard; `None` where the term did not use one. A trend to zero
    /// means collapse, or times close to the clean end. The mean over the frames for
    /// [`Normalizer::over_frame`](crate::Normalizer::over_frame), as on_guard.
    pub n: Option<PerSample>,
    /// 1 where the distance is below the normaliser's floor or epsilon, else 0. Above 0 in the mean:
    /// the guard acts. Near 1: directions are hardly normalised.
    pub on_guard: Option<PerSample>,
    /// The teacher's score against the fake one, of Distribution Matching.
    pub scores: Option<ScoreDiagnostics>,
    /// The numbers that the term passed to [`Probe::observe`](crate::Probe::observe): scalars, or `[B]`.
    pub observations: Vec<(&'static str, Tensor)>,
    pub(crate) role: Role,
    /// The direction, zero where the mask leaves an element out.
    pub(crate) direction: Option<Tensor>,
    mask: Option<Tensor>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Engine,
    Regularizer,
}

impl TermDiagnostics {
    pub(crate) fn new(tau: &Tensor, mask: Option<&Tensor>) -> Self {
        Self {
            tau: tau.shallow_clone(),
            update_rms: None,
            n: None,
            on_guard: None,
            scores: None,
            observations: Vec::new(),
            role: Role::Regularizer,
            direction: None,
            mask: mask.map(Tensor::shallow_clone),
        }
    }

    pub(crate) fn set_direction(&mut self, direction: &Tensor) -> Result<()> {
        let mask = self.mask.as_ref();
        let rms = masked_mean(&direction.f_square()?, mask)?.f_sqrt()?;
        self.update_rms = Some(PerSample::new(rms, &any_kept(direction, mask)?)?);
        self.direction = Some(direction.shallow_clone());
        Ok(())
    }

    pub(crate) fn set_distance(&mut self, Distance { n, guarded }: &Distance) -> Result<()> {
        let n = self.of_sample(n)?;
        let finite = n.f_isfinite()?.f_logical_and(&any_kept(&n, self.mask.as_ref())?)?;
        self.on_guard =
            Some(PerSample::new(self.of_sample(&guarded.f_to_kind(Kind::Double)?)?, &finite)?);
        self.n = Some(PerSample::new(n, &finite)?);
        Ok(())
    }

    /// Numbers per frame as their mean over the elements of each sample that count, `[B]`.
    fn of_sample(&self, values: &Tensor) -> Result<Tensor> {
        match &self.mask {
            _ if values.dim() < 2 => Ok(values.shallow_clone()),
            None => sample_mean(values),
            Some(mask) => masked_mean(&per_sample(values, mask)?.f_expand_as(mask)?, Some(mask)),
        }
    }

    /// Sets the scores from the flow velocities of teacher, fake score and the sample itself, given up to one factor
    /// for each sample.
    pub(crate) fn set_scores(
        &mut self,
        noised: &Tensor,
        [real, fake, own]: [&Tensor; 3],
    ) -> Result<()> {
        let mask = self.mask.as_ref();
        let rms =
            |t: &Tensor| -> Result<Tensor> { Ok(masked_mean(&t.f_square()?, mask)?.f_sqrt()?) };
        let smallest = rms(noised)?.times(resolution(noised)?)?;
        let (real_rms, fake_rms) = (rms(real)?, rms(fake)?);
        let real_there = real_rms.f_gt_tensor(&smallest)?;
        let both_there = fake_rms.f_gt_tensor(&smallest)?.f_logical_and(&real_there)?;
        let gap = rms(&real.f_sub(fake)?)?;
        let product = masked_mean(&real.f_mul(fake)?, mask)?;
        let norms = real_rms.f_mul(&fake_rms)?;
        let (real_error, fake_error) = (rms(&real.f_sub(own)?)?, rms(&fake.f_sub(own)?)?);
        let errs = real_error.f_gt_tensor(&smallest)?;
        self.scores = Some(ScoreDiagnostics {
            rel_gap: PerSample::new(gap.f_div(&real_rms)?, &real_there)?,
            cos: PerSample::new(product.f_div(&norms)?, &both_there)?,
            mag_ratio: PerSample::new(fake_rms.f_div(&real_rms)?, &real_there)?,
            error_ratio: PerSample::new(fake_error.f_div(&real_error)?, &errs)?,
        });
        Ok(())
    }

    /// Appends named scalars in float64, NaN or infinite where undefined.
    pub(super) fn report(&self, name: &str, named: &mut Vec<(String, Tensor)>) -> Result<()> {
        let mut push = |what: &str, value: Tensor| named.push((format!("{name}_{what}"), value));
        if let Some(ScoreDiagnostics { rel_gap, cos, mag_ratio, error_ratio }) = &self.scores {
            push("rel_gap", rel_gap.mean_tensor()?);
            push("cos", cos.mean_tensor()?);
            push("mag_ratio", mag_ratio.mean_tensor()?);
            // A few errors near zero in the denominator would carry the mean of the ratios.
            let logarithm = error_ratio.map(|ratio| Ok(ratio.f_log()?))?;
            push("error_ratio", logarithm.mean_tensor()?.f_exp()?);
        }
        if let Some(rms) = &self.update_rms {
            push("update_rms", rms.mean_tensor()?);
        }
        if let Some(n) = &self.n {
            push("n", n.mean_tensor()?);
            push("n_min", n.min_tensor()?);
        }
        if let Some(on_guard) = &self.on_guard {
            push("share_on_floor", on_guard.mean_tensor()?);
        }
        for (what, value) in &self.observations {
            // A term may have counted on the host; the numbers are read together, from one device.
            push(what, value.f_to_device(self.tau.device())?.f_mean(Kind::Double)?);
        }
        Ok(())
    }
}

/// The teacher's conditional prediction against the fake score's, at one tau and noise, as flow velocities
/// u = eps - x0. They come from the clean samples of networks of any type: `s u = x_tau - (a + s) x0`.
///
/// Undefined for a sample at which a velocity in the denominator is below a hundred rounding steps
/// of the noised sample: at the clean end both scores vanish, and their angle is rounding noise.
#[derive(Debug)]
#[non_exhaustive]
pub struct ScoreDiagnostics {
    /// rms(u_real - u_fake) / rms(u_real): how far the student's samples, as the fake score knows them, are from the
    /// teacher's. 0 with a fake score that still is the teacher, however bad the samples are.
    pub rel_gap: PerSample,
    /// cos(u_real, u_fake), the same in angle.
    pub cos: PerSample,
    /// rms(u_fake) / rms(u_real). Away from 1: the fake is mis-scaled.
    pub mag_ratio: PerSample,
    /// rms(x0_fake - x) / rms(x0_real - x), the errors of fake score and teacher on the student's noised samples. Below
    /// 1: the fake score knows these samples better, as it must. 1: it is frozen, or lags. Far above 1: it is broken.
    pub error_ratio: PerSample,
}

/// Cosine of the directions of two terms, undefined where one of them vanishes.
pub(super) fn cos_of(one: &TermDiagnostics, two: &TermDiagnostics) -> Result<Option<PerSample>> {
    let (Some(left), Some(left_rms)) = (&one.direction, &one.update_rms) else { return Ok(None) };
    let (Some(right), Some(right_rms)) = (&two.direction, &two.update_rms) else { return Ok(None) };
    let there = |rms: &PerSample| -> Result<Tensor> {
        Ok(rms.values().above(resolution(left)?)?.f_logical_and(rms.defined())?)
    };
    let defined = there(left_rms)?.f_logical_and(&there(right_rms)?)?;
    let product = masked_mean(&left.f_mul(right)?, one.mask.as_ref())?;
    let norms = left_rms.values().f_mul(right_rms.values())?;
    PerSample::new(product.f_div(&norms)?, &defined).map(Some)
}

/// A hundred rounding steps of numbers about 1.
fn resolution(like: &Tensor) -> Result<f64> {
    let double = compute_kind(like.f_kind()?) == Kind::Double;
    Ok(100.0 * if double { f64::EPSILON } else { f64::from(f32::EPSILON) })
}
