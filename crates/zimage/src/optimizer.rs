//! AdamW whose whole state can be saved and restored.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::dispatcher::{AdamWStep, fused_adamw, multiply_all};
use crate::parameters::{Parameters, restore};

/// Settings of [`AdamW`]; they may change between steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWSettings {
    pub learning_rate: f64,
    pub betas: (f64, f64),
    pub eps: f64,
    /// Applied to parameters with two or more axes; norms and biases do not decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient; a longer one is shortened to it.
    pub max_gradient_norm: Option<f64>,
}

impl Default for AdamWSettings {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            betas: (0.9, 0.999),
            eps: 1e-8,
            weight_decay: 0.01,
            max_gradient_norm: None,
        }
    }
}

#[derive(Debug)]
struct Slot {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    step: Tensor,
}

/// AdamW (Loshchilov and Hutter, 2019) over named parameters.
#[derive(Debug)]
pub struct AdamW {
    pub settings: AdamWSettings,
    slots: Vec<Slot>,
}

impl AdamW {
    /// An optimizer of `parameters`, whose storage it shares.
    ///
    /// # Errors
    /// If libtorch cannot allocate the moments.
    pub fn new(parameters: Vec<(String, Tensor)>, settings: AdamWSettings) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let slots = parameters
            .into_iter()
            .map(|(name, parameter)| {
                let first = parameter.f_zeros_like()?;
                let second = parameter.f_zeros_like()?;
                let step = Tensor::f_zeros([1i64; 0], (Kind::Float, parameter.device()))?;
                Ok(Slot { name, parameter, first, second, step })
            })
            .collect::<Result<_>>()?;
        Ok(Self { settings, slots })
    }

    /// Updates every parameter that has a gradient. Returns the gradient's norm before clipping as a
    /// scalar tensor, so that nothing waits for the device.
    ///
    /// # Errors
    /// If no parameter has a gradient.
    pub fn step(&mut self) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let mut gradients = Vec::with_capacity(self.slots.len());
        let mut norms = Vec::with_capacity(self.slots.len());
        for slot in &self.slots {
            let gradient = slot.parameter.f_grad()?;
            if gradient.defined() {
                norms.push(gradient.f_norm()?);
            }
            gradients.push(gradient);
        }
        ensure!(!norms.is_empty(), "no parameter has a gradient");
        let norm = Tensor::f_stack(&norms, 0)?.f_norm()?;

        if let Some(max) = self.settings.max_gradient_norm {
            let factor = norm.f_add_scalar(1e-6)?.f_reciprocal()?.f_mul_scalar(max)?;
            let defined: Vec<&Tensor> = gradients.iter().filter(|g| g.defined()).collect();
            multiply_all(&defined, &factor.f_clamp_max(1.0)?)?;
        }
        for decays in [true, false] {
            let (slots, gradients): (Vec<&mut Slot>, Vec<&Tensor>) = self
                .slots
                .iter_mut()
                .zip(&gradients)
                .filter(|(slot, g)| g.defined() && (slot.parameter.dim() >= 2) == decays)
                .unzip();
            update(slots, &gradients, &self.settings, decays)?;
        }
        Ok(norm)
    }

    /// Forgets all gradients.
    pub fn zero_grad(&mut self) {
        for slot in &mut self.slots {
            slot.parameter.zero_grad();
        }
    }

    /// The parameters by name; storage is shared with the optimizer.
    pub fn parameters(&self) -> Parameters {
        self.slots.iter().map(|slot| (slot.name.clone(), slot.parameter.shallow_clone())).collect()
    }

    /// Moments and step counts by name; storage is shared with the optimizer.
    pub fn state(&self) -> Parameters {
        let entries = |slot: &Slot| {
            [("exp_avg", &slot.first), ("exp_avg_sq", &slot.second), ("step", &slot.step)]
                .map(|(part, tensor)| (format!("{}.{part}", slot.name), tensor.shallow_clone()))
        };
        self.slots.iter().flat_map(entries).collect()
    }

    /// Restores what [`Self::state`] gave.
    ///
    /// # Errors
    /// As for [`restore`].
    pub fn load_state(&mut self, state: &Parameters) -> Result<()> {
        restore(&self.state(), state)
    }
}

/// One fused update of slots that share a weight decay.
fn update(
    mut slots: Vec<&mut Slot>,
    gradients: &[&Tensor],
    settings: &AdamWSettings,
    decays: bool,
) -> Result<()> {
    for slot in &mut slots {
        let _ = slot.step.f_add_scalar_(1.0)?;
    }
    let pick = |part: fn(&Slot) -> &Tensor| slots.iter().map(|slot| part(slot)).collect::<Vec<_>>();
    fused_adamw(
        &pick(|slot| &slot.parameter),
        gradients,
        &pick(|slot| &slot.first),
        &pick(|slot| &slot.second),
        &pick(|slot| &slot.step),
        AdamWStep {
            learning_rate: settings.learning_rate,
            betas: settings.betas,
            weight_decay: if decays { settings.weight_decay } else { 0.0 },
            eps: settings.eps,
        },
    )
}
