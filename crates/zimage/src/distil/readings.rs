//! What an update has shown, while it is still on the device.

use anyhow::{Result, ensure};
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
    /// One of each part of the batch, in float64, without a graph.
    values: Vec<Tensor>,
    /// Whether it is an observation, which is left out of the record where it is not finite.
    may_be_undefined: bool,
}

impl Scalar {
    /// One number of those of all parts and processes, the mean. Of observations those that are not finite take no part,
    /// and it is the least of what ends in `_min`, the largest of what ends in `_max`, and the geometric mean of what ends
    /// in `_error_ratio`, as that of samples.
    fn joined(&self, mut values: Vec<f64>) -> f64 {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
        if !self.may_be_undefined {
            return mean(&values);
        }
        values.retain(|value| value.is_finite());
        if self.name.ends_with("_min") {
            values.into_iter().fold(f64::INFINITY, f64::min)
        } else if self.name.ends_with("_max") {
            values.into_iter().fold(f64::NEG_INFINITY, f64::max)
        } else if self.name.ends_with("_error_ratio") {
            let logarithms: Vec<f64> = values.into_iter().map(f64::ln).collect();
            mean(&logarithms).exp()
        } else {
            mean(&values)
        }
    }
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
        self.scalars.push(Scalar { name, values: vec![value], may_be_undefined });
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

    /// The parts of a batch, which have shown the same numbers, as one.
    ///
    /// # Errors
    /// If they have not.
    pub(super) fn join(parts: Vec<Self>) -> Result<Self> {
        let mut parts = parts.into_iter();
        let mut all = parts.next().unwrap_or_default();
        for part in parts {
            ensure!(
                part.scalars.len() == all.scalars.len() && part.norms.is_empty(),
                "the parts of a batch have shown different numbers"
            );
            for (scalar, more) in all.scalars.iter_mut().zip(part.scalars) {
                ensure!(scalar.name == more.name, "{} and {} are of two", scalar.name, more.name);
                scalar.values.extend(more.values);
            }
        }
        Ok(all)
    }

    /// Adds what others hold.
    pub(super) fn extend(&mut self, others: Self) {
        self.scalars.extend(others.scalars);
        self.norms.extend(others.norms);
    }

    /// Reads all, and waits for the device once: the record of all processes together, and a word on the gradient
    /// whose norm is not finite, if there is one.
    ///
    /// # Errors
    /// If libtorch fails, the scalars are on several devices, or a process is lost.
    pub(super) fn read(self, processes: Processes<'_>) -> Result<(Record, Option<String>)> {
        let scalars = self.scalars.iter().flat_map(|scalar| &scalar.values);
        let norms = self.norms.iter().map(|(_, norm)| norm);
        let values: Vec<&Tensor> = scalars.chain(norms).collect();
        if values.is_empty() {
            return Ok((Record::new(), None));
        }
        let together = Tensor::f_stack(&values, 0)?.f_to_device(Device::Cpu)?;
        // A row of each process, the same rows on all.
        let rows = Vec::<Vec<f64>>::try_from(processes.stack(&together)?)?;
        let mut place = 0;
        let mut next = |count: usize| -> Vec<f64> {
            let places = place..place + count;
            place = places.end;
            rows.iter().flat_map(|row| &row[places.clone()]).copied().collect()
        };
        let mut record = Record::new();
        for scalar in self.scalars {
            let value = scalar.joined(next(scalar.values.len()));
            if value.is_finite() || !scalar.may_be_undefined {
                record.push((scalar.name, value));
            }
        }
        // Gradients are means of all processes: so are their norms.
        let norms = self.norms.iter().map(|(role, _)| (role, next(1)[0]));
        let fault = norms
            .filter(|(_, norm)| !norm.is_finite())
            .map(|(role, norm)| format!("the norm of the gradient of the {role} is {norm}"))
            .next();
        Ok((record, fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_joined_by_what_their_numbers_are() -> Result<()> {
        let part = |loss: f64, [cos, least, most]: [f64; 3]| -> Result<Readings> {
            let mut readings = Readings::default();
            readings.push("loss", &Tensor::from(loss))?;
            let ratio = if loss > 5.0 { f64::NAN } else { loss.powi(3) };
            let numbers =
                [("cos", cos), ("cos_min", least), ("cos_max", most), ("dm_error_ratio", ratio)];
            readings.observe(numbers.map(|(name, number)| (name.into(), Tensor::from(number))))?;
            Ok(readings)
        };
        let undefined = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        let read = |parts| Readings::join(parts)?.read(Processes::default());
        let some =
            vec![part(1.0, [0.5, 0.1, 0.7])?, part(2.0, [0.3, 0.2, 0.9])?, part(6.0, undefined)?];
        let (record, fault) = read(some)?;
        // Of 1 and 8.
        let ratio = 8f64.ln() / 2.0;
        let expected = [
            ("loss", 3.0),
            ("cos", 0.4),
            ("cos_min", 0.1),
            ("cos_max", 0.9),
            ("dm_error_ratio", ratio.exp()),
        ];
        assert_eq!(record, expected.map(|(name, number)| (name.to_owned(), number)));
        assert!(fault.is_none());
        // A loss is never left out, and what no part has is no number.
        let (record, _) = read(vec![part(9.0, undefined)?, part(f64::NAN, undefined)?])?;
        assert!(record.len() == 1 && record[0].1.is_nan());
        let other = Readings::default();
        assert!(Readings::join(vec![part(1.0, undefined)?, other]).is_err());
        Ok(())
    }
}
