//! Gradient checkpointing (Chen et al., arXiv 1604.06174): of each computation its inputs are kept, and the
//! rest is computed again when the gradient is wanted.

use std::cell::RefCell;
use std::fmt;

use tch::{Device, Kind, Tensor};

use crate::dispatcher::{Graph, backward};
use crate::error::{BoxedError, Error, Result};

type Computation = Box<dyn Fn(&[Tensor]) -> Result<Tensor, BoxedError>>;

/// The computations of one loss whose inputs alone are kept.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_training::Tape;
///
/// # fn main() -> tch_training::Result<()> {
/// let options = (Kind::Float, Device::Cpu);
/// let weight = Tensor::f_ones([3], options)?.f_set_requires_grad(true)?;
/// let tape = Tape::default();
/// let mut x = Tensor::f_ones([3], options)?;
/// for _ in 0..4 {
///     // One block of a model. It runs twice: now without a graph, and again in `Tape::backward`.
///     let weight = weight.shallow_clone();
///     x = tape.run(&[x], move |inputs| inputs[0].f_mul(&weight)?.f_tanh())?;
/// }
/// tape.backward(&x.f_sum(Kind::Float)?)?;
/// assert!(weight.grad().defined());
/// # Ok(())
/// # }
/// ```
/// The output of a computation is a leaf, at which the loss's own graph ends; [`Self::backward`] goes on from
/// there. Plain `loss.backward()` would stop there, so parameters before it would get no gradient.
///
/// Between the computations there may be any operations, and a loss may be made of any number of passes, of
/// several models too.
#[derive(Default)]
pub struct Tape(RefCell<Vec<Entry>>);

/// One computation.
struct Entry {
    computation: Computation,
    /// What it was given, in the graphs that that came from.
    inputs: Vec<Tensor>,
    /// What it gave: a leaf.
    output: Tensor,
    /// What libtorch's generator is seeded with before it runs.
    seed: Option<i64>,
}

impl fmt::Debug for Tape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tape").field("computations", &self.0.borrow().len()).finish()
    }
}

impl Tape {
    /// Runs `computation` on `inputs` without a graph and keeps both for [`Self::backward`], which runs it
    /// again with one. It must give the same again: where it draws random numbers, take [`Self::run_seeded`].
    ///
    /// The closure owns what it needs besides its inputs; handles on parameters are cheap. Gradients reach
    /// the inputs and whatever leaves the closure uses. Where gradients are switched off nothing is kept, and
    /// the output is not a leaf.
    ///
    /// # Errors
    /// [`Error::Computation`] if the closure fails.
    pub fn run<E: Into<BoxedError>>(
        &self,
        inputs: &[Tensor],
        computation: impl Fn(&[Tensor]) -> Result<Tensor, E> + 'static,
    ) -> Result<Tensor> {
        self.record(inputs, None, move |inputs| computation(inputs).map_err(Into::into))
    }

    /// [`Self::run`] of a computation that draws, from dropout for instance: libtorch's generator, that of the
    /// whole process, is seeded with `seed` before it runs, both times.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_seeded<E: Into<BoxedError>>(
        &self,
        seed: i64,
        inputs: &[Tensor],
        computation: impl Fn(&[Tensor]) -> Result<Tensor, E> + 'static,
    ) -> Result<Tensor> {
        self.record(inputs, Some(seed), move |inputs| computation(inputs).map_err(Into::into))
    }

    /// `tensor` as a leaf that gathers the gradients of all computations that use it, so that they go on into
    /// its graph once and together. For what every block is given, an embedding of time for instance.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn gather(&self, tensor: &Tensor) -> Result<Tensor> {
        if !tensor.requires_grad() {
            return Ok(tensor.shallow_clone());
        }
        self.run(std::slice::from_ref(tensor), |inputs| Ok::<_, Error>(inputs[0].shallow_clone()))
    }

    fn record(
        &self,
        inputs: &[Tensor],
        seed: Option<i64>,
        computation: impl Fn(&[Tensor]) -> Result<Tensor, BoxedError> + 'static,
    ) -> Result<Tensor> {
        let enabled = gradients_are_enabled()?;
        let _guard = tch::no_grad_guard();
        let plain = inputs.iter().map(Tensor::f_detach).collect::<Result<Vec<_>, _>>()?;
        let output = run(&computation, &plain, seed)?;
        if !enabled {
            return Ok(output);
        }
        // Detached, as a computation may hand its input on.
        let output = output.f_detach()?.f_set_requires_grad(true)?;
        self.0.borrow_mut().push(Entry {
            computation: Box::new(computation),
            inputs: inputs.iter().map(Tensor::shallow_clone).collect(),
            output: output.shallow_clone(),
            seed,
        });
        Ok(output)
    }

    /// Whether nothing has been kept.
    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Adds the gradient of `loss`, a scalar, to the `grad` of every leaf that it depends on, through
    /// all that the tape has kept since it was made or last used here.
    ///
    /// # Errors
    /// [`Error::NoGraph`] if `loss` requires no gradient, [`Error::GradientsOff`] where gradients are
    /// switched off, [`Error::Computation`] if a closure fails at its second run.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        if !gradients_are_enabled()? {
            return Err(Error::GradientsOff);
        }
        let entries = self.0.take();
        if !loss.requires_grad() {
            return Err(Error::NoGraph);
        }
        // What lies between the computations may be passed once for each of them, hence it is kept.
        backward(loss, None, Graph::Kept)?;
        // A later one may depend on the output of an earlier one.
        for entry in entries.into_iter().rev() {
            entry.backward()?;
        }
        Ok(())
    }
}

impl Entry {
    fn backward(self) -> Result<()> {
        let gradient = self.output.f_grad()?;
        if !gradient.defined() {
            return Ok(());
        }
        // An input that is a leaf itself, as the output of an earlier computation is, gathers its gradient
        // where it is.
        let leaf = |input: &Tensor| -> Result<Tensor> {
            if input.f_is_leaf()? {
                return Ok(input.shallow_clone());
            }
            Ok(input.f_detach()?.f_set_requires_grad(true)?)
        };
        let leaves = self.inputs.iter().map(leaf).collect::<Result<Vec<_>>>()?;
        {
            let output = run(&self.computation, &leaves, self.seed)?;
            if output.requires_grad() {
                backward(&output, Some(&gradient), Graph::Freed)?;
            }
        }
        drop((gradient, self.output, self.computation));
        for (input, leaf) in self.inputs.iter().zip(leaves) {
            if !input.f_is_leaf()? && leaf.f_grad()?.defined() {
                backward(input, Some(&leaf.f_grad()?), Graph::Kept)?;
            }
        }
        Ok(())
    }
}

fn run(
    computation: &impl Fn(&[Tensor]) -> Result<Tensor, BoxedError>,
    inputs: &[Tensor],
    seed: Option<i64>,
) -> Result<Tensor> {
    if let Some(seed) = seed {
        tch::manual_seed(seed);
    }
    computation(inputs).map_err(Error::Computation)
}

/// Whether operations record a graph on this thread, which `tch` does not tell.
fn gradients_are_enabled() -> Result<bool> {
    let leaf = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
    Ok(leaf.f_neg()?.requires_grad())
}
