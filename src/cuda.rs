//! Finding the GPU from a binary whose linker dropped the CUDA half of libtorch.

use std::ffi::{CString, OsString};
use std::path::PathBuf;

use tch::Device;

/// The first CUDA device if there is one that works, else the CPU.
///
/// Prefer it to `tch::Device::cuda_if_available`, and call it before any other question about CUDA.
/// The default linker of Rust on Linux drops `libtorch_cuda.so`, which nothing refers to by name, and
/// libtorch then remembers for ever that there is no CUDA; this loads the library first, where the
/// libtorch in use has it.
#[must_use]
pub fn default_device() -> Device {
    load_cuda();
    Device::cuda_if_available()
}

/// Loads `libtorch_cuda.so` from the folder of the libtorch that this process uses; does nothing
/// where there is none, or where it is loaded already. Returns whether it is loaded now.
///
/// It must run before the first question about CUDA; tensors on the CPU may exist before.
pub fn load_cuda() -> bool {
    let Some(folder) = libtorch_folder() else { return false };
    let library = folder.join("libtorch_cuda.so");
    library.exists() && open(library.into_os_string())
}

/// The folder of `libtorch_cpu.so`, from the memory map of this process (Linux only).
fn libtorch_folder() -> Option<PathBuf> {
    let maps = std::fs::read_to_string("/proc/self/maps").ok()?;
    let start = |line: &str| line.find('/').and_then(|at| line.get(at..).map(PathBuf::from));
    let library = maps.lines().find(|line| line.ends_with("/libtorch_cpu.so")).and_then(start)?;
    library.parent().map(PathBuf::from)
}

/// Opens a shared library and keeps it open.
#[cfg(unix)]
#[allow(unsafe_code)]
fn open(library: OsString) -> bool {
    use std::os::unix::ffi::OsStringExt;

    const RTLD_NOW: i32 = 2;
    const RTLD_GLOBAL: i32 = 0x100;
    unsafe extern "C" {
        fn dlopen(file: *const std::ffi::c_char, mode: std::ffi::c_int) -> *mut std::ffi::c_void;
    }
    let Ok(name) = CString::new(library.into_vec()) else { return false };
    // SAFETY: `name` is a C string that outlives the call. Opening runs the constructors of
    // libtorch's own CUDA library, the same that run when it is linked; the handle is never closed.
    !unsafe { dlopen(name.as_ptr(), RTLD_NOW | RTLD_GLOBAL) }.is_null()
}

/// Elsewhere the linker keeps the library.
#[cfg(not(unix))]
fn open(_library: OsString) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_libtorch_in_use() {
        let _loaded = tch::Tensor::from(1.0);
        let folder = libtorch_folder().expect("the tests link libtorch");
        assert!(folder.join("libtorch_cpu.so").exists());
    }

    #[cfg(unix)]
    #[test]
    fn says_whether_a_library_could_be_opened() {
        let _loaded = tch::Tensor::from(1.0);
        let folder = libtorch_folder().expect("the tests link libtorch");
        assert!(open(folder.join("libtorch_cpu.so").into_os_string()));
        assert!(!open(folder.join("no_such_library.so").into_os_string()));
        assert!(!open("with\0zero".into()));
    }

    #[test]
    fn answers_without_a_gpu() {
        let loaded = load_cuda();
        assert_eq!(loaded, libtorch_folder().is_some_and(|f| f.join("libtorch_cuda.so").exists()));
        assert!(matches!(default_device(), Device::Cpu | Device::Cuda(0)));
    }
}
