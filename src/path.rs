//! Noise paths, mixtures of data and noise: `x_t = a(t) x0 + s(t) eps`.

mod angle;
mod edm;
mod levels;
mod rectified_flow;
mod subinterval;
mod trig_flow;
mod variance_preserving;

pub use angle::NoiseAngle;
pub use edm::{Edm, Preconditioning};
pub use rectified_flow::RectifiedFlow;
pub use subinterval::Subinterval;
pub use trig_flow::TrigFlow;
pub use variance_preserving::VariancePreserving;

use tch::{Device, Kind, Tensor};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_like, check_samples, check_times};
use crate::error::Result;
use crate::numeric::{compute_kind, numbers, of_one_rank, per_sample, widen, widen_like};
use crate::time::{PostShift, Shift};
use crate::value::checked;

/// A noise path on the crate's clock, t in [0, 1] from noise to data.
///
/// | path | a | s | a, s at t = 0 | at t = 1 |
/// |---|---|---|---|---|
/// | [`RectifiedFlow`] | t | 1 - t | 0, 1 | 1, 0 |
/// | [`VariancePreserving::linear`] | sqrt(abar) | sqrt(1 - abar) | 0.0066, 1.0000 | 1, 0 |
/// | [`VariancePreserving::scaled_linear`] as SDXL | sqrt(abar_n) | sqrt(1 - abar_n) | 0.0683, 0.9977 | 0.9996, 0.0292 |
/// | [`Edm`] | 1 | sigma | 1, 80 | 1, 0.002 |
/// | [`TrigFlow`] | cos(angle) | sin(angle) | 0, 1 | 1, 0 |
///
/// A custom path must be monotone: `a` non-decreasing, `s` non-increasing in t.
/// [`AboveStudent`](crate::AboveStudent) relies on larger t being cleaner, and the checks for singular times
/// evaluate only the ends of a range.
pub trait NoisePath {
    /// The coefficients of data and noise at `time`, in its shape and on its device, in float32 or wider. Each is
    /// of one time alone, so that frames with times of their own ([`PostShift`]) are what samples are.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients>;

    /// The timestep shift that models on this path are run with; none unless
    /// [`shifted`](Self::shifted) has said so. Few-step grids and re-noising times are shifted by it.
    fn shift(&self) -> Shift {
        Shift::NONE
    }

    /// This path for a model that is run with `shift`. The shift is said here once: samplers, groups,
    /// Distribution Matching and critics take it from the path.
    ///
    /// ```
    /// # use decoupled_dmd::{NoisePath, RectifiedFlow, Shift};
    /// let z_image = RectifiedFlow.shifted(Shift::new(6.0)?);
    /// # assert_eq!(z_image.shift().get(), 6.0);
    /// # Ok::<(), decoupled_dmd::Error>(())
    /// ```
    fn shifted(self, shift: Shift) -> Shifted<Self>
    where
        Self: Sized,
    {
        Shifted { path: self, shift }
    }

    /// Whether a + s = 1 at every time, as on the straight path: a velocity then leads to the clean
    /// sample without a division.
    fn is_straight(&self) -> bool {
        false
    }

    /// `a x0 + s eps`, in float32, or in float64 where `x0` is.
    ///
    /// `x0` and `noise` are `[B, ..]`, `time` holds B times, or one for each frame.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
    /// [`Error::Device`](crate::Error::Device) unless `x0` are floating-point samples, and `noise` and
    /// `time` fit them.
    fn renoise(&self, x0: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        check_samples("x0", x0, 1)?;
        check_like("noise", noise, x0)?;
        check_times("time", time.tensor(), x0)?;
        let Coefficients { data, noise: level } = self.coefficients(time)?.like(x0)?;
        Ok(widen(x0)?.f_mul(&data)?.f_addcmul_(&widen(noise)?, &level)?)
    }

    /// The noise that a clean prediction implies in a noised sample, `(noised - a x0) / s`, `[B, ..]` in
    /// float32, or in float64 where `noised` is.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
    /// [`Error::Device`](crate::Error::Device) unless `x0` and `time` fit the samples `noised`;
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if a time may be one at which s is 0.
    fn implied_noise(&self, noised: &Tensor, x0: &Tensor, time: &PostShift) -> Result<Tensor> {
        check_samples("noised", noised, 1)?;
        check_like("x0", x0, noised)?;
        check_times("time", time.tensor(), noised)?;
        let end = PostShift::all(time.range().1, 1, (Kind::Double, Device::Cpu))?;
        let level = self.coefficients(&end)?.noise.f_double_value(&[0])?;
        let requirement = "positive: a clean sample has no noise to imply";
        checked("share of noise at the cleanest time", requirement, level, level > 0.0)?;
        let Coefficients { data, noise: level } = self.coefficients(time)?.like(noised)?;
        Ok(widen(noised)?.f_sub(&widen_like(x0, noised)?.f_mul(&data)?)?.f_div(&level)?)
    }

    /// The clean prediction with which one deterministic step from `noised` at `time` leads to `reached` at the
    /// cleaner `later`, `[B, ..]` in float32, or in float64 where `noised` is:
    ///
    /// ```text
    /// x0 = (reached - (s' / s) noised) / (a' - a s' / s)
    /// ```
    /// Where a teacher has gone in several steps it is the target of a student that goes in one, for
    /// [`PairedRegression`](crate::PairedRegression): intra-segment guidance (SenseFlow), the anchor of the
    /// first step (DP-DMD). Two numbers are read from their device.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
    /// [`Error::Device`](crate::Error::Device) unless both samples are alike, with two times for each;
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if a `time` has no noise, or a `later` is not cleaner.
    fn implied_sample(
        &self,
        noised: &Tensor,
        time: &PostShift,
        reached: &Tensor,
        later: &PostShift,
    ) -> Result<Tensor> {
        check_samples("noised", noised, 1)?;
        check_like("reached", reached, noised)?;
        check_times("time", time.tensor(), noised)?;
        check_times("later time", later.tensor(), noised)?;
        let (from, to) = self.coefficients(time)?.beside(self.coefficients(later)?)?;
        let ratio = to.noise.f_div(&from.noise)?;
        let step = to.data.f_sub(&from.data.f_mul(&ratio)?)?;
        let [level, least] = numbers([from.noise.f_min()?, step.f_min()?])?;
        let what = "share of noise at the time of the step";
        checked(what, "positive: a clean sample has no step left", level, level > 0.0)?;
        let what = "share of the prediction in the step";
        checked(what, "at least 1e-4: the later time is cleaner", least, least >= 1e-4)?;
        let (ratio, step) = (factor(&ratio, noised)?, factor(&step, noised)?);
        let rest = widen_like(reached, noised)?.f_sub(&widen(noised)?.f_mul(&ratio)?)?;
        Ok(rest.f_div(&step)?)
    }

    /// The noise with which a clean prediction, re-noised at `time`, is the sample of `mid` re-noised by the
    /// forward process, `[B, ..]` in float32, or in float64 where `implied` is:
    ///
    /// ```text
    /// x_mid  = a_mid x0 + s_mid implied
    /// x_time = (a / a_mid) x_mid + b fresh = a x0 + s mix,    b^2 = s^2 - (a s_mid / a_mid)^2
    /// mix    = ((a / a_mid) s_mid implied + b fresh) / s
    /// ```
    /// TDM's code (81b019f) judges the student inside a segment of its rollout by it: `implied` is
    /// [`implied_noise`](Self::implied_noise) of the student's input and prediction, `mid` the end of the
    /// segment, and mix the noise of a [`Draw`](crate::Draw) and of the fake score's loss. At `time` = `mid`
    /// mix is `implied`; where `mid` has no noise it is `fresh`. Three numbers are read from their device.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape), [`Error::Kind`](crate::Error::Kind) or
    /// [`Error::Device`](crate::Error::Device) unless both noises are alike, with two times for each sample;
    /// [`Error::OutOfRange`](crate::Error::OutOfRange) if a `mid` is pure noise, a `time` has no noise, or is
    /// cleaner than its `mid`.
    fn segment_noise(
        &self,
        mid: &PostShift,
        time: &PostShift,
        implied: &Tensor,
        fresh: &Tensor,
    ) -> Result<Tensor> {
        check_samples("implied noise", implied, 1)?;
        check_like("fresh noise", fresh, implied)?;
        check_times("middle time", mid.tensor(), implied)?;
        check_times("time", time.tensor(), implied)?;
        let (from, to) = self.coefficients(mid)?.beside(self.coefficients(time)?)?;
        let [data, level] = numbers([from.data.f_min()?, to.noise.f_min()?])?;
        let what = "share of data at the middle time";
        checked(what, "positive: pure noise has no sample to noise further", data, data > 0.0)?;
        let what = "share of noise at the cleanest time";
        checked(what, "positive: a clean sample has no noise", level, level > 0.0)?;
        let kept = to.data.f_mul(&from.noise)?.f_div(&from.data)?.f_div(&to.noise)?;
        let added = kept.f_square()?.complement()?;
        let [least] = numbers([added.f_min()?])?;
        let what = "share of fresh noise";
        // Times in float32 that are equal may give a share below 0 by their rounding.
        checked(
            what,
            "at least 0: no time is cleaner than its middle time",
            least,
            least >= -1e-5,
        )?;
        let added = added.at_least(0.0)?.f_sqrt()?;
        let (kept, added) = (factor(&kept, implied)?, factor(&added, implied)?);
        Ok(widen(implied)?.f_mul(&kept)?.f_add(&widen_like(fresh, implied)?.f_mul(&added)?)?)
    }

    /// The start of generation at t = 0: `s(0) eps`, for unit noise `[B, ..]`, in float32 or wider.
    /// [`VariancePreserving`] starts from `eps` itself, see there. FastGen starts at t = 0.001 instead, on
    /// rectified flow from `0.999 eps`.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) or [`Error::Kind`](crate::Error::Kind) unless `noise` are
    /// floating-point samples.
    fn start(&self, noise: &Tensor) -> Result<Tensor> {
        check_samples("noise", noise, 1)?;
        let options = (compute_kind(noise.f_kind()?), noise.device());
        let level = self.coefficients(&PostShift::all(0.0, 1, options)?)?.like(noise)?.noise;
        Ok(widen(noise)?.f_mul(&level)?)
    }
}

/// A path with the timestep shift of its model; [`NoisePath::shifted`] returns it.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(deny_unknown_fields))]
pub struct Shifted<P> {
    path: P,
    shift: Shift,
}

impl<P: NoisePath> NoisePath for Shifted<P> {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        self.path.coefficients(time)
    }
    fn shift(&self) -> Shift {
        self.shift
    }
    fn is_straight(&self) -> bool {
        self.path.is_straight()
    }
    fn renoise(&self, x0: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
        self.path.renoise(x0, time, noise)
    }
    fn start(&self, noise: &Tensor) -> Result<Tensor> {
        self.path.start(noise)
    }
}

/// The coefficients of a path at given times.
#[derive(Debug)]
pub struct Coefficients {
    /// a: the share of data, shaped like the times, `[B]` or per frame `[B, F]`.
    pub data: Tensor,
    /// s: the share of noise, likewise.
    pub noise: Tensor,
}

impl Coefficients {
    pub(crate) fn shallow_clone(&self) -> Self {
        Self { data: self.data.shallow_clone(), noise: self.noise.shallow_clone() }
    }

    /// Both in float64 and in one rank: one may be per sample, and the other per frame.
    fn beside(self, other: Self) -> Result<(Self, Self)> {
        let (data, of_data) = of_one_rank(&wide_time(&self.data)?, &wide_time(&other.data)?)?;
        let (noise, of_noise) = of_one_rank(&wide_time(&self.noise)?, &wide_time(&other.noise)?)?;
        Ok((Self { data, noise }, Self { data: of_data, noise: of_noise }))
    }

    /// Reshaped to `[B, 1, ..]`, or `[B, F, 1, ..]`, so that they multiply a tensor of the rank of `like`, and in
    /// float32, or float64 where `like` is: paths may return float64, samples stay in float32.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) unless `like` is `[B, ..]`.
    pub fn like(&self, like: &Tensor) -> Result<Self> {
        Ok(Self { data: factor(&self.data, like)?, noise: factor(&self.noise, like)? })
    }
}

/// One number per sample, or per frame, as a factor of `like`.
fn factor(values: &Tensor, like: &Tensor) -> Result<Tensor> {
    let values = widen_like(values, like)?;
    if values.size() == [1] {
        // One number for all samples.
        return Ok(values.f_view(vec![1; like.dim()].as_slice())?);
    }
    per_sample(&values, like)
}

/// Times in float64, in which paths compute coefficients: near an end these are small differences
/// of large numbers, or powers of them.
fn wide_time(time: &Tensor) -> Result<Tensor> {
    Ok(time.f_to_kind(Kind::Double)?)
}

/// a and s at one time, on the host: no device is waited for.
pub(crate) fn coefficients_at(path: &dyn NoisePath, time: f64) -> Result<(f64, f64)> {
    let Coefficients { data, noise } =
        path.coefficients(&PostShift::all(time, 1, (Kind::Double, Device::Cpu))?)?;
    Ok((data.f_double_value(&[0])?, noise.f_double_value(&[0])?))
}

/// Refuses a path whose coefficients differ from the teacher's, evaluated at a few times on the host, or
/// whose model has another shift. A term calls it once if its own network is handed the noised samples of the
/// teacher's path.
///
/// # Errors
/// [`Error::OutOfRange`](crate::Error::OutOfRange) if coefficients or shifts differ;
/// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
pub fn check_same_path(path: &dyn NoisePath, teacher: &dyn NoisePath) -> Result<()> {
    let same = |what, requirement, found: f64, expected: f64| {
        checked(what, requirement, found, (found - expected).abs() <= 1e-6 * expected.abs())
    };
    for time in [0.25, 0.5, 0.75] {
        let (found, expected) = (coefficients_at(path, time)?, coefficients_at(teacher, time)?);
        let requirement = "the same as on the teacher's path at each time";
        same("share of data on the term's path", requirement, found.0, expected.0)?;
        same("share of noise on the term's path", requirement, found.1, expected.1)?;
    }
    let (found, expected) = (path.shift().get(), teacher.shift().get());
    same("shift of the term's path", "the shift of the teacher's path", found, expected)?;
    Ok(())
}

macro_rules! forward_path {
    ($type:ty) => {
        impl<P: NoisePath + ?Sized> NoisePath for $type {
            fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
                (**self).coefficients(time)
            }
            fn shift(&self) -> Shift {
                (**self).shift()
            }
            fn is_straight(&self) -> bool {
                (**self).is_straight()
            }
            fn renoise(&self, x0: &Tensor, time: &PostShift, noise: &Tensor) -> Result<Tensor> {
                (**self).renoise(x0, time, noise)
            }
            fn start(&self, noise: &Tensor) -> Result<Tensor> {
                (**self).start(noise)
            }
        }
    };
}

forward_path!(&P);
forward_path!(Box<P>);
forward_path!(std::rc::Rc<P>);
