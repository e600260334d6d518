//! The training of one arm: the loop of `zimage::distil` for any engine and any shields.

use anyhow::{Result, ensure};
use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Denoiser, DistributionMatching, FewStepGrid, Group,
    Guidance, Kernel, MaximumMeanDiscrepancy, MeanVariance, NoisePath, Normalizer, Objective,
    RectifiedFlow, Sampler, Shift, Statistics, Transition,
};
use tch::{Kind, Tensor};
use tch_training::ema::update_average;
use tch_training::seed::begin;
use zimage::ZImageTransformer;
use zimage::distil::{
    Buckets, FakeScore, Network, Prompts, RoleTrainer, RoleWeights, Rollout, Stream, denoiser,
    embedded_optimizer,
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

/// One arm under training.
#[derive(Debug)]
pub struct Trainer<'a> {
    arm: &'a Arm,
    seed: u64,
    material: &'a Material<'a>,
    /// Captions to draw from.
    buckets: Buckets,
    student: RoleTrainer,
    pub fake: Option<FakeScore>,
    critic: Option<Critic>,
    average: RoleWeights,
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
        begin(seed, Stream::Critic);
        let teacher = material.teacher;
        let student =
            RoleTrainer::new(teacher, None, embedded_optimizer(arm.student_learning_rate), None)?;
        let other = embedded_optimizer(arm.fake_learning_rate);
        let fake = || FakeScore::new(teacher, None, other, arm.steps);
        Ok(Self {
            buckets: material.prompts.buckets(&material.items)?,
            average: student.weights.duplicate()?,
            student,
            fake: arm.has_fake().then(fake).transpose()?,
            critic: arm.has_critic().then(|| Critic::new(teacher, other)).transpose()?,
            update: 0,
            arm,
            seed,
            material,
        })
    }

    /// The moving average of the student: what is measured.
    pub fn averaged_student(&self) -> Network<'_> {
        self.average.network(self.material.teacher)
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
            begin(self.seed, Stream::WarmUp(chunk[0]));
            let (rollout, _) = self.roll_out()?;
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
        begin(self.seed, Stream::Update(self.update));
        self.student.optimizer.settings.learning_rate =
            self.arm.student_learning_rate * self.learning_rate_factor();
        let (rollout, real) = self.roll_out()?;
        let mut record = self.train_student(&rollout, &real)?;
        if self.fake.is_some() {
            let mut loss = 0.0;
            for _ in 0..self.arm.fake_updates {
                loss += self.train_fake(&rollout)?;
            }
            record.push(("fake_loss".into(), loss / self.arm.fake_updates.max(1) as f64));
        }
        if self.critic.is_some() {
            record.push(("critic_loss".into(), self.train_critic(&rollout, &real)?));
        }
        self.update += 1;
        let current = self.student.weights.parameters();
        update_average(&self.average.parameters(), &current, self.arm.ema, self.update)?;
        Ok(record)
    }

    /// Linear warm-up, then constant: a decay would end some arms before they show what they do.
    fn learning_rate_factor(&self) -> f64 {
        ((self.update + 1) as f64 / self.arm.warmup.max(1) as f64).min(1.0)
    }

    fn train_student(&mut self, rollout: &Rollout, real: &Tensor) -> Result<Vec<(String, f64)>> {
        let Material { teacher, shift, .. } = *self.material;
        let dm =
            self.fake.as_ref().map(|fake| DistributionMatching::new(fake.denoiser(teacher, shift)));
        let gan = self.adversarial();
        let steps = rollout.trajectory.draw_steps()?;
        let made = {
            let student = denoiser(self.student.weights.network(teacher), shift);
            self.sampler(&student)?.simulate_on(&rollout.trajectory, &rollout.cond, &steps)?
        };
        let cond = rollout.cond_at(&steps);
        let batch = Batch::of(&made, &cond)?.with_null(&rollout.null).with_real(real)?;
        let evaluation = self.objective(dm.as_ref(), gan.as_ref())?.evaluate(&batch)?;
        let mut record = Vec::new();
        for (name, value) in &evaluation.terms {
            record.push((format!("{name}_loss"), f64::try_from(value)?));
        }
        if let Some(diagnostics) = &evaluation.diagnostics {
            record.extend(diagnostics.report()?);
        }
        drop((dm, gan));
        let _norm = self.student.descend(&evaluation.loss, None)?;
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
        let group = |tau: Tau| -> Result<Group<'o>> { Ok(Group::new(tau.renoising()?)) };
        let guidance = Guidance::new(self.arm.guidance)?;
        let engine = CfgAugmentation::new(guidance);
        let mut objective =
            Objective::new(denoiser(self.material.teacher, self.material.shift)).observed();
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
        let (critic, teacher) = (self.critic.as_ref()?, self.material.teacher);
        Some(Adversarial::new(
            RectifiedFlow.shifted(self.material.shift),
            |x: &Tensor, t: &Tensor, c: &_| critic.logits(teacher, x, t, c),
        ))
    }

    fn train_fake(&mut self, rollout: &Rollout) -> Result<f64> {
        let Some(fake) = &mut self.fake else { return Ok(0.0) };
        let Material { teacher, shift, .. } = *self.material;
        let (loss, _norm) = fake.train(teacher, rollout, shift, None)?;
        Ok(f64::try_from(&loss)?)
    }

    fn train_critic(&mut self, rollout: &Rollout, real: &Tensor) -> Result<f64> {
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let Some(gan) = self.adversarial() else { return Ok(0.0) };
        let loss = gan.critic_loss(&Batch::new(&x, &rollout.cond)?.with_real(real)?)?;
        drop(gan);
        let Some(critic) = &mut self.critic else { return Ok(0.0) };
        let _norm = critic.learner.descend(&loss, None)?;
        Ok(f64::try_from(&loss)?)
    }

    /// The student's way from fresh noise over its whole grid, for fresh captions, and the pictures
    /// of these.
    fn roll_out(&self) -> Result<(Rollout, Tensor)> {
        let Material { teacher, shift, prompts, images, .. } = self.material;
        let items = self.buckets.draw(self.arm.batch)?;
        let (cond, null) = prompts.conditions(&items)?;
        let (_, channels, height, width) = images.size4()?;
        let shape = [self.arm.batch as i64, channels, height, width];
        let noise = Tensor::f_randn(shape, (Kind::Float, teacher.device()))?;
        let student = denoiser(self.student.weights.network(teacher), *shift);
        let trajectory = self.sampler(&student)?.trajectory(&noise, &cond)?;
        Ok((Rollout { trajectory, cond, null }, self.material.pictures(&items)?))
    }

    fn sampler<'d>(&self, student: &'d Denoiser<'d>) -> Result<Sampler<'d>> {
        let grid = FewStepGrid::even(self.arm.steps)?;
        Ok(Sampler::new(student, grid, TRANSITION))
    }
}
