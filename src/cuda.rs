//! The CUDA half of libtorch, which the linker leaves out of a Rust program.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use tch::Device;

use crate::error::{Error, Result};

const LIBRARY: &str = "libtorch_cuda.so";

/// The first CUDA device if there is one that works, else the CPU.
///
/// Calls [`load_cuda`]; where that fails, says why on standard error and answers the CPU.
#[must_use]
pub fn default_device() -> Device {
    if let Err(error) = load_cuda() {
        eprintln!("decoupled-dmd: computing on the CPU: {error}");
    }
    Device::cuda_if_available()
}

/// Loads `libtorch_cuda.so` from the folder of the libtorch in use, and returns whether libtorch has
/// CUDA now: false for a libtorch without that library. A program may have CUDA and no GPU.
///
/// Rust's default linker on Linux drops the library, which nothing refers to by name. Libtorch looks for
/// CUDA once: a question before the library is loaded turns CUDA off for the whole process. Such
/// questions are `tch::Cuda::is_available`, `Device::cuda_if_available`, **`tch::manual_seed`, `backward`,
/// `run_backward`, an optimizer step, a convolution, batch norm, and an RNN**; `randn`, `from_slice`,
/// matrix products, linear layers, layer norm, group norm and attention are none. On Linux this crate
/// therefore loads the library when the process starts, before `main`, and no call comes too early.
/// Elsewhere, call this function first.
///
/// # Errors
/// [`Error::Cuda`] if the library is there and cannot be opened, or if libtorch was asked for CUDA before
/// it was loaded.
pub fn load_cuda() -> Result<bool> {
    libtorch_folder().map_or(Ok(false), |folder| load_from(&folder))
}

fn load_from(folder: &Path) -> Result<bool> {
    let library = folder.join(LIBRARY);
    if !library.exists() {
        return Ok(false);
    }
    let failed = |reason: String| Error::Cuda { library: library.clone(), reason };
    open(library.clone().into_os_string()).map_err(failed)?;
    // Asked only now, since this too is a question after which libtorch has made up its mind.
    if tch::utils::has_cudart() {
        return Ok(true);
    }
    let too_early = "libtorch was asked for CUDA before, as tch::manual_seed, backward, an optimizer step, \
                     a convolution, batch norm and an RNN do: call load_cuda or default_device first";
    Err(failed(too_early.into()))
}

/// Loads the library before `main`: see [`load_cuda`], which finds out whether this went well.
#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
// SAFETY: the loader calls the functions of this section once, after the initialisation of the libraries
// that the program links, libtorch among them. `at_start` has the signature of these functions,
// cannot unwind, and uses nothing that `main` sets up.
#[unsafe(link_section = ".init_array")]
#[used]
static AT_START: extern "C" fn() = at_start;

#[cfg(target_os = "linux")]
extern "C" fn at_start() {
    if let Some(library) = libtorch_folder().map(|folder| folder.join(LIBRARY))
        && library.exists()
    {
        let _ = open(library.into_os_string());
    }
}

/// The folder of `libtorch_cpu.so`, from the memory map of this process (Linux only).
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let start = |line: &str| line.find('/').and_then(|at| line.get(at..).map(PathBuf::from));
    let library = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so")).and_then(start)?;
    library.parent().map(PathBuf::from)
}

/// Opens a shared library and keeps it open; the error is the loader's.
#[cfg(unix)]
#[allow(unsafe_code)]
fn open(library: OsString) -> Result<(), String> {
    use std::ffi::{CStr, CString, c_char, c_int, c_void};
    use std::os::unix::ffi::OsStringExt;

    const RTLD_NOW: c_int = 2;
    const RTLD_GLOBAL: c_int = 0x100;
    unsafe extern "C" {
        fn dlopen(file: *const c_char, mode: c_int) -> *mut c_void;
        fn dlerror() -> *const c_char;
    }
    let name = CString::new(library.into_vec()).map_err(|error| error.to_string())?;
    // SAFETY: `name` is a C string that outlives the call. Opening runs the constructors of
    // libtorch's own CUDA library, the same that run when it is linked; the handle is never closed.
    if !unsafe { dlopen(name.as_ptr(), RTLD_NOW | RTLD_GLOBAL) }.is_null() {
        return Ok(());
    }
    // SAFETY: the message of this thread's last failure, null if there is none; it is valid until the
    // next call of this thread to the loader, and copied at once.
    let message = unsafe {
        let message = dlerror();
        if message.is_null() { None } else { Some(CStr::from_ptr(message)) }
    };
    Err(message.map_or_else(String::new, |message| message.to_string_lossy().into_owned()))
}

/// Elsewhere the linker keeps the library.
#[cfg(not(unix))]
fn open(_library: OsString) -> Result<(), String> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> PathBuf {
        let _loaded = tch::Tensor::from(1.0);
        libtorch_folder().expect("the tests link libtorch")
    }

    #[test]
    fn finds_the_libtorch_in_use() {
        assert!(folder().join("libtorch_cpu.so").exists());
    }

    #[cfg(unix)]
    #[test]
    fn says_why_a_library_could_not_be_opened() {
        assert_eq!(open(folder().join("libtorch_cpu.so").into_os_string()), Ok(()));
        let missing = open(folder().join("no_such_library.so").into_os_string()).unwrap_err();
        assert!(missing.contains("no_such_library.so"), "{missing}");
        assert!(open("with\0zero".into()).is_err());
    }

    #[test]
    fn answers_without_a_gpu() -> Result<()> {
        assert_eq!(load_cuda()?, folder().join(LIBRARY).exists());
        assert_eq!(load_cuda()?, tch::utils::has_cudart());
        assert!(matches!(default_device(), Device::Cpu | Device::Cuda(0)));
        Ok(())
    }

    /// Libtorch was asked before, or has CUDA already.
    #[cfg(unix)]
    #[test]
    fn a_library_that_changes_nothing_came_too_late() -> Result<()> {
        tch::manual_seed(0);
        let place = tempfile::tempdir().expect("a folder");
        assert!(!load_from(place.path())?);
        let library = place.path().join(LIBRARY);
        // Any library without the hooks of CUDA will do.
        std::os::unix::fs::symlink(folder().join("libc10.so"), &library).expect("a link");
        let found = load_from(place.path());
        if tch::utils::has_cudart() {
            assert!(found?);
        } else {
            let Err(Error::Cuda { library: named, reason }) = found else { panic!("{found:?}") };
            assert!(named == library && reason.contains("tch::manual_seed"), "{reason}");
        }
        // In another folder: the loader knows a library that it has by its inode.
        let other = tempfile::tempdir().expect("a folder");
        std::fs::write(other.path().join(LIBRARY), "no library").expect("to write");
        let Err(Error::Cuda { reason, .. }) = load_from(other.path()) else {
            panic!("opened a text")
        };
        assert!(reason.contains(LIBRARY) && !reason.contains("tch::manual_seed"), "{reason}");
        Ok(())
    }
}
