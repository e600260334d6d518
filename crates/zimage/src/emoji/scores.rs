//! Scores of generated pictures.

use anyhow::{Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use serde::Serialize;
use tch::{Device, Kind, Tensor};
use tch_training::parameters::is_finite;

use crate::distil::Record;
use crate::emoji::classifier::{Classifier, unit_rows};
use crate::emoji::pictures::EmojiData;

/// Images that go through a network or a comparison at once.
const CHUNK: i64 = 128;
/// Cosines this close count as equal: two real pictures may be the same picture.
const SAME_COSINE: f64 = 1e-6;
/// Side of the pictures that are compared pixel by pixel.
const SMALL_SIDE: i64 = 16;

/// What one way to draw the pictures achieves.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// Share of images nearest to the picture asked for, in the classifier's features.
    pub alignment: f64,
    /// The same by pixels at 16x16.
    pub alignment_at_16: f64,
    /// Between the classifier's features of the images and of the pictures asked for.
    pub frechet_distance: f64,
    /// Log ratio of the images' mean variance to that of the reference.
    pub variance_drift: f64,
    pub saturation: f64,
}

impl Scores {
    /// The scores by name.
    pub(super) fn named(&self) -> Record {
        let Self { alignment, alignment_at_16, frechet_distance, variance_drift, saturation } =
            *self;
        let named = [
            ("alignment", alignment),
            ("alignment_at_16", alignment_at_16),
            ("frechet_distance", frechet_distance),
            ("variance_drift", variance_drift),
            ("saturation", saturation),
        ];
        named.map(|(name, value)| (name.to_owned(), value)).to_vec()
    }
}

/// Compares generated images with the real ones.
#[derive(Debug)]
pub struct Judge {
    classifier: Classifier,
    /// `[N, 64]`.
    features: Tensor,
    /// `[N, 64]`, rows of length one.
    directions: Tensor,
    /// `[N, 3 * 16 * 16]`.
    small: Tensor,
    /// Root mean square distance of the real features from their mean.
    radius: f64,
}

impl Judge {
    /// A judge on the classifier's device, which takes the features of all real images, those held
    /// out of training included.
    ///
    /// # Errors
    /// If the classifier does not tell the real images apart at all.
    pub fn new(classifier: Classifier, data: &EmojiData) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let real = data.images.f_to_device(classifier.device())?;
        let features = chunked(&real, |chunk| features(&classifier, chunk))?;
        let directions = unit_rows(&features)?;
        let small = chunked(&real, shrink)?;
        let variances = features.f_to_kind(Kind::Double)?.f_var_dim(0i64, false, false)?;
        let radius = f64::try_from(variances.f_sum(None)?)?.sqrt();
        ensure!(
            radius.is_finite() && radius > 0.0,
            "the features of the real images spread by {radius}"
        );
        Ok(Self { classifier, features, directions, small, radius })
    }

    /// Share of images `[M, 3, 32, 32]` whose nearest real image, by the cosine of the features, is
    /// that of the item asked for: the vendor counts.
    ///
    /// # Errors
    /// If `items` does not name one item for each image.
    pub fn alignment(&self, images: &Tensor, items: &[i64]) -> Result<f64> {
        self.share(images, items, |chunk| {
            let directions = unit_rows(&features(&self.classifier, chunk)?)?;
            let cosines = directions.f_matmul(&self.directions.f_transpose(0, 1)?)?;
            // As distances, with near ties made exact.
            let best = cosines.f_amax(1i64, true)?.minus(SAME_COSINE)?;
            Ok(cosines.f_minimum(&best)?.f_neg()?)
        })
    }

    /// As [`Self::alignment`], but nearest by the squared error of 16x16 pixels: an opinion that no
    /// network has a part in.
    ///
    /// # Errors
    /// If `items` does not name one item for each image.
    pub fn alignment_at_16(&self, images: &Tensor, items: &[i64]) -> Result<f64> {
        // Mode 2 subtracts pixel from pixel: exactly zero between equal images.
        self.share(images, items, |chunk| {
            Ok(Tensor::f_cdist(&shrink(chunk)?, &self.small, 2.0, 2)?)
        })
    }

    /// Fréchet distance between the features of images `[M, 3, 32, 32]` and of the real images of the
    /// same items, each as often as it was asked for.
    ///
    /// The features keep their length, which tells faint pictures from clear ones, in units of the
    /// radius of all real features: 1 is as far as a real image is from the mean one.
    ///
    /// # Errors
    /// If there are fewer than two images, `items` does not name one for each, or a feature is not
    /// finite.
    pub fn frechet_distance(&self, images: &Tensor, items: &[i64]) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let index = self.index(images, items)?;
        let images = images.f_to_device(self.classifier.device())?;
        let generated = chunked(&images, |chunk| features(&self.classifier, chunk))?;
        let real = self.features.f_index_select(0, &index)?;
        Ok(frechet_distance(&generated, &real)? / self.radius.powi(2))
    }

    /// Mean distance between the classifier's features of two images of one caption: `images`
    /// `[K, N, 3, 32, 32]` are K samples for each of N captions. In units of the radius of all real features.
    ///
    /// # Errors
    /// If there are fewer than two samples of a caption, or no caption.
    pub fn diversity(&self, images: &Tensor) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let size = images.size();
        ensure!(size.len() == 5 && size[0] > 1 && size[1] > 0, "no pairs of images in {size:?}");
        let images = images.f_flatten(0, 1)?.f_to_device(self.classifier.device())?;
        let features = chunked(&images, |chunk| features(&self.classifier, chunk))?;
        let features = features.f_view([size[0], size[1], -1])?.f_transpose(0, 1)?;
        let features = features.f_to_kind(Kind::Double)?.f_contiguous()?;
        let sum = f64::try_from(Tensor::f_cdist(&features, &features, 2.0, 2)?.f_sum(None)?)?;
        Ok(sum / (size[1] * size[0] * (size[0] - 1)) as f64 / self.radius)
    }

    /// All scores of images `[M, 3, 32, 32]`, the variance against that of `reference`.
    ///
    /// # Errors
    /// As [`Self::frechet_distance`].
    pub fn scores(&self, images: &Tensor, items: &[i64], reference: &Tensor) -> Result<Scores> {
        Ok(Scores {
            alignment: self.alignment(images, items)?,
            alignment_at_16: self.alignment_at_16(images, items)?,
            frechet_distance: self.frechet_distance(images, items)?,
            variance_drift: variance_drift(images, reference)?,
            saturation: saturation(images)?,
        })
    }

    /// Share of images whose distances `[B, N]` are smallest at their item; an image that is not
    /// finite is at its item never.
    fn share(
        &self,
        images: &Tensor,
        items: &[i64],
        distances: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let index = self.index(images, items)?;
        let images = images.f_to_device(self.classifier.device())?;
        let mut hits = 0;
        for start in (0..index.size()[0]).step_by(CHUNK as usize) {
            let count = CHUNK.min(index.size()[0] - start);
            let distances = distances(&images.f_narrow(0, start, count)?)?;
            let wanted = index.f_narrow(0, start, count)?.f_unsqueeze(1)?;
            let own = distances.f_gather(1, &wanted, false)?;
            let is_nearest = own.f_le_tensor(&distances.f_amin(1i64, true)?)?;
            hits += i64::try_from(is_nearest.f_sum(Kind::Int64)?)?;
        }
        Ok(hits as f64 / index.size()[0] as f64)
    }

    /// `items` as a tensor `[M]`, one for each image.
    fn index(&self, images: &Tensor, items: &[i64]) -> Result<Tensor> {
        let count = self.features.size()[0];
        ensure!(
            images.size().first() == Some(&(items.len() as i64)) && !items.is_empty(),
            "{} items do not describe images {:?}",
            items.len(),
            images.size()
        );
        if let Some(item) = items.iter().find(|item| !(0..count).contains(*item)) {
            anyhow::bail!("item {item} is not among the {count} real images");
        }
        Ok(Tensor::f_from_slice(items)?.f_to_device(self.features.device())?)
    }
}

/// Images `[B, 3, 32, 32]`, cut off at [-1, 1] as any file would, to `[B, 64]` in float32.
fn features(classifier: &Classifier, images: &Tensor) -> Result<Tensor> {
    let images = images.f_to_kind(Kind::Float)?.within(-1.0, 1.0)?;
    Ok(classifier.features(&images)?.f_to_kind(Kind::Float)?)
}

/// Images `[B, 3, 32, 32]`, cut off at [-1, 1], to the values of 16x16 pixels `[B, 3 * 16 * 16]`.
fn shrink(images: &Tensor) -> Result<Tensor> {
    Ok(images
        .f_to_kind(Kind::Float)?
        .within(-1.0, 1.0)?
        .f_adaptive_avg_pool2d([SMALL_SIDE, SMALL_SIDE])?
        .f_flatten(1, -1)?)
}

/// `function` over chunks of the first axis, its results joined along it.
fn chunked(images: &Tensor, function: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
    let parts = images.f_split(CHUNK, 0)?.iter().map(function).collect::<Result<Vec<_>>>()?;
    Ok(Tensor::f_cat(&parts, 0)?)
}

/// Fréchet distance between Gaussians fitted to samples `[M, F]` and `[N, F]`:
/// `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`, in float64 on the CPU. M and N may be below F.
///
/// # Errors
/// If there are fewer than two samples, or one is not finite.
pub fn frechet_distance(first: &Tensor, second: &Tensor) -> Result<f64> {
    let _guard = tch::no_grad_guard();
    let (first_mean, first_covariance) = moments(first)?;
    let (second_mean, second_covariance) = moments(second)?;
    let between = f64::try_from(first_mean.f_sub(&second_mean)?.f_square()?.f_sum(None)?)?;
    let root = square_root(&first_covariance)?;
    // Similar to S1 S2, hence of the same eigenvalues, but symmetric.
    let product = root.f_matmul(&second_covariance)?.f_matmul(&root)?;
    let shared = symmetric(&product)?.f_linalg_eigh("L")?.0.at_least(0.0)?.f_sqrt()?;
    let trace = first_covariance.f_add(&second_covariance)?.f_trace()?;
    let within = f64::try_from(trace)? - 2.0 * f64::try_from(shared.f_sum(None)?)?;
    // Rounding can leave equal sets slightly below zero.
    Ok((between + within).max(0.0))
}

/// Mean `[F]` and unbiased covariance `[F, F]` of samples `[M, F]`, in float64.
fn moments(samples: &Tensor) -> Result<(Tensor, Tensor)> {
    let samples = samples.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
    let (count, _) = samples.size2()?;
    ensure!(count >= 2, "a covariance takes two samples or more, not {count}");
    ensure!(is_finite(&samples)?, "a feature is not finite");
    let mean = samples.f_mean_dim(0i64, false, None)?;
    let centred = samples.f_sub(&mean)?;
    let covariance = centred.f_transpose(0, 1)?.f_matmul(&centred)?.over((count - 1) as f64)?;
    Ok((mean, covariance))
}

/// The symmetric square root of a positive semi-definite matrix `[F, F]`.
fn square_root(matrix: &Tensor) -> Result<Tensor> {
    let (values, vectors) = symmetric(matrix)?.f_linalg_eigh("L")?;
    // Rounding puts the zero eigenvalues of a rank-deficient matrix on both sides of zero.
    let roots = values.at_least(0.0)?.f_sqrt()?;
    Ok(vectors.f_mul(&roots)?.f_matmul(&vectors.f_transpose(0, 1)?)?)
}

fn symmetric(matrix: &Tensor) -> Result<Tensor> {
    Ok(matrix.f_add(&matrix.f_transpose(0, 1)?)?.times(0.5)?)
}

/// Mean over images `[N, ..]` of the variance of all values of one.
///
/// # Errors
/// If there are none.
pub fn mean_variance(images: &Tensor) -> Result<f64> {
    ensure!(images.numel() > 0, "no images in {:?}", images.size());
    let values = images.f_to_kind(Kind::Float)?.f_flatten(1, -1)?;
    let variances = values.f_var_dim(1i64, false, false)?;
    Ok(f64::try_from(variances.f_mean(Kind::Double)?)?)
}

/// Log ratio of mean variances, each of all values of one image: above zero, `images`
/// `[M, 3, H, W]` have more contrast than `reference` `[N, 3, H, W]`.
///
/// # Errors
/// If either is empty.
pub fn variance_drift(images: &Tensor, reference: &Tensor) -> Result<f64> {
    let _guard = tch::no_grad_guard();
    Ok((mean_variance(images)? / mean_variance(reference)?).ln())
}

/// Mean over all pixels of `(max - min) / max` over the three colours in [0, 1]; black has none.
///
/// # Errors
/// If the shape is not `[M, 3, H, W]`.
pub fn saturation(images: &Tensor) -> Result<f64> {
    let _guard = tch::no_grad_guard();
    let (_, channels, _, _) = images.size4()?;
    ensure!(channels == 3 && images.numel() > 0, "no colours in {:?}", images.size());
    let colours = images.f_to_kind(Kind::Float)?.plus(1.0)?.times(0.5)?.within(0.0, 1.0)?;
    let most = colours.f_amax(1i64, false)?;
    let least = colours.f_amin(1i64, false)?;
    let ratio = most.f_sub(&least)?.f_div(&most.at_least(1e-6)?)?;
    Ok(f64::try_from(ratio.f_mean(Kind::Double)?)?)
}
