//! The loss of the student: engines and regularizers, in groups that share a probe.

mod evaluation;

pub use evaluation::Evaluation;
use tch::{Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::batch::Batch;
use crate::checks::{check_size, check_times};
use crate::collective::Collective;
use crate::denoiser::Denoiser;
use crate::diagnostics::{Diagnostics, Role};
use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::gradient::{is_recording, surrogate};
use crate::normalizer::Normalizer;
use crate::numeric::noise_like;
use crate::probe::Probe;
use crate::regularizer::Regularizer;
use crate::renoising::{Renoising, check_draws};
use crate::value::{checked, is_finite};

/// Terms that share one probe: one tau, one noise, one set of teacher forwards.
pub struct Group<'a> {
    renoising: Renoising<'a>,
    normalizer: Normalizer,
    terms: Vec<Term<'a>>,
}

struct Term<'a> {
    name: String,
    weight: f64,
    role: Role,
    form: Form<'a>,
}

/// The form of a term: a direction or a loss.
enum Form<'a> {
    Direction(Box<dyn Engine + 'a>),
    Loss(Box<dyn Regularizer + 'a>),
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
    /// must be finite, which the evaluation checks. A term of weight 0 is off: an evaluation neither computes it nor
    /// has its value, and needs nothing for it; nor is a probe made for a group of such terms. Its network still has its
    /// [own loss](Objective::own_losses).
    #[must_use]
    pub fn engine(self, name: impl Into<String>, weight: f64, engine: impl Engine + 'a) -> Self {
        self.term(name, weight, Role::Engine, Form::Direction(Box::new(engine)))
    }

    /// Adds a regularizer, as [`engine`](Self::engine). Lend it (`&dm`), so that the loop can train its
    /// network.
    #[must_use]
    pub fn regularizer(
        self,
        name: impl Into<String>,
        weight: f64,
        regularizer: impl Regularizer + 'a,
    ) -> Self {
        self.term(name, weight, Role::Regularizer, Form::Loss(Box::new(regularizer)))
    }

    /// Adds an engine that is given as a loss, such as a reward or a regression to the teacher's samples.
    #[must_use]
    pub fn engine_loss(
        self,
        name: impl Into<String>,
        weight: f64,
        engine: impl Regularizer + 'a,
    ) -> Self {
        self.term(name, weight, Role::Engine, Form::Loss(Box::new(engine)))
    }

    /// Adds a regularizer that is given as a direction.
    #[must_use]
    pub fn regularizer_direction(
        self,
        name: impl Into<String>,
        weight: f64,
        regularizer: impl Engine + 'a,
    ) -> Self {
        self.term(name, weight, Role::Regularizer, Form::Direction(Box::new(regularizer)))
    }

    fn term(mut self, name: impl Into<String>, weight: f64, role: Role, form: Form<'a>) -> Self {
        self.terms.push(Term { name: name.into(), weight, role, form });
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
    /// Unit-uniform numbers `[B]`, or per frame, which the group's time distribution maps to tau.
    pub u: Tensor,
    /// The re-noising noise, shaped like x.
    pub noise: Tensor,
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
    processes: Option<&'a Collective<'a>>,
    observed: bool,
}

impl<'a> Objective<'a> {
    /// An objective without terms, over `teacher`.
    #[must_use]
    pub fn new(teacher: Denoiser<'a>) -> Self {
        Self { teacher, groups: Vec::new(), processes: None, observed: false }
    }

    /// Adds a group of terms.
    #[must_use]
    pub fn with(mut self, group: Group<'a>) -> Self {
        self.groups.push(group);
        self
    }

    /// Changes the weight of the term that was added as `name`; 0 turns it off.
    ///
    /// # Errors
    /// [`Error::NoTerm`] if there is no such term, [`Error::OutOfRange`] unless `weight` is finite.
    pub fn set_weight(&mut self, name: &str, weight: f64) -> Result<()> {
        let weight = check_weight(weight).map_err(|error| error.in_term(name))?;
        let mut terms = self.groups.iter_mut().flat_map(|group| &mut group.terms);
        let term = terms.find(|term| term.name == name);
        term.ok_or_else(|| Error::NoTerm { name: name.to_owned() })?.weight = weight;
        Ok(())
    }

    /// Changes the normaliser of the group that holds the term `name`, as when a guided normaliser has to
    /// follow a guidance that changes.
    ///
    /// # Errors
    /// [`Error::NoTerm`] if there is no such term.
    pub fn set_normalizer(&mut self, name: &str, normalizer: Normalizer) -> Result<()> {
        let holds = |group: &&mut Group<'a>| group.terms.iter().any(|term| term.name == name);
        let group = self.groups.iter_mut().find(holds);
        group.ok_or_else(|| Error::NoTerm { name: name.to_owned() })?.normalizer = normalizer;
        Ok(())
    }

    /// Takes [`Diagnostics`] in every [`Evaluation`]. They cost a few elementwise operations, no
    /// network forward, and the memory of the directions until they are dropped. The update of a term that is a loss
    /// is its gradient: a backward pass from the loss to the samples, short of the student.
    #[must_use]
    pub fn observed(mut self) -> Self {
        self.observed = true;
        self
    }

    /// Makes every batch a part of the batch of several processes, for the terms that look at the whole of it; see
    /// [`Collective`]. The loss of such a term is that of the whole batch on each process, the loss of
    /// another that of the part: the mean over the processes is that of the whole batch for all. Diagnostics are
    /// of the part.
    #[must_use]
    pub fn among(mut self, processes: &'a Collective<'a>) -> Self {
        self.processes = Some(processes);
        self
    }

    /// The random numbers of one evaluation, one draw a group, from libtorch's global generator.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if a group draws [`per_frame`](Renoising::per_frame) and the samples have no such axis.
    pub fn draw(&self, batch: &Batch<'_>) -> Result<Vec<Draw>> {
        let x = batch.x();
        let draw = |group: &Group<'_>| {
            Ok(Draw { u: group.renoising.unit_uniform(x)?, noise: noise_like(x)? })
        };
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
    /// read from their device. A term with an [`Augmentation`](crate::Augmentation) still draws that, and
    /// [`MaximumMeanDiscrepancy`](crate::MaximumMeanDiscrepancy) its prior or its orders;
    /// [`Adversarial::generator_loss_at`](crate::Adversarial::generator_loss_at),
    /// [`PairedRegression::between_at`](crate::PairedRegression::between_at) and
    /// [`MaximumMeanDiscrepancy::between`](crate::MaximumMeanDiscrepancy::between) take what is drawn.
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
            check_times("draw", u, batch.x())?;
            check_draws(u)?;
        }
        self.evaluate_with(batch, draws)
    }

    fn evaluate_with(&self, batch: &Batch<'_>, draws: Vec<Draw>) -> Result<Evaluation> {
        let mut total: Option<Tensor> = None;
        let mut terms = Vec::new();
        self.check_terms()?;
        let mut diagnostics = if self.observed { Some(Diagnostics::of(batch)?) } else { None };
        for (group, Draw { u, noise }) in self.groups.iter().zip(draws) {
            if !group.terms.iter().any(Term::is_on) {
                continue;
            }
            let path = self.teacher.path();
            let tau = group.renoising.times(path, &u, batch.student_time())?;
            let mut probe =
                Probe::at(&self.teacher, batch, tau, noise)?.normalizer(group.normalizer);
            if let Some(processes) = self.processes {
                probe = probe.among(processes);
            }
            if self.observed {
                probe = probe.observed();
            }
            for term in group.terms.iter().filter(|term| term.is_on()) {
                let Term { name, weight, .. } = term;
                let loss = term.loss(&probe).map_err(|error| error.in_term(name))?;
                let weighted = loss.times(*weight)?;
                total = Some(match total {
                    Some(total) => total.f_add(&weighted)?,
                    None => weighted,
                });
                terms.push((name.clone(), loss.f_detach()?));
                if let (Some(all), Some(of_term)) =
                    (&mut diagnostics, probe.take_diagnostics(term.role))
                {
                    all.push(name, of_term)?;
                }
            }
        }
        let loss = match total {
            Some(total) => total,
            // Every term is off.
            None => {
                let x = batch.trained()?;
                surrogate(&x, &x.f_zeros_like()?)?
            }
        };
        Ok(Evaluation { loss, terms, diagnostics })
    }

    /// Refuses an objective without terms, terms of one name, and weights that are not finite.
    fn check_terms(&self) -> Result<()> {
        let mut names: Vec<&str> = Vec::new();
        for Term { name, weight, .. } in self.groups.iter().flat_map(|group| &group.terms) {
            check_weight(*weight).map_err(|error| error.in_term(name))?;
            if names.contains(&name.as_str()) {
                return Err(Error::SameName { name: name.clone() });
            }
            names.push(name);
        }
        checked("number of terms", "at least 1", names.len() as f64, !names.is_empty()).map(|_| ())
    }

    /// The losses of the regularizers' own networks, by the name of the term. A regularizer that is lent to two
    /// terms has its loss here twice, drawn afresh: a sum over all would train its network twice as fast.
    ///
    /// # Errors
    /// [`Error::Term`] with the name of the term that failed and why, such as a loss that is no
    /// floating-point scalar.
    pub fn own_losses(&self, batch: &Batch<'_>) -> Result<Vec<(String, Tensor)>> {
        let mut losses = Vec::new();
        for Term { name, form, .. } in self.groups.iter().flat_map(|group| &group.terms) {
            if let Form::Loss(term) = form {
                let loss = term.own_loss(batch).map_err(|error| error.in_term(name))?;
                if let Some(loss) = loss {
                    check_size("loss", &loss, &[]).map_err(|error| error.in_term(name))?;
                    losses.push((name.clone(), loss));
                }
            }
        }
        Ok(losses)
    }
}

fn check_weight(weight: f64) -> Result<f64> {
    checked("weight of a term", "finite, as float32 too", weight, is_finite(weight))
}

impl Term<'_> {
    fn is_on(&self) -> bool {
        self.weight != 0.0
    }

    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        match &self.form {
            Form::Direction(term) => {
                let direction = {
                    let _no_grad = no_grad_guard();
                    term.direction(probe)?
                };
                probe.loss_of(&direction)
            }
            Form::Loss(term) => {
                let loss = term.loss(probe)?;
                // Another shape would broadcast over the sum, and fail in `backward` without a name.
                check_size("loss", &loss, &[])?;
                // Beside other terms a loss without a graph would train nothing in silence.
                if !loss.requires_grad() && probe.x().requires_grad() && is_recording()? {
                    return Err(Error::NoGradient { what: "loss" });
                }
                probe.observe_update(&loss)?;
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
            .field("processes", &self.processes)
            .field("observed", &self.observed)
            .finish()
    }
}
