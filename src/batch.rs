//! The student's samples of one training step, with their conditions, times and real samples.

use std::cell::OnceCell;
use std::ops::Deref;

use tch::{Kind, Tensor};

use crate::arithmetic::number_like;
use crate::checks::{
    check_device, check_leading, check_like, check_samples, check_size, check_strided, check_times,
};
use crate::error::{Error, Result};
use crate::numeric::{
    any_kept, batch_size, finite_where_masked, of_one_rank, once, per_sample, widen,
};
use crate::simulation::Simulation;
use crate::time::{PostShift, PreShift};
use crate::value::checked;

/// The condition of a network: any tensors, handed to network closures untouched.
///
/// The crate never reads them, so one type serves token features of unequal length (one tensor a caption),
/// SDXL's pair of embeddings, and class labels:
///
/// ```
/// # use decoupled_dmd::Condition;
/// # use tch::Tensor;
/// let condition = Condition::from(vec![Tensor::from_slice(&[3i64, 7])]);
/// let [labels] = &*condition else { panic!("one tensor of labels") };
/// # assert_eq!(labels.size(), [2]);
/// ```
#[derive(Debug, Default)]
pub struct Condition(Vec<Tensor>);

impl Condition {
    /// No condition, for an unconditional model.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }
}

impl From<Vec<Tensor>> for Condition {
    fn from(tensors: Vec<Tensor>) -> Self {
        Self(tensors)
    }
}

impl From<Tensor> for Condition {
    fn from(tensor: Tensor) -> Self {
        Self(vec![tensor])
    }
}

impl Deref for Condition {
    type Target = [Tensor];
    fn deref(&self) -> &[Tensor] {
        &self.0
    }
}

/// The samples of one step with their condition, and further data that some terms need.
#[derive(Debug)]
pub struct Batch<'a> {
    x: &'a Tensor,
    cond: &'a Condition,
    null: Option<&'a Condition>,
    real: Option<&'a Tensor>,
    real_cond: Option<&'a Condition>,
    target: Option<&'a Tensor>,
    student_time: Option<&'a PreShift>,
    student_input: Option<(&'a Tensor, &'a PostShift)>,
    /// Boolean, expanded to the shape of `x`; false at given frames.
    mask: Option<Tensor>,
    /// Boolean, `[B]` or per frame.
    given: Option<&'a Tensor>,
    /// `x` in float32 or wider, with its graph.
    wide: OnceCell<Tensor>,
}

impl<'a> Batch<'a> {
    /// Samples `x` `[B, ..]` with the student's gradient, drawn for the condition `cond`.
    ///
    /// The batch of an `x` in half precision keeps one copy in float32, made when a term first asks for it: a later
    /// change of such an `x` in place is not seen.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `x` has a batch axis and at least one more, none of them empty;
    /// [`Error::Kind`] unless it is floating point; [`Error::Layout`] unless it is strided.
    pub fn new(x: &'a Tensor, cond: &'a Condition) -> Result<Self> {
        check_samples("x", x, 2)?;
        Ok(Self {
            x,
            cond,
            null: None,
            real: None,
            real_cond: None,
            target: None,
            student_time: None,
            student_input: None,
            mask: None,
            given: None,
            wide: OnceCell::new(),
        })
    }

    /// The student's samples of a simulation, with their input and their times, for the condition `cond`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn of(made: &'a Simulation, cond: &'a Condition) -> Result<Self> {
        Self::new(&made.x, cond)?
            .with_student_input(&made.input, &made.time)?
            .with_student_time(&made.student_time)
    }

    /// Adds the null condition (the encoded empty prompt), which CFG Augmentation needs.
    #[must_use]
    pub fn with_null(mut self, null: &'a Condition) -> Self {
        self.null = Some(null);
        self
    }

    /// Adds real samples `[M, ..]`, with the axes of `x` after the first, for terms that use data.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] unless they are like `x` but in number.
    pub fn with_real(mut self, real: &'a Tensor) -> Result<Self> {
        check_samples("real samples", real, 2)?;
        let mut expected = self.x.size();
        if let Some(first) = expected.first_mut() {
            *first = batch_size(real);
        }
        check_size("real samples", real, &expected)?;
        check_device("real samples", real, self.x)?;
        self.real = Some(real);
        Ok(self)
    }

    /// Adds the condition of the real samples, such as their own captions. Without it they share the
    /// condition of the student's samples.
    #[must_use]
    pub fn with_real_cond(mut self, cond: &'a Condition) -> Self {
        self.real_cond = Some(cond);
        self
    }

    /// Adds targets `[B, ..]`, one for each sample, for terms that regress pairs.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] unless they are like `x`.
    pub fn with_target(mut self, target: &'a Tensor) -> Result<Self> {
        check_like("target", target, self.x)?;
        self.target = Some(target);
        Ok(self)
    }

    /// Adds the pre-shift times `[B]` at which the student was evaluated, or one for each frame; [`AboveStudent`]
    /// needs them.
    ///
    /// [`AboveStudent`]: crate::AboveStudent
    ///
    /// # Errors
    /// [`Error::Shape`] unless there is one time for each sample or frame; [`Error::Device`] if they are
    /// elsewhere than `x`.
    pub fn with_student_time(mut self, time: &'a PreShift) -> Result<Self> {
        check_times("student time", time.tensor(), self.x)?;
        self.student_time = Some(time);
        Ok(self)
    }

    /// Adds the student's input x_t `[B, ..]`, from which it predicted x, and the time of the input as the
    /// network sees it. Engines that follow the teacher's ODE through the student's input need it.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::Kind`] or [`Error::Device`] unless `input` is like `x` and there is one
    /// time for each sample or frame.
    pub fn with_student_input(mut self, input: &'a Tensor, time: &'a PostShift) -> Result<Self> {
        check_like("student input", input, self.x)?;
        check_times("time of the student input", time.tensor(), self.x)?;
        self.student_input = Some((input, time));
        Ok(self)
    }

    /// Adds a mask of booleans: true counts, false (padding, a sample to leave out) does not. The mask is
    /// `[B]`, one boolean for each sample, or has the axes of `x` with 1 where one value serves an axis: a mask of
    /// the frames of `[B, F, C, H, W]` is `[B, F, 1, 1, 1]`.
    ///
    /// No term moves a masked element: it sends a gradient of exactly zero to the student, even if its value is NaN
    /// or infinite; this cannot help where activations inside the student are not finite. Networks see the whole
    /// sample, with zeros in place of what is not finite and masked; masking attention is their own matter.
    ///
    /// For engines, Distribution Matching and the loss of the fake score:
    /// - the means of the normaliser and of the diagnostics are over the elements that count;
    /// - losses remain means over *all* elements of the batch, so that the mask of one sample does not
    ///   change the gradient of another. For a mean over the elements that count, multiply the weight of
    ///   the term by their inverse share.
    ///
    /// Regularizers over the statistics of whole samples count masked elements in. A custom term gets the gradient
    /// right by [`Probe::x`](crate::Probe::x), its loss by [`Probe::masked`](crate::Probe::masked) or
    /// [`kept_samples`](Self::kept_samples), and a network of its own what it may see by [`as_data`](Self::as_data).
    ///
    /// # Errors
    /// [`Error::Kind`] unless boolean, [`Error::Shape`] if it does not fit `x`, [`Error::Device`] if
    /// it is elsewhere.
    pub fn with_mask(mut self, mask: &Tensor) -> Result<Self> {
        const WHAT: &str = "mask";
        let (size, whole) = (mask.size(), self.x.size());
        let is_per_sample = size == [self.batch_size()];
        let fits =
            size.len() == whole.len() && size.iter().zip(&whole).all(|(m, x)| m == x || *m == 1);
        if !mask.defined() || !(is_per_sample || fits) {
            return Err(Error::shape(WHAT, format!("[B] or broadcastable to {whole:?}"), &size));
        }
        check_strided(WHAT, mask)?;
        if mask.f_kind()? != Kind::Bool {
            return Err(Error::Kind { what: WHAT, expected: "booleans", found: mask.f_kind()? });
        }
        check_device(WHAT, mask, self.x)?;
        let mask = if is_per_sample { per_sample(mask, self.x)? } else { mask.shallow_clone() };
        let mask = mask.f_expand(whole, false)?;
        self.mask = Some(match self.given {
            Some(given) => mask.f_logical_and(&self.not(given)?)?,
            None => mask,
        });
        Ok(self)
    }

    /// Adds the frames that are given, such as the first of image-to-video: true, `[B, F]` for samples
    /// `[B, F, ..]`, `[B, 1, F]` for `[B, C, F, ..]` ([`PostShift`]). x holds them as they are.
    ///
    /// A given frame is not trained on: the [`mask`](Self::with_mask) leaves it out. Nor is it noised: its time is 1,
    /// the clean end of the path, at every probe and in the loss of the fake score, so that networks are handed times
    /// per frame. The end has no noise on most paths, and little on [`Edm`](crate::Edm) and tables. Terms that noise
    /// whole samples refuse such a batch.
    ///
    /// # Errors
    /// [`Error::Kind`] unless boolean, [`Error::Shape`] if it does not fit `x`, [`Error::Device`] if it is elsewhere.
    pub fn with_given_frames(mut self, given: &'a Tensor) -> Result<Self> {
        const WHAT: &str = "given frames";
        check_leading(WHAT, given, &self.x.size())?;
        check_strided(WHAT, given)?;
        if given.f_kind()? != Kind::Bool {
            return Err(Error::Kind { what: WHAT, expected: "booleans", found: given.f_kind()? });
        }
        check_device(WHAT, given, self.x)?;
        let others = self.not(given)?;
        self.mask = Some(match &self.mask {
            Some(mask) => mask.f_logical_and(&others)?,
            None => others,
        });
        self.given = Some(given);
        Ok(self)
    }

    /// The elements outside the given frames, expanded to the shape of x.
    fn not(&self, given: &Tensor) -> Result<Tensor> {
        Ok(per_sample(&given.f_logical_not()?, self.x)?.f_expand(self.x.size(), false)?)
    }

    /// `time`, with 1 at the [given frames](Self::with_given_frames): the times at which a term of one's own noises the
    /// samples of the batch. Without given frames, the times as they are.
    ///
    /// # Errors
    /// [`Error::Shape`] and the like unless there is one time for each sample, or for each frame along the axis of the
    /// given ones.
    pub fn keep_given(&self, time: &PostShift) -> Result<PostShift> {
        check_times("time", time.tensor(), self.x)?;
        let Some(given) = self.given else { return Ok(time.shallow_clone()) };
        let (times, given) = of_one_rank(time.tensor(), given)?;
        let times = number_like(1.0, &times)?.f_where_self(&given, &times)?;
        check_leading("time of given frames", &times, &self.x.size())?;
        Ok(PostShift::within(times, (time.range().0, 1.0)))
    }

    /// The samples in float32 or wider, with the student's gradient: one copy for all terms, or x
    /// itself. Gradients of several terms are added up here, before they are rounded to the type of x.
    fn wide(&self) -> Result<&Tensor> {
        // The first caller may be under no_grad; the copy must have a graph for the next.
        once(&self.wide, || tch::with_grad(|| widen(self.x)))
    }

    /// The samples that a probe shows its terms: in float32 or wider, with the student's gradient, but for what the mask
    /// leaves out: no gradient passes there, and what is not finite is zero. Made anew at each call, since a backward
    /// pass frees the graph of the selection.
    pub(crate) fn trained(&self) -> Result<Tensor> {
        let x = self.wide()?;
        let Some(mask) = &self.mask else { return Ok(x.shallow_clone()) };
        let still = finite_where_masked(&x.f_detach()?, Some(mask))?;
        tch::with_grad(|| Ok(x.f_where_self(mask, &still)?))
    }

    /// The mask, boolean and of the shape of x, where given.
    pub fn mask(&self) -> Option<&Tensor> {
        self.mask.as_ref()
    }

    /// Whether the mask leaves anything of a sample in, booleans `[B]`; `None` without a mask.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn kept_samples(&self) -> Result<Option<Tensor>> {
        self.mask.as_ref().map(|mask| any_kept(mask, Some(mask))).transpose()
    }

    /// The given frames, booleans `[B, F]` or `[B, 1, F]`, where there are any.
    pub fn given_frames(&self) -> Option<&'a Tensor> {
        self.given
    }

    /// Refuses given frames, for what noises whole samples.
    pub(crate) fn check_none_given(&self) -> Result<()> {
        let requirement = "none for a term that noises whole samples";
        checked("given frames", requirement, 1.0, self.given.is_none()).map(|_| ())
    }

    /// The samples, `[B, ..]`, carrying the student's gradient.
    pub fn x(&self) -> &'a Tensor {
        self.x
    }

    /// The samples as data for a network that is trained on them, `[B, ..]`: without a graph, and with zeros in place
    /// of what is not finite where the [`mask`](Self::with_mask) leaves an element out.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn as_data(&self) -> Result<Tensor> {
        finite_where_masked(&self.x.f_detach()?, self.mask())
    }

    /// The condition of the samples.
    pub fn cond(&self) -> &'a Condition {
        self.cond
    }

    /// The number of samples, B.
    pub fn batch_size(&self) -> i64 {
        batch_size(self.x)
    }

    /// The pre-shift times of the student's evaluation, where given.
    pub fn student_time(&self) -> Option<&'a PreShift> {
        self.student_time
    }

    /// The student's input x_t `[B, ..]`, from which it predicted x, and its time as the network sees it.
    ///
    /// # Errors
    /// [`Error::Missing`] if it was not given.
    pub fn student_input(&self) -> Result<(&'a Tensor, &'a PostShift)> {
        let missing = Error::Missing { what: "student input", setter: "Batch::with_student_input" };
        self.student_input.ok_or(missing)
    }

    /// The null condition.
    ///
    /// # Errors
    /// [`Error::Missing`] if none was given.
    pub fn null(&self) -> Result<&'a Condition> {
        self.null.ok_or(Error::Missing { what: "null condition", setter: "Batch::with_null" })
    }

    /// The targets of the samples, `[B, ..]`.
    ///
    /// # Errors
    /// [`Error::Missing`] if none were given.
    pub fn target(&self) -> Result<&'a Tensor> {
        self.target.ok_or(Error::Missing { what: "target", setter: "Batch::with_target" })
    }

    /// The real samples, `[M, ..]`.
    ///
    /// # Errors
    /// [`Error::Missing`] if none were given.
    pub fn real(&self) -> Result<&'a Tensor> {
        self.real.ok_or(Error::Missing { what: "real samples", setter: "Batch::with_real" })
    }

    /// The condition of the real samples: their own where given, else the condition of the samples.
    pub fn real_cond(&self) -> &'a Condition {
        self.real_cond.unwrap_or(self.cond)
    }
}
