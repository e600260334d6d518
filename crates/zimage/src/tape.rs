//! Gradient checkpointing (Chen et al., arXiv 1604.06174): of a stack of blocks the input of each is
//! kept, and the rest is computed again when the gradient is wanted.

use std::cell::RefCell;
use std::rc::Rc;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};

use crate::dispatcher::backward;
use crate::model::{Block, OwnedRole, Role, Sequence};

/// What the checkpointed forward passes of one loss have kept.
///
/// ```ignore
/// let tape = Tape::default();
/// let student = denoiser(&model, Role::training(&lora).checkpointed(&tape));
/// // .. any loss of any number of calls ..
/// tape.backward(&loss)?;
/// ```
/// The output of a stack is a leaf, at which the loss's own graph ends; [`Self::backward`] goes on from
/// there. Plain `loss.backward()` would stop there, so parameters before it would get no gradient.
#[derive(Debug, Default)]
pub struct Tape(RefCell<Vec<Stack>>);

/// Blocks that ran one after the other.
#[derive(Debug)]
struct Stack {
    blocks: Rc<[Block]>,
    /// The input of every block, outside any graph.
    inputs: Vec<Tensor>,
    /// The first input, in the graph that it came from.
    source: Tensor,
    /// The last output: a leaf.
    output: Tensor,
    sequence: Sequence,
    /// The time embedding in its graph, and the leaf that the blocks are given.
    time: Option<(Tensor, Tensor)>,
    role: OwnedRole,
}

impl Tape {
    /// Runs `blocks` as [`run_blocks`] and keeps what [`Self::backward`] needs. Nothing is kept, nor is
    /// the output a leaf, where gradients are switched off.
    fn run(
        &self,
        blocks: &Rc<[Block]>,
        source: &Tensor,
        sequence: &Sequence,
        time: Option<&Tensor>,
        role: Role<'_>,
    ) -> Result<Tensor> {
        let enabled = gradients_are_enabled()?;
        let leaf = |time: &Tensor| -> Result<(Tensor, Tensor)> {
            let leaf = time.f_detach()?.f_set_requires_grad(time.requires_grad())?;
            Ok((time.shallow_clone(), leaf))
        };
        let _guard = tch::no_grad_guard();
        let mut inputs = Vec::with_capacity(blocks.len());
        let mut x = source.f_detach()?;
        for (index, block) in blocks.iter().enumerate() {
            let rows = sequence.rows(index, blocks.len());
            let output = block.forward(&x, sequence, rows, time, role)?;
            if enabled {
                inputs.push(x);
            }
            x = output;
        }
        if enabled {
            x = x.f_set_requires_grad(true)?;
            self.0.borrow_mut().push(Stack {
                blocks: blocks.clone(),
                inputs,
                source: source.shallow_clone(),
                output: x.shallow_clone(),
                sequence: sequence.shallow_clone(),
                time: time.map(leaf).transpose()?,
                role: role.owned(),
            });
        }
        Ok(x)
    }

    /// Whether no pass has been kept.
    pub fn is_empty(&self) -> bool {
        self.0.borrow().is_empty()
    }

    /// Adds the gradient of `loss`, a scalar, to the `grad` of every leaf that it depends on, through
    /// all that the tape has kept since it was made or last used here.
    ///
    /// The masks of dropout are those of the forward pass; to draw them again, libtorch's generator is
    /// seeded anew.
    ///
    /// # Errors
    /// If `loss` does not require a gradient, or gradients are switched off.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        ensure!(gradients_are_enabled()?, "gradients are switched off, but blocks must run again");
        let stacks = self.0.take();
        ensure!(loss.requires_grad(), "the loss depends on nothing that requires a gradient");
        // What lies between the stacks may be passed once for each of them, hence it is retained.
        backward(loss, None, true)?;
        // A later stack may depend on the output of an earlier one.
        for stack in stacks.into_iter().rev() {
            stack.backward()?;
        }
        Ok(())
    }
}

impl Stack {
    fn backward(mut self) -> Result<()> {
        let mut gradient = self.output.f_grad()?;
        if !gradient.defined() {
            return Ok(());
        }
        let role = self.role.role();
        let time = self.time.as_ref().map(|(_, leaf)| leaf);
        for (index, block) in self.blocks.iter().enumerate().rev() {
            let Some(input) = self.inputs.pop() else { break };
            let input = input.f_set_requires_grad(index > 0 || self.source.requires_grad())?;
            let rows = self.sequence.rows(index, self.blocks.len());
            let output = block.forward(&input, &self.sequence, rows, time, role)?;
            if output.requires_grad() {
                backward(&output, Some(&gradient), false)?;
            }
            gradient = input.f_grad()?;
        }
        if self.source.requires_grad() {
            backward(&self.source, Some(&gradient), true)?;
        }
        if let Some((time, leaf)) = &self.time
            && leaf.f_grad()?.defined()
        {
            backward(time, Some(&leaf.f_grad()?), true)?;
        }
        Ok(())
    }
}

/// Runs `blocks` one after the other on `x` `[B, S, D]`, on the role's tape if it has one, and returns the
/// tokens that `sequence` keeps. `time` as for [`Block::forward`].
///
/// # Errors
/// If the shapes do not fit.
pub(crate) fn run_blocks(
    blocks: &Rc<[Block]>,
    x: Tensor,
    sequence: &Sequence,
    time: Option<&Tensor>,
    role: Role<'_>,
) -> Result<Tensor> {
    match role.tape() {
        // Without blocks there is nothing to keep, and the graph need not end.
        Some(tape) if !blocks.is_empty() => tape.run(blocks, &x, sequence, time, role),
        _ => blocks.iter().enumerate().try_fold(x, |x, (index, block)| {
            block.forward(&x, sequence, sequence.rows(index, blocks.len()), time, role)
        }),
    }
}

/// Whether operations record a graph on this thread, which `tch` does not tell.
fn gradients_are_enabled() -> Result<bool> {
    let leaf = Tensor::f_zeros([1], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
    Ok(leaf.f_neg()?.requires_grad())
}
