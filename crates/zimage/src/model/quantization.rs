//! Weights in 8 bits: whole numbers from -127 to 127, and a scale for each row.

use anyhow::{Result, ensure};
use decoupled_dmd::arithmetic::{Arithmetic as _, filled};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::stem;
use tch_training::parameters::parameter;

use crate::model::config::BLOCK_LINEARS;

/// The largest of the whole numbers.
const LARGEST: f64 = 127.0;

/// How a model keeps the weights of its blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Storage {
    /// In the dtype of the forward pass.
    #[default]
    Full,
    /// The linear layers of attention and feed-forward in 8 bits, which the forward pass turns into its own dtype,
    /// layer by layer; all else as in [`Self::Full`].
    Int8,
}

impl Storage {
    /// What is kept in place of a parameter.
    ///
    /// # Errors
    /// If libtorch fails.
    pub(super) fn keep(
        self,
        name: String,
        tensor: Tensor,
    ) -> tch_training::Result<Vec<(String, Tensor)>> {
        match self {
            Self::Full => Ok(vec![(name, tensor)]),
            Self::Int8 => quantize(name, tensor),
        }
    }
}

/// The matrix of a linear layer.
#[derive(Debug)]
pub(super) struct Weight {
    numbers: Tensor,
    /// Of each row, `[out, 1]`, where the numbers are whole.
    scale: Option<Tensor>,
}

impl Weight {
    /// `{name}.weight`, and `{name}.weight_scale` if there is one.
    pub(super) fn new(parameters: &Parameters, name: &str) -> Result<Self> {
        let numbers = parameter(parameters, &format!("{name}.weight"))?;
        let scale = parameters.get(&scale_of(name)).map(Tensor::shallow_clone);
        ensure!(
            scale.is_some() == (numbers.f_kind()? == Kind::Int8),
            "the scale of {name} goes with a weight in 8 bits, and with no other"
        );
        Ok(Self { numbers, scale })
    }

    /// `[out, in]` to multiply activations of a dtype by.
    pub(super) fn in_kind(&self, kind: Kind) -> Result<Tensor> {
        Ok(match &self.scale {
            None => self.numbers.shallow_clone(),
            Some(scale) => self.numbers.f_to_kind(kind)?.f_mul_(&scale.f_to_kind(kind)?)?,
        })
    }

    pub(super) fn kind(&self) -> Kind {
        self.numbers.kind()
    }
}

fn scale_of(layer: &str) -> String {
    format!("{layer}.weight_scale")
}

/// Whether a parameter is kept in 8 bits by [`Storage::Int8`].
pub(super) fn is_quantized(parameter: &str) -> bool {
    let Some(layer) = parameter.strip_suffix(".weight") else { return false };
    BLOCK_LINEARS.iter().any(|parts| stem(layer, parts).is_some())
}

/// The parameters in place of one: a matrix of a block in 8 bits and its scales, all else as it is.
///
/// The scale of a row is its largest magnitude over 127, rounded up to a number of bfloat16: a forward pass in
/// bfloat16 adds no error by the scale, and no number is beyond 127. The error of a weight is at most half a scale.
///
/// # Errors
/// If libtorch fails.
fn quantize(name: String, tensor: Tensor) -> tch_training::Result<Vec<(String, Tensor)>> {
    let Some(layer) = name.strip_suffix(".weight").filter(|_| is_quantized(&name)) else {
        return Ok(vec![(name, tensor)]);
    };
    let _guard = tch::no_grad_guard();
    let wide = tensor.f_to_kind(Kind::Float)?;
    let largest = wide.f_abs()?.f_amax([-1i64].as_slice(), true)?;
    // A row of zeros has scale one. Half a step of bfloat16 up, so that rounding does not go down.
    let scale = largest.times((1.0 + 0.5f64.powi(8)) / LARGEST)?;
    let one = filled(&[], 1.0, (Kind::Float, scale.device()))?;
    let scale =
        scale.f_masked_fill_tensor(&scale.f_logical_not()?, &one)?.f_to_kind(Kind::BFloat16)?;
    let numbers =
        wide.f_div(&scale)?.f_round()?.within(-LARGEST, LARGEST)?.f_to_kind(Kind::Int8)?;
    Ok(vec![(scale_of(layer), scale), (name, numbers)])
}
