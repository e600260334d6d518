//! The training of one arm: the distillation of `zimage::distil` with any engine and any shields.

use anyhow::{Context, Result, ensure};
use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Denoiser, DistributionMatching, Group, Guidance, Kernel,
    MaximumMeanDiscrepancy, MeanVariance, NoisePath, Normalizer, Objective, RectifiedFlow,
    Schedule, Shift, Statistics, Transition,
};
use tch::Tensor;
use tch_training::Parameters;
use tch_training::seed::begin;
use zimage::ZImageTransformer;
use zimage::distil::{
    Decay, Distillation, Prompts, Recipe, Record, Rollout, Stream, Terms, embedded_optimizer,
};

use super::arm::{Arm, Shield, Tau};
use super::critic::Critic;

/// How students walk their grid, in training and in sampling.
pub const TRANSITION: Transition = Transition::Ddim;
/// Side of the pictures that the maximum mean discrepancy compares.
const SMALL_SIDE: i64 = 8;

/// What all arms share.
#[derive(Debug)]
pub struct Material<'a> {
    pub teacher: &'a ZImageTransformer,
    pub shift: Shift,
    pub prompts: &'a Prompts,
    /// Captions to train on.
    pub items: Vec<i64>,
    /// Pictures of all captions, `[N, C, H, W]`.
    pub images: Tensor,
}

impl Material<'_> {
    /// The pictures at `items`.
    pub fn pictures(&self, items: &[i64]) -> Result<Tensor> {
        let index = Tensor::f_from_slice(items)?.f_to_device(self.images.device())?;
        Ok(self.images.f_index_select(0, &index)?)
    }
}

/// The distillation of one arm.
pub type Training<'a> = Distillation<'a, ArmTerms<'a>>;

/// Student, fake score and critic of an arm, all copies of the teacher.
///
/// # Errors
/// If the arm has no term, or libtorch cannot allocate the copies.
pub fn training<'a>(arm: &'a Arm, seed: u64, material: &'a Material<'a>) -> Result<Training<'a>> {
    let recipe = Recipe {
        // The terms are those of the arm: no schedule arranges them.
        schedule: Schedule::DecoupledHybrid,
        guidance: Guidance::new(arm.guidance)?,
        steps: arm.steps,
        transition: TRANSITION,
        shift: material.shift,
        dm_shift: material.shift,
        updates: arm.updates,
        fake_updates: arm.fake_updates,
        fake_warmup: arm.fake_warmup,
        batch: arm.batch,
        student: embedded_optimizer(arm.student_learning_rate),
        fake: embedded_optimizer(arm.fake_learning_rate),
        warmup: arm.warmup,
        // A decay would end some arms before they show what they do.
        decay: Decay::None,
        ema: arm.ema,
        adapter: None,
        checkpointing: false,
        seed,
    };
    let terms = ArmTerms::new(arm, seed, material)?;
    let (_, channels, height, width) = material.images.size4()?;
    let size = [channels, height, width];
    Distillation::with_terms(
        recipe,
        material.teacher,
        material.prompts,
        &material.items,
        size,
        terms,
    )
}

/// The names that result files give to what an update has shown: losses end in `_loss`, and the sum is left out.
pub fn named(record: Record) -> Record {
    const LOSSES: [&str; 7] = ["ca", "dm", "mean_variance", "mmd", "gan", "fake", "critic"];
    let kept = record
        .into_iter()
        .filter(|(name, _)| !["loss", "student_gradient"].contains(&name.as_str()));
    let renamed = |(name, value): (String, f64)| {
        let name = if LOSSES.contains(&name.as_str()) { format!("{name}_loss") } else { name };
        (name, value)
    };
    kept.map(renamed).collect()
}

/// The engine and the shields of an arm, over what all arms share.
#[derive(Debug)]
pub struct ArmTerms<'a> {
    arm: &'a Arm,
    material: &'a Material<'a>,
    critic: Option<Critic>,
}

impl<'a> ArmTerms<'a> {
    /// The terms, and a critic where a shield needs one.
    ///
    /// # Errors
    /// If the arm has no term, or libtorch cannot allocate the critic.
    pub fn new(arm: &'a Arm, seed: u64, material: &'a Material<'a>) -> Result<Self> {
        ensure!(
            arm.engine.is_some() || !arm.shields.is_empty(),
            "arm {} has neither engine nor shield",
            arm.name
        );
        begin(seed, Stream::Critic);
        let settings = embedded_optimizer(arm.fake_learning_rate);
        let critic = || Critic::new(material.teacher, settings);
        Ok(Self { arm, material, critic: arm.has_critic().then(critic).transpose()? })
    }

    fn adversarial(&self) -> Option<Adversarial<'_>> {
        let (critic, teacher) = (self.critic.as_ref()?, self.material.teacher);
        Some(Adversarial::new(
            RectifiedFlow.shifted(self.material.shift),
            |x: &Tensor, t: &Tensor, c: &_| critic.logits(teacher, x, t, c),
        ))
    }
}

impl Terms for ArmTerms<'_> {
    fn objective<'o>(
        &'o self,
        teacher: Denoiser<'o>,
        dm: Option<&'o DistributionMatching<'o>>,
    ) -> Result<Objective<'o>> {
        let group = |tau: Tau| -> Result<Group<'o>> { Ok(Group::new(tau.renoising()?)) };
        let guidance = Guidance::new(self.arm.guidance)?;
        let engine = CfgAugmentation::new(guidance);
        let mut objective = Objective::new(teacher);
        // The group of the engine waits for distribution matching where the two are coupled.
        let mut coupled = None;
        if let Some(tau) = self.arm.engine {
            let with_engine = group(tau)?.engine("ca", 1.0, engine);
            if self.arm.coupled {
                coupled = Some(with_engine.normalizer(Normalizer::guided(guidance)));
            } else {
                objective = objective.with(with_engine);
            }
        }
        for shield in &self.arm.shields {
            let other = group(Tau::Full)?;
            let real = &self.material.images;
            let moments = |statistics| MeanVariance::measured(real, statistics);
            objective = objective.with(match (*shield, dm) {
                (Shield::DistributionMatching(tau), Some(dm)) => {
                    let group = coupled.take().map_or_else(|| group(tau), Ok)?;
                    group.regularizer("dm", 1.0, dm)
                }
                (Shield::MeanVariance { weight }, _) => {
                    other.regularizer("mean_variance", weight, moments(Statistics::PerSample)?)
                }
                (Shield::ChannelMeanVariance { weight }, _) => {
                    other.regularizer("mean_variance", weight, moments(Statistics::PerChannel)?)
                }
                (Shield::MaximumMeanDiscrepancy { weight }, _) => {
                    let small = |x: &Tensor| x.f_adaptive_avg_pool2d([SMALL_SIDE, SMALL_SIDE]);
                    let mmd = MaximumMeanDiscrepancy::new(Kernel::gaussian())?.features(small);
                    other.regularizer("mmd", weight, mmd)
                }
                (Shield::Adversarial { weight }, _) => {
                    let gan =
                        self.adversarial().context("the adversarial shield lacks its critic")?;
                    other.regularizer("gan", weight, gan)
                }
                (shield, None) => anyhow::bail!("{shield:?} lacks its network"),
            });
        }
        ensure!(coupled.is_none(), "a coupled arm needs distribution matching");
        Ok(objective)
    }

    fn has_fake_score(&self) -> bool {
        self.arm.has_fake()
    }

    fn real(&self, items: &[i64]) -> Result<Option<Tensor>> {
        Ok(Some(self.material.pictures(items)?))
    }

    fn train(&mut self, rollout: &Rollout) -> Result<Record> {
        let loss = {
            let (Some(gan), Some(real)) = (self.adversarial(), &rollout.real) else {
                return Ok(Record::new());
            };
            let steps = rollout.trajectory.draw_steps()?;
            let x = rollout.trajectory.samples_at(&steps)?;
            gan.critic_loss(&Batch::new(&x, &rollout.cond)?.with_real(real)?)?
        };
        let Some(critic) = &mut self.critic else { return Ok(Record::new()) };
        let _norm = critic.trainer.descend(&loss, None)?;
        Ok(vec![("critic".to_owned(), f64::try_from(&loss)?)])
    }

    fn state(&self) -> Parameters {
        self.critic.iter().flat_map(|critic| critic.trainer.state()).collect()
    }
}
