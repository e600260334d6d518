//! Composable losses for distilling a many-step diffusion model into a few-step generator, over
//! libtorch tensors ([`tch`]).
//!
//! The method is Decoupled DMD (arXiv 2511.22677), by which the 8-step Z-Image model was made. A student
//! makes a sample x; the gradient that distils it is a sum of two mechanisms, each at its own noise level:
//!
//! ```text
//! dL/dx  ~  - (alpha - 1) (x0_cond - x0_null)(tau_CA)  -  (x0_cond - x0_fake)(tau_DM)
//!             CFG Augmentation, the engine                Distribution Matching, a regularizer
//! ```
//!
//! Two open traits, and an objective that adds them up:
//!
//! - [`Engine::direction`]: the direction in which the samples get better; [`CfgAugmentation`],
//!   [`Consistency`].
//! - [`Regularizer::loss`]: a loss that keeps the samples in place; [`DistributionMatching`],
//!   [`MeanVariance`], [`MaximumMeanDiscrepancy`], [`Adversarial`] and others.
//! - [`Objective`]: [`Group`]s of terms, each group with one [`Probe`] of the samples. [`Schedule`] has the
//!   paper's four arrangements.
//!
//! | formula | item | source |
//! |---|---|---|
//! | `(alpha - 1)(x0_cond - x0_null) / n` | [`CfgAugmentation`] | Decoupled DMD, Eq. 6, 8 |
//! | `f(x_l, l) - f(x_t, t)` along the teacher's ODE | [`Consistency`] | CM, LCM, sCM, rCM |
//! | `(x0_cond - x0_fake) / n` | [`DistributionMatching`] | Decoupled DMD, Eq. 2, 8 |
//! | W(t) of the fake score's loss | [`Weighting`] | DMD2, Algorithm 1, min-SNR, EDM |
//! | KL of means and variances | [`MeanVariance`] | Decoupled DMD, Eq. 7 |
//! | `E k(x, x') + E k(y, y') - 2 E k(x, y)` | [`MaximumMeanDiscrepancy`] | Gretton et al. 2012 |
//! | `softplus(-D(x_t))` and other games | [`Adversarial`] | DMD2, LADD, APT |
//! | a game of the teacher's step and the fake score's | [`AdversarialDistributionMatching`] | ADM |
//! | divergences other than the reverse one | [`Divergence`] | f-distill |
//! | Fisher divergence, through both networks | [`ScoreIdentity`] | SiD, SIM |
//! | distance of x and its target | [`PairedRegression`], [`Distance`] | DMD, Diffusion2GAN, SenseFlow |
//! | one random change of both sides | [`Augmentation`] | StyleGAN-ADA, Diffusion2GAN |
//! | `- mean score(x)` | [`Reward`] | DMDR, JDM |
//! | `x - (r - t) u(x; t -> r)` | [`FlowMap`], [`MeanFlow`] | MeanFlow, AlphaFlow |
//! | n | [`Normalizer`] | DMD2, FastGen, FastVideo, CDM |
//! | `null + alpha (cond - null)` | [`Guidance`] | Eq. 4 |
//! | `x_t = a x0 + s eps` | [`NoisePath`], [`Prediction`] | four families, five predictions |
//! | tau, grids, shifts | [`Renoising`], [`FewStepGrid`], [`Shift`] | Section 4 |
//!
//! [`Denoiser`] makes any network a predictor of clean samples on its [`NoisePath`]. [`Batch`] carries the
//! student's samples. [`Sampler`] is backward simulation and few-step sampling. Networks, optimizers and the
//! loop stay the user's.
//!
//! Losses are means over all elements of the batch; directions are differences of clean samples; time
//! runs from 0, noise, to 1, data. Nothing here panics on bad input: every function on user input
//! returns an [`Error`] that names the argument. Nor does it where libtorch fails, as for want of memory. In a closure of
//! yours, calls of tch 0.26 with a number, such as `f_mul_scalar`, do; those of [`arithmetic`] do not.
#![warn(
    missing_docs,
    missing_debug_implementations,
    unreachable_pub,
    clippy::missing_errors_doc,
    clippy::float_cmp
)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing,
        // Tensor operators panic; `f_*` calls return errors.
        clippy::arithmetic_side_effects,
    )
)]

pub mod arithmetic;
mod augmentation;
mod batch;
mod checks;
mod collective;
mod cuda;
mod denoiser;
mod diagnostics;
mod engine;
mod error;
mod flow_map;
mod freeze;
mod gradient;
mod grid;
mod guidance;
mod moving_average;
mod network;
mod normalizer;
mod numeric;
mod objective;
mod output;
mod path;
mod prediction;
mod probe;
mod regularizer;
mod renoising;
mod rollout;
mod schedule;
mod simulation;
mod steps;
#[cfg(feature = "testing")]
pub mod testing;
mod time;
mod trajectory;
mod update_ratio;
mod value;
mod weighting;

pub use augmentation::{Augmentation, AugmentationDraw};
pub use batch::{Batch, Condition};
pub use collective::Collective;
pub use cuda::{default_device, load_cuda};
pub use denoiser::Denoiser;
pub use diagnostics::{Diagnostics, PerSample, ScoreDiagnostics, TermDiagnostics};
pub use engine::{CfgAugmentation, Consistency, Engine, EngineFn, Tangent, engine_fn};
pub use error::{Error, Result};
pub use flow_map::{FlowMap, FlowRule, MeanFlow, MeanFlowEvaluation};
pub use freeze::{Frozen, freeze_matching};
pub use gradient::{gradient_only_in, surrogate};
pub use grid::FewStepGrid;
pub use guidance::Guidance;
pub use moving_average::move_toward;
pub use network::IntoOutput;
pub use normalizer::Normalizer;
pub use objective::{Draw, Evaluation, Group, Objective};
pub use output::{Difference, ModelOutput};
pub use path::{
    Coefficients, Edm, NoiseAngle, NoisePath, Preconditioning, RectifiedFlow, Shifted, Subinterval,
    TrigFlow, VariancePreserving, check_same_path,
};
pub use prediction::Prediction;
pub use probe::Probe;
pub use regularizer::{
    Adversarial, AdversarialDistributionMatching, Bandwidth, CriticDraw, CriticEvaluation,
    CriticHeads, CriticPenalty, Distance, DistributionMatching, Divergence, Estimator, GanLoss,
    Kernel, MaximumMeanDiscrepancy, MeanVariance, PairedRegression, Perceptual, PseudoHuber,
    Regularizer, RegularizerFn, Reward, ScoreIdentity, Statistics, regularizer_fn,
};
pub use renoising::{
    AboveStudent, LogNormal, LogitNormal, Power, Renoising, TimeDistribution, Times, Uniform,
};
pub use rollout::{Sampler, Transition};
pub use schedule::{Schedule, Shifts};
pub use simulation::Simulation;
pub use steps::Steps;
pub use time::{PostShift, PreShift, Shift};
pub use trajectory::Trajectory;
pub use update_ratio::UpdateRatio;
pub use weighting::Weighting;

/// The code of the README, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct ReadmeDoctests;
