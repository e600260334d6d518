//! Metrics of generated pictures: closed forms, the effect of blur, and files that are not a classifier.

use std::fs;

use anyhow::Result;
use approx::assert_relative_eq;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::tempdir;
use zimage::emoji::{
    Classifier, EmojiData, FEATURES, Judge, Scores, Summary, frechet_distance, saturation,
    variance_drift,
};

use super::common::{float32_bound, seeded, workspace};

fn data() -> Result<EmojiData> {
    EmojiData::load(&workspace("assets/emoji"))
}

fn judge(data: &EmojiData) -> Result<Judge> {
    let folder = workspace("assets/classifier");
    Judge::new(Classifier::load(&folder, Kind::Float, Device::Cpu)?, data)
}

/// Samples `[2 F, F]` whose mean is `mean` and whose unbiased covariance is diagonal, with these
/// deviations: a step along every axis in both directions.
fn cross(mean: &[f64], deviations: &[f64]) -> Result<Tensor> {
    let width = mean.len() as f64;
    let step = ((2.0 * width - 1.0) / 2.0).sqrt();
    let steps = Tensor::from_slice(deviations).f_mul_scalar(step)?.f_diag(0)?;
    Ok(Tensor::f_cat(&[&steps, &steps.f_neg()?], 0)?.f_add(&Tensor::from_slice(mean))?)
}

fn blur(images: &Tensor, side: i64) -> Result<Tensor> {
    let margin = side / 2;
    let padded = images.f_replication_pad2d([margin, margin, margin, margin])?;
    Ok(padded.f_avg_pool2d(side, 1, 0, false, true, None)?)
}

/// A ratio to nothing is said in words, and is no number in a report.
#[test]
fn a_student_is_not_compared_with_nothing() -> Result<()> {
    let of = |alignment, frechet_distance| Scores {
        alignment,
        alignment_at_16: 0.5,
        frechet_distance,
        variance_drift: 0.25,
        saturation: 0.0,
    };
    let usual = Summary::new(&of(0.8, 0.5), &of(0.4, 0.5), &of(0.6, 1.0));
    assert_eq!(
        usual.to_string(),
        "75.0% of its alignment, 50% of the gap closed, 2.00 times its Fréchet distance, variance drift +0.250"
    );
    let same = Summary::new(&of(0.0, 0.0), &of(0.0, 0.5), &of(0.6, 1.0));
    assert_eq!(
        same.to_string(),
        "a teacher without alignment, no gap to close, a teacher without Fréchet distance, variance drift +0.250"
    );
    assert!(serde_json::to_value(&same)?["gap_closed"].is_null());
    Ok(())
}

#[test]
fn frechet_distance_of_diagonal_gaussians() -> Result<()> {
    let (means, deviations) =
        ([[1.0, 2.0, -1.0], [0.5, 2.0, 3.0]], [[1.0, 0.5, 2.0], [3.0, 0.5, 0.0]]);
    let first = cross(&means[0], &deviations[0])?;
    let second = cross(&means[1], &deviations[1])?;
    // Commuting covariances: the squared differences of means and of deviations.
    let squared =
        |pair: &[[f64; 3]; 2]| (0..3).map(|i| (pair[0][i] - pair[1][i]).powi(2)).sum::<f64>();
    let expected = squared(&means) + squared(&deviations);
    assert_relative_eq!(frechet_distance(&first, &second)?, expected, max_relative = 1e-9);
    assert_relative_eq!(frechet_distance(&second, &first)?, expected, max_relative = 1e-9);
    Ok(())
}

#[test]
fn frechet_distance_of_covariances_that_do_not_commute() -> Result<()> {
    // For 2x2 matrices, tr (S1 S2)^(1/2) = (tr(S1 S2) + 2 (det S1 det S2)^(1/2))^(1/2).
    let (cosine, sine) = (0.6, 0.8);
    let turn = Tensor::from_slice(&[cosine, sine, -sine, cosine]).view([2, 2]);
    let first = cross(&[0.0, 0.0], &[2.0, 1.0])?;
    let second = cross(&[0.0, 0.0], &[3.0, 0.5])?.f_matmul(&turn)?;
    let first_covariance: [f64; 2] = [4.0, 1.0];
    // Diagonal of turn^T diag(9, 0.25) turn.
    let second_diagonal =
        [9.0 * cosine * cosine + 0.25 * sine * sine, 9.0 * sine * sine + 0.25 * cosine * cosine];
    let of_product =
        first_covariance[0] * second_diagonal[0] + first_covariance[1] * second_diagonal[1];
    let determinants: f64 = (4.0 * 1.0) * (9.0 * 0.25);
    let root = (of_product + 2.0 * determinants.sqrt()).sqrt();
    let expected = 5.0 + 9.25 - 2.0 * root;
    assert_relative_eq!(frechet_distance(&first, &second)?, expected, max_relative = 1e-9);
    assert_relative_eq!(frechet_distance(&second, &first)?, expected, max_relative = 1e-9);
    Ok(())
}

#[test]
fn frechet_distance_of_fewer_samples_than_axes() -> Result<()> {
    // Five samples in 64 dimensions; the second set is moved by one along every axis.
    let values = Tensor::f_arange(5 * FEATURES, (Kind::Double, Device::Cpu))?;
    let samples = values.f_mul_scalar(0.7)?.f_sin()?.f_view([5, FEATURES])?;
    assert!(frechet_distance(&samples, &samples)? < 1e-6);
    let moved = samples.f_add_scalar(1.0)?;
    assert_relative_eq!(frechet_distance(&samples, &moved)?, FEATURES as f64, max_relative = 1e-6);

    let one = samples.f_narrow(0, 0, 1)?;
    assert!(frechet_distance(&one, &samples).unwrap_err().to_string().contains("two samples"));
    let broken = samples.f_mul_scalar(f64::NAN)?;
    assert!(frechet_distance(&broken, &samples).unwrap_err().to_string().contains("finite"));
    Ok(())
}

#[test]
fn diversity_of_pictures_that_are_alike_and_that_are_not() -> Result<()> {
    let data = data()?;
    let judge = judge(&data)?;
    let pictures = data.images.f_narrow(0, 0, 3)?;
    let alike = Tensor::f_stack(&[&pictures, &pictures, &pictures], 0)?;
    // Several threads may round equal pictures in unequal ways.
    assert!(judge.diversity(&alike)? < 1e-5);
    // Two kinds, twice each: 8 of the 12 ordered pairs are of both.
    let others = data.images.f_narrow(0, 3, 3)?;
    let pair = judge.diversity(&Tensor::f_stack(&[&pictures, &others], 0)?)?;
    let twice = Tensor::f_stack(&[&pictures, &others, &pictures, &others], 0)?;
    assert!(pair > 0.0);
    assert_relative_eq!(judge.diversity(&twice)?, pair * 8.0 / 12.0, max_relative = 1e-6);
    let error = judge.diversity(&pictures.f_unsqueeze(0)?).unwrap_err().to_string();
    assert!(error.contains("no pairs"), "{error}");
    Ok(())
}

#[test]
fn variance_drift_of_scaled_images() -> Result<()> {
    let images = data()?.images.f_narrow(0, 0, 16)?;
    let scaled = images.f_mul_scalar(0.5)?.f_add_scalar(0.3)?;
    assert_relative_eq!(
        variance_drift(&scaled, &images)?,
        0.25f64.ln(),
        epsilon = float32_bound(0.0)
    );
    assert_relative_eq!(variance_drift(&images, &images)?, 0.0);
    Ok(())
}

#[test]
fn saturation_of_plain_colours() -> Result<()> {
    let colours = [[1.0f32, -1.0, -1.0], [1.0, 1.0, 1.0], [-1.0, -1.0, -1.0], [1.0, 0.0, 0.0]];
    for (colour, expected) in colours.into_iter().zip([1.0, 0.0, 0.0, 0.5]) {
        let image = Tensor::from_slice(&colour).view([1, 3, 1, 1]).f_expand([2, 3, 4, 4], false)?;
        assert_relative_eq!(saturation(&image)?, expected, epsilon = float32_bound(0.0));
    }
    Ok(())
}

#[test]
fn real_images_are_aligned_and_shuffled_ones_are_not() -> Result<()> {
    let data = data()?;
    let judge = judge(&data)?;
    let items: Vec<i64> = (0..data.items.len() as i64).collect();
    let scores = judge.scores(&data.images, &items, &data.images)?;
    assert_relative_eq!(scores.alignment, 1.0);
    assert_relative_eq!(scores.alignment_at_16, 1.0);
    assert!(scores.frechet_distance < 1e-6);
    assert_relative_eq!(scores.variance_drift, 0.0);

    // Even by one place: the same emoji by the other vendor is not what was asked for.
    for places in [1, 400] {
        let shuffled = data.images.f_roll([places], [0])?;
        assert!(judge.alignment(&shuffled, &items)? < 0.02);
        assert!(judge.alignment_at_16(&shuffled, &items)? < 0.02);
    }
    let broken = data.images.f_full_like(f64::NAN)?;
    assert_relative_eq!(judge.alignment(&broken, &items)?, 0.0);
    assert_relative_eq!(judge.alignment_at_16(&broken, &items)?, 0.0);
    Ok(())
}

#[test]
fn blur_lowers_every_score() -> Result<()> {
    let data = data()?;
    let judge = judge(&data)?;
    let items: Vec<i64> = (0..data.items.len() as i64).collect();
    let degraded = [1, 3, 5].map(|side| blur(&data.images, side));
    let scores = degraded
        .into_iter()
        .map(|images| judge.scores(&images?, &items, &data.images))
        .collect::<Result<Vec<_>>>()?;
    for pair in scores.windows(2) {
        assert!(pair[1].alignment < pair[0].alignment);
        assert!(pair[1].alignment_at_16 <= pair[0].alignment_at_16);
        assert!(pair[1].frechet_distance > pair[0].frechet_distance);
        assert!(pair[1].variance_drift < pair[0].variance_drift);
    }
    Ok(())
}

#[test]
fn items_must_fit_the_images() -> Result<()> {
    let data = data()?;
    let judge = judge(&data)?;
    let images = data.images.f_narrow(0, 0, 2)?;
    assert!(judge.alignment(&images, &[0]).is_err());
    let error = judge.alignment(&images, &[0, 100_000]).unwrap_err();
    assert!(error.to_string().contains("100000"), "{error}");
    assert!(judge.scores(&images.f_narrow(0, 0, 0)?, &[], &images).is_err());
    Ok(())
}

#[test]
fn classifier_files_round_trip() -> Result<()> {
    let _guard = seeded(2);
    let folder = tempdir()?;
    let folder = folder.path();
    let classifier = Classifier::init(5, Device::Cpu)?;
    classifier.save(folder)?;
    let loaded = Classifier::load(folder, Kind::Float, Device::Cpu)?;
    for (name, tensor) in classifier.parameters() {
        let rounded = tensor.f_to_kind(Kind::Half)?.f_to_kind(Kind::Float)?;
        assert_eq!(loaded.parameters()[name], rounded, "{name}");
    }
    let images = data()?.images.f_narrow(0, 0, 3)?;
    assert_eq!(loaded.features(&images)?.size(), [3, FEATURES]);
    assert_eq!(loaded.logits(&images)?.size(), [3, 5]);
    Ok(())
}

#[test]
fn broken_classifier_files_are_rejected() -> Result<()> {
    let _guard = seeded(1);
    let folder = tempdir()?;
    let folder = folder.path();
    let path = folder.join("classifier.safetensors");
    let message = || match Classifier::load(folder, Kind::Float, Device::Cpu) {
        Ok(_) => String::new(),
        Err(error) => format!("{error:#}"),
    };
    assert!(message().contains("classifier.safetensors"), "{}", message());

    let wide = |name: &str| (name.to_owned(), Tensor::zeros([7, 7], (Kind::Float, Device::Cpu)));
    type Edit<'a> = &'a dyn Fn(&mut Parameters);
    let edits: [(Edit, &str); 5] = [
        (&|p| drop(p.remove("embedding.bias")), "embedding.bias is missing"),
        (&|p| drop(p.remove("classes.weight")), "classes.weight is missing"),
        (&|p| p.extend([wide("layers.1.norm.bias")]), "layers.1.norm.bias has shape [7, 7]"),
        (&|p| p.extend([wide("classes.weight")]), "classes.weight has shape [7, 7]"),
        (&|p| p.extend([wide("surplus")]), "surplus is unexpected"),
    ];
    for (edit, expected) in edits {
        Classifier::init(5, Device::Cpu)?.save(folder)?;
        let mut parameters = read_tensors(&path)?;
        edit(&mut parameters);
        write_tensors(&path, &parameters)?;
        assert!(message().contains(expected), "{} does not say {expected}", message());
    }

    let whole = fs::read(&path)?;
    fs::write(&path, &whole[..whole.len() / 2])?;
    assert!(message().contains("classifier.safetensors"), "{}", message());
    Ok(())
}
