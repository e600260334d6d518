//! Distances between a sample and its target.

use tch::{Kind, Tensor, no_grad_guard};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_floating, check_like, check_samples};
use crate::error::{Error, Result};
use crate::gradient::gradient_only_in;
use crate::network::IntoOutput;
use crate::numeric::{batch_size, mean, row_squares, widen, widen_like};
use crate::value::{Positive, checked};

type Features<'a> = dyn Fn(&Tensor) -> Result<Vec<Tensor>> + 'a;

/// A distance between samples and targets, a scalar; d = x - target.
#[derive(Debug)]
#[non_exhaustive]
pub enum Distance<'a> {
    /// `mean d^2` over all elements, without a factor of 1/2, as torch's `mse_loss`.
    Squared,
    /// `mean |d|` over all elements.
    Absolute,
    /// `mean (sqrt(d^2 + c^2) - c)` over all elements: TDM and SenseFlow; made by
    /// [`pseudo_huber`](Self::pseudo_huber).
    PseudoHuber(PseudoHuber),
    /// `mean_b (sqrt(|d_b|^2 + c^2) - c)` over whole samples: improved consistency training (arXiv
    /// 2310.14189), with c = 0.00054 sqrt(elements of a sample); made by
    /// [`pseudo_huber_of_samples`](Self::pseudo_huber_of_samples).
    PseudoHuberOfSamples(PseudoHuber),
    /// A distance of features, the form of LPIPS.
    Perceptual(Perceptual<'a>),
}

/// The width c of a pseudo-Huber distance: quadratic below, linear above.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PseudoHuber(f64);

impl<'a> Distance<'a> {
    /// [`PseudoHuber`](Self::PseudoHuber) with the width `c`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `c` is finite and positive.
    pub fn pseudo_huber(c: f64) -> Result<Self> {
        width(c).map(Self::PseudoHuber)
    }

    /// [`PseudoHuberOfSamples`](Self::PseudoHuberOfSamples) with the width `c`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `c` is finite and positive.
    pub fn pseudo_huber_of_samples(c: f64) -> Result<Self> {
        width(c).map(Self::PseudoHuberOfSamples)
    }

    /// Of samples and targets that are alike, in the type that is computed in.
    pub(super) fn between(&self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        let difference = || x.f_sub(target);
        match self {
            Self::Squared => mean(&difference()?.f_square()?),
            Self::Absolute => mean(&difference()?.f_abs()?),
            Self::PseudoHuber(c) => mean(&c.of(&difference()?.f_square()?)?),
            Self::PseudoHuberOfSamples(c) => {
                mean(&c.of(&row_squares(&difference()?.f_flatten(1, -1)?)?)?)
            }
            Self::Perceptual(perceptual) => perceptual.between(x, target),
        }
    }
}

fn width(c: f64) -> Result<PseudoHuber> {
    Ok(PseudoHuber(Positive::new("width of the pseudo-Huber distance", c)?.get()))
}

impl PseudoHuber {
    /// `sqrt(square + c^2) - c`.
    fn of(self, square: &Tensor) -> Result<Tensor> {
        Ok(square.plus(self.0 * self.0)?.f_sqrt()?.minus(self.0)?)
    }
}

/// A perceptual distance, the form of LPIPS (Zhang et al., arXiv 1801.03924):
///
/// ```text
/// sum over layers of mean over places of sum over channels w (h(x) - h(target))^2,    h = f / sqrt(sum f^2 + 1e-8)
/// ```
/// The features f are a closure of the samples that returns one tensor `[B, C, ..]` for each layer: a
/// frozen network, such as a TorchScript module, or a classifier's activations. The crate ships no
/// features: numbers of LPIPS or E-LatentLPIPS need their weights. The gradient ends in x.
pub struct Perceptual<'a> {
    features: Box<Features<'a>>,
    weights: Vec<Tensor>,
}

impl<'a> Perceptual<'a> {
    /// With features and a weight `[C]` for each channel of each layer.
    ///
    /// # Errors
    /// [`Error::Shape`] if there is no weight, or one is not `[C]`; [`Error::Kind`] unless they are floating
    /// point; [`Error::OutOfRange`] if one is negative or not finite: with a negative weight the loss falls
    /// without bound.
    pub fn new<O: IntoOutput<Vec<Tensor>>>(
        features: impl Fn(&Tensor) -> O + 'a,
        weights: Vec<Tensor>,
    ) -> Result<Self> {
        const WHAT: &str = "weight of a channel";
        if weights.is_empty() {
            return Err(Error::shape(
                WHAT,
                "[C] for each layer, of which there is one at least",
                &[],
            ));
        }
        for weight in &weights {
            if weight.size().len() != 1 {
                return Err(Error::shape(WHAT, "[C]", &weight.size()));
            }
            check_samples(WHAT, weight, 1)?;
            let least = weight.f_min()?.f_to_kind(Kind::Double)?.f_double_value(&[])?;
            let most = weight.f_max()?.f_to_kind(Kind::Double)?.f_double_value(&[])?;
            let valid = |value: f64| (0.0..=f64::from(f32::MAX)).contains(&value);
            checked(WHAT, "finite and at least 0", least, valid(least))?;
            checked(WHAT, "finite and at least 0", most, valid(most))?;
        }
        let features = Box::new(move |x: &Tensor| features(x).into_result());
        Ok(Self { features, weights })
    }

    fn between(&self, x: &Tensor, target: &Tensor) -> Result<Tensor> {
        let target = {
            let _no_grad = no_grad_guard();
            self.layers(target)?
        };
        gradient_only_in("features", x, |x| {
            let mut sum: Option<Tensor> = None;
            for ((own, target), weight) in self.layers(x)?.iter().zip(&target).zip(&self.weights) {
                check_like("features of the target", target, own)?;
                let shape: Vec<i64> =
                    (0..own.dim()).map(|axis| if axis == 1 { -1 } else { 1 }).collect();
                let weight = widen_like(weight, own)?.f_to_device(own.device())?;
                let weight = weight.f_view(shape.as_slice())?;
                let square = own.f_sub(target)?.f_square()?.f_mul(&weight)?;
                let places = own.numel() as f64 / own.size().get(1).copied().unwrap_or(1) as f64;
                let distance = square.f_sum(None::<Kind>)?.over(places)?;
                sum = Some(match sum {
                    Some(sum) => sum.f_add(&distance)?,
                    None => distance,
                });
            }
            sum.ok_or_else(|| Error::shape("features", "one tensor for each weight", &[]))
        })
    }

    /// The features of each layer with channels of unit norm at each place.
    fn layers(&self, x: &Tensor) -> Result<Vec<Tensor>> {
        const WHAT: &str = "features";
        let layers = (self.features)(x)?;
        let (found, expected) = (layers.len(), self.weights.len());
        let requirement = "as many as there are weights";
        checked("number of layers of features", requirement, found as f64, found == expected)?;
        let mut unit = Vec::new();
        for (layer, weight) in layers.iter().zip(&self.weights) {
            let size = layer.size();
            let channels = weight.size().first().copied().unwrap_or_default();
            if size.first() != Some(&batch_size(x)) || size.get(1) != Some(&channels) {
                let expected = format!("[{}, {channels}, ..]", batch_size(x));
                return Err(Error::shape(WHAT, expected, &size));
            }
            check_floating(WHAT, layer.f_kind()?)?;
            let layer = widen(layer)?;
            let square = layer.f_square()?.f_sum_dim_intlist(&[1i64][..], true, None::<Kind>)?;
            unit.push(layer.f_div(&square.plus(1e-8)?.f_sqrt()?)?);
        }
        Ok(unit)
    }
}

impl std::fmt::Debug for Perceptual<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Perceptual").field("layers", &self.weights.len()).finish_non_exhaustive()
    }
}
