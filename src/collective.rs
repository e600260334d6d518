//! Processes that share a batch, and the gathering of their parts.

use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::checks::check_device;
use crate::error::{Error, Result};
use crate::network::IntoOutput;
use crate::value::checked;

type AllGather<'a> = dyn Fn(&Tensor) -> Result<Tensor> + 'a;

/// Processes that each hold a part of one batch, and average the gradients of their parameters.
///
/// Losses are means over the samples, so that the mean of the processes' gradients is the gradient of the
/// whole batch. What looks at several samples at once must see the parts of the other processes too:
///
/// | looks at the whole batch | gathers |
/// |---|---|
/// | [`MaximumMeanDiscrepancy`](crate::MaximumMeanDiscrepancy) | features of the samples, with gradient, and of the real samples |
/// | [`Normalizer::over_batch`](crate::Normalizer::over_batch) | a sum and a count |
/// | [`MeanVariance::update_among`](crate::MeanVariance::update_among) | sums of means and variances |
///
/// Every other term looks at each sample alone. [`Objective::among`](crate::Objective::among) hands the
/// processes to all terms; a term of one's own calls [`Probe::gather`](crate::Probe::gather). Without it
/// nothing is gathered, and nothing is paid.
///
/// All processes must evaluate the same terms in the same order, and have equally many samples. What they draw
/// should differ, but for what decides how many forwards are run: see
/// [`Sampler::draw_step`](crate::Sampler::draw_step).
///
/// The exchange is a closure, such as `|part| group.all_gather(part)` of the crate tch-c10d: it is given the part of
/// this process, of any shape, and returns the parts of all, `[N, ..]`, rank 0 first. It should fail in bounded time
/// where a process does not answer.
///
/// # Example
/// ```
/// use decoupled_dmd::Collective;
/// # use tch::{Kind, Tensor};
/// # struct Group;
/// # impl Group {
/// #     fn all_gather(&self, part: &Tensor) -> Tensor { part.unsqueeze(0) }
/// # }
/// # let (group, world_size, rank) = (Group, 1, 0);
/// let processes = Collective::new(world_size, rank, |part: &Tensor| group.all_gather(part))?;
/// // objective.among(&processes)
/// # let part = Tensor::from_slice(&[1.0, 2.0]).view([2, 1]);
/// # assert_eq!(processes.gather(&part)?, part);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
pub struct Collective<'a> {
    processes: usize,
    rank: usize,
    all_gather: Box<AllGather<'a>>,
}

impl<'a> Collective<'a> {
    /// Process `rank`, from 0, of so many `processes`, which exchange tensors by `all_gather`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `rank` is below `processes`.
    pub fn new<O: IntoOutput<Tensor>>(
        processes: usize,
        rank: usize,
        all_gather: impl Fn(&Tensor) -> O + 'a,
    ) -> Result<Self> {
        checked("rank", "below the number of processes", rank as f64, rank < processes)?;
        let all_gather = Box::new(move |part: &Tensor| {
            all_gather(part).into_result().map_err(|error| match error {
                Error::Network { source, .. } => Error::Collective(source),
                error => error,
            })
        });
        Ok(Self { processes, rank, all_gather })
    }

    /// The number of processes, N.
    pub fn processes(&self) -> usize {
        self.processes
    }

    /// The number of this process, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The parts `[B, ..]` of all processes as one tensor `[N B, ..]`, rank 0 first.
    ///
    /// The rows of this process carry N times the gradient, those of the others none. So the mean over the
    /// processes of the gradients of a function of the whole batch is the gradient of that function.
    ///
    /// # Errors
    /// [`Error::Collective`] if the exchange fails; [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] if
    /// it does not return `[N, B, ..]` like `part`.
    pub fn gather(&self, part: &Tensor) -> Result<Tensor> {
        const WHAT: &str = "gathered parts";
        if part.dim() == 0 {
            return Err(Error::shape("part to gather", "[B, ..]", &[]));
        }
        let gathered = {
            let _no_grad = no_grad_guard();
            (self.all_gather)(&part.f_detach()?)?
        };
        let mut expected = vec![i64::try_from(self.processes).unwrap_or(i64::MAX)];
        expected.extend(part.size());
        if !gathered.defined() || gathered.size() != expected {
            return Err(Error::shape(WHAT, format!("{expected:?}"), &gathered.size()));
        }
        let (found, kind) = (gathered.f_kind()?, part.f_kind()?);
        if found != kind {
            return Err(Error::Kind { what: WHAT, expected: "the type of the part", found });
        }
        check_device(WHAT, &gathered, part)?;
        if !part.requires_grad() {
            return Ok(gathered.f_flatten(0, 1)?);
        }
        let mut parts = gathered.f_unbind(0)?;
        // The bracket is exactly zero, so that the part keeps all its bits.
        let zero = part.f_sub(&part.f_detach()?)?;
        let own = part.f_add(&zero.times(self.processes.saturating_sub(1) as f64)?)?;
        if let Some(place) = parts.get_mut(self.rank) {
            *place = own;
        }
        Ok(Tensor::f_cat(&parts, 0)?)
    }

    /// The sum over the processes, without a graph.
    pub(crate) fn sum(&self, part: &Tensor) -> Result<Tensor> {
        let rows = self.gather(&part.f_detach()?.f_unsqueeze(0)?)?;
        Ok(rows.f_sum_dim_intlist(&[0i64][..], false, None::<Kind>)?)
    }
}

/// [`Collective::gather`]; of one process without others, the part itself.
pub(crate) fn gather(processes: Option<&Collective<'_>>, part: &Tensor) -> Result<Tensor> {
    processes.map_or_else(|| Ok(part.shallow_clone()), |processes| processes.gather(part))
}

impl std::fmt::Debug for Collective<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Collective")
            .field("processes", &self.processes)
            .field("rank", &self.rank)
            .finish_non_exhaustive()
    }
}
