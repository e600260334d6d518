//! One stream of random numbers for each thing that is drawn, so that none disturbs another.
//!
//! Libtorch's generator is one for the whole process. A run that goes on after an interruption draws what it
//! would have drawn only if the generator is seeded anew at every step, by the step's number; and what is
//! drawn beside the steps, initial weights or the noise of an evaluation, needs numbers that no step has. An
//! enum says which number is whose:
//!
//! ```
//! use tch_training::seed::{begin, seed_of};
//!
//! enum Stream {
//!     /// Everything drawn at one step.
//!     Step(u32),
//!     /// The initial weights.
//!     Weights,
//! }
//!
//! impl From<Stream> for u64 {
//!     fn from(stream: Stream) -> Self {
//!         match stream {
//!             Stream::Step(step) => step.into(),
//!             Stream::Weights => u64::MAX,
//!         }
//!     }
//! }
//!
//! let seed = 7; // of the run
//! begin(seed, Stream::Weights);
//! let first = tch::Tensor::randn([3], (tch::Kind::Float, tch::Device::Cpu));
//! begin(seed, Stream::Step(0));
//! let second = tch::Tensor::randn([3], (tch::Kind::Float, tch::Device::Cpu));
//! assert_ne!(first, second);
//! assert_ne!(seed_of(seed, Stream::Step(1)), seed_of(seed + 1, Stream::Step(1)));
//! ```

use tch::{Device, Kind, Tensor};

use crate::error::Result;

/// The seed of one stream of a run, from 0 to 2^63 - 1.
///
/// SplitMix64 (Steele, Lea, Flood 2014, `doi:10.1145/2660193.2660195`): streams and runs of neighbouring
/// numbers get unrelated seeds.
pub fn seed_of(run: u64, stream: impl Into<u64>) -> i64 {
    let stream = stream.into();
    let mut z = run.wrapping_mul(0x9E37_79B9_7F4A_7C15).wrapping_add(stream.wrapping_add(1));
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 1) as i64
}

/// Seeds libtorch's generator, that of the whole process, for one stream of a run.
pub fn begin(run: u64, stream: impl Into<u64>) {
    tch::manual_seed(seed_of(run, stream));
}

/// A number for [`seed_of`] that follows from libtorch's generator, for what is to be drawn twice alike.
///
/// # Errors
/// [`Error::Torch`](crate::Error::Torch) if libtorch fails.
pub fn draw_seed() -> Result<u64> {
    let seed = Tensor::f_randint(i64::MAX, [1], (Kind::Int64, Device::Cpu))?;
    Ok(seed.f_int64_value(&[0])? as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stored results depend on these numbers.
    #[test]
    fn seeds_stay_what_they_are() {
        assert_eq!(seed_of(0, 0u64), 3_119_036_373_970_289_394);
        assert_eq!(seed_of(7, 1_000_000_000u64), 6_817_789_957_669_735_722);
        assert_eq!(seed_of(u64::MAX, u64::MAX), 1_851_685_210_305_519_456);
    }

    #[test]
    fn neighbours_differ() {
        let mut seeds: Vec<i64> =
            (0..100u64).flat_map(|run| (0..100u64).map(move |step| seed_of(run, step))).collect();
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 10_000);
        assert!(seeds[0] >= 0);
    }
}
