//! Helpers of the tests.

#[path = "../../../../tests/common/tensors.rs"]
mod tensors;

pub use tensors::{max_difference, seeded, wave};

/// The errors of all tests.
pub type Result<T, E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// An error with all its causes.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
