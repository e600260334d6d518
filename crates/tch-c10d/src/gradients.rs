//! Averaging the gradients of all ranks.

mod buckets;
mod norm;

use tch::{Device, Kind, Tensor};

use self::buckets::{ABSENT, buckets, fingerprint, flatten, misfit, unflatten};
use self::norm::{norm, on_cpu, spread, total_norm};
use crate::agreement::{Call, digest};
use crate::ffi::{self, Layout};
use crate::group::{is_float, number};
use crate::{Error, Operation, ProcessGroup, Result, Statistics};

const OPERATION: Operation = Operation::AverageGradients;

/// How gradients are averaged.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Averaging {
    bucket_bytes: usize,
    max_norm: Option<f64>,
}

impl Default for Averaging {
    /// Buckets of 25 MiB, which is the default of PyTorch's `DistributedDataParallel`; no clipping.
    fn default() -> Self {
        Self { bucket_bytes: 25 << 20, max_norm: None }
    }
}

impl Averaging {
    /// The bytes of gradients that go into one `all_reduce`, at least 1; a larger gradient goes alone.
    ///
    /// Small buckets cost latency, large ones the memory of a copy.
    ///
    /// # Errors
    /// [`Error::Argument`] for 0.
    pub fn bucket_bytes(self, bucket_bytes: usize) -> Result<Self> {
        if bucket_bytes == 0 {
            let (expected, found) = ("at least 1".into(), "0".into());
            return Err(Error::Argument { what: "bucket_bytes", expected, found });
        }
        Ok(Self { bucket_bytes, ..self })
    }

    /// Scales the mean down to this norm over all gradients if it is larger, as PyTorch's
    /// `clip_grad_norm_` does: by `max_norm / (norm + 1e-6)`.
    ///
    /// # Errors
    /// [`Error::Argument`] unless finite and above 0.
    pub fn max_norm(self, max_norm: f64) -> Result<Self> {
        if !(max_norm > 0.0 && max_norm.is_finite()) {
            let expected = "a finite number above 0".into();
            return Err(Error::Argument {
                what: "max_norm",
                expected,
                found: max_norm.to_string(),
            });
        }
        Ok(Self { max_norm: Some(max_norm), ..self })
    }
}

/// What [`ProcessGroup::average_gradients`] did; the same on all ranks, but for the time.
#[derive(Debug, Clone, Copy, PartialEq)]
#[must_use]
pub struct Averaged {
    /// The 2-norm of the mean over all gradients, before clipping.
    pub norm: f64,
    /// Whether the mean was scaled down.
    pub clipped: bool,
    /// What was exchanged.
    pub statistics: Statistics,
}

impl ProcessGroup {
    /// Replaces the gradients of some parameters by their mean over all ranks.
    ///
    /// `parameters` are those that one optimizer is about to step, in the same order on all ranks: the
    /// gradients of others stay as they are. A parameter without a gradient is passed over, if it has none
    /// on any rank. Gradients are gathered into buckets from the last parameter to the first, one bucket for
    /// each element type and device at a time, and summed in their own type.
    ///
    /// The norm is off by some 1e-9 of itself, for floats; that of rank 0 counts for all, so that all scale
    /// by the same number. A group of one process measures and clips just so.
    ///
    /// # Errors
    /// [`Error::NotFinite`] on all ranks if the norm is not finite: the gradients then hold the useless mean,
    /// and the ranks are in step. [`Error::GradientAbsent`], [`Error::GradientShape`],
    /// [`Error::ParameterCount`] if the ranks do not fit together, with the gradients untouched.
    /// [`Error::Kind`], [`Error::Layout`], [`Error::Device`] for a gradient that cannot be averaged; those of
    /// [`ProcessGroup::barrier`].
    ///
    /// # Example
    /// ```
    /// # use tch::{Device, Kind, Tensor};
    /// # use tch_c10d::{Averaging, ProcessGroup};
    /// let group = ProcessGroup::from_env()?;
    /// let parameter = Tensor::from_slice(&[3.0, 4.0]).set_requires_grad(true);
    /// (&parameter * &parameter).sum(Kind::Double).backward();
    ///
    /// let averaging = Averaging::default().max_norm(1.0)?;
    /// let averaged = group.average_gradients(&[parameter.shallow_clone()], &averaging)?;
    /// assert!((averaged.norm - 10.0).abs() < 1e-9 && averaged.clipped);
    /// assert!((parameter.grad().norm().double_value(&[]) - 1.0).abs() < 1e-6);
    /// # Ok::<(), tch_c10d::Error>(())
    /// ```
    pub fn average_gradients(
        &self,
        parameters: &[Tensor],
        averaging: &Averaging,
    ) -> Result<Averaged> {
        let before = self.statistics();
        let _guard = tch::no_grad_guard();
        let gradients = self.gradients(parameters)?;
        let buckets = buckets(&gradients, averaging.bucket_bytes);
        self.agree_on(&gradients, &buckets, averaging)?;
        let refused = |source| self.refused(OPERATION, source);

        let mut own_spreads = Vec::new();
        let mut norms = Vec::new();
        for bucket in &buckets {
            let bucket: Vec<&Tensor> =
                bucket.iter().filter_map(|place| gradients.get(*place)?.as_ref()).collect();
            if self.world_size() == 1 {
                for gradient in bucket {
                    norms.push(flatten(&[gradient]).and_then(|flat| norm(&flat)).map_err(refused)?);
                }
                continue;
            }
            let mut flat = flatten(&bucket).map_err(refused)?;
            own_spreads.push(spread(&flat).map_err(refused)?);
            self.sum(OPERATION, &mut flat)?;
            self.divide(OPERATION, &mut flat)?;
            unflatten(&flat, &bucket).map_err(refused)?;
            norms.push(norm(&flat).map_err(refused)?);
        }
        let mut total = total_norm(&norms, &gradients).map_err(refused)?;
        self.send(OPERATION, &mut total, 0)?;
        let norm = total.f_double_value(&[]).map_err(refused)?;
        if !norm.is_finite() {
            return Err(self.not_finite(&own_spreads)?);
        }
        let clipped = match averaging.max_norm {
            Some(max_norm) if norm + 1e-6 > max_norm => {
                let factor = max_norm / (norm + 1e-6);
                for gradient in gradients.iter().flatten() {
                    let scaled =
                        number(factor).and_then(|factor| gradient.shallow_clone().f_mul_(&factor));
                    let _ = scaled.map_err(refused)?;
                }
                true
            }
            _ => false,
        };
        Ok(Averaged { norm, clipped, statistics: self.statistics().since(before) })
    }

    /// The gradient of each parameter, if it has one.
    fn gradients(&self, parameters: &[Tensor]) -> Result<Vec<Option<Tensor>>> {
        let rank = self.rank();
        let gradient = |parameter: &Tensor| {
            let layout = |found| Err(Error::Layout { rank, operation: OPERATION, found });
            if !parameter.defined() {
                return layout("is undefined");
            }
            let torch = |source| Error::Torch { rank, operation: OPERATION, source };
            let gradient = parameter.f_grad().map_err(torch)?;
            if !gradient.defined() {
                return Ok(None);
            }
            if ffi::layout(&gradient).is_ok_and(|layout| layout == Layout::NotStrided) {
                return layout("is sparse, quantized or opaque");
            }
            let kind = gradient.f_kind().map_err(torch)?;
            if !is_float(kind) {
                let expected = "a floating-point gradient of 16, 32 or 64 bits";
                return Err(Error::Kind { rank, operation: OPERATION, expected, found: kind });
            }
            match gradient.device() {
                Device::Cpu | Device::Cuda(_) => Ok(Some(gradient)),
                found => Err(Error::Device { rank, operation: OPERATION, found }),
            }
        };
        parameters.iter().map(gradient).collect()
    }

    /// Whether all ranks have the same gradients to average, in the same buckets.
    fn agree_on(
        &self,
        gradients: &[Option<Tensor>],
        buckets: &[Vec<usize>],
        averaging: &Averaging,
    ) -> Result<()> {
        let number = |place| buckets.iter().position(|bucket| bucket.contains(&place));
        let prints = gradients.iter().map(|gradient| {
            gradient
                .as_ref()
                .map_or(ABSENT, |gradient| fingerprint(gradient, self.is_by_nccl(gradient)))
        });
        let numbers =
            (0..gradients.len()).map(|place| number(place).map_or(-1, |bucket| bucket as i64));
        let list: Vec<i64> = prints.chain(numbers).collect();
        let call = Call::new(OPERATION).averaging(
            gradients.len(),
            averaging.bucket_bytes,
            digest(list.iter().copied()),
        );
        if self.agree(OPERATION, call)? {
            return Ok(());
        }
        let refused = |source| self.refused(OPERATION, source);
        let list = Tensor::f_from_slice(&list).map_err(refused)?;
        let lists = self.gather_all(OPERATION, &list)?;
        let lists = lists.f_flatten(0, 1).and_then(Vec::<i64>::try_from).map_err(refused)?;
        Err(misfit(self.rank(), gradients.len(), &lists))
    }

    /// The error of a mean that is not finite, with the ranks that are to blame.
    fn not_finite(&self, own_spreads: &[Tensor]) -> Result<Error> {
        if self.world_size() == 1 {
            return Ok(Error::NotFinite { rank: 0, ranks: vec![0] });
        }
        let refused = |source| self.refused(OPERATION, source);
        let own =
            on_cpu(own_spreads).and_then(|spreads| spreads.f_sum(Kind::Double)).map_err(refused)?;
        let all = self.gather_all(OPERATION, &own)?;
        let all = Vec::<f64>::try_from(&all).map_err(refused)?;
        let ranks =
            all.iter().enumerate().filter(|(_, spread)| !spread.is_finite()).map(|(rank, _)| rank);
        Ok(Error::NotFinite { rank: self.rank(), ranks: ranks.collect() })
    }
}
