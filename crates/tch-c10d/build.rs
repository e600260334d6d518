//! Compiles the C++ half from libtorch's own headers, and bakes the folder of libtorch into our binaries.
//!
//! The feature `nccl` also needs `cuda_runtime.h`, `nccl.h` and the headers that they include, which no
//! libtorch carries: `TCH_C10D_INCLUDE` lists folders that have them, separated by colons. Without the
//! variable, `$CUDA_HOME/include` and the folders of NVIDIA's Python packages beside libtorch are searched.

use std::env;
use std::path::{Path, PathBuf};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=shim");
    println!("cargo:rerun-if-env-changed=TCH_C10D_INCLUDE");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    // Absent with the feature `doc-only`.
    let Some(lib) = env::var_os("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else { return };
    let nccl = env::var_os("CARGO_FEATURE_NCCL").is_some();
    compile(&lib, nccl);
    println!("cargo:rustc-link-search=native={}", lib.display());
    for library in ["torch_cpu", "c10"] {
        println!("cargo:rustc-link-lib=dylib={library}");
    }
    if nccl {
        for library in ["torch_cuda", "c10_cuda"] {
            println!("cargo:rustc-link-lib=dylib={library}");
        }
    }
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    // A dependent crate reads DEP_TCH_C10D_LIBTORCH_LIB: link arguments do not reach its binaries.
    println!("cargo:libtorch_lib={}", lib.display());
}

fn compile(lib: &Path, nccl: bool) {
    let include = lib.parent().unwrap_or(lib).join("include");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        // The warnings are those of libtorch's headers.
        .warnings(false)
        // Debug information of those headers is some tens of megabytes, of which nothing is ours.
        .debug(false)
        .include("shim")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("shim/c10d.cpp");
    if nccl {
        build.define("USE_C10D_NCCL", None);
        for folder in cuda_includes(lib) {
            build.include(folder);
        }
    }
    build.compile("tch_c10d_shim");
}

/// Folders that may have the headers of CUDA and NCCL; those that do not exist do no harm.
fn cuda_includes(lib: &Path) -> Vec<PathBuf> {
    if let Some(folders) = env::var_os("TCH_C10D_INCLUDE") {
        return env::split_paths(&folders).collect();
    }
    let mut folders: Vec<PathBuf> = Vec::new();
    folders.extend(env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("include")));
    if let Some(packages) = lib.ancestors().nth(2) {
        folders.extend(
            ["cu13", "nccl"].map(|name| packages.join("nvidia").join(name).join("include")),
        );
    }
    folders
}
