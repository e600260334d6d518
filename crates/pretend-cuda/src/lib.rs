#![doc = include_str!("../README.md")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::fmt;
use std::path::Path;
use std::sync::Mutex;

use tch::Device;

unsafe extern "C" {
    fn pretend_cuda_install() -> bool;
    fn pretend_cuda_on_event(callback: Option<extern "C" fn(i32, *const c_char)>);
    fn pretend_cuda_on_operator(callback: Option<extern "C" fn(*const c_char)>);
    fn pretend_cuda_share_generator(share: bool);
}

/// The pretended device, there from the first call on. `None` where libtorch has a CUDA half of its own, and where
/// the process has asked libtorch about CUDA before, as `tch::manual_seed` and `backward` do: call it first.
pub fn try_device() -> Option<Device> {
    // SAFETY: takes nothing, and registers with libtorch once.
    unsafe { pretend_cuda_install() }.then_some(Device::Cuda(0))
}

/// With `true`, what is drawn on the device comes from the generator of the CPU, so that a run on the device draws
/// what a run on the CPU draws. CUDA has a generator of its own, as this device has to begin with.
pub fn share_generator(share: bool) {
    // SAFETY: sets a flag.
    unsafe { pretend_cuda_share_generator(share) }
}

/// What crossed between host and device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// The host read a scalar.
    Read,
    /// The host waited for the size of a result.
    Size,
    /// A blocking copy to the host.
    ToHost,
    /// A blocking copy to the device.
    ToDevice,
    /// A copy that does not block; from pageable memory it is staged before the call returns.
    Asynchronous,
    /// An explicit wait.
    Synchronize,
}

/// One crossing.
#[derive(Clone, Debug)]
pub struct Event {
    /// What it is.
    pub crossing: Crossing,
    /// The operator that made it.
    pub operator: String,
    /// The lines of this workspace that led to a wait, the innermost first.
    pub at: Vec<String>,
}

impl Event {
    /// Whether the host waits for the device.
    pub fn waits(&self) -> bool {
        self.crossing != Crossing::Asynchronous
    }
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { crossing, operator, at } = self;
        write!(f, "{crossing:?} by {operator} at {}", at.join(" < "))
    }
}

/// What was seen of the device during a piece of work, on any thread.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// What crossed between host and device.
    pub events: Vec<Event>,
    /// How often each operator computed on the device, views left out.
    pub operators: BTreeMap<String, u64>,
}

impl Seen {
    /// What made the host wait.
    pub fn waits(&self) -> Vec<&Event> {
        self.events.iter().filter(|event| event.waits()).collect()
    }

    /// How many operators computed: each launches a kernel or a few.
    pub fn launches(&self) -> u64 {
        self.operators.values().sum()
    }
}

static SEEN: Mutex<Option<Seen>> = Mutex::new(None);

thread_local! {
    /// Whether this thread is taking a backtrace.
    static RECORDING: Cell<bool> = const { Cell::new(false) };
}

extern "C" fn record_event(event: i32, operator: *const c_char) {
    if RECORDING.replace(true) {
        return;
    }
    let crossing = match event {
        0 => Crossing::Read,
        1 => Crossing::Size,
        2 => Crossing::ToHost,
        3 => Crossing::ToDevice,
        4 => Crossing::Asynchronous,
        _ => Crossing::Synchronize,
    };
    let mut event = Event { crossing, operator: text(operator), at: Vec::new() };
    if event.waits() {
        event.at = lines_of_this_workspace();
    }
    if let Ok(mut seen) = SEEN.lock()
        && let Some(seen) = seen.as_mut()
    {
        seen.events.push(event);
    }
    RECORDING.set(false);
}

extern "C" fn record_operator(operator: *const c_char) {
    if let Ok(mut seen) = SEEN.lock()
        && let Some(seen) = seen.as_mut()
    {
        *seen.operators.entry(text(operator)).or_default() += 1;
    }
}

fn text(operator: *const c_char) -> String {
    // SAFETY: the device passes a C string that outlives the call.
    unsafe { CStr::from_ptr(operator) }.to_string_lossy().into_owned()
}

/// Where the code of this workspace stands in the backtrace, the innermost line first.
fn lines_of_this_workspace() -> Vec<String> {
    let workspace =
        Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap_or(Path::new("/"));
    // Places are relative to the current folder where they lie in it.
    let here = std::env::current_dir().unwrap_or_default();
    let trace = std::backtrace::Backtrace::force_capture().to_string();
    let place = |line: &str| {
        let (place, _column) = line.trim().strip_prefix("at ")?.rsplit_once(':')?;
        let place = place.strip_prefix("./").map_or_else(|| place.into(), |place| here.join(place));
        let own = place.strip_prefix(workspace).ok()?.to_str()?;
        (!own.starts_with("crates/pretend-cuda/src/")).then(|| own.to_owned())
    };
    trace.lines().filter_map(place).collect()
}

/// What `work` returns, and what was seen of the device meanwhile: nothing where the device is a true one. One at a
/// time, as it sees the whole process; slow, as every wait takes a backtrace.
pub fn watch<T>(work: impl FnOnce() -> T) -> (T, Seen) {
    let watching = |seen: Option<Seen>| {
        let mut place = SEEN.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        std::mem::replace(&mut *place, seen)
    };
    watching(Some(Seen::default()));
    // SAFETY: the callbacks are functions, and unwind nowhere.
    unsafe {
        pretend_cuda_on_event(Some(record_event));
        pretend_cuda_on_operator(Some(record_operator));
    }
    let made = work();
    // SAFETY: as above; null means none.
    unsafe {
        pretend_cuda_on_event(None);
        pretend_cuda_on_operator(None);
    }
    (made, watching(None).unwrap_or_default())
}

/// Runs `work`, during which the host must wait for the device `count` times. On a true device, whose waits are
/// not seen, it only runs.
///
/// # Panics
/// If the host waits more or less often: names where.
pub fn expect_waits<T>(what: &str, count: usize, work: impl FnOnce() -> T) -> T {
    let (made, seen) = watch(work);
    let waits: Vec<_> = seen.waits().into_iter().map(ToString::to_string).collect();
    let is_pretended = try_device().is_some();
    assert!(
        !is_pretended || waits.len() == count,
        "{what}: the host waits {} times, not {count}:\n{}",
        waits.len(),
        waits.join("\n")
    );
    made
}
