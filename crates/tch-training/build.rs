//! Bakes the folder of libtorch into the test programs of this crate.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Absent where torch-sys is built for documentation alone.
    if let Some(lib) = std::env::var_os("DEP_TCH_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.to_string_lossy());
    }
}
