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

impl Scalar {
    /// One number of those of parts or processes `[N]`: the least of what ends in `_min`, the largest of what ends in
    /// `_max`, the geometric mean of what ends in `_error_ratio`, as that of samples, else the mean. Of observations those
    /// that are not finite take no part.
    fn joined(&self, values: &Tensor) -> Result<Tensor> {
        let defined = if self.may_be_undefined {
            values.f_isfinite()?
        } else {
            values.f_ones_like()?.f_to_kind(Kind::Bool)?
        };
        let or = |number: f64| -> Result<Tensor> {
            Ok(values.f_where_self(&defined, &values.f_zeros_like()?.plus(number)?)?)
        };
        let mean = |values: &Tensor| -> Result<Tensor> {
            Ok(values.f_sum(Kind::Double)?.f_div(&defined.f_sum(Kind::Double)?)?)
        };
        Ok(match self.name.rsplit('_').next() {
            Some("min") => or(f64::INFINITY)?.f_min()?,
            Some("max") => or(f64::NEG_INFINITY)?.f_max()?,
            _ if self.name.ends_with("_error_ratio") => mean(&or(1.0)?.f_log()?)?.f_exp()?,
            _ => mean(&or(0.0)?)?,
        })
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

    /// The parts of a batch, which have shown the same numbers, as one: see [`joined`].
    ///
    /// # Errors
    /// If they have not, or libtorch fails.
    pub(super) fn join(parts: Vec<Self>) -> Result<Self> {
        let mut values: Vec<Vec<Tensor>> = Vec::new();
        let mut all: Option<Self> = None;
        for part in parts {
            let names = |of: &Self| of.scalars.iter().map(|s| s.name.clone()).collect::<Vec<_>>();
            ensure!(part.norms.is_empty(), "norms are of whole batches");
            if let Some(first) = &all {
                let (found, expected) = (names(&part), names(first));
                ensure!(
                    found == expected,
                    "parts of a batch have shown {expected:?} and {found:?}"
                );
            }
            values.push(part.scalars.iter().map(|scalar| scalar.value.shallow_clone()).collect());
            all.get_or_insert(part);
        }
        let mut all = all.unwrap_or_default();
        if values.len() > 1 {
            for (place, scalar) in all.scalars.iter_mut().enumerate() {
                let values: Vec<&Tensor> = values.iter().map(|part| &part[place]).collect();
                scalar.value = scalar.joined(&Tensor::f_stack(&values, 0)?)?;
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
        let norms = self.norms.iter().map(|(_, norm)| norm);
        let values: Vec<&Tensor> =
            self.scalars.iter().map(|scalar| &scalar.value).chain(norms).collect();
        if values.is_empty() {
            return Ok((Record::new(), None));
        }
        let together = Tensor::f_stack(&values, 0)?.f_to_device(Device::Cpu)?;
        // [N, scalars and norms], the same on all processes.
        let together = processes.stack(&together)?;
        let count = self.scalars.len() as i64;
        let norms = together.f_narrow(1, count, together.size()[1] - count)?;
        let norms = Vec::<f64>::try_from(norms.f_mean_dim(&[0i64][..], false, None::<Kind>)?)?;
        let mut record = Record::new();
        for (place, scalar) in self.scalars.into_iter().enumerate() {
            let value = scalar.joined(&together.f_select(1, place as i64)?)?.f_double_value(&[])?;
            if value.is_finite() || !scalar.may_be_undefined {
                record.push((scalar.name, value));
            }
        }
        let norms = self.norms.iter().zip(norms).find(|(_, norm)| !norm.is_finite());
        let fault = norms
            .map(|((role, _), norm)| format!("the norm of the gradient of the {role} is {norm}"));
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
