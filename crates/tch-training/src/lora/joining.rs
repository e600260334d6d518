//! An adapter joined to the weights of a model, or to another adapter.

use std::collections::BTreeSet;

use tch::{Device, Kind, Tensor};

use super::{Lora, Pair};
use crate::error::{Fault, Result};
use crate::number::times;
use crate::parameters::{Parameters, no_faults};

impl Lora {
    /// `parameters` with `W + scale B A` for each `{layer}.weight` that has a pair, computed in float32 where
    /// the model is, and in the model's dtype on `device`. The other tensors are shared.
    ///
    /// # Errors
    /// [`Error::Tensors`](crate::Error::Tensors) if a layer is not among the parameters or its pair is for another
    /// shape.
    pub fn merged(&self, parameters: &Parameters, device: Device) -> Result<Parameters> {
        let _guard = tch::no_grad_guard();
        let handle = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.shallow_clone());
        let mut merged: Parameters = parameters.iter().map(handle).collect();
        let mut faults = Vec::new();
        for (layer, pair) in self.pairs() {
            let name = format!("{layer}.weight");
            let Some(weight) = merged.get_mut(&name) else {
                faults.push(Fault::NoSuchLayer { name: layer.clone() });
                continue;
            };
            let update = pair.update()?;
            if update.size() != weight.size() {
                let (expected, found) = (update.size(), weight.size());
                faults.push(Fault::Shape { name, expected, found });
                continue;
            }
            // Not in place: the model keeps its weights.
            let sum = weight.f_to_kind(update.f_kind()?)?.f_add(&update)?;
            *weight = sum.f_to_kind(weight.f_kind()?)?.f_to_device(device)?;
        }
        no_faults("the model", faults)?;
        Ok(merged)
    }

    /// The share of the update that a merge has kept, from the parameters before and those that [`Self::merged`] made
    /// of them: the projection of what rounding to their type leaves of it on the update, over the update. It is 1 in
    /// float32. In bfloat16 a weight that is hundreds of times as large as its update swallows it: below about 0.9 the
    /// adapter apart is the better student.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if the shapes of the two do not fit.
    pub fn kept_by_merge(&self, parameters: &Parameters, merged: &Parameters) -> Result<f64> {
        let _guard = tch::no_grad_guard();
        let (mut kept, mut all) = (0.0, 0.0);
        let double = |tensor: &Tensor| tensor.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double);
        let sum = |tensor: Tensor| f64::try_from(&tensor.f_sum(Kind::Double)?);
        for (layer, pair) in self.pairs() {
            let name = format!("{layer}.weight");
            let (Some(before), Some(after)) = (parameters.get(&name), merged.get(&name)) else {
                continue;
            };
            let update = double(&pair.update()?)?;
            kept += sum(double(after)?.f_sub(&double(before)?)?.f_mul(&update)?)?;
            all += sum(update.f_square()?)?;
        }
        Ok(if all > 0.0 { kept / all } else { 1.0 })
    }

    /// An adapter that does what this one and `other` do together: pairs that a layer has in both become one of the
    /// sum of their ranks. Scales are folded into B, and there is no dropout.
    ///
    /// # Errors
    /// [`Error::Torch`](crate::Error::Torch) if the pairs of a layer do not fit, or a tensor cannot be allocated.
    pub fn joined(&self, other: &Self) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let names: BTreeSet<&String> = self.pairs().keys().chain(other.pairs().keys()).collect();
        let pairs = names.into_iter().map(|name| {
            let pairs: Vec<&Pair> =
                [self, other].iter().filter_map(|lora| lora.pair(name)).collect();
            let kind = pairs[0].down.f_kind()?;
            let (mut downs, mut ups) = (Vec::new(), Vec::new());
            for Pair { down, up, scale } in pairs {
                downs.push(down.f_to_kind(kind)?);
                ups.push(times(&up.f_to_kind(kind)?, *scale)?);
            }
            let (down, up) = (Tensor::f_cat(&downs, 0)?, Tensor::f_cat(&ups, 1)?);
            Ok((name.clone(), Pair { down, up, scale: 1.0 }))
        });
        Self::from_pairs(pairs.collect::<Result<_>>()?, 0.0)
    }
}
