//! Blocks one after the other, on a tape or not.

use std::rc::Rc;

use anyhow::Result;
use tch::Tensor;
use tch_training::seed::{draw_seed, seed_of};

use crate::model::blocks::Block;
use crate::model::layout::Sequence;
use crate::model::role::Role;

/// Runs `blocks` one after the other on `x` `[B, S, D]`, on the role's tape if it has one, and returns the
/// tokens that `sequence` keeps. `time` as for [`Block::forward`].
///
/// # Errors
/// If the shapes do not fit.
pub(super) fn run_blocks(
    blocks: &Rc<[Block]>,
    x: Tensor,
    sequence: Sequence,
    time: Option<&Tensor>,
    role: Role<'_>,
) -> Result<Tensor> {
    let count = blocks.len();
    // Each block draws by a seed of its own, on a tape or not, so that both draw the same.
    let seed = if role.draws() { Some(draw_seed()?) } else { None };
    let seed = |index| seed.map(|seed| seed_of(seed, index as u64));
    // Without blocks there is nothing to keep, and the graph need not end.
    let Some(tape) = role.tape().filter(|_| count > 0) else {
        return blocks.iter().enumerate().try_fold(x, |x, (index, block)| {
            if let Some(seed) = seed(index) {
                tch::manual_seed(seed);
            }
            block.forward(&x, &sequence, sequence.rows(index, count), time, role)
        });
    };
    let sequence = Rc::new(sequence);
    // Every block is given the time; its gradient goes on in one piece.
    let time = time.map(|time| tape.gather(time)).transpose()?;
    let mut x = x;
    for index in 0..count {
        let time = time.as_ref().map(Tensor::shallow_clone);
        let inputs: Vec<Tensor> = [x].into_iter().chain(time).collect();
        let (blocks, sequence) = (blocks.clone(), sequence.clone());
        let kept = role.kept();
        let block = move |inputs: &[Tensor]| {
            let rows = sequence.rows(index, count);
            blocks[index].forward(&inputs[0], &sequence, rows, inputs.get(1), kept.role())
        };
        x = match seed(index) {
            Some(seed) => tape.run_seeded(seed, &inputs, block)?,
            None => tape.run(&inputs, block)?,
        };
    }
    Ok(x)
}
