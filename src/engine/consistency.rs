//! Consistency: the student's prediction should not change along the teacher's ODE.

mod derivatives;
mod tangent;

use std::cell::Cell;

pub use tangent::Tangent;
use tch::Tensor;

use crate::arithmetic::{Arithmetic, number};
use crate::checks::check_per_sample;
use crate::denoiser::{Denoiser, FitsTeacher};
use crate::engine::Engine;
use crate::error::Result;
use crate::guidance::Guidance;
use crate::numeric::{finite_where_masked, per_sample, slope};
use crate::output::ModelOutput;
use crate::path::{NoiseAngle, NoisePath, check_same_path};
use crate::probe::Probe;
use crate::time::PostShift;
use crate::value::{Positive, checked};

/// Consistency distillation: moves the student's prediction at its input x_t to its prediction further
/// along the teacher's ODE.
///
/// ```text
/// discrete:    direction = f'(x_l, l) - f(x_t, t)              one teacher step from t to the cleaner l
/// continuous:  direction = T_w / (rms(T_w) + kappa) / (q d)    T_w = (1 - w) pull + w T
///              T    = c (f_l - f_k) / (phi_k - phi_l)          -> -c df/dphi, along the ODE through x_t
///              pull = (c^2 / q) (X - f)
/// ```
/// X is the teacher's guided clean prediction at (x_t, t), phi = atan2(s, a d) the noise angle of the
/// path, c its cosine, q its sine, d the standard deviation of the data. A neighbour is
/// x_l = a_l X + s_l E with the teacher's implied noise E.
///
/// | form | made by | source |
/// |---|---|---|
/// | discrete: CM, LCM | [`discrete`](Self::discrete) | Song et al., arXiv 2303.01469; Luo et al., arXiv 2310.04378 |
/// | continuous: sCM, rCM's consistency term | [`continuous`](Self::continuous) with [`Tangent::Central`] or [`Tangent::Exact`] | Lu & Song, arXiv 2410.11081, Sections 3 and 4; rCM, arXiv 2510.08431 |
/// | a finite normalised step: dsCD | [`continuous`](Self::continuous) with [`Tangent::Ahead`], such as 1/48 | sCM, Appendix E |
///
/// The gradient is that of the papers written in clean samples, on any path: sCM's
/// `mean (F - sg F - g)^2 / 2` has in `f = c x - q F` the direction `-g / q`. It differs from the
/// papers in one convention: the tangent is normalised by its root mean square, where sCM and rCM take
/// the norm, which is larger by the root of the number of elements of a sample.
///
/// The engine looks at the student's *input*, not at the re-noised samples of its group: make the
/// batch with [`Batch::of`](crate::Batch::of), or with
/// [`Batch::with_student_input`](crate::Batch::with_student_input) on noised data. The tau of its group
/// is not used.
///
/// | parameter | meaning | default and its source |
/// |---|---|---|
/// | `student` | the student that made x, or its moving average for [`discrete`](Self::discrete) | |
/// | [`guided`](Self::guided) | guidance of the teacher, baked in | neutral |
/// | [`normalized`](Self::normalized), [`unnormalized`](Self::unnormalized) | kappa | 0.1 for the continuous form (sCM), off for the discrete |
/// | [`data_std`](Self::data_std) | d | 1, normalised latents; 0.5 in sCM |
/// | [`set_warmup`](Self::set_warmup) | w | 1; sCM raises it from 0 to 1 in 10,000 updates |
///
/// # Shapes
/// x `[B, ..]` to a direction `[B, ..]` in float32 or wider.
///
/// # Forwards
/// Teacher: one at the student's input, two with guidance (one where the teacher is
/// [`paired`](Denoiser::paired)). Student, without a graph: one for the discrete form and
/// [`Tangent::Ahead`], two for [`Tangent::Central`], one call of the tangent closure for
/// [`Tangent::Exact`]; none at w = 0.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, its normalisation included.
///
/// # Diagnostics
/// `tangent_rms` `[B]`: rms(T_w). `roughness` `[B]`, for [`Tangent::Central`]: the share of the bend
/// b = rms(f_l - 2 f + f_k) in b + rms(f_l - f_k). It is of the order of the step where the difference is
/// a derivative, about one half where it is rounding noise, and 1 where nothing is left of it.
///
/// # Errors
/// [`Error::Missing`](crate::Error::Missing) without the student's input, or without the null condition
/// under guidance; [`Error::OutOfRange`](crate::Error::OutOfRange) if student and teacher are on
/// different paths, the noise angle of the path does not change over the step (a variance-preserving
/// table and a step below one index), or a time of the input may be at the clean end, where q is 0;
/// [`Error::NoTangent`](crate::Error::NoTangent) for [`Tangent::Exact`] without
/// [`Denoiser::tangent`]; whatever the networks return.
///
/// # Example
/// ```
/// use decoupled_dmd::{Consistency, Guidance, Tangent};
/// # use decoupled_dmd::{Condition, Denoiser, Prediction, RectifiedFlow};
/// # let network = |x: &tch::Tensor, _: &tch::Tensor, _: &Condition| x * 0.5;
/// # let student = Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network);
/// let scm = Consistency::continuous(student, Tangent::Central { step: 1e-3 })?
///     .guided(Guidance::new(5.0)?);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct Consistency<'a> {
    student: Denoiser<'a>,
    form: Form,
    guidance: Guidance,
    kappa: Option<f64>,
    data_std: Positive,
    warmup: Cell<f64>,
    /// Whose path the student was found to live on, and the path to be fit.
    fits: FitsTeacher,
}

#[derive(Debug, Clone, Copy)]
enum Form {
    Discrete { step: f64 },
    Continuous(Tangent),
}

/// What the terms of the direction are made of, at the student's input.
struct Point<'p> {
    input: Tensor,
    time: &'p PostShift,
    /// The student's prediction, detached.
    own: Tensor,
    /// X.
    teacher: Tensor,
    /// E.
    noise: Tensor,
}

impl<'a> Consistency<'a> {
    /// The discrete form. The neighbour lies `step` further in the pre-shift clock, at most at the clean
    /// end, where its target is the teacher's clean sample; `target` is the student or its moving
    /// average. LCM has 1/50.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `step` is in (0, 1].
    pub fn discrete(target: Denoiser<'a>, step: f64) -> Result<Self> {
        let step = check_step(step)?;
        Ok(Self::new(target, Form::Discrete { step }, None))
    }

    /// The continuous form, whose derivative along the ODE `tangent` takes.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless a step of `tangent` is in (0, 1].
    pub fn continuous(student: Denoiser<'a>, tangent: Tangent) -> Result<Self> {
        if let Some(step) = tangent.step() {
            check_step(step)?;
        }
        Ok(Self::new(student, Form::Continuous(tangent), Some(0.1)))
    }

    fn new(student: Denoiser<'a>, form: Form, kappa: Option<f64>) -> Self {
        Self {
            student: student.in_role("student"),
            form,
            guidance: Guidance::NEUTRAL,
            kappa,
            data_std: Positive::ONE,
            warmup: Cell::new(1.0),
            fits: FitsTeacher::default(),
        }
    }

    /// Guides the teacher, and so bakes the guidance in.
    #[must_use]
    pub fn guided(mut self, guidance: Guidance) -> Self {
        self.guidance = guidance;
        self
    }

    /// Normalises the direction of each sample by its root mean square plus `kappa`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `kappa` is finite and positive.
    pub fn normalized(mut self, kappa: f64) -> Result<Self> {
        self.kappa = Some(Positive::new("kappa of the tangent", kappa)?.get());
        Ok(self)
    }

    /// Leaves the direction as long as it is.
    #[must_use]
    pub fn unnormalized(mut self) -> Self {
        self.kappa = None;
        self
    }

    /// Sets the standard deviation of the data, in the units of x.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `std` is finite and positive.
    pub fn data_std(mut self, std: f64) -> Result<Self> {
        self.data_std = Positive::new("standard deviation of the data", std)?;
        Ok(self)
    }

    /// Sets the share w of the tangent, from the training loop; the rest is the pull to the teacher's
    /// clean sample. For the continuous form.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) unless `share` is in [0, 1].
    pub fn set_warmup(&self, share: f64) -> Result<()> {
        let valid = (0.0..=1.0).contains(&share);
        self.warmup.set(checked("share of the tangent", "in [0, 1]", share, valid)?);
        Ok(())
    }

    fn point<'p>(&self, probe: &'p Probe<'_>) -> Result<Point<'p>> {
        let batch = probe.batch();
        let (input, time) = batch.student_input()?;
        let input = finite_where_masked(input, batch.mask())?;
        batch.check_none_given()?;
        check_per_sample("time of the student input", time.tensor(), &input)?;
        let teacher = probe.teacher();
        self.fits.check(teacher, || self.check_paths(teacher.path()))?;
        let clean = teacher.predict_guided(&input, time, batch, self.guidance)?.into_sample()?;
        let noise = teacher.path().implied_noise(&input, &clean, time)?;
        Ok(Point { input, time, own: probe.x().f_detach()?, teacher: clean, noise })
    }

    fn check_paths(&self, teacher: &dyn NoisePath) -> Result<()> {
        check_same_path(self.student.path(), teacher)?;
        let step = match self.form {
            Form::Discrete { step } => Some(step),
            Form::Continuous(tangent) => tangent.step(),
        };
        step.map_or(Ok(()), |step| NoiseAngle::check_changes(teacher, step))
    }

    /// The student's prediction on the teacher's step from the point to time `to`.
    fn at(&self, probe: &Probe<'_>, point: &Point<'_>, to: &PostShift) -> Result<ModelOutput> {
        let neighbour = probe.teacher().path().renoise(&point.teacher, to, &point.noise)?;
        self.student.predict(&neighbour, to, probe.batch().cond())
    }

    fn discrete_direction(&self, probe: &Probe<'_>, step: f64) -> Result<Tensor> {
        let point = self.point(probe)?;
        let shift = probe.teacher().path().shift();
        let to = shift.apply(&shift.invert(point.time)?.moved(step)?)?;
        let target = self.at(probe, &point, &to)?;
        // The consistency function is the identity at the clean end.
        let at_the_end =
            per_sample(&to.tensor().f_ge_tensor(&number(1.0, to.tensor())?)?, &point.teacher)?;
        Ok(point.teacher.f_where_self(&at_the_end, target.sample()?)?.f_sub(&point.own)?)
    }

    fn continuous_direction(&self, probe: &Probe<'_>, tangent: Tangent) -> Result<Tensor> {
        let point = self.point(probe)?;
        let path = probe.teacher().path();
        let angle = NoiseAngle::at(path, point.time, self.data_std.get())?;
        NoiseAngle::check_clean_end(path, point.time)?;
        let like = &point.own;
        let (c, q) = (angle.cosine(like)?, angle.sine(like)?);
        let w = self.warmup.get();
        let mut direction = if w > 0.0 {
            let slope = self.slope(probe, &point, tangent, &angle)?;
            // T = -c df/dphi
            slope.f_mul(&c.times(-w)?)?
        } else {
            like.f_zeros_like()?
        };
        if w < 1.0 {
            let factor = c.f_square()?.f_div(&q)?.times(1.0 - w)?;
            direction = direction.f_addcmul(&point.teacher.f_sub(like)?, &factor)?;
        }
        let rms = probe.masked_mean(&direction.f_square()?)?.f_sqrt()?;
        probe.observe("tangent_rms", || Ok(rms.shallow_clone()))?;
        let mut divisor = q.times(self.data_std.get())?;
        if let Some(kappa) = self.kappa {
            divisor = divisor.f_mul(&per_sample(&rms.plus(kappa)?, like)?)?;
        }
        Ok(direction.f_div(&divisor)?)
    }

    /// df/dphi along the teacher's ODE, `[B, ..]`.
    fn slope(
        &self,
        probe: &Probe<'_>,
        point: &Point<'_>,
        tangent: Tangent,
        angle: &NoiseAngle,
    ) -> Result<Tensor> {
        let path = probe.teacher().path();
        let angle_at = |time: &PostShift| NoiseAngle::at(path, time, self.data_std.get());
        // No angle lies between at the clean end, or within a level of a table.
        match tangent {
            Tangent::Ahead { step } => {
                let to = point.time.moved(step)?;
                let ahead = self.at(probe, point, &to)?;
                slope(&ahead.sample()?.f_sub(&point.own)?, &angle_at(&to)?.minus(angle)?)
            }
            Tangent::Central { step } => {
                let (to, from) = (point.time.moved(step)?, point.time.moved(-step)?);
                let (ahead, behind) = (self.at(probe, point, &to)?, self.at(probe, point, &from)?);
                let (ahead, behind) = (ahead.sample()?, behind.sample()?);
                probe.observe("roughness", || {
                    let rms = |tensor: &Tensor| -> Result<Tensor> {
                        Ok(probe.masked_mean(&tensor.f_square()?)?.f_sqrt()?)
                    };
                    let bend = ahead.f_add(behind)?.f_sub(&point.own.times(2.0)?)?;
                    let (bend, difference) = (rms(&bend)?, rms(&ahead.f_sub(behind)?)?);
                    let share = bend.f_div(&bend.f_add(&difference)?)?;
                    Ok(share.f_where_self(&difference.above(0.0)?, &share.f_ones_like()?)?)
                })?;
                slope(&ahead.f_sub(behind)?, &angle_at(&to)?.minus(&angle_at(&from)?)?)
            }
            Tangent::Exact => tangent::exact(
                &self.student,
                probe,
                (&point.input, point.time),
                (&point.teacher, &point.noise),
                self.data_std.get(),
            ),
        }
    }
}

impl Engine for Consistency<'_> {
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let direction = match self.form {
            Form::Discrete { step } => {
                let direction = self.discrete_direction(probe, step)?;
                match self.kappa {
                    None => direction,
                    Some(kappa) => {
                        let rms = probe.masked_mean(&direction.f_square()?)?.f_sqrt()?;
                        direction.f_div(&per_sample(&rms.plus(kappa)?, &direction)?)?
                    }
                }
            }
            Form::Continuous(tangent) => self.continuous_direction(probe, tangent)?,
        };
        probe.masked(&direction)
    }
}

fn check_step(step: f64) -> Result<f64> {
    let valid = step > 0.0 && step <= 1.0;
    checked("step along the teacher's ODE", "in (0, 1]", step, valid)
}
