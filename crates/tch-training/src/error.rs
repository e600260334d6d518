//! The one error type of the crate.

use std::io;
use std::path::{Path, PathBuf};

use tch::{Kind, TchError};

use crate::safetensors::FormatError;

/// The error of a closure of the user's.
pub type BoxedError = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong: which argument, file or tensor, what was expected, what was found.
///
/// The data are in the fields, so that callers can match on them; the words are made on display. The cause,
/// where there is one, is the [source](std::error::Error::source) and not repeated in the words.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Libtorch refused an operation.
    #[error("libtorch: {}", first_line(.0))]
    Torch(TchError),
    /// The system refused an operation on a file or folder.
    #[error("{action} {}", path.display())]
    File {
        /// What was tried, as in "reading".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The closure that writes the content of a file failed.
    #[error("writing {}", path.display())]
    Writing {
        /// The file.
        path: PathBuf,
        /// What the closure says.
        source: BoxedError,
    },
    /// A text is not JSON, or not of the type expected.
    #[error("parsing {place}")]
    Json {
        /// The file, or the part of one.
        place: String,
        /// Where in it, and why.
        source: serde_json::Error,
    },
    /// A safetensors file, or the index of several, is broken.
    #[error("reading {}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A file has none of the names that it may have.
    #[error("there is neither {} nor {}", paths[0].display(), paths[1].display())]
    NoFile {
        /// The paths that were looked at.
        paths: [PathBuf; 2],
    },
    /// A part of something larger failed.
    #[error("{part}")]
    In {
        /// The part in words: a tensor of a file, a file of several.
        part: String,
        /// Why it failed.
        source: Box<Error>,
    },
    /// A tensor was asked for by a name that is not there.
    #[error("tensor {name} is missing in {place}")]
    NoTensor {
        /// The name.
        name: String,
        /// Where it was looked for.
        place: String,
    },
    /// Tensors by name are not those that were expected.
    #[error("{place}: tensors do not fit: {}", listed(.faults))]
    Tensors {
        /// The file, or the argument.
        place: String,
        /// All that is wrong.
        faults: Vec<Fault>,
    },
    /// Two tensors of one list have one name.
    #[error("two tensors are named {name}")]
    SameName {
        /// The name.
        name: String,
    },
    /// A tensor has the wrong shape.
    #[error("{what}: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The offending argument.
        what: &'static str,
        /// The shape asked for.
        expected: Vec<i64>,
        /// The shape given.
        found: Vec<i64>,
    },
    /// A setting lies outside its range, or is not a number.
    #[error("{what} must be {requirement}, found {found}")]
    OutOfRange {
        /// The setting.
        what: &'static str,
        /// The range in words.
        requirement: &'static str,
        /// The value given.
        found: String,
    },
    /// A setting asks for something that this crate does not do.
    #[error("{what} is not supported: {found}")]
    NotSupported {
        /// The setting.
        what: String,
        /// Its value.
        found: String,
    },
    /// A target of an adapter matches no layer.
    #[error("target {target:?} matches no linear layer")]
    NoSuchTarget {
        /// The target.
        target: String,
    },
    /// An adapter holds no pair.
    #[error("the adapter holds no pair")]
    EmptyAdapter,
    /// The optimizer was asked for a step, and no parameter has a gradient.
    #[error("no parameter has a gradient")]
    NoGradient,
    /// The backward pass was asked for from a loss without a graph.
    #[error("the loss depends on nothing that requires a gradient")]
    NoGraph,
    /// The backward pass was asked for where gradients are switched off.
    #[error("gradients are switched off, but checkpointed computations must run again")]
    GradientsOff,
    /// A computation that was handed to a tape failed.
    #[error("a checkpointed computation failed")]
    Computation(#[source] BoxedError),
    /// Another process holds the lock of a folder.
    #[error("another process is at work in {}", folder.display())]
    Locked {
        /// The folder.
        folder: PathBuf,
    },
    /// The state in a folder has another layout.
    #[error("{}: version must be {expected}, found {found}", path.display())]
    Version {
        /// The file that says so.
        path: PathBuf,
        /// The version of this crate.
        expected: u32,
        /// The version there.
        found: String,
    },
    /// The run in a folder is another one.
    #[error("the run in {} is another one: {}", folder.display(), listed(.differences))]
    OtherRun {
        /// The folder.
        folder: PathBuf,
        /// In what the two differ.
        differences: Vec<Difference>,
    },
    /// The system refused to pass on Ctrl-C.
    #[error("listening for Ctrl-C and SIGTERM")]
    Signals(#[source] io::Error),
}

// No source of the error: a chain would say the same twice, with the stack.
impl From<TchError> for Error {
    fn from(error: TchError) -> Self {
        Self::Torch(error)
    }
}

/// `Result` with the crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What is wrong with one of several tensors.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// It is not there.
    #[error("{name} is missing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// It is there, and should not be.
    #[error("{name} is unexpected")]
    Unexpected {
        /// Its name.
        name: String,
    },
    /// It has another shape.
    #[error("{name} has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// The shape asked for.
        expected: Vec<i64>,
        /// The shape that it has.
        found: Vec<i64>,
    },
    /// It has another element type.
    #[error("{name} is {found:?}, expected {expected:?}")]
    Kind {
        /// Its name.
        name: String,
        /// The element type asked for.
        expected: Kind,
        /// The element type that it has.
        found: Kind,
    },
    /// It holds NaN or an infinity.
    #[error("{name} holds numbers that are not finite")]
    NotFinite {
        /// Its name.
        name: String,
    },
    /// It is there under two names that mean the same.
    #[error("{name} is there twice")]
    Twice {
        /// The name.
        name: String,
    },
    /// It is half of a pair for a layer that the model does not have.
    #[error("{name} belongs to no linear layer of the model")]
    NoSuchLayer {
        /// Its name.
        name: String,
    },
    /// It is the alpha of a pair whose B is not there, or has no rank.
    #[error("{layer} has an alpha but no {half} with a rank")]
    Alpha {
        /// The layer.
        layer: String,
        /// Name of B.
        half: String,
    },
    /// The two halves of a pair do not fit one another, or not the layer.
    #[error(
        "the pair of {layer} has shapes {down:?} and {up:?}, expected [r, {inputs}] and [{outputs}, r]"
    )]
    Pair {
        /// The layer.
        layer: String,
        /// Shape of A.
        down: Vec<i64>,
        /// Shape of B.
        up: Vec<i64>,
        /// Width of the layer's input.
        inputs: i64,
        /// Width of the layer's output.
        outputs: i64,
    },
}

/// One thing in which two runs differ.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{name} is {there} there and {here} here")]
pub struct Difference {
    /// The way to the value: names of fields with dots between.
    pub name: String,
    /// The value in the folder; null where there is none.
    pub there: serde_json::Value,
    /// The value of this run; null where there is none.
    pub here: serde_json::Value,
}

/// Libtorch's messages end in some twenty lines of C++ stack; the first line says what is wrong.
fn first_line(error: &TchError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

fn listed<T: ToString>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// For `map_err` on an operation of the system.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    /// The same error as the cause of another, which names a part.
    pub(crate) fn inside(self, part: impl Into<String>) -> Self {
        Self::In { part: part.into(), source: Box::new(self) }
    }
}
