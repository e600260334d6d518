//! Blocks one after the other, on a tape or not.

use std::rc::Rc;

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::seed::seed_of;

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
    // Without blocks there is nothing to keep, and the graph need not end.
    let Some(tape) = role.tape().filter(|_| count > 0) else {
        return blocks.iter().enumerate().try_fold(x, |x, (index, block)| {
            block.forward(&x, &sequence, sequence.rows(index, count), time, role)
        });
    };
    let seed = if role.draws() { Some(draw_seed()?) } else { None };
    let sequence = Rc::new(sequence);
    // Every block is given the time; its gradient goes on in one piece.
    let time = time.map(|time| tape.gather(time)).transpose()?;
    let mut x = x;
    for index in 0..count {
        let time = time.as_ref().map(Tensor::shallow_clone);
        let inputs: Vec<Tensor> = [x].into_iter().chain(time).collect();
        let (blocks, sequence) = (blocks.clone(), sequence.clone());
        let (lora, dropout) = (role.lora().cloned(), role.dropout());
        let block = move |inputs: &[Tensor]| {
            let role = Role::off_tape(lora.as_ref(), dropout);
            let rows = sequence.rows(index, count);
            blocks[index].forward(&inputs[0], &sequence, rows, inputs.get(1), role)
        };
        x = match seed {
            Some(seed) => tape.run_seeded(seed_of(seed, index as u64), &inputs, block)?,
            None => tape.run(&inputs, block)?,
        };
    }
    Ok(x)
}

/// A number that follows from libtorch's generator, for what is to be drawn twice alike.
fn draw_seed() -> Result<u64> {
    let seed = Tensor::f_randint(i64::MAX, [1], (Kind::Int64, Device::Cpu))?;
    Ok(seed.f_int64_value(&[0])? as u64)
}
