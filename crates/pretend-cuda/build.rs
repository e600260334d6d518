//! Compiles the device from libtorch's own headers, and bakes the folder of libtorch into our test program.

use std::path::PathBuf;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shim");
    // Absent where tch is built without libtorch.
    let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else { return };
    let include = lib.parent().unwrap_or(&lib).join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        // The warnings are those of libtorch's headers.
        .warnings(false)
        // Debug information of those headers is some tens of megabytes, of which nothing is ours.
        .debug(false)
        .opt_level(1)
        .include(include.join("torch/csrc/api/include"))
        .include(include)
        .file("shim/pretend_cuda.cpp")
        .compile("pretend_cuda");
    println!("cargo:rustc-link-search=native={}", lib.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
}
