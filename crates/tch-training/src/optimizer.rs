//! AdamW whose whole state can be saved and restored, with libtorch's fused kernel.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::dispatcher::{AdamWStep, Moments, fused_adamw, multiply_all, zero_all};
use crate::error::{Error, Result};
use crate::number::number;
use crate::parameters::{Parameters, restore};

/// Settings of [`AdamW`]; they may change between steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct AdamWSettings {
    /// Not negative; 1e-3 by default.
    pub learning_rate: f64,
    /// Decays of the two moments, in [0, 1); 0.9 and 0.999 by default.
    pub betas: (f64, f64),
    /// Not negative; 1e-8 by default.
    pub eps: f64,
    /// Not negative; 0.01 by default. Applied to parameters with two or more axes: norms and biases do not
    /// decay.
    pub weight_decay: f64,
    /// Largest global norm of the gradient, positive; a longer one is shortened to it. No limit by default.
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

impl AdamWSettings {
    fn check(&self) -> Result<()> {
        let check = |what, requirement, found: f64, fits: bool| {
            let found = found.to_string();
            if fits { Ok(()) } else { Err(Error::OutOfRange { what, requirement, found }) }
        };
        for (what, value) in [
            ("learning_rate", self.learning_rate),
            ("eps", self.eps),
            ("weight_decay", self.weight_decay),
        ] {
            check(what, "finite and not negative", value, value.is_finite() && value >= 0.0)?;
        }
        for beta in [self.betas.0, self.betas.1] {
            check("a beta", "in [0, 1)", beta, (0.0..1.0).contains(&beta))?;
        }
        let norm = self.max_gradient_norm.unwrap_or(1.0);
        check("max_gradient_norm", "positive", norm, norm > 0.0)
    }
}

#[derive(Debug)]
struct Slot {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    /// An element of the optimizer's step counts.
    step: Tensor,
}

impl Slot {
    /// Whether the weight decay applies.
    fn decays(&self) -> bool {
        self.parameter.dim() >= 2
    }
}

/// AdamW (Loshchilov and Hutter, arXiv 1711.05101) over named parameters.
///
/// Unlike tch's own optimizer, it gives its moments and step counts away by name, so that a run that is
/// stopped and restored goes on bit for bit; it updates each group of parameters in one call of a fused
/// kernel, and clips by the global norm without waiting for the device.
///
/// ```
/// use tch::{Device, Kind, Tensor};
/// use tch_training::{AdamW, AdamWSettings};
///
/// # fn main() -> tch_training::Result<()> {
/// let weight = Tensor::f_ones([2, 2], (Kind::Float, Device::Cpu))?.f_set_requires_grad(true)?;
/// let parameters = || vec![("weight".to_owned(), weight.shallow_clone())];
/// let mut optimizer = AdamW::new(parameters(), AdamWSettings::default())?;
/// for _ in 0..3 {
///     optimizer.zero_grad()?;
///     weight.f_square()?.f_sum(Kind::Float)?.f_backward()?;
///     let _norm = optimizer.step()?;
/// }
/// // Saved and restored: `tch_training::safetensors` writes such a list to a file.
/// let state = optimizer.state();
/// let mut resumed = AdamW::new(parameters(), AdamWSettings::default())?;
/// resumed.load_state(&state)?;
/// assert_eq!(resumed.state()["weight.step"].double_value(&[]), 3.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct AdamW {
    /// What the next step goes by.
    pub settings: AdamWSettings,
    slots: Vec<Slot>,
    steps: Steps,
}

/// The step counts of all slots, in one tensor: one addition counts a step of all that have a gradient.
#[derive(Debug)]
struct Steps {
    counts: Tensor,
    /// What the next step adds: 1 where there is a gradient.
    increments: Tensor,
    /// Which slots had a gradient when the increments were made.
    with_gradient: Vec<bool>,
}

impl Steps {
    fn new(slots: usize, device: Device) -> Result<Self> {
        let counts = Tensor::f_zeros([slots as i64], (Kind::Float, device))?;
        Ok(Self { increments: counts.f_ones_like()?, counts, with_gradient: vec![true; slots] })
    }

    /// Counts `step`, a scalar of 1 or 0, for the slots whose gradient is defined.
    fn count(&mut self, step: &Tensor, gradients: &[Tensor]) -> Result<()> {
        let with_gradient: Vec<bool> = gradients.iter().map(Tensor::defined).collect();
        if with_gradient != self.with_gradient {
            let (zero, one) = (step.f_zeros_like()?, step.f_ones_like()?);
            let increments = with_gradient.iter().map(|counts| if *counts { &one } else { &zero });
            self.increments = Tensor::f_stack(&increments.collect::<Vec<_>>(), 0)?;
            self.with_gradient = with_gradient;
        }
        let _ = self.counts.f_addcmul_(&self.increments, step)?;
        Ok(())
    }
}

impl AdamW {
    /// An optimizer of `parameters`, whose storage it shares.
    ///
    /// # Errors
    /// [`Error::SameName`] if two have one name, [`Error::OutOfRange`] for a setting, [`Error::Torch`] if the
    /// moments cannot be allocated.
    pub fn new(parameters: Vec<(String, Tensor)>, settings: AdamWSettings) -> Result<Self> {
        settings.check()?;
        let mut names = BTreeSet::new();
        if let Some((name, _)) = parameters.iter().find(|(name, _)| !names.insert(name)) {
            return Err(Error::SameName { name: name.clone() });
        }
        let _guard = tch::no_grad_guard();
        let device = parameters.first().map_or(Device::Cpu, |(_, parameter)| parameter.device());
        let steps = Steps::new(parameters.len(), device)?;
        let slots = (0..)
            .zip(parameters)
            .map(|(index, (name, parameter))| {
                let first = parameter.f_zeros_like()?;
                let second = parameter.f_zeros_like()?;
                let step = steps.counts.f_select(0, index)?;
                Ok(Slot { name, parameter, first, second, step })
            })
            .collect::<Result<_>>()?;
        Ok(Self { settings, slots, steps })
    }

    /// Updates every parameter that has a gradient. Returns the gradient's norm before clipping as a
    /// scalar tensor, so that nothing waits for the device. Where that norm is infinite or not a number, nothing is
    /// updated: parameters, moments and step counts stay as they are. So weights stay finite in a training that is
    /// broken: look at the norm.
    ///
    /// # Errors
    /// [`Error::NoGradient`] if no parameter has one, [`Error::OutOfRange`] for a setting.
    pub fn step(&mut self) -> Result<Tensor> {
        self.settings.check()?;
        let _guard = tch::no_grad_guard();
        let gradients = self.gradients()?;
        let defined: Vec<&Tensor> = gradients.iter().filter(|g| g.defined()).collect();
        if defined.is_empty() {
            return Err(Error::NoGradient);
        }
        let norms = defined.iter().map(|gradient| Ok(gradient.f_norm()?));
        let norm = Tensor::f_stack(&norms.collect::<Result<Vec<_>>>()?, 0)?.f_norm()?;

        if let Some(max) = self.settings.max_gradient_norm {
            let number = |value| number(value, norm.f_kind()?);
            let factor = norm.f_add(&number(1e-6)?)?.f_reciprocal()?.f_mul(&number(max)?)?;
            multiply_all(&defined, &factor.f_minimum(&number(1.0)?)?)?;
        }
        let is_good = norm.f_isfinite()?;
        let is_bad = is_good.f_logical_not()?.f_to_kind(Kind::Float)?;
        self.steps.count(&is_good.f_to_kind(Kind::Float)?, &gradients)?;
        for decays in [true, false] {
            let group = self
                .slots
                .iter()
                .zip(&gradients)
                .filter(|(slot, gradient)| gradient.defined() && slot.decays() == decays);
            update(group, &self.settings, decays, &is_bad)?;
        }
        Ok(norm)
    }

    /// Sets all gradients to zero.
    ///
    /// # Errors
    /// [`Error::Torch`] if libtorch fails.
    pub fn zero_grad(&mut self) -> Result<()> {
        let gradients = self.gradients()?;
        zero_all(&gradients.iter().filter(|gradient| gradient.defined()).collect::<Vec<_>>())
    }

    /// The gradient of each slot, undefined where there is none.
    fn gradients(&self) -> Result<Vec<Tensor>> {
        self.slots.iter().map(|slot| Ok(slot.parameter.f_grad()?)).collect()
    }

    /// The parameters by name; storage is shared with the optimizer.
    pub fn parameters(&self) -> Parameters {
        self.slots.iter().map(|slot| (slot.name.clone(), slot.parameter.shallow_clone())).collect()
    }

    /// Moments and step counts by name, `{parameter}.exp_avg`, `.exp_avg_sq` and `.step`; storage is shared
    /// with the optimizer.
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
    /// As [`restore`].
    pub fn load_state(&mut self, state: &Parameters) -> Result<()> {
        restore(&self.state(), state)
    }
}

/// One fused update of slots that share a weight decay.
fn update<'a>(
    group: impl Iterator<Item = (&'a Slot, &'a Tensor)>,
    settings: &AdamWSettings,
    decays: bool,
    is_bad: &Tensor,
) -> Result<()> {
    let slots: Vec<_> = group
        .map(|(Slot { parameter, first, second, step, .. }, gradient)| Moments {
            parameter,
            gradient,
            first,
            second,
            step,
        })
        .collect();
    let AdamWSettings { learning_rate, betas, eps, weight_decay, .. } = *settings;
    let weight_decay = if decays { weight_decay } else { 0.0 };
    fused_adamw(&slots, AdamWStep { learning_rate, betas, weight_decay, eps }, is_bad)
}
