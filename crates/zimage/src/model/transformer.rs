//! The Z-Image transformer (S3-DiT): image and caption tokens in one stream.

mod forward;

use std::rc::Rc;

use anyhow::{Result, ensure};
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::lora::Lora;
use tch_training::parameters::{check_shapes, parameter};

use crate::model::blocks::{Block, Linear, RmsNorm, TimeEmbedder};
use crate::model::config::Config;
use crate::model::quantization::Storage;
use crate::model::rope::RotaryCache;

/// The transformer over named tensors, which it shares with whoever gave them.
#[derive(Debug)]
pub struct ZImageTransformer {
    config: Config,
    parameters: Parameters,
    /// Frozen, and part of the model in all its roles.
    adapter: Option<Lora>,
    patch_embedder: Linear,
    patch_padding: Tensor,
    caption_norm: RmsNorm,
    caption_embedder: Linear,
    caption_padding: Tensor,
    time_embedder: TimeEmbedder,
    noise_refiner: Rc<[Block]>,
    context_refiner: Rc<[Block]>,
    layers: Rc<[Block]>,
    final_modulation: Linear,
    final_linear: Linear,
    rotary: Rc<RotaryCache>,
}

impl ZImageTransformer {
    /// The model over `parameters`, whose storage is shared, not copied.
    ///
    /// # Errors
    /// Lists parameters that are missing, unexpected or of the wrong shape.
    pub fn from_parameters(config: Config, parameters: Parameters) -> Result<Self> {
        config.validate()?;
        let shapes = parameters.iter().map(|(name, tensor)| (name.as_str(), tensor.size()));
        check_shapes("the parameters", &config.parameters(), shapes)?;
        Self::assemble(config, parameters, Rc::default())
    }

    /// The same model with its weights kept as `storage` says. Tensors that stay as they are are shared.
    ///
    /// # Errors
    /// If weights are kept in 8 bits already, or libtorch cannot allocate those.
    pub fn stored(&self, storage: Storage) -> Result<Self> {
        ensure!(!self.is_quantized(), "the weights are kept in 8 bits already");
        let mut parameters = Parameters::new();
        for (name, tensor) in &self.parameters {
            parameters.extend(storage.keep(name.clone(), tensor.shallow_clone())?);
        }
        self.over(parameters)
    }

    /// The model over what a [`Storage`] keeps of parameters that were checked.
    ///
    /// # Errors
    /// If the config is not valid, or a parameter is missing.
    pub(super) fn from_kept(config: Config, parameters: Parameters) -> Result<Self> {
        config.validate()?;
        Self::assemble(config, parameters, Rc::default())
    }

    /// The model over parameters, without an adapter.
    fn assemble(config: Config, parameters: Parameters, rotary: Rc<RotaryCache>) -> Result<Self> {
        let p = &parameters;
        let key = config.patch_key();
        let stack = |name: &str, count: i64, modulated: bool| -> Result<Rc<[Block]>> {
            (0..count).map(|i| Block::new(p, &format!("{name}.{i}"), &config, modulated)).collect()
        };
        Ok(Self {
            patch_embedder: Linear::new(p, &format!("all_x_embedder.{key}"), true)?,
            patch_padding: parameter(p, "x_pad_token")?,
            caption_norm: RmsNorm::new(p, "cap_embedder.0", config.norm_eps)?,
            caption_embedder: Linear::new(p, "cap_embedder.1", true)?,
            caption_padding: parameter(p, "cap_pad_token")?,
            time_embedder: TimeEmbedder::new(p, &config)?,
            noise_refiner: stack("noise_refiner", config.n_refiner_layers, true)?,
            context_refiner: stack("context_refiner", config.n_refiner_layers, false)?,
            layers: stack("layers", config.n_layers, true)?,
            final_modulation: Linear::new(
                p,
                &format!("all_final_layer.{key}.adaLN_modulation.1"),
                true,
            )?,
            final_linear: Linear::new(p, &format!("all_final_layer.{key}.linear"), true)?,
            rotary,
            config,
            parameters,
            adapter: None,
        })
    }

    /// The same model, with its adapter, over other parameters.
    fn over(&self, parameters: Parameters) -> Result<Self> {
        let model = Self::assemble(self.config.clone(), parameters, self.rotary.clone())?;
        Ok(Self { adapter: self.adapter.clone(), ..model })
    }

    /// The same model with an adapter that belongs to it in all its roles, apart from the weights, which are shared:
    /// what rounding a sum of both would lose stays. The pairs are kept as [`Lora::frozen`] makes them, in the
    /// model's dtype.
    ///
    /// # Errors
    /// If the model has one already, or libtorch cannot allocate the pairs.
    pub fn with_adapter(&self, lora: &Lora) -> Result<Self> {
        ensure!(self.adapter.is_none(), "the model has an adapter already");
        let adapter = Some(lora.frozen(1.0, self.kind(), self.device())?);
        Ok(Self { adapter, ..self.map(|tensor| Ok(tensor.shallow_clone()))? })
    }

    /// The adapter that belongs to the model.
    pub fn adapter(&self) -> Option<&Lora> {
        self.adapter.as_ref()
    }

    /// Whether weights are kept in 8 bits.
    pub fn is_quantized(&self) -> bool {
        self.parameters.values().any(|tensor| tensor.kind() == Kind::Int8)
    }

    /// The model's shape.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Every parameter by its diffusers name.
    pub fn parameters(&self) -> &Parameters {
        &self.parameters
    }

    /// Names and handles, sorted by name.
    pub fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.parameters
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.shallow_clone()))
            .collect()
    }

    /// The dtype the model computes in.
    pub fn kind(&self) -> Kind {
        self.patch_embedder.kind()
    }

    /// Where the model lives.
    pub fn device(&self) -> Device {
        self.patch_padding.device()
    }

    /// A deep copy outside any graph, with the model's own adapter in its weights.
    ///
    /// # Errors
    /// If weights are kept in 8 bits, or libtorch cannot allocate the copy.
    pub fn duplicate(&self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        ensure!(!self.is_quantized(), "of a model in 8 bits there are no whole copies to train");
        let mut copy = self.map(|tensor| Ok(tensor.f_detach_copy()?))?;
        if let Some(adapter) = copy.adapter.take() {
            let parameters = adapter.merged(&copy.parameters, copy.device())?;
            copy = Self::from_parameters(copy.config, parameters)?;
        }
        Ok(copy)
    }

    /// The same model in another dtype; weights of 8 bits stay. Gradients flow back to `self`, so that a float32
    /// master can be trained through a bfloat16 forward pass.
    ///
    /// # Errors
    /// If libtorch cannot convert.
    pub fn cast(&self, kind: Kind) -> Result<Self> {
        self.map(|tensor| {
            let is_whole = tensor.f_kind()? != Kind::Int8;
            Ok(if is_whole { tensor.f_to_kind(kind)? } else { tensor.shallow_clone() })
        })
    }

    fn map(&self, convert: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let parameters = self
            .parameters
            .iter()
            .map(|(name, tensor)| Ok((name.clone(), convert(tensor)?)))
            .collect::<Result<_>>()?;
        self.over(parameters)
    }

    /// The model with the pairs of `lora` and of its own adapter added to its weights, in its dtype and on `device`.
    /// Tensors without a pair are shared with this one.
    ///
    /// # Errors
    /// If the adapter was made for a model of another shape, or weights are kept in 8 bits.
    pub fn merged(&self, lora: &Lora, device: Device) -> Result<Self> {
        ensure!(!self.is_quantized(), "an adapter is not merged into weights of 8 bits");
        let joined = self.adapter.as_ref().map(|adapter| adapter.joined(lora)).transpose()?;
        let lora = joined.as_ref().unwrap_or(lora);
        Self::from_parameters(self.config.clone(), lora.merged(&self.parameters, device)?)
    }

    /// Makes every parameter trainable, or none.
    ///
    /// # Errors
    /// If a parameter is not a leaf of the graph.
    pub fn set_requires_grad(&self, requires_grad: bool) -> Result<()> {
        for tensor in self.parameters.values() {
            // Handles share the tensor, so this marks the one the layers use.
            let _ = tensor.f_set_requires_grad(requires_grad)?;
        }
        Ok(())
    }
}
