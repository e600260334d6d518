//! Bakes the folder of libtorch into our binaries and passes it on to dependents.
//!
//! Link arguments of a dependency never reach a final binary, so torch-sys cannot do this for us.
//! A dependent crate reads `DEP_DECOUPLED_DMD_LIBTORCH_LIB` in its own build script.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Absent with the feature `doc-only`.
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        let lib = lib.to_string_lossy();
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
        println!("cargo:libtorch_lib={lib}");
    }
}
