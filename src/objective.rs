//! The loss of the student: engines and regularizers, in groups that share a probe.

use tch::{Tensor, no_grad_guard};

use crate::diagnostics::Role;
use crate::numeric::{check_per_sample, check_size, noise_like};
use crate::renoising::{check_draws, unit_uniform};
use crate::value::checked;
use crate::{
    Batch, Denoiser, Diagnostics, Engine, Error, Normalizer, Probe, Regularizer, Renoising, Result,
};

/// Terms that look at the same re-noised samples: one tau, one noise, one set of teacher forwards.
pub struct Group<'a> {
    renoising: Renoising<'a>,
    normalizer: Normalizer,
    terms: Vec<NamedTerm<'a>>,
}

struct NamedTerm<'a> {
    name: String,
    weight: f64,
    term: Term<'a>,
}

enum Term<'a> {
    Engine(Box<dyn Engine + 'a>),
    Regularizer(Box<dyn Regularizer + 'a>),
}

impl<'a> Group<'a> {
    /// A group without terms that draws tau from `renoising`.
    #[must_use]
    pub fn new(renoising: Renoising<'a>) -> Self {
        Self { renoising, normalizer: Normalizer::default(), terms: Vec::new() }
    }

    /// Sets the normaliser that the terms of this group share.
    #[must_use]
    pub fn normalizer(mut self, normalizer: Normalizer) -> Self {
        self.normalizer = normalizer;
        self
    }

    /// Adds an engine. `name` appears in the evaluation and in errors; `weight` scales its loss and
    /// must be finite, which the evaluation checks.
    #[must_use]
    pub fn engine(
        mut self,
        name: impl Into<String>,
        weight: f64,
        engine: impl Engine + 'a,
    ) -> Self {
        let term = Term::Engine(Box::new(engine));
        self.terms.push(NamedTerm { name: name.into(), weight, term });
        self
    }

    /// Adds a regularizer, as [`engine`](Self::engine). Lend it (`&dm`) to train its network beside.
    #[must_use]
    pub fn regularizer(
        mut self,
        name: impl Into<String>,
        weight: f64,
        regularizer: impl Regularizer + 'a,
    ) -> Self {
        let term = Term::Regularizer(Box::new(regularizer));
        self.terms.push(NamedTerm { name: name.into(), weight, term });
        self
    }
}

impl std::fmt::Debug for Group<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.terms.iter().map(|t| &t.name).collect();
        f.debug_struct("Group")
            .field("terms", &names)
            .field("normalizer", &self.normalizer)
            .finish_non_exhaustive()
    }
}

/// The random numbers that one group consumes in one evaluation.
#[derive(Debug)]
pub struct Draw {
    /// Unit-uniform numbers `[B]`, which the group's sampler turns into tau.
    pub u: Tensor,
    /// The re-noising noise, shaped like x.
    pub noise: Tensor,
}

/// The value of an objective: tensors, so that reading a number is the caller's choice (it
/// synchronises a GPU).
#[derive(Debug)]
#[non_exhaustive]
#[must_use = "a loss does nothing until it is propagated"]
pub struct Evaluation {
    /// The weighted sum of all terms, a scalar with a graph back to x.
    pub loss: Tensor,
    /// The value of each term before its weight, without a graph.
    pub terms: Vec<(String, Tensor)>,
    /// What the terms found on the way; `None` unless [`Objective::observed`] was called.
    pub diagnostics: Option<Diagnostics>,
}

/// Engines and regularizers over one teacher.
///
/// ```text
/// loss = sum of weight_k surrogate(x, direction_k) + sum of weight_j loss_j
/// ```
/// The paper's four schedules are ready-made, see [`Schedule`](crate::Schedule); any other arrangement
/// is a sum of [`Group`]s.
pub struct Objective<'a> {
    teacher: Denoiser<'a>,
    groups: Vec<Group<'a>>,
    observed: bool,
}

impl<'a> Objective<'a> {
    /// An objective without terms, over `teacher`.
    #[must_use]
    pub fn new(teacher: Denoiser<'a>) -> Self {
        Self { teacher, groups: Vec::new(), observed: false }
    }

    /// Adds a group of terms.
    #[must_use]
    pub fn with(mut self, group: Group<'a>) -> Self {
        self.groups.push(group);
        self
    }

    /// Takes [`Diagnostics`] in every [`Evaluation`]. They cost a few elementwise operations, no
    /// network forward, and the memory of the directions until they are dropped.
    #[must_use]
    pub fn observed(mut self) -> Self {
        self.observed = true;
        self
    }

    /// The random numbers of one evaluation, one draw a group, from libtorch's global generator.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn draw(&self, batch: &Batch<'_>) -> Result<Vec<Draw>> {
        let x = batch.x();
        let draw = |_| Ok(Draw { u: unit_uniform(x)?, noise: noise_like(x)? });
        self.groups.iter().map(draw).collect()
    }

    /// The loss on a batch, with fresh draws.
    ///
    /// # Errors
    /// [`Error::Term`] with the name of the term that failed and why, such as a loss that is no
    /// floating-point scalar; [`Error::Missing`] if a schedule needs the student's times;
    /// [`Error::OutOfRange`] if there is no term at all; [`Error::SameName`] if two have one name.
    pub fn evaluate(&self, batch: &Batch<'_>) -> Result<Evaluation> {
        self.evaluate_with(batch, self.draw(batch)?)
    }

    /// The loss on a batch for given draws, one for each group in order. Two numbers of each `u` are
    /// read from their device.
    ///
    /// # Errors
    /// As [`evaluate`](Self::evaluate); [`Error::OutOfRange`] if the draws are not as many as the
    /// groups, or a `u` is outside [0, 1]; [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] if
    /// they do not fit the batch.
    pub fn evaluate_at(&self, batch: &Batch<'_>, draws: Vec<Draw>) -> Result<Evaluation> {
        let count = draws.len();
        let one_each = count == self.groups.len();
        checked("number of draws", "the number of groups", count as f64, one_each)?;
        for Draw { u, .. } in &draws {
            check_per_sample("draw", u, batch.x())?;
            check_draws(u)?;
        }
        self.evaluate_with(batch, draws)
    }

    fn evaluate_with(&self, batch: &Batch<'_>, draws: Vec<Draw>) -> Result<Evaluation> {
        let mut total: Option<Tensor> = None;
        let mut terms = Vec::new();
        let mut diagnostics = if self.observed { Some(Diagnostics::of(batch)?) } else { None };
        for (group, Draw { u, noise }) in self.groups.iter().zip(draws) {
            let tau = group.renoising.times(&u, batch.student_times())?;
            let mut probe =
                Probe::at(&self.teacher, batch, tau, noise)?.normalizer(group.normalizer);
            if self.observed {
                probe = probe.observed();
            }
            for NamedTerm { name, weight, term } in &group.terms {
                checked("weight of a term", "finite", *weight, weight.is_finite())
                    .map_err(|error| error.in_term(name))?;
                if terms.iter().any(|(other, _)| other == name) {
                    return Err(Error::SameName { name: name.clone() });
                }
                let loss = term.loss(&probe).map_err(|error| error.in_term(name))?;
                let weighted = loss.f_mul_scalar(*weight)?;
                total = Some(match total {
                    Some(total) => total.f_add(&weighted)?,
                    None => weighted,
                });
                terms.push((name.clone(), loss.f_detach()?));
                if let (Some(all), Some(of_term)) =
                    (&mut diagnostics, probe.take_diagnostics(term.role()))
                {
                    all.push(name, of_term)?;
                }
            }
        }
        let loss = total.ok_or(Error::OutOfRange {
            what: "number of terms",
            requirement: "at least 1",
            value: 0.0,
        })?;
        Ok(Evaluation { loss, terms, diagnostics })
    }

    /// The losses of the regularizers' own networks, by the name of the term.
    ///
    /// # Errors
    /// [`Error::Term`] with the name of the term that failed and why, such as a loss that is no
    /// floating-point scalar.
    pub fn own_losses(&self, batch: &Batch<'_>) -> Result<Vec<(String, Tensor)>> {
        let mut losses = Vec::new();
        for NamedTerm { name, term, .. } in self.groups.iter().flat_map(|group| &group.terms) {
            if let Term::Regularizer(regularizer) = term {
                let loss = regularizer.own_loss(batch).map_err(|error| error.in_term(name))?;
                if let Some(loss) = loss {
                    check_size("loss", &loss, &[]).map_err(|error| error.in_term(name))?;
                    losses.push((name.clone(), loss));
                }
            }
        }
        Ok(losses)
    }
}

impl Term<'_> {
    fn role(&self) -> Role {
        match self {
            Self::Engine(_) => Role::Engine,
            Self::Regularizer(_) => Role::Regularizer,
        }
    }

    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        match self {
            Self::Engine(engine) => {
                let direction = {
                    let _no_grad = no_grad_guard();
                    engine.direction(probe)?
                };
                probe.descend(&direction)
            }
            Self::Regularizer(regularizer) => {
                let loss = regularizer.loss(probe)?;
                // Another shape would spread over the sum, and fail in `backward` without a name.
                check_size("loss", &loss, &[])?;
                Ok(loss)
            }
        }
    }
}

impl std::fmt::Debug for Objective<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Objective")
            .field("teacher", &self.teacher)
            .field("groups", &self.groups)
            .field("observed", &self.observed)
            .finish()
    }
}
