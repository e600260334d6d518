//! Diagnostics of one training step: typed numbers on the health of a distillation.

mod per_sample;
mod term;

pub use per_sample::PerSample;
use tch::{Kind, Tensor, no_grad_guard};
pub(crate) use term::Role;
pub use term::{ScoreDiagnostics, TermDiagnostics};

use crate::arithmetic::Arithmetic;
use crate::batch::Batch;
use crate::error::Result;
use crate::numeric::{any_kept, masked, masked_mean, per_sample, widen};
use crate::value::{checked, is_positive};

/// The diagnostics of one evaluation, from what it computed anyway: no network runs forward for them, and a term that is a
/// loss is propagated back to the samples.
///
/// [`Objective::observed`](crate::Objective::observed) asks for them; without it they cost nothing.
/// All are taken without a graph, per sample (over the elements that the mask does not leave out), and stay
/// tensors until a number is read. They depend on tau: average over hundreds of steps, or bin the
/// samples by [`TermDiagnostics::tau`]. The guide says how to read them.
///
/// | what | formula, for sample i | where |
/// |---|---|---|
/// | x_mean, x_std, x_rms | m_i, sqrt v_i, sqrt mean x^2 | fields |
/// | x_spread | root of the mean over elements of their unbiased variance over the batch | [`spread`](Self::spread) |
/// | variance drift | ln(mean_i v_i / target) | [`variance_drift`](Self::variance_drift) |
/// | share of samples that are not finite | in x or in a direction | [`not_finite`](Self::not_finite) |
/// | update_rms, n, on_guard, rel_gap, cos, mag_ratio, error_ratio | see there | [`TermDiagnostics`], [`ScoreDiagnostics`] |
/// | regularizer to engine, dm_to_ca | mean_i rms(d_DM) / mean_i rms(d_CA) | [`update_balance`](Self::update_balance) |
/// | ca_dm_cos | cos(d_CA, d_DM), each at its own tau | [`update_cos`](Self::update_cos) |
///
/// d is a direction after the normaliser, before the weight of its term.
#[derive(Debug)]
#[non_exhaustive]
pub struct Diagnostics {
    /// Mean of each sample.
    pub x_mean: PerSample,
    /// Standard deviation of each sample, the root of the biased variance.
    pub x_std: PerSample,
    /// Root mean square of each sample.
    pub x_rms: PerSample,
    /// The diagnostics of each term, under its name, in the order of the objective.
    pub terms: Vec<(String, TermDiagnostics)>,
    finite: Tensor,
    /// A scalar in float64, NaN where undefined.
    spread: Tensor,
}

impl Diagnostics {
    pub(crate) fn of(batch: &Batch<'_>) -> Result<Self> {
        let _no_grad = no_grad_guard();
        let (x, mask) = (widen(&batch.x().f_detach()?)?, batch.mask());
        let mean = masked_mean(&x, mask)?;
        let variance = masked_mean(&x.f_sub(&per_sample(&mean, &x)?)?.f_square()?, mask)?;
        let rms = masked_mean(&x.f_square()?, mask)?.f_sqrt()?;
        let any = any_kept(&x, mask)?;
        let finite = all_finite(&masked(&x, mask)?)?;
        Ok(Self {
            x_mean: PerSample::new(mean, &any)?,
            x_std: PerSample::new(variance.f_sqrt()?, &any)?,
            x_rms: PerSample::new(rms, &any)?,
            terms: Vec::new(),
            spread: spread(&x, mask, &finite)?,
            finite,
        })
    }

    pub(crate) fn push(&mut self, name: &str, term: TermDiagnostics) -> Result<()> {
        if let Some(direction) = &term.direction {
            self.finite = self.finite.f_logical_and(&all_finite(direction)?)?;
        }
        self.terms.push((name.to_owned(), term));
        Ok(())
    }

    /// The diagnostics of the term that was added as `name`.
    pub fn term(&self, name: &str) -> Option<&TermDiagnostics> {
        self.terms.iter().find(|(of, _)| of == name).map(|(_, term)| term)
    }

    /// Share of samples in which x or a direction is not finite. These samples are left out of all
    /// other numbers that they would touch.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn not_finite(&self) -> Result<f64> {
        Ok(self.not_finite_tensor()?.f_double_value(&[])?)
    }

    /// ln(mean_i v_i / target): the variance of the samples against `target`, the mean variance of real
    /// samples. Rising without end is the signature of CFG Augmentation alone. `None` where no sample is
    /// finite.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `target` is finite and positive.
    pub fn variance_drift(&self, target: f64) -> Result<Option<f64>> {
        let valid = is_positive(target);
        checked("target variance", "finite and positive", target, valid)?;
        let mean = self.mean_variance()?.f_double_value(&[])?;
        Ok((!mean.is_nan()).then(|| (mean / target).ln()))
    }

    /// The mean over the samples of their variance v_i, a scalar in float64, NaN where no sample is finite: what
    /// [`variance_drift`](Self::variance_drift) compares, without waiting for the device.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn mean_variance(&self) -> Result<Tensor> {
        self.x_std.map(|std| Ok(std.f_square()?))?.mean_tensor()
    }

    /// How far the samples of the batch are from one another: the root of the mean over elements of their unbiased
    /// variance over the batch, which is the rms distance of two samples over the root of 2. It falls where samples
    /// of one condition become alike, which no other number here sees; compare it with its own start, and take batches
    /// of one condition where the conditions themselves differ. `None` for fewer than two finite samples.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn spread(&self) -> Result<Option<f64>> {
        let spread = self.spread.f_double_value(&[])?;
        Ok(spread.is_finite().then_some(spread))
    }

    /// The ratio of the updates of two terms, mean_i rms over mean_i rms: `("dm", "ca")` says how strong
    /// Distribution Matching is. It is a ratio of means, since a single update of CFG Augmentation vanishes
    /// at the clean end. `None` unless both terms have a direction and the direction of `below` is not zero.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn update_balance(&self, above: &str, below: &str) -> Result<Option<f64>> {
        let (Some(above), Some(below)) = (self.term(above), self.term(below)) else {
            return Ok(None);
        };
        let Some(balance) = balance(above, below)? else { return Ok(None) };
        let balance = balance.f_double_value(&[])?;
        Ok(balance.is_finite().then_some(balance))
    }

    /// The cosine between the updates of two terms, each at its own tau: negative where one opposes
    /// the other. `None` unless both have a direction; undefined for a sample where either vanishes.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn update_cos(&self, one: &str, two: &str) -> Result<Option<PerSample>> {
        match (self.term(one), self.term(two)) {
            (Some(one), Some(two)) => term::cos_of(one, two),
            _ => Ok(None),
        }
    }

    /// Everything as named numbers, for a log: `x_std`, `not_finite`, and for terms called `ca` and
    /// `dm` `ca_update_rms`, `dm_cos`, `dm_n`, `dm_n_min`, `dm_share_on_floor`, `dm_to_ca`,
    /// `ca_dm_cos`, its `_std`, `_min` and `_max`, and so on, the mean over the samples at which each is
    /// defined, the geometric one of `dm_error_ratio`. A number that is undefined, or not finite, is left out.
    ///
    /// It reads all of them at once, so that a GPU is waited for once.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    pub fn report(&self) -> Result<Vec<(String, f64)>> {
        let _no_grad = no_grad_guard();
        let mut named = Vec::new();
        self.named(&mut named)?;
        read_together(named, 0)
    }

    /// Appends everything as named scalars in float64, NaN or infinite where undefined.
    pub(crate) fn named(&self, named: &mut Vec<(String, Tensor)>) -> Result<()> {
        named.extend([
            ("x_mean".to_owned(), self.x_mean.mean_tensor()?),
            ("x_std".to_owned(), self.x_std.mean_tensor()?),
            ("x_rms".to_owned(), self.x_rms.mean_tensor()?),
            ("x_spread".to_owned(), self.spread.shallow_clone()),
            ("not_finite".to_owned(), self.not_finite_tensor()?),
        ]);
        for (name, term) in &self.terms {
            term.report(name, named)?;
        }
        let of_role = |role| self.terms.iter().filter(move |(_, term)| term.role == role);
        for (engine_name, engine) in of_role(Role::Engine) {
            for (name, regularizer) in of_role(Role::Regularizer) {
                if let Some(balance) = balance(regularizer, engine)? {
                    named.push((format!("{name}_to_{engine_name}"), balance));
                }
                if let Some(cos) = term::cos_of(engine, regularizer)? {
                    let name = format!("{engine_name}_{name}_cos");
                    named.push((format!("{name}_std"), cos.std_tensor()?));
                    named.push((format!("{name}_min"), cos.min_tensor()?));
                    named.push((format!("{name}_max"), cos.max_tensor()?));
                    named.push((name, cos.mean_tensor()?));
                }
            }
        }
        Ok(())
    }

    fn not_finite_tensor(&self) -> Result<Tensor> {
        Ok(self.finite.f_logical_not()?.f_mean(Kind::Double)?)
    }
}

/// Named scalars in float64 as numbers, read in one go; without those that are not finite, but for the first `always`.
pub(crate) fn read_together(
    named: Vec<(String, Tensor)>,
    always: usize,
) -> Result<Vec<(String, f64)>> {
    let (names, tensors): (Vec<_>, Vec<_>) = named.into_iter().unzip();
    let values = Vec::<f64>::try_from(Tensor::f_stack(&tensors, 0)?)?;
    let read = names.into_iter().zip(values).enumerate();
    let kept = read.filter(|(place, (_, value))| *place < always || value.is_finite());
    Ok(kept.map(|(_, read)| read).collect())
}

/// The ratio of the mean sizes of two directions, a scalar in float64; NaN or infinite where undefined.
fn balance(above: &TermDiagnostics, below: &TermDiagnostics) -> Result<Option<Tensor>> {
    let (Some(above), Some(below)) = (&above.update_rms, &below.update_rms) else {
        return Ok(None);
    };
    Ok(Some(above.mean_tensor()?.f_div(&below.mean_tensor()?)?))
}

/// The root of the mean over elements of their unbiased variance over the batch, over the elements that the mask
/// keeps in two `finite` samples `[B]` or more; a scalar in float64, NaN where there is none.
fn spread(x: &Tensor, mask: Option<&Tensor>, finite: &Tensor) -> Result<Tensor> {
    let finite = per_sample(finite, x)?.f_expand_as(x)?;
    let kept =
        mask.map_or_else(|| Ok(finite.shallow_clone()), |mask| mask.f_logical_and(&finite))?;
    let x = masked(&x.f_to_kind(Kind::Double)?, Some(&kept))?;
    let kept = kept.f_to_kind(Kind::Double)?;
    let over_batch = |tensor: &Tensor| tensor.f_sum_dim_intlist(&[0i64][..], true, None::<Kind>);
    let count = over_batch(&kept)?;
    let offset = x.f_sub(&over_batch(&x)?.f_div(&count.at_least(1.0)?)?)?.f_mul(&kept)?;
    let variance = over_batch(&offset.f_square()?)?.f_div(&count.minus(1.0)?.at_least(1.0)?)?;
    let counts = count.above(1.5)?.f_to_kind(Kind::Double)?;
    let sum = variance.f_mul(&counts)?.f_sum(Kind::Double)?;
    Ok(sum.f_div(&counts.f_sum(Kind::Double)?)?.f_sqrt()?)
}

/// Whether all elements of a sample are finite, `[B]`.
fn all_finite(tensor: &Tensor) -> Result<Tensor> {
    Ok(tensor.f_isfinite()?.f_flatten(1, -1)?.f_all_dim(1, false)?)
}
