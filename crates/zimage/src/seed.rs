//! One stream of random numbers for each thing that is drawn.

/// The seed of everything drawn at one step, so that a resumed run draws the same.
pub fn step_seed(seed: u64, step: u64) -> i64 {
    // SplitMix64's mixing.
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(step.wrapping_add(1));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 1) as i64
}
