//! One evaluation of a student.

use tch::Tensor;

use crate::time::{PostShift, PreShift};

/// One evaluation of a student on its grid, made by [`Sampler`](crate::Sampler);
/// [`Batch::of`](crate::Batch::of) makes a batch of it.
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
