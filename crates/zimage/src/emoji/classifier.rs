//! A small convolutional network that tells the pictures apart: the judge of generated ones.

use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::parameters::{check_shapes, parameter};
use tch_training::safetensors::{Weights, write_tensors};

use crate::model::{Linear, Role};

/// Width of a feature vector.
pub const FEATURES: i64 = 64;
/// File of the weights.
const WEIGHTS: &str = "classifier.safetensors";
/// Factor between cosines and logits.
const SCALE: f64 = 20.0;
/// Channels to a group of the normalisation.
const GROUP: i64 = 16;
const EPS: f64 = 1e-5;

/// A convolution's geometry.
#[derive(Clone, Copy, Debug)]
struct Stage {
    inputs: i64,
    outputs: i64,
    kernel: i64,
    stride: i64,
}

/// From 32x32 pixels to 4x4 positions. The first kernel takes in more values (48) than it puts out, at
/// half the resolution, where full-resolution channels would cost most of the time.
const STAGES: [Stage; 4] = [
    Stage { inputs: 3, outputs: 48, kernel: 4, stride: 2 },
    Stage { inputs: 48, outputs: 80, kernel: 3, stride: 2 },
    Stage { inputs: 80, outputs: 96, kernel: 3, stride: 1 },
    Stage { inputs: 96, outputs: 128, kernel: 3, stride: 2 },
];

/// Convolution, group normalisation, SiLU.
#[derive(Debug)]
struct Layer {
    kernel: Tensor,
    scale: Tensor,
    shift: Tensor,
    stage: Stage,
}

impl Layer {
    /// `[B, inputs, H, W]` to `[B, outputs, H / stride, W / stride]`.
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let Stage { outputs, stride, .. } = self.stage;
        let groups = outputs / GROUP;
        let x = x.f_conv2d(&self.kernel, None::<&Tensor>, stride, 1, 1, 1)?;
        Ok(x.f_group_norm(groups, Some(&self.scale), Some(&self.shift), EPS, false)?.f_silu()?)
    }
}

/// Features of pictures, and a cosine softmax over the pictures it was trained on.
#[derive(Debug)]
pub struct Classifier {
    layers: Vec<Layer>,
    embedding: Linear,
    /// `[N, 64]`: a direction in the features for each picture.
    classes: Tensor,
    parameters: Parameters,
}

impl Classifier {
    /// An untrained network for `classes` pictures, in float32.
    ///
    /// # Errors
    /// If `classes` is not positive.
    pub fn init(classes: i64, device: Device) -> Result<Self> {
        ensure!(classes > 0, "a classifier needs classes, not {classes}");
        let parameters = shapes(classes)
            .into_iter()
            .map(|(name, shape)| {
                let options = (Kind::Float, device);
                let tensor = match shape.as_slice() {
                    [_] if name.ends_with(".weight") => Tensor::f_ones(&shape, options)?,
                    [_] => Tensor::f_zeros(&shape, options)?,
                    [_, fan_in @ ..] => {
                        let deviation = (2.0 / fan_in.iter().product::<i64>() as f64).sqrt();
                        Tensor::f_randn(&shape, options)?.times(deviation)?
                    }
                    [] => bail!("{name} has no axis"),
                };
                Ok((name, tensor))
            })
            .collect::<Result<_>>()?;
        Self::from_parameters(parameters)
    }

    /// A network over named tensors, whose storage it shares.
    ///
    /// # Errors
    /// Names tensors that are missing, unexpected or mis-shaped.
    pub fn from_parameters(parameters: Parameters) -> Result<Self> {
        let shapes = || parameters.iter().map(|(name, tensor)| (name.as_str(), tensor.size()));
        check_shapes("the parameters", &expected(shapes()), shapes())?;
        let layers = (0..)
            .zip(STAGES)
            .map(|(index, stage)| {
                Ok(Layer {
                    kernel: parameter(&parameters, &format!("layers.{index}.convolution.weight"))?,
                    scale: parameter(&parameters, &format!("layers.{index}.norm.weight"))?,
                    shift: parameter(&parameters, &format!("layers.{index}.norm.bias"))?,
                    stage,
                })
            })
            .collect::<Result<_>>()?;
        let embedding = Linear::new(&parameters, "embedding", true)?;
        let classes = parameter(&parameters, "classes.weight")?;
        Ok(Self { layers, embedding, classes, parameters })
    }

    /// Reads `classifier.safetensors` of a folder, in the dtype and on the device asked for.
    ///
    /// # Errors
    /// If the file cannot be read, or names tensors that are missing, unexpected or mis-shaped.
    pub fn load(folder: &Path, kind: Kind, device: Device) -> Result<Self> {
        let weights = Weights::open_file(&folder.join(WEIGHTS))?;
        let expected = expected(weights.shapes());
        Self::from_parameters(weights.load(&expected, kind, device, &mut |_, _| {})?)
    }

    /// Writes `classifier.safetensors`, in float16: a judge needs no more digits.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn save(&self, folder: &Path) -> Result<()> {
        let parameters = converted(&self.parameters, Kind::Half, Device::Cpu)?;
        Ok(write_tensors(&folder.join(WEIGHTS), &parameters)?)
    }

    /// The same network in another dtype; gradients flow back to the tensors of this one.
    ///
    /// # Errors
    /// If libtorch cannot convert.
    pub fn cast(&self, kind: Kind) -> Result<Self> {
        Self::from_parameters(converted(&self.parameters, kind, self.classes.device())?)
    }

    /// Named tensors.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.classes.device()
    }

    /// Images `[B, 3, 32, 32]` in [-1, 1] to `[B, 64]`; only the direction was trained.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn features(&self, images: &Tensor) -> Result<Tensor> {
        let x = self.activations(images)?.pop().context("a classifier has layers")?;
        self.embedding.forward(&x.f_mean_dim([2i64, 3].as_slice(), false, None)?, Role::BASE)
    }

    /// Images `[B, 3, 32, 32]` in [-1, 1] to the activations `[B, C, H, W]` of each layer.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn activations(&self, images: &Tensor) -> Result<Vec<Tensor>> {
        let mut x = images.f_to_kind(self.classes.kind())?;
        let mut activations = Vec::new();
        for layer in &self.layers {
            x = layer.forward(&x)?;
            activations.push(x.shallow_clone());
        }
        Ok(activations)
    }

    /// Channels of the activations of each layer.
    pub fn channels(&self) -> impl Iterator<Item = i64> {
        self.layers.iter().map(|layer| layer.stage.outputs)
    }

    /// Images `[B, 3, 32, 32]` to logits `[B, N]` in float32: scaled cosines to every class.
    ///
    /// # Errors
    /// If the shape is another.
    pub fn logits(&self, images: &Tensor) -> Result<Tensor> {
        let features = self.features(images)?.f_to_kind(Kind::Float)?;
        let classes = self.classes.f_to_kind(Kind::Float)?;
        Ok(unit_rows(&features)?
            .f_matmul(&unit_rows(&classes)?.f_transpose(0, 1)?)?
            .times(SCALE)?)
    }
}

/// Rows `[B, F]` at length one; a row of zeros stays zero.
pub(crate) fn unit_rows(rows: &Tensor) -> Result<Tensor> {
    let lengths = rows.f_square()?.f_sum_dim_intlist(1, true, None)?.f_sqrt()?;
    Ok(rows.f_div(&lengths.at_least(1e-12)?)?)
}

fn converted(parameters: &Parameters, kind: Kind, device: Device) -> Result<Parameters> {
    parameters
        .iter()
        .map(|(name, tensor)| Ok((name.clone(), tensor.f_to_device(device)?.f_to_kind(kind)?)))
        .collect()
}

/// Every tensor's name and shape.
fn shapes(classes: i64) -> Vec<(String, Vec<i64>)> {
    let mut shapes = vec![
        ("classes.weight".to_owned(), vec![classes, FEATURES]),
        ("embedding.weight".to_owned(), vec![FEATURES, STAGES[STAGES.len() - 1].outputs]),
        ("embedding.bias".to_owned(), vec![FEATURES]),
    ];
    for (index, Stage { inputs, outputs, kernel, .. }) in STAGES.into_iter().enumerate() {
        let name = |part: &str| format!("layers.{index}.{part}");
        shapes.push((name("convolution.weight"), vec![outputs, inputs, kernel, kernel]));
        shapes.push((name("norm.weight"), vec![outputs]));
        shapes.push((name("norm.bias"), vec![outputs]));
    }
    shapes
}

/// Names and shapes of the network for as many classes as `found` has, at least one.
fn expected<'a, S: AsRef<[i64]>>(
    mut found: impl Iterator<Item = (&'a str, S)>,
) -> Vec<(String, Vec<i64>)> {
    let classes = found.find(|(name, _)| *name == "classes.weight");
    let count = classes.and_then(|(_, shape)| shape.as_ref().first().copied());
    shapes(count.unwrap_or(1).max(1))
}
