//! The result of one evaluation of a student.

use tch::Tensor;

use crate::time::{PostShift, PreShift};

/// One evaluation of a student on its grid. [`Sampler`](crate::Sampler) returns it,
/// [`Batch::of`](crate::Batch::of) turns it into a batch.
#[derive(Debug)]
#[non_exhaustive]
pub struct Simulation {
    /// The student's clean prediction `[B, ..]`, with its gradient: the x of a [`Batch`](crate::Batch).
    pub x: Tensor,
    /// The student's input x_t `[B, ..]`, in float32 or wider, without a graph.
    pub input: Tensor,
    /// The time of the input as the network sees it.
    pub time: PostShift,
    /// The time of the input on the grid, before the shift.
    pub student_time: PreShift,
}
