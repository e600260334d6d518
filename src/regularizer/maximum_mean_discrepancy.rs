//! Maximum mean discrepancy: a distance between the distributions of samples and data, seen by a kernel.

mod kernel;
mod pairs;

pub use kernel::{Bandwidth, Kernel};
use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_device, check_samples, check_size};
use crate::collective::{Collective, gather};
use crate::error::{Error, Result};
use crate::gradient::{gradient_only_in, with_gradient};
use crate::network::IntoOutput;
use crate::numeric::{batch_size, widen, widen_like};
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::value::checked;

type Features<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

/// The estimator of the expectations over pairs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
pub enum Estimator {
    /// The U-statistic, over pairs of different samples. Right on average, so it may be negative;
    /// needs two samples of each kind.
    #[default]
    Unbiased,
    /// The V-statistic, over all pairs. Never negative; too large by up to 1/m + 1/n where k(0) = 1,
    /// and with a repulsion between samples that is too weak by the factor 1 - 1/m.
    Biased,
}

/// Maximum mean discrepancy (MMD): the distance between the distributions of samples and real samples, seen
/// through a kernel, without a critic to train.
///
/// ```text
/// E k(x, x') + E k(y, y') - 2 E k(x, y)        k(a, b) = k(|f(a) - f(b)|)
/// ```
/// Gretton et al., A Kernel Two-Sample Test (JMLR 2012), Lemma 6; x are the m samples, y the n real
/// ones, f the features. It vanishes, for the kernels here, only where the distributions of f agree.
/// Conditions are ignored: the batch as a whole is compared with the real samples as a whole.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | `kernel` | [`Kernel`] with its bandwidth | [`Kernel::gaussian`]: DAN's mixture, median heuristic |
/// | [`estimator`](Self::estimator) | over which pairs | unbiased; the biased one shrinks small batches |
/// | [`features`](Self::features) | f, a frozen network or a pooling | the sample itself, flattened |
/// | [`prior`](Self::prior), [`independence`](Self::independence) | samples to compare x with in place of real ones | real samples |
///
/// Choose features for anything but small vectors: in the tens of thousands of dimensions of a
/// latent all distances are nearly equal, and the kernel tells nothing apart. Pooled latents, or the
/// pooled features of a frozen network, keep it informative. The statistical error falls with the
/// number of *samples*; with one or two, this is not the term to use.
///
/// # Shapes
/// x `[m, ..]` and real samples `[n, ..]` to a scalar, in float32 or wider; features `[m, ..]` and
/// `[n, ..]` are flattened to vectors. Pairs are visited in blocks of rows: memory grows with
/// (m + n) times the length of a feature vector, time with (m + n)^2 times it. f is handed both in the
/// type of x, but in float32 where that is narrower.
///
/// # Forwards
/// Features: one of x, one of the real samples without a graph. The gradient flows through f into x
/// alone; parameters inside f, the bandwidth and the real samples receive none. It is the exact
/// gradient of the value, computed when the loss is.
///
/// # Processes
/// The term looks at the whole batch: with [`Objective::among`](crate::Objective::among) the features of
/// samples and of real samples are gathered, and every process visits the pairs of all. Equally many samples, and
/// equally many real ones, are needed on each. Alone, each process would compare its part, and the mean of
/// the gradients would be that of a smaller batch.
///
/// # Errors
/// [`Error::Missing`] without [`Batch::with_real`](crate::Batch::with_real); [`Error::OutOfRange`] for a
/// single sample with the unbiased estimator; [`Error::NoGradient`] if `f` detaches;
/// [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] if the features of x and of the real samples
/// do not fit each other; errors of `f` and of [`Collective::gather`].
///
/// # Example
/// ```
/// use decoupled_dmd::{Kernel, MaximumMeanDiscrepancy};
/// # use tch::{Device, Kind, Tensor};
/// // Latents [B, C, H, W], pooled to [B, C, 4, 4].
/// let term = MaximumMeanDiscrepancy::new(Kernel::gaussian())?
///     .features(|x: &Tensor| x.f_adaptive_avg_pool2d([4, 4]));
/// # let x = Tensor::randn([8, 4, 8, 8], (Kind::Float, Device::Cpu));
/// # assert!(term.between(&x, &x)?.double_value(&[]) < 0.0);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
pub struct MaximumMeanDiscrepancy<'a> {
    kernel: Kernel,
    estimator: Estimator,
    features: Option<Box<Features<'a>>>,
    against: Against<'a>,
}

/// The samples that the distribution of x is compared with.
enum Against<'a> {
    Real,
    /// Drawn in the space of the features.
    Prior(Box<Features<'a>>),
    /// The features themselves, each column in an order of its own.
    Independent,
}

impl<'a> MaximumMeanDiscrepancy<'a> {
    /// With a kernel.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless there are scales and they and a fixed bandwidth are finite and
    /// positive.
    pub fn new(kernel: Kernel) -> Result<Self> {
        kernel.check()?;
        Ok(Self { kernel, estimator: Estimator::default(), features: None, against: Against::Real })
    }

    /// Sets the estimator of the expectations.
    #[must_use]
    pub fn estimator(mut self, estimator: Estimator) -> Self {
        self.estimator = estimator;
        self
    }

    /// Compares features of the samples, `[B, ..]` to `[B, ..]`; the closure must be differentiable
    /// and treat each sample alone.
    #[must_use]
    pub fn features<O: IntoOutput<Tensor>>(mut self, features: impl Fn(&Tensor) -> O + 'a) -> Self {
        self.features = Some(Box::new(move |x| features(x).into_result()));
        self
    }

    /// Compares the features with samples of a chosen prior in place of real ones: the closure gets the
    /// features of x as vectors `[m, D]`, for their size, type and device, and returns `[n, D]`, drawn again
    /// at each call. The programmable priors of arXiv 2510.11953, of which only the abstract and reviews
    /// could be read.
    #[must_use]
    pub fn prior<O: IntoOutput<Tensor>>(mut self, samples: impl Fn(&Tensor) -> O + 'a) -> Self {
        self.against = Against::Prior(Box::new(move |like| samples(like).into_result()));
        self
    }

    /// Compares the features with themselves, each of their columns in a random order of its own and without
    /// a graph: the joint distribution of the columns against the product of their marginals. It vanishes
    /// where the columns are independent. Rows that meet themselves by chance bias it by about 1/m.
    #[must_use]
    pub fn independence(mut self) -> Self {
        self.against = Against::Independent;
        self
    }

    /// The vectors to compare the features of x with, those of all processes, without a graph; `vectors` `[m, D]` are
    /// of this process, `whole` of all.
    fn target(
        &self,
        (vectors, whole): (&Tensor, &Tensor),
        others: Option<&Tensor>,
        processes: Option<&Collective<'_>>,
    ) -> Result<Tensor> {
        let _no_grad = no_grad_guard();
        let as_vectors = |what, samples: &Tensor| -> Result<Tensor> {
            check_samples(what, samples, 2)?;
            check_device(what, samples, vectors)?;
            Ok(widen_like(samples, vectors)?.f_to_kind(vectors.f_kind()?)?)
        };
        let target = match (&self.against, others) {
            (Against::Prior(samples), None) => {
                as_vectors("samples of the prior", &samples(&vectors.f_detach()?)?)?
            }
            (Against::Prior(_) | Against::Independent, Some(drawn)) => {
                as_vectors("vectors to compare with", &drawn.f_detach()?)?
            }
            (Against::Independent, None) => {
                // Gathered as the vectors were: one order on all processes.
                let order = Tensor::f_rand(vectors.size(), (Kind::Double, vectors.device()))?;
                let order = gather(processes, &order)?.f_argsort(0, false)?;
                return Ok(whole.f_detach()?.f_gather(0, &order, false)?);
            }
            (Against::Real, Some(real)) => self.vectors(&widen_like(real, vectors)?)?,
            (Against::Real, None) => {
                return Err(Error::Missing { what: "real samples", setter: "Batch::with_real" });
            }
        };
        let mut width = vectors.size();
        if let Some(first) = width.first_mut() {
            *first = batch_size(&target);
        }
        check_size("features of the real samples", &target, &width)?;
        gather(processes, &target.f_to_kind(vectors.f_kind()?)?)
    }

    /// The discrepancy between samples x `[m, ..]` and others `[n, ..]`, a scalar, differentiable in x. The others
    /// are real samples; where the term draws what it compares with, from a [`prior`](Self::prior) or for
    /// [`independence`](Self::independence), they are vectors `[n, D]` in the space of the features, taken as they are.
    /// Nothing is drawn here.
    ///
    /// # Errors
    /// As the term.
    pub fn between(&self, x: &Tensor, others: &Tensor) -> Result<Tensor> {
        check_samples("x", x, 2)?;
        check_samples("real samples", others, 2)?;
        check_device("real samples", others, x)?;
        self.discrepancy(x, Some(others), None)
    }

    fn discrepancy(
        &self,
        x: &Tensor,
        others: Option<&Tensor>,
        processes: Option<&Collective<'_>>,
    ) -> Result<Tensor> {
        check_samples("x", x, 2)?;
        let several = |what, count: i64| {
            let valid = count > 1 || self.estimator == Estimator::Biased;
            checked(what, "at least 2 for the unbiased estimator", count as f64, valid)
        };
        if processes.is_none() {
            // Before the features are computed.
            several("number of samples", batch_size(x))?;
        }
        gradient_only_in("features", x, |x| {
            let part = self.vectors(&widen(x)?)?;
            let vectors = gather(processes, &part)?;
            let target = self.target((&part, &vectors), others, processes)?;
            several("number of samples", batch_size(&vectors))?;
            several("number of real samples", batch_size(&target))?;
            let (value, slope) = {
                let _no_grad = no_grad_guard();
                self.estimate(&vectors.f_detach()?, &target)?
            };
            with_gradient(&value, &vectors, &slope)
        })
    }

    /// Features as vectors, `[B, D]`, in float32 or wider.
    fn vectors(&self, x: &Tensor) -> Result<Tensor> {
        let features = match &self.features {
            Some(features) => features(x)?,
            None => x.shallow_clone(),
        };
        check_samples("features", &features, 2)?;
        if batch_size(&features) != batch_size(x) {
            let expected = format!("[{}, ..], one for each sample", batch_size(x));
            return Err(Error::shape("features", expected, &features.size()));
        }
        check_device("features", &features, x)?;
        Ok(widen(&features)?.f_flatten(1, -1)?)
    }

    /// The estimate for vectors x `[m, D]` and y `[n, D]`, and its gradient in x.
    fn estimate(&self, x: &Tensor, y: &Tensor) -> Result<(Tensor, Tensor)> {
        let unit = self.kernel.measure(x, y)?;
        let (m, n) = (batch_size(x) as f64, batch_size(y) as f64);
        // Pairs of one sample with itself contribute k(0), and no gradient.
        let (own, real, diagonal) = match self.estimator {
            Estimator::Unbiased => (m * (m - 1.0), n * (n - 1.0), self.kernel.at_zero()),
            Estimator::Biased => (m * m, n * n, 0.0),
        };
        let (own_sum, own_slope) = self.kernel.among_rows(x, &unit, true)?;
        let (real_sum, _) = self.kernel.among_rows(y, &unit, false)?;
        let (cross_sum, cross_slope) = self.kernel.between_rows(x, y, &unit)?;
        let mean = |sum: Tensor, diagonal: f64, pairs: f64| sum.minus(diagonal)?.times(1.0 / pairs);
        let value = mean(own_sum, m * diagonal, own)?
            .f_add(&mean(real_sum, n * diagonal, real)?)?
            .f_sub(&mean(cross_sum, 0.0, 0.5 * m * n)?)?;
        // x is on both sides of the pairs with itself.
        let slope = own_slope.times(2.0 / own)?.f_sub(&cross_slope.times(2.0 / (m * n))?)?;
        Ok((value.f_to_kind(x.f_kind()?)?, slope))
    }
}

impl Regularizer for MaximumMeanDiscrepancy<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        match self.against {
            Against::Real => {
                let real = probe.batch().real()?;
                self.discrepancy(probe.x(), Some(real), probe.processes())
            }
            Against::Prior(_) | Against::Independent => {
                self.discrepancy(probe.x(), None, probe.processes())
            }
        }
    }
}

impl std::fmt::Debug for MaximumMeanDiscrepancy<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MaximumMeanDiscrepancy")
            .field("kernel", &self.kernel)
            .field("estimator", &self.estimator)
            .field("features", &self.features.is_some())
            .finish()
    }
}
