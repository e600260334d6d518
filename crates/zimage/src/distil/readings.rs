//! What an update has shown, while it is still on the device.

use anyhow::{Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::{Device, Kind, Tensor};

use crate::distil::distillation::Record;
use crate::distil::processes::Processes;

/// Scalars that are read together, so that an update waits for its device once.
#[derive(Debug, Default)]
pub struct Readings {
    scalars: Vec<Scalar>,
    /// Norms of gradients, by whose they are.
    norms: Vec<(&'static str, Tensor)>,
}

#[derive(Debug)]
struct Scalar {
    name: String,
    /// In float64, without a graph.
    value: Tensor,
    /// Whether the number is left out of the record where it is not finite.
    may_be_undefined: bool,
}

impl Readings {
    /// Adds a number that is part of the record whatever it is, such as a loss.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn push(&mut self, name: impl Into<String>, scalar: &Tensor) -> Result<()> {
        self.add(name.into(), scalar, false)
    }

    /// Adds observations, of which those are left out of the record that are not finite.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn observe(&mut self, scalars: impl IntoIterator<Item = (String, Tensor)>) -> Result<()> {
        scalars.into_iter().try_for_each(|(name, scalar)| self.add(name, &scalar, true))
    }

    fn add(&mut self, name: String, scalar: &Tensor, may_be_undefined: bool) -> Result<()> {
        let value = scalar.f_detach()?.f_to_kind(Kind::Double)?;
        self.scalars.push(Scalar { name, value, may_be_undefined });
        Ok(())
    }

    /// Adds the norm of the gradient of a role, which is no part of the record: where it is not finite, the update is
    /// left out, or training ends.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn push_norm(&mut self, role: &'static str, norm: &Tensor) -> Result<()> {
        self.norms.push((role, norm.f_to_kind(Kind::Double)?));
        Ok(())
    }

    /// The mean of each number over the parts of a batch, which have the same.
    ///
    /// # Errors
    /// If they have not, or libtorch fails.
    pub(super) fn mean(parts: Vec<Self>) -> Result<Self> {
        let count = parts.len() as f64;
        let mut parts = parts.into_iter();
        let mut mean = parts.next().unwrap_or_default();
        if count <= 1.0 {
            return Ok(mean);
        }
        for part in parts {
            ensure!(
                part.scalars.len() == mean.scalars.len() && part.norms.is_empty(),
                "the parts of a batch have shown different numbers"
            );
            for (sum, scalar) in mean.scalars.iter_mut().zip(part.scalars) {
                ensure!(sum.name == scalar.name, "{} and {} are of two", sum.name, scalar.name);
                sum.value = sum.value.f_add(&scalar.value)?;
            }
        }
        for scalar in &mut mean.scalars {
            scalar.value = scalar.value.over(count)?;
        }
        Ok(mean)
    }

    /// Adds what others hold.
    pub(super) fn extend(&mut self, others: Self) {
        self.scalars.extend(others.scalars);
        self.norms.extend(others.norms);
    }

    /// Reads all, and waits for the device once: the record, averaged over the processes, and a word on the gradient
    /// whose norm is not finite, if there is one.
    ///
    /// # Errors
    /// If libtorch fails, the scalars are on several devices, or a process is lost.
    pub(super) fn read(self, processes: Processes<'_>) -> Result<(Record, Option<String>)> {
        let norms = self.norms.iter().map(|(_, norm)| norm);
        let values: Vec<&Tensor> =
            self.scalars.iter().map(|scalar| &scalar.value).chain(norms).collect();
        if values.is_empty() {
            return Ok((Record::new(), None));
        }
        let together = Tensor::f_stack(&values, 0)?.f_to_device(Device::Cpu)?;
        let values = Vec::<f64>::try_from(processes.mean(together)?)?;
        let (values, norms) = values.split_at(self.scalars.len());
        let record = self.scalars.into_iter().zip(values);
        let record: Record = record
            .filter(|(scalar, value)| value.is_finite() || !scalar.may_be_undefined)
            .map(|(scalar, value)| (scalar.name, *value))
            .collect();
        let norms = self.norms.iter().zip(norms).find(|(_, norm)| !norm.is_finite());
        let fault = norms
            .map(|((role, _), norm)| format!("the norm of the gradient of the {role} is {norm}"));
        Ok((record, fault))
    }
}
