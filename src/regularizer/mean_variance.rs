//! Mean-variance regularization: mean and variance of every sample against their averages over the data.

use std::cell::{Cell, RefCell};

use tch::{Device, Kind, Tensor};

use crate::arithmetic::{Arithmetic, filled};
use crate::checks::{check_like, check_samples, check_size};
use crate::collective::Collective;
use crate::error::{Error, Result};
use crate::numeric::{batch_size, numbers, widen};
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::value::{checked, is_positive};

/// The elements over which the mean and the variance of a sample are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Statistics {
    /// One mean and one variance for each sample (Eq. 7).
    PerSample,
    /// One of each for every channel of a sample `[B, C, ..]`.
    PerChannel,
}

/// The non-parametric regularizer: the KL divergence between two Gaussians, one with the statistics
/// of a generated sample and one with the statistics of the data.
///
/// ```text
/// 0.5 mean [ (v + (m - mu)^2) / var - 1 - ln(v / var) ]
/// ```
/// Eq. 7 of Decoupled DMD (arXiv 2511.22677), with m and v the mean and variance of one sample, or
/// of one channel of it; the outer mean is over samples and channels. Its gradient in an element of
/// x, with N elements to a mean and G means in the batch,
///
/// ```text
/// 1 / (G N) [ (x - mu) / var - (x - m) / v ]
/// ```
/// is zero exactly where m and v meet the target. The term needs no network, stabilises CFG Augmentation,
/// and is blind to structure. It pulls every single sample to the *average* statistics and so penalises a
/// picture for being dark: keep the weight small.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | `mean`, `variance` | the target: averages of m and v over real samples | SDXL latents: 0.075 and 0.81 (the paper) |
/// | [`running`](Self::running) | a target that follows the batches shown to it | off |
/// | [`floor`](Self::floor) | smallest v whose logarithm is taken | 1e-6, ours |
///
/// The target variance is the average of v, not the variance of all elements pooled, which would add
/// the spread of m between samples. Measure latents as the network sees them, after the scale and
/// shift of the autoencoder. The paper states no weight; compare the gradient with the gradients of the
/// other terms.
///
/// Below the floor, ln v continues as its tangent there, `ln f + v / f - 1`: a collapsed sample is
/// still pushed apart, but by at most `1 / (G N sqrt(f))` in the root mean square, where Eq. 7 itself
/// has no bound. A constant sample (v = 0) has no direction to be pushed in and is moved by its mean
/// alone.
///
/// # Shapes
/// x `[B, ..]`, for channels `[B, C, ..]` with at least one more axis, to a scalar. m and v are
/// computed in float32, or float64 for such x.
///
/// # Forwards
/// None. The gradient flows into x, once: second derivatives differ from the formula's. Targets carry no
/// gradient.
///
/// # Processes
/// The loss looks at each sample alone. A running target is that of the whole batch with
/// [`update_among`](Self::update_among); with [`update`](Self::update) each process would follow its own part, and
/// descend another loss.
///
/// # Errors
/// [`Error::Shape`] if the samples have no channels or not as many as the target.
///
/// # Example
/// ```
/// use decoupled_dmd::{MeanVariance, Statistics};
/// # use tch::{Device, Kind, Tensor};
/// let sdxl = MeanVariance::per_sample(0.075, 0.81)?;
///
/// // Channel by channel, following real latents: start from one batch, then show it more.
/// # let latents = || Tensor::randn([8, 4, 6, 6], (Kind::Float, Device::Cpu));
/// let term = MeanVariance::measured(&latents(), Statistics::PerChannel)?.running(0.99, 1)?;
/// term.update(&latents())?;
/// # assert_eq!(term.updates(), 2);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct MeanVariance {
    statistics: Statistics,
    /// Mean and variance, `[]` or `[C]`, in float64. Replaced, never written to.
    target: RefCell<(Tensor, Tensor)>,
    decay: Option<f64>,
    updates: Cell<u64>,
    floor: f64,
}

impl MeanVariance {
    /// One target for every sample as a whole.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `mean` is finite and `variance` finite and positive.
    pub fn per_sample(mean: f64, variance: f64) -> Result<Self> {
        let target = |value: f64| filled(&[], value, (Kind::Double, Device::Cpu));
        Self::toward(Statistics::PerSample, target(mean)?, target(variance)?)
    }

    /// A target for every channel: `[C]` each, on any device.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless both are `[C]` and floating point;
    /// [`Error::OutOfRange`] unless means are finite and variances finite and positive.
    pub fn per_channel(mean: &Tensor, variance: &Tensor) -> Result<Self> {
        if mean.size().len() != 1 {
            return Err(Error::shape("target mean", "[C]", &mean.size()));
        }
        check_samples("target mean", mean, 1)?;
        check_like("target variance", variance, mean)?;
        Self::toward(Statistics::PerChannel, mean.f_detach()?, variance.f_detach()?)
    }

    /// The target measured on real samples `[M, ..]`: the averages of m and v over them.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless they are samples with channels where needed;
    /// [`Error::OutOfRange`] if they are not finite, or constant.
    pub fn measured(real: &Tensor, statistics: Statistics) -> Result<Self> {
        let (mean, variance) = averages(real, statistics)?;
        Self::toward(statistics, mean, variance)
    }

    /// Lets the target follow the batches given to [`update`](Self::update).
    ///
    /// ```text
    /// target_k = target_(k-1) + (1 - decay) / (1 - decay^k) (average of the batch - target_(k-1))
    /// ```
    /// for the k-th batch: the exponential moving average with its bias corrected as in Adam. The
    /// first batch replaces the target; decay 1 is the plain average of all batches. `updates` is the number
    /// of batches that the present target stands for: 0 for a guess, 1 for a target
    /// [`measured`](Self::measured) on a batch. To resume a training, restore
    /// [`target`](Self::target) through the constructor and [`updates`](Self::updates) here.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `decay` is in [0, 1].
    pub fn running(mut self, decay: f64, updates: u64) -> Result<Self> {
        let valid = (0.0..=1.0).contains(&decay);
        self.decay = Some(checked("decay of the running target", "in [0, 1]", decay, valid)?);
        self.updates.set(updates);
        Ok(self)
    }

    /// Moves a [`running`](Self::running) target toward the averages over real samples `[M, ..]`, or over
    /// samples of a many-step teacher. Each batch counts the same, for every M.
    ///
    /// # Errors
    /// As [`measured`](Self::measured), which leaves the target as it was; [`Error::Shape`] if the samples
    /// have other channels than the target; [`Error::OutOfRange`] if the target is not running.
    pub fn update(&self, real: &Tensor) -> Result<()> {
        self.follow(real, None)
    }

    /// [`update`](Self::update) with the samples of all processes, `[M, ..]` of each, where M may differ. To
    /// measure the first target so, begin with a guess and [`running`](Self::running)`(decay, 0)`.
    ///
    /// # Errors
    /// As [`update`](Self::update) and [`Collective::gather`].
    pub fn update_among(&self, real: &Tensor, processes: &Collective<'_>) -> Result<()> {
        self.follow(real, Some(processes))
    }

    fn follow(&self, real: &Tensor, processes: Option<&Collective<'_>>) -> Result<()> {
        let Some(decay) = self.decay else {
            let what = "decay of the running target";
            return Err(Error::OutOfRange {
                what,
                requirement: "set by `running`",
                value: f64::NAN,
            });
        };
        let (mut mean, mut variance) = averages(real, self.statistics)?;
        let target = self.target();
        check_size("channels of the real samples", &mean, &target.0.size())?;
        if let Some(processes) = processes {
            let count =
                filled(&mean.size(), batch_size(real) as f64, (Kind::Double, mean.device()))?;
            let parts = [&mean.f_mul(&count)?, &variance.f_mul(&count)?, &count];
            let whole = processes.sum(&Tensor::f_stack(&parts, 0)?)?;
            let over =
                |place| -> Result<Tensor> { Ok(whole.f_get(place)?.f_div(&whole.f_get(2)?)?) };
            (mean, variance) = (over(0)?, over(1)?);
        }
        // Of all processes: none refuses alone.
        check_target(&mean, &variance)?;
        let updates = self.updates.get().saturating_add(1);
        let rate = if decay < 1.0 {
            (1.0 - decay) / (1.0 - decay.powf(updates as f64))
        } else {
            1.0 / updates as f64
        };
        let step = |old: &Tensor, new: &Tensor| old.f_to_device(new.device())?.toward(new, rate);
        let _old = self.target.replace((step(&target.0, &mean)?, step(&target.1, &variance)?));
        self.updates.set(updates);
        Ok(())
    }

    /// The number of batches that the target stands for; see [`running`](Self::running).
    pub fn updates(&self) -> u64 {
        self.updates.get()
    }

    /// Sets the variance below which the loss grows as a line and no longer as a logarithm.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless finite and positive, as float32 too.
    pub fn floor(mut self, floor: f64) -> Result<Self> {
        self.floor = checked("variance floor", "finite and positive", floor, is_positive(floor))?;
        Ok(self)
    }

    /// The target mean and variance, `[]` or `[C]`, in float64.
    pub fn target(&self) -> (Tensor, Tensor) {
        let target = self.target.borrow();
        (target.0.shallow_clone(), target.1.shallow_clone())
    }

    fn toward(statistics: Statistics, mean: Tensor, variance: Tensor) -> Result<Self> {
        check_target(&mean, &variance)?;
        let target = (mean.f_to_kind(Kind::Double)?, variance.f_to_kind(Kind::Double)?);
        Ok(Self {
            statistics,
            target: RefCell::new(target),
            decay: None,
            updates: Cell::new(0),
            floor: 1e-6,
        })
    }
}

fn check_target(mean: &Tensor, variance: &Tensor) -> Result<()> {
    let largest = mean.f_abs()?.f_max()?;
    let [mean, least, most] = numbers([largest, variance.f_min()?, variance.f_max()?])?;
    checked("target mean", "finite", mean, mean <= f64::from(f32::MAX))?;
    for variance in [least, most] {
        checked("target variance", "finite and positive", variance, is_positive(variance))?;
    }
    Ok(())
}

/// The averages of m and v over samples, `[]` or `[C]`, in float64.
fn averages(real: &Tensor, statistics: Statistics) -> Result<(Tensor, Tensor)> {
    check_samples("real samples", real, 2)?;
    let (mean, variance) = moments("real samples", &real.f_detach()?, statistics)?;
    let over_batch = |t: Tensor| t.f_mean_dim(&[0i64][..], false, Kind::Double);
    Ok((over_batch(mean)?, over_batch(variance)?))
}

/// Mean and (biased) variance, `[B]` or `[B, C]`.
fn moments(what: &'static str, x: &Tensor, statistics: Statistics) -> Result<(Tensor, Tensor)> {
    let first_axis = match statistics {
        Statistics::PerSample => 1,
        Statistics::PerChannel => 2,
    };
    if x.dim() <= first_axis {
        return Err(Error::shape(what, "[B, C, ..] with an axis after the channels", &x.size()));
    }
    let x = widen(x)?;
    let axes: Vec<i64> = (first_axis as i64..x.dim() as i64).collect();
    let count = x.size().iter().skip(first_axis).product::<i64>() as f64;
    let mean = x.f_sum_dim_intlist(&axes[..], true, None::<Kind>)?.over(count)?;
    // v does not change with m, which is where sum (x - m)^2 is least.
    let centred = x.f_sub(&mean.f_detach()?)?;
    let squares = centred.f_mul(&centred.f_detach()?)?;
    let half = squares.f_sum_dim_intlist(&axes[..], true, None::<Kind>)?.over(count)?;
    // One factor of a square has half of its slope, in fewer passes than both.
    let variance = half.times(2.0)?.f_sub(&half.f_detach()?)?;
    let flat = |t: Tensor| t.f_flatten((first_axis as i64).saturating_sub(1), -1);
    Ok((flat(mean)?, flat(variance)?))
}

impl Regularizer for MeanVariance {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let (mean, variance) = moments("x", probe.x(), self.statistics)?;
        let (target_mean, target_variance) = self.target();
        let channels = target_mean.size();
        if mean.size().get(1..) != Some(&channels) {
            let expected = format!("[B, {channels:?}, ..] as the target");
            return Err(Error::shape("x", expected, &probe.x().size()));
        }
        let like_mean = |t: &Tensor| {
            // A copy from the CPU is not waited for: libtorch copies the numbers before it returns.
            let non_blocking = t.device() == Device::Cpu;
            t.f_to_device_(mean.device(), mean.f_kind()?, non_blocking, false)
        };
        let (target_mean, target_variance) =
            (like_mean(&target_mean)?, like_mean(&target_variance)?);
        let offset = mean.f_sub(&target_mean)?.f_square()?;
        let floored = variance.at_least(self.floor)?;
        // Zero above the floor, with zero gradient; below it, the slope of the tangent.
        let tangent = variance.f_div(&floored)?.minus(1.0)?;
        let logarithm = floored.f_div(&target_variance)?.f_log()?.f_add(&tangent)?;
        let divergence =
            variance.f_add(&offset)?.f_div(&target_variance)?.minus(1.0)?.f_sub(&logarithm)?;
        Ok(divergence.f_mean(None::<Kind>)?.times(0.5)?)
    }
}
