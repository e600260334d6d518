//! Return types of network closures.

use tch::{TchError, Tensor};

use crate::error::{Error, NETWORK, Result};

/// The return type of a network closure: a value, or a `Result` with any error.
pub trait IntoOutput<T> {
    /// The value, the error boxed as [`Error::Network`].
    ///
    /// # Errors
    /// The closure's own error.
    fn into_result(self) -> Result<T>;
}

impl IntoOutput<Tensor> for Tensor {
    fn into_result(self) -> Result<Tensor> {
        Ok(self)
    }
}

impl IntoOutput<Self> for Vec<Tensor> {
    fn into_result(self) -> Result<Self> {
        Ok(self)
    }
}

impl IntoOutput<(Tensor, Tensor)> for (Tensor, Tensor) {
    fn into_result(self) -> Result<(Tensor, Tensor)> {
        Ok(self)
    }
}

impl<T, E: Into<Box<dyn std::error::Error + Send + Sync>>> IntoOutput<T> for Result<T, E> {
    fn into_result(self) -> Result<T> {
        self.map_err(|error| {
            let source = error.into().downcast::<TchError>();
            let source = source.map_or_else(|other| other, |error| Error::Torch(*error).into());
            Error::Network { what: NETWORK, source }
        })
    }
}
