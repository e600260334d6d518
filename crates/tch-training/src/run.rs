//! A run that can be stopped at any moment and goes on with the same numbers: its state on disk, its log, event
//! files for TensorBoard, a lock on its folder, Ctrl-C, and fingerprints of the data that it works on.

mod event_file;
mod fingerprint;
mod interrupt;
mod lock;
mod log;
mod state;

pub use event_file::{EventFile, Shown};
pub use fingerprint::{Hash, fingerprint};
pub use interrupt::{INTERRUPTED, Interrupt};
pub use lock::Lock;
pub use log::{Lines, Log, LostLines};
pub use state::{Progress, StateFolder};
