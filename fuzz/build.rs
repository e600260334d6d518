//! Bakes the folder of libtorch into the programs of this crate.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Absent where decoupled-dmd is built without libtorch.
    if let Some(lib) = std::env::var_os("DEP_DECOUPLED_DMD_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.to_string_lossy());
    }
}
