//! The numbers of a noise schedule that is a table.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// A table of float64 numbers, with one copy on each device that has asked for it.
#[derive(Debug)]
pub(crate) struct Levels {
    levels: Vec<f64>,
    copies: Mutex<Vec<Tensor>>,
}

impl Levels {
    pub(crate) fn new(levels: Vec<f64>) -> Self {
        Self { levels, copies: Mutex::default() }
    }

    /// The number of levels, N.
    pub(crate) fn len(&self) -> usize {
        self.levels.len()
    }

    #[cfg(feature = "serde")]
    pub(crate) fn into_vec(self) -> Vec<f64> {
        self.levels
    }

    /// The levels on `device`, `[N]` in float64; they go there once.
    pub(crate) fn on(&self, device: Device) -> Result<Tensor> {
        let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(copy) = copies.iter().find(|copy| copy.device() == device) {
            return Ok(copy.shallow_clone());
        }
        // Not waited for: libtorch reads the numbers before it returns.
        let levels = Tensor::f_from_slice(&self.levels)?;
        let copy = levels.f_to_device_(device, Kind::Double, true, false)?;
        copies.push(copy.shallow_clone());
        Ok(copy)
    }
}

impl Clone for Levels {
    fn clone(&self) -> Self {
        Self::new(self.levels.clone())
    }
}

impl PartialEq for Levels {
    fn eq(&self, other: &Self) -> bool {
        self.levels == other.levels
    }
}
