//! The one error type of the crate.

use std::path::PathBuf;

use tch::{Device, Kind, TchError};

/// An error of this crate: which argument, what was expected, what was found.
///
/// The data are in the fields, so that callers can match on them; display makes the words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A tensor has the wrong shape.
    #[error("{what}: expected shape {expected}, found {found:?}")]
    Shape {
        /// The offending argument.
        what: &'static str,
        /// The shape asked for, in words or numbers.
        expected: String,
        /// The shape given.
        found: Vec<i64>,
    },
    /// A tensor has the wrong element type.
    #[error("{what}: expected {expected}, found {found:?}")]
    Kind {
        /// The offending argument.
        what: &'static str,
        /// The element types that are accepted.
        expected: &'static str,
        /// The element type given.
        found: Kind,
    },
    /// Two tensors of one computation are on different devices.
    #[error("{what}: expected a tensor on {expected:?}, found one on {found:?}")]
    Device {
        /// The offending argument.
        what: &'static str,
        /// The device of the sample.
        expected: Device,
        /// The device given.
        found: Device,
    },
    /// A tensor is sparse, or in the blocks of oneDNN: its numbers do not lie one beside the other.
    #[error("{what}: expected a strided tensor, found a sparse one or one of oneDNN")]
    Layout {
        /// The offending argument.
        what: &'static str,
    },
    /// A number lies outside its range, or is not a number.
    #[error("{what}: must be {requirement}, found {}", legible(*.value))]
    OutOfRange {
        /// The offending argument.
        what: &'static str,
        /// The range in words.
        requirement: &'static str,
        /// The number given.
        value: f64,
    },
    /// A term needs something that it was not given, of the batch mostly.
    #[error("there is no {what}: add it with {setter}")]
    Missing {
        /// What is missing.
        what: &'static str,
        /// The method that provides it, such as `Batch::with_null`.
        setter: &'static str,
    },
    /// A closure cut the graph between the samples and its result: the loss would train nothing.
    #[error("{what}: no gradient to the samples: is there a detach or no_grad in the closure?")]
    NoGradient {
        /// The result of the closure.
        what: &'static str,
    },
    /// An exact derivative was asked of a network without a closure for it.
    #[error(
        "the network has no tangent: add it with the method `tangent` of its Denoiser or FlowMap, or take a difference"
    )]
    NoTangent,
    /// A derivative in time was asked of a path that has none.
    #[error(
        "the path is a table of levels, which has no derivative in time: take a difference over more than one level"
    )]
    NotDifferentiable,
    /// Two terms of an objective have one name.
    #[error("two terms of the objective are named \"{name}\"")]
    SameName {
        /// The name.
        name: String,
    },
    /// An objective has no term of this name.
    #[error("the objective has no term named \"{name}\"")]
    NoTerm {
        /// The name.
        name: String,
    },
    /// A term of an objective failed.
    #[error("term \"{name}\" failed")]
    Term {
        /// The name under which the term was added.
        name: String,
        /// Why it failed.
        source: Box<Error>,
    },
    /// The CUDA half of libtorch is there, and this process cannot use it.
    #[error("{}: {reason}", library.display())]
    Cuda {
        /// The library.
        library: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The exchange between processes failed.
    #[error("the exchange between processes failed")]
    Collective(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A network closure returned an error.
    #[error("the {what} failed")]
    Network {
        /// Which: the teacher, the fake score, the student, the critic, the score of a reward, or just a network.
        what: &'static str,
        /// What it returned; an error of libtorch as [`Error::Torch`].
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Libtorch refused an operation.
    #[error("libtorch: {}", first_line(.0))]
    Torch(TchError),
}

// No source of the error: a chain would say the same twice, with the stack.
impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        Self::Torch(error)
    }
}

/// A closure of which nothing more is known.
pub(crate) const NETWORK: &str = "network";

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A number as it is read: a long one with an exponent, in place of hundreds of zeros.
fn legible(value: f64) -> String {
    let size = value.abs();
    let is_short = size == 0.0 || !size.is_finite() || (1e-6..1e6).contains(&size);
    if is_short { value.to_string() } else { format!("{value:e}") }
}

/// Libtorch's messages end in some twenty lines of C++ stack; the first line says what is wrong.
fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

impl Error {
    pub(crate) fn shape(what: &'static str, expected: impl Into<String>, found: &[i64]) -> Self {
        Self::Shape { what, expected: expected.into(), found: found.to_vec() }
    }

    /// Says whose closure failed, unless that is known.
    pub(crate) fn of(self, what: &'static str) -> Self {
        match self {
            Self::Network { what: NETWORK, source } => Self::Network { what, source },
            other => other,
        }
    }

    pub(crate) fn in_term(self, name: &str) -> Self {
        Self::Term { name: name.to_owned(), source: Box::new(self) }
    }
}
