//! Ctrl-C and SIGTERM: the first asks the run to save and leave, the second leaves at once.
//!
//! ```no_run
//! use tch_training::run::Interrupt;
//!
//! # fn main() -> tch_training::Result<()> {
//! let interrupt = Interrupt::install("Saving after this step; Ctrl-C again leaves at once")?;
//! for step in 0..1000 {
//!     // .. train ..
//!     if interrupt.is_requested() {
//!         // .. save ..
//!         break;
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::error::{Error, Result};

/// Exit status of a program that was interrupted, as shells have it.
pub const INTERRUPTED: u8 = 130;

/// Knows whether the user wants the program to stop.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Takes over Ctrl-C and SIGTERM for the rest of the program. `message` is printed on the first, to say
    /// what comes next.
    ///
    /// # Errors
    /// [`Error::Signals`] if the system refuses.
    pub fn install(message: &'static str) -> Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(Error::Signals)?;
        let interrupt = Self(Arc::default());
        let seen = interrupt.clone();
        // A thread of its own may print, which a signal handler may not.
        let listen = move || {
            for _ in signals.forever() {
                if seen.0.swap(true, Ordering::SeqCst) {
                    // Without destructors: another thread may be inside libtorch.
                    signal_hook::low_level::exit(i32::from(INTERRUPTED));
                }
                eprintln!("\n{message}");
            }
        };
        thread::Builder::new().name("interrupt".into()).spawn(listen).map_err(Error::Signals)?;
        Ok(interrupt)
    }

    /// Whether to stop at the next chance.
    pub fn is_requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// From here on the first Ctrl-C leaves at once: there is nothing to save.
    pub fn leave_at_once(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}
