//! Bytes that the C allocator has handed out, which on the CPU are libtorch's tensors.
#![allow(unsafe_code)]

/// `struct mallinfo2` of glibc.
#[repr(C)]
struct Mallinfo2 {
    arena: usize,
    ordblks: usize,
    smblks: usize,
    hblks: usize,
    hblkhd: usize,
    usmblks: usize,
    fsmblks: usize,
    uordblks: usize,
    fordblks: usize,
    keepcost: usize,
}

unsafe extern "C" {
    fn mallinfo2() -> Mallinfo2;
}

/// Bytes in use, small blocks and mapped ones, of all threads.
pub fn live_bytes() -> f64 {
    // SAFETY: takes no arguments, returns numbers by value, and glibc locks its own arenas.
    let info = unsafe { mallinfo2() };
    (info.uordblks + info.hblkhd) as f64
}
