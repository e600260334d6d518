//! Augmentations: random changes of whole samples that gradients pass through, the same for both sides of a
//! comparison.

use tch::{Kind, Tensor};

use crate::arithmetic::{Arithmetic, counting, number};
use crate::checks::{check_device, check_range, check_samples, check_size};
use crate::error::{Error, Result};
use crate::numeric::{batch_size, compute_kind, masked, per_sample, sample_mean, widen};
use crate::renoising::normal_quantile;
use crate::value::checked;

/// The augmentation of pairs and critics: which random changes a sample goes through before it is compared.
/// One draw serves both sides of a comparison, so a pair that is equal stays equal.
///
/// | setter | changes, in this order | draw |
/// |---|---|---|
/// | [`blit`](Self::blit) | flip in x; quarter turns; shift by whole elements | half of all; 0 to 3; U(-1/8, 1/8) of each side |
/// | [`geometric`](Self::geometric) | scale; turn; stretch; turn; shift | 2^N(0, 0.2^2); U(-pi, pi); 2^N(0, 0.2^2); U(-pi, pi); N(0, 1/8^2) of each side |
/// | [`colour`](Self::colour) | brightness `x + b`; contrast about the mean of the sample; saturation about the mean of the channels | U(-1/2, 1/2); factor U(1/2, 3/2); factor U(0, 2) |
/// | [`cutout`](Self::cutout) | zeros in a box | its centre, even over the plane |
///
/// The law of the draws is that of StyleGAN-ADA (Karras et al., arXiv 2006.06676) with probability 1, and of
/// differentiable augmentation (Zhao et al., arXiv 2006.10738) for colour and cutout, as the code of
/// E-LatentLPIPS has it, whose default is `new().blit().geometric()`. Diffusion2GAN (arXiv 2405.05967) uses
/// `new().geometric().cutout(0.5)`, by pages about it.
///
/// Two things differ from that code. All moves of a sample are one bilinear resampling, without its wavelet
/// filter, so that fine detail is slightly softer. Beyond the edge samples are reflected with the edge
/// repeated, where that code does not repeat it.
///
/// # Shapes
/// Samples `[B, C, H, W]`, or `[B, F, C, H, W]` with one draw for all F frames. The plane is the last two
/// axes. Colour alone looks at the channels, the third axis from the end.
///
/// # Example
/// ```
/// use decoupled_dmd::{Augmentation, Distance, PairedRegression};
/// # use tch::{Device, Kind, Tensor};
/// let augmentation = Augmentation::new().geometric().cutout(0.5)?;
/// let regression = PairedRegression::new(Distance::Squared).augmented(augmentation);
///
/// let x = Tensor::randn([2, 4, 8, 8], (Kind::Float, Device::Cpu));
/// let draw = augmentation.draw(&x)?;
/// assert!(draw.apply(&x)?.equal(&draw.apply(&x)?));
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(default, deny_unknown_fields))]
pub struct Augmentation {
    blit: bool,
    geometric: bool,
    colour: bool,
    cutout: Option<Share>,
}

impl Augmentation {
    /// The number of unit-uniform numbers that a sample takes, whatever is set.
    pub const NUMBERS: i64 = 15;

    /// Without any change.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds flips, quarter turns and shifts by whole elements.
    #[must_use]
    pub fn blit(mut self) -> Self {
        self.blit = true;
        self
    }

    /// Adds scales, turns, stretches and shifts by any distance.
    #[must_use]
    pub fn geometric(mut self) -> Self {
        self.geometric = true;
        self
    }

    /// Adds brightness, contrast and saturation.
    #[must_use]
    pub fn colour(mut self) -> Self {
        self.colour = true;
        self
    }

    /// Adds a box of zeros whose sides are the share `side` of those of the plane, cut off at its edge; 0.5 in
    /// differentiable augmentation.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `side` is above 0 and at most 1.
    pub fn cutout(mut self, side: f64) -> Result<Self> {
        self.cutout = Some(Share::try_from(side)?);
        Ok(self)
    }

    /// A draw for the samples `[B, ..]` like `x`, from libtorch's global generator.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless `x` are floating-point samples.
    pub fn draw(&self, x: &Tensor) -> Result<AugmentationDraw> {
        check_samples(WHAT, x, 1)?;
        let size = [batch_size(x), Self::NUMBERS];
        let numbers = Tensor::f_rand(size, (compute_kind(x.f_kind()?), x.device()))?;
        Ok(AugmentationDraw { augmentation: *self, numbers: numbers.f_to_kind(Kind::Double)? })
    }

    /// The draw that unit-uniform numbers `[B, 15]` stand for, a row for each sample:
    ///
    /// | column | number |
    /// |---|---|
    /// | 0, 1 | flip; quarter turn |
    /// | 2, 3 | whole shift in x, in y |
    /// | 4, 5, 6, 7 | scale; first turn; stretch; second turn |
    /// | 8, 9 | shift in x, in y |
    /// | 10, 11, 12 | brightness; contrast; saturation |
    /// | 13, 14 | centre of the box in x, in y |
    ///
    /// At 1/2 nothing changes, but for two quarter turns, and the box, which is in the middle. Two numbers are
    /// read from their device.
    ///
    /// # Errors
    /// [`Error::Shape`] or [`Error::Kind`] unless the numbers are `[B, 15]` and floating point;
    /// [`Error::OutOfRange`] if one is outside [0, 1] or not a number.
    pub fn at(&self, numbers: &Tensor) -> Result<AugmentationDraw> {
        const WHAT: &str = "numbers of an augmentation";
        check_samples(WHAT, numbers, 2)?;
        check_size(WHAT, numbers, &[batch_size(numbers), Self::NUMBERS])?;
        check_range(WHAT, "in [0, 1]", numbers, (0.0, 1.0))?;
        let numbers = numbers.f_detach()?.f_to_kind(Kind::Double)?;
        Ok(AugmentationDraw { augmentation: *self, numbers })
    }
}

/// The name of the samples in errors.
const WHAT: &str = "samples to augment";

/// One draw of an [`Augmentation`], a row of random numbers for each sample. It is applied to as many tensors
/// as are to be changed alike.
#[derive(Debug)]
pub struct AugmentationDraw {
    augmentation: Augmentation,
    /// `[B, 15]`, in float64.
    numbers: Tensor,
}

impl AugmentationDraw {
    /// The samples `[B, C, H, W]` or `[B, F, C, H, W]` with their changes, in float32, or in float64 where `x`
    /// is. Blit, geometry, contrast, saturation and cutout are linear in `x`.
    ///
    /// # Errors
    /// [`Error::Shape`] unless `x` has these axes and as many samples as the draw; [`Error::Kind`] unless it is
    /// floating point; [`Error::Device`] if it is elsewhere than the draw.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        let batch = batch_size(&self.numbers);
        if !(4..=5).contains(&size.len()) || size.first() != Some(&batch) {
            let expected = format!("[{batch}, C, H, W] or [{batch}, F, C, H, W]");
            return Err(Error::shape(WHAT, expected, &size));
        }
        check_samples(WHAT, x, 4)?;
        check_device(WHAT, x, &self.numbers)?;
        let Augmentation { blit, geometric, colour, cutout } = self.augmentation;
        let mut x = widen(x)?;
        if blit || geometric {
            x = self.moved(&x, blit, geometric)?;
        }
        if colour {
            x = self.recoloured(&x)?;
        }
        match cutout {
            Some(side) => self.cut(&x, side.0),
            None => Ok(x),
        }
    }

    fn column(&self, column: i64) -> Result<Tensor> {
        Ok(self.numbers.f_select(1, column)?)
    }

    /// A column mapped from [0, 1] to `[low, high]`.
    fn between(&self, column: i64, low: f64, high: f64) -> Result<Tensor> {
        Ok(self.column(column)?.times(high - low)?.plus(low)?)
    }

    /// A column as normal numbers of the standard deviation `std`.
    fn normal(&self, column: i64, std: f64) -> Result<Tensor> {
        Ok(normal_quantile(&self.column(column)?)?.times(std)?)
    }

    fn moved(&self, x: &Tensor, blit: bool, geometric: bool) -> Result<Tensor> {
        let size = x.size();
        let &[.., height, width] = size.as_slice() else { return Ok(x.shallow_clone()) };
        let (tall, wide) = (height as f64, width as f64);
        let mut total = Affine::identity(&self.column(0)?)?;
        if blit {
            let flip = self.column(0)?.below(0.5)?.f_to_kind(Kind::Double)?;
            total = total.scaled(&flip.times(-2.0)?.plus(1.0)?, None)?;
            // 1 at the number of quarter turns, so that no cosine is rounded.
            let turns = self.column(1)?.times(4.0)?.f_floor()?.at_most(3.0)?;
            let is = |turn: f64| -> Result<Tensor> {
                Ok(turns.f_eq_tensor(&number(turn, &turns)?)?.f_to_kind(Kind::Double)?)
            };
            total = total.turned(&is(0.0)?.f_sub(&is(2.0)?)?, &is(1.0)?.f_sub(&is(3.0)?)?)?;
            let whole = |column, side: f64| -> Result<Tensor> {
                Ok(self.between(column, -0.125, 0.125)?.times(side)?.f_round()?.f_neg()?)
            };
            total = total.shifted(&whole(2, wide)?, &whole(3, tall)?)?;
        }
        if geometric {
            let shrink = |column| -> Result<Tensor> { Ok(self.normal(column, -0.2)?.f_exp2()?) };
            let turn = |column| self.between(column, -std::f64::consts::PI, std::f64::consts::PI);
            let (scale, stretch) = (shrink(4)?, shrink(6)?);
            let (first, second) = (turn(5)?, turn(7)?);
            total = total.scaled(&scale, Some(&scale))?;
            total = total.turned(&first.f_cos()?, &first.f_sin()?)?;
            total = total.scaled(&stretch, Some(&stretch.f_reciprocal()?))?;
            total = total.turned(&second.f_cos()?, &second.f_sin()?)?;
            let by = |column, side: f64| self.normal(column, -0.125 * side);
            total = total.shifted(&by(8, wide)?, &by(9, tall)?)?;
        }
        let frames = x.f_flatten(1, -3)?;
        let theta = total.in_unit_coordinates(tall, wide)?;
        let grid = Tensor::f_affine_grid_generator(&theta, frames.size(), false)?;
        const BILINEAR: i64 = 0;
        const REFLECTED: i64 = 2;
        let grid = grid.f_to_kind(x.f_kind()?)?;
        Ok(frames.f_grid_sampler(&grid, BILINEAR, REFLECTED, false)?.f_reshape(size)?)
    }

    fn recoloured(&self, x: &Tensor) -> Result<Tensor> {
        let kind = x.f_kind()?;
        let like = |values: Tensor| -> Result<Tensor> { per_sample(&values.f_to_kind(kind)?, x) };
        let about = |x: &Tensor, mean: &Tensor, factor: &Tensor| -> Result<Tensor> {
            Ok(x.f_sub(mean)?.f_mul(factor)?.f_add(mean)?)
        };
        let brighter = x.f_add(&like(self.between(10, -0.5, 0.5)?)?)?;
        let mean = per_sample(&sample_mean(&brighter)?, x)?;
        let contrasted = about(&brighter, &mean, &like(self.between(11, 0.5, 1.5)?)?)?;
        if x.size().iter().rev().nth(2) == Some(&1) {
            // The mean of one channel is the channel.
            return Ok(contrasted);
        }
        let mean = contrasted.f_mean_dim(&[-3i64][..], true, None::<Kind>)?;
        about(&contrasted, &mean, &like(self.between(12, 0.0, 2.0)?)?)
    }

    fn cut(&self, x: &Tensor, side: f64) -> Result<Tensor> {
        let size = x.size();
        let within = |from_end: usize, column: i64| -> Result<Tensor> {
            let count = size.iter().rev().nth(from_end).copied().unwrap_or(1);
            let mut shape = vec![1; x.dim()];
            if let Some(length) = shape.iter_mut().rev().nth(from_end) {
                *length = count;
            }
            // The middles of the elements.
            let places = counting(count, (Kind::Double, x.device()))?;
            let places = places.plus(0.5)?.over(count as f64)?;
            let centre = per_sample(&self.column(column)?, x)?;
            let distance = places.f_view(shape.as_slice())?.f_sub(&centre)?.f_abs()?;
            Ok(distance.below(0.5 * side)?)
        };
        let cut = within(0, 13)?.f_logical_and(&within(1, 14)?)?;
        masked(x, Some(&cut.f_logical_not()?))
    }
}

/// The maps from places of the result to places of the sample, one for each of B samples, in elements from
/// the centre.
struct Affine {
    /// `[B, 2, 2]`.
    matrix: Tensor,
    /// `[B, 2, 1]`.
    shift: Tensor,
}

impl Affine {
    fn identity(like: &Tensor) -> Result<Self> {
        let options = (Kind::Double, like.device());
        let batch = batch_size(like);
        let matrix = Tensor::f_eye(2, options)?.f_expand([batch, 2, 2], false)?;
        Ok(Self { matrix, shift: Tensor::f_zeros([batch, 2, 1], options)? })
    }

    /// This map after the linear map with the rows `[B]` each.
    fn after(self, rows: [&Tensor; 4]) -> Result<Self> {
        let matrix = Tensor::f_stack(&rows, 1)?.f_view([-1, 2, 2])?;
        Ok(Self { matrix: self.matrix.f_matmul(&matrix)?, shift: self.shift })
    }

    /// Without a factor for y that is 1.
    fn scaled(self, x: &Tensor, y: Option<&Tensor>) -> Result<Self> {
        let (zero, one) = (x.f_zeros_like()?, x.f_ones_like()?);
        self.after([x, &zero, &zero, y.unwrap_or(&one)])
    }

    fn turned(self, cosine: &Tensor, sine: &Tensor) -> Result<Self> {
        self.after([cosine, &sine.f_neg()?, sine, cosine])
    }

    fn shifted(self, x: &Tensor, y: &Tensor) -> Result<Self> {
        let by = Tensor::f_stack(&[x, y], 1)?.f_unsqueeze(-1)?;
        let shift = self.matrix.f_matmul(&by)?.f_add(&self.shift)?;
        Ok(Self { matrix: self.matrix, shift })
    }

    /// `[B, 2, 3]`, where the plane is [-1, 1] in both axes, as libtorch wants it.
    fn in_unit_coordinates(&self, tall: f64, wide: f64) -> Result<Tensor> {
        let both = Tensor::f_cat(&[&self.matrix, &self.shift], 2)?;
        let factors = [[1.0, tall / wide, 2.0 / wide], [wide / tall, 1.0, 2.0 / tall]].concat();
        let factors = Tensor::f_from_slice(&factors)?.f_view([2, 3])?;
        // Not waited for: libtorch reads the factors before it returns.
        let factors = factors.f_to_device_(both.device(), Kind::Double, true, false)?;
        Ok(both.f_mul(&factors)?)
    }
}

/// A number above 0 and at most 1.
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(try_from = "f64", into = "f64"))]
struct Share(f64);

impl TryFrom<f64> for Share {
    type Error = Error;
    fn try_from(side: f64) -> Result<Self> {
        let valid = side > 0.0 && side <= 1.0;
        checked("side of the cutout", "above 0 and at most 1", side, valid).map(Self)
    }
}

impl From<Share> for f64 {
    fn from(share: Share) -> f64 {
        share.0
    }
}
