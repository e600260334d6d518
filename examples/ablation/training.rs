//! The training of one arm: the loop of `zimage/distillation.rs` for any engine and any shields.

use anyhow::{Result, ensure};
use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, FewStepGrid,
    Group, Guidance, Kernel, MaximumMeanDiscrepancy, MeanVariance, Normalizer, Objective,
    RectifiedFlow, Sampler, Shift, Simulation, Statistics, Trajectory, Transition,
};
use tch::{Kind, Tensor};

use super::arm::{Arm, Shield, Tau};
use super::critic::Critic;
use crate::zimage::ZImageTransformer;
use crate::zimage::adapter::{denoiser, fake_denoiser};
use crate::zimage::ema::update_average;
use crate::zimage::flow_matching::step_seed;
use crate::zimage::optimizer::{AdamW, AdamWSettings};
use crate::zimage::prompts::{Prompts, is_caption_side};

/// How students walk their grid, in training and in sampling.
pub const TRANSITION: Transition = Transition::Euler;
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

/// The optimizer of one network, with the settings of `zimage_8step`.
fn optimizer(
    model: &ZImageTransformer,
    learning_rate: f64,
    more: Option<(&str, &Tensor)>,
) -> Result<AdamW> {
    let own = model.named_parameters().into_iter().filter(|(name, _)| !is_caption_side(name));
    let more = more.map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()));
    let trainable =
        own.chain(more).map(|(name, tensor)| (name, tensor.set_requires_grad(true))).collect();
    let settings = AdamWSettings {
        learning_rate,
        betas: (0.0, 0.99),
        weight_decay: 0.01,
        max_gradient_norm: Some(1.0),
        ..AdamWSettings::default()
    };
    AdamW::new(trainable, settings)
}

fn descend(optimizer: &mut AdamW, loss: &Tensor) -> Result<()> {
    optimizer.zero_grad();
    loss.f_backward()?;
    let _norm = optimizer.step()?;
    Ok(())
}

/// A fake score that knows the student's step.
#[derive(Debug)]
pub struct Fake {
    model: ZImageTransformer,
    steps: Tensor,
    optimizer: AdamW,
}

impl Fake {
    fn new(arm: &Arm, teacher: &ZImageTransformer) -> Result<Self> {
        let options = (Kind::Float, teacher.device());
        let steps = Tensor::f_zeros([arm.steps as i64, teacher.config().dim], options)?;
        let model = teacher.duplicate()?;
        let optimizer = optimizer(&model, arm.fake_learning_rate, Some(("steps", &steps)))?;
        Ok(Self { model, steps, optimizer })
    }

    /// As a denoiser, whose condition holds captions and the student's steps.
    pub fn denoiser(&self) -> Denoiser<'_> {
        fake_denoiser(&self.model, &self.steps)
    }
}

/// A rollout of the student and what it was made for.
struct Rollout {
    trajectory: Trajectory,
    cond: Condition,
    null: Condition,
    real: Tensor,
}

impl Rollout {
    fn cond_at(&self, steps: &Tensor) -> Condition {
        Condition::from(vec![self.cond[0].shallow_clone(), steps.shallow_clone()])
    }
}

/// One arm under training.
#[derive(Debug)]
pub struct Trainer<'a> {
    arm: &'a Arm,
    seed: u64,
    material: &'a Material<'a>,
    student: ZImageTransformer,
    student_optimizer: AdamW,
    pub fake: Option<Fake>,
    critic: Option<(Critic, AdamW)>,
    average: ZImageTransformer,
    pub update: u64,
}

impl<'a> Trainer<'a> {
    /// Student, fake score and critic as copies of the teacher.
    ///
    /// # Errors
    /// If the arm has no term, or libtorch cannot allocate the copies.
    pub fn new(arm: &'a Arm, seed: u64, material: &'a Material<'a>) -> Result<Self> {
        ensure!(
            arm.engine.is_some() || !arm.shields.is_empty(),
            "arm {} has neither engine nor shield",
            arm.name
        );
        tch::manual_seed(step_seed(seed, 2_000_000_000));
        let teacher = material.teacher;
        let student = teacher.duplicate()?;
        let critic = || -> Result<_> {
            let critic = Critic::new(teacher)?;
            let readout = Some(("readout", &critic.readout));
            let optimizer = optimizer(&critic.model, arm.fake_learning_rate, readout)?;
            Ok((critic, optimizer))
        };
        Ok(Self {
            student_optimizer: optimizer(&student, arm.student_learning_rate, None)?,
            average: teacher.duplicate()?,
            student,
            fake: arm.has_fake().then(|| Fake::new(arm, teacher)).transpose()?,
            critic: arm.has_critic().then(critic).transpose()?,
            update: 0,
            arm,
            seed,
            material,
        })
    }

    /// The moving average of the student: what is measured.
    pub fn averaged_student(&self) -> &ZImageTransformer {
        &self.average
    }

    /// Trains the fake score alone on the student's first samples.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn warm_up(&mut self) -> Result<()> {
        if self.fake.is_none() {
            return Ok(());
        }
        let updates: Vec<u64> = (0..self.arm.fake_warmup).collect();
        for chunk in updates.chunks(self.arm.fake_updates.max(1) as usize) {
            tch::manual_seed(step_seed(self.seed, 1_000_000_000 + chunk[0]));
            let rollout = self.roll_out()?;
            for _ in chunk {
                self.train_fake(&rollout)?;
            }
        }
        Ok(())
    }

    /// One update of the student and those of the networks that go with it; the diagnostics.
    ///
    /// What the student draws does not depend on which other networks are trained, so arms of one
    /// seed start from the same captions and noise at each update.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn step(&mut self) -> Result<Vec<(String, f64)>> {
        tch::manual_seed(step_seed(self.seed, self.update));
        self.student_optimizer.settings.learning_rate =
            self.arm.student_learning_rate * self.learning_rate_factor();
        let rollout = self.roll_out()?;
        let mut record = self.train_student(&rollout)?;
        if self.fake.is_some() {
            let mut loss = 0.0;
            for _ in 0..self.arm.fake_updates {
                loss += self.train_fake(&rollout)?;
            }
            record.push(("fake_loss".into(), loss / self.arm.fake_updates.max(1) as f64));
        }
        if self.critic.is_some() {
            record.push(("critic_loss".into(), self.train_critic(&rollout)?));
        }
        self.update += 1;
        let average = self.average.named_parameters();
        update_average(&average, &self.student.named_parameters(), self.arm.ema, self.update)?;
        Ok(record)
    }

    /// Linear warm-up, then constant: a decay would end some arms before they show what they do.
    fn learning_rate_factor(&self) -> f64 {
        ((self.update + 1) as f64 / self.arm.warmup.max(1) as f64).min(1.0)
    }

    fn train_student(&mut self, rollout: &Rollout) -> Result<Vec<(String, f64)>> {
        let dm = self
            .fake
            .as_ref()
            .map(|fake| DistributionMatching::new(fake.denoiser(), self.material.shift));
        let gan = self.adversarial();
        let steps = rollout.trajectory.draw_steps()?;
        let Simulation { x, student_time } = {
            let student = denoiser(&self.student);
            self.sampler(&student)?.simulate_on(&rollout.trajectory, &rollout.cond, &steps)?
        };
        let cond = rollout.cond_at(&steps);
        let batch = Batch::new(&x, &cond)?
            .null(&rollout.null)
            .student_time(&student_time)?
            .real(&rollout.real)?;
        let evaluation = self.objective(dm.as_ref(), gan.as_ref())?.evaluate(&batch)?;
        let mut record = Vec::new();
        for (name, value) in &evaluation.terms {
            record.push((format!("{name}_loss"), f64::try_from(value)?));
        }
        if let Some(diagnostics) = &evaluation.diagnostics {
            record.extend(diagnostics.report()?);
        }
        drop((dm, gan));
        descend(&mut self.student_optimizer, &evaluation.loss)?;
        Ok(record)
    }

    /// The sum of the arm's terms, over the teacher.
    ///
    /// # Errors
    /// If a shield lacks its network, or a setting is out of range.
    pub fn objective<'o>(
        &'o self,
        dm: Option<&'o DistributionMatching<'o>>,
        gan: Option<&'o Adversarial<'o>>,
    ) -> Result<Objective<'o>> {
        let shift = self.material.shift;
        let group = |tau: Tau| -> Result<Group<'o>> { Ok(Group::new(tau.renoising(shift)?)) };
        let guidance = Guidance::new(self.arm.guidance)?;
        let engine = CfgAugmentation::new(guidance);
        let mut objective = Objective::new(denoiser(self.material.teacher)).observed();
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
            objective = objective.with(match (*shield, dm, gan) {
                (Shield::DistributionMatching(tau), Some(dm), _) => {
                    let group = coupled.take().map_or_else(|| group(tau), Ok)?;
                    group.regularizer("dm", 1.0, dm)
                }
                (Shield::MeanVariance { weight }, ..) => {
                    other.regularizer("mean_variance", weight, moments(Statistics::PerSample)?)
                }
                (Shield::ChannelMeanVariance { weight }, ..) => {
                    other.regularizer("mean_variance", weight, moments(Statistics::PerChannel)?)
                }
                (Shield::MaximumMeanDiscrepancy { weight }, ..) => {
                    let small = |x: &Tensor| x.f_adaptive_avg_pool2d([SMALL_SIDE, SMALL_SIDE]);
                    let mmd = MaximumMeanDiscrepancy::new(Kernel::gaussian())?.features(small);
                    other.regularizer("mmd", weight, mmd)
                }
                (Shield::Adversarial { weight }, _, Some(gan)) => {
                    other.regularizer("gan", weight, gan)
                }
                (shield, ..) => anyhow::bail!("{shield:?} lacks its network"),
            });
        }
        ensure!(coupled.is_none(), "a coupled arm needs distribution matching");
        Ok(objective)
    }

    fn adversarial(&self) -> Option<Adversarial<'_>> {
        let (critic, _) = self.critic.as_ref()?;
        Some(Adversarial::new(
            RectifiedFlow,
            self.material.shift,
            |x: &Tensor, t: &Tensor, c: &_| critic.logits(x, t, c),
        ))
    }

    fn train_fake(&mut self, rollout: &Rollout) -> Result<f64> {
        let Some(fake) = &mut self.fake else { return Ok(0.0) };
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let loss = DistributionMatching::new(fake.denoiser(), self.material.shift)
            .denoising_loss(&Batch::new(&x, &rollout.cond_at(&steps))?)?;
        descend(&mut fake.optimizer, &loss)?;
        Ok(f64::try_from(&loss)?)
    }

    fn train_critic(&mut self, rollout: &Rollout) -> Result<f64> {
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let Some(gan) = self.adversarial() else { return Ok(0.0) };
        let loss = gan.critic_loss(&Batch::new(&x, &rollout.cond)?.real(&rollout.real)?)?;
        drop(gan);
        let Some((_, optimizer)) = &mut self.critic else { return Ok(0.0) };
        descend(optimizer, &loss)?;
        Ok(f64::try_from(&loss)?)
    }

    /// The student's way from fresh noise over its whole grid, for fresh captions.
    fn roll_out(&self) -> Result<Rollout> {
        let Material { teacher, prompts, items, images, .. } = self.material;
        let batch = self.arm.batch as i64;
        let picks =
            Tensor::f_randint(items.len() as i64, [batch], (Kind::Int64, tch::Device::Cpu))?;
        let picked: Vec<i64> =
            Vec::<i64>::try_from(&picks)?.into_iter().map(|pick| items[pick as usize]).collect();
        let (cond, null) = prompts.conditions(&picked)?;
        let (_, channels, height, width) = images.size4()?;
        let shape = [batch, channels, height, width];
        let noise = Tensor::f_randn(shape, (Kind::Float, teacher.device()))?;
        let student = denoiser(&self.student);
        let trajectory = self.sampler(&student)?.trajectory(&noise, &cond)?;
        Ok(Rollout { trajectory, cond, null, real: self.material.pictures(&picked)? })
    }

    fn sampler<'d>(&self, student: &'d Denoiser<'d>) -> Result<Sampler<'d>> {
        let grid = FewStepGrid::even(self.arm.steps, self.material.shift)?;
        Ok(Sampler::new(student, grid, TRANSITION))
    }
}
