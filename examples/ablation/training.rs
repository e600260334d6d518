//! The training of one arm: the distillation of `zimage::distil` with any terms.

use anyhow::{Context, Result, ensure};
use decoupled_dmd::{
    Adversarial, AdversarialDistributionMatching, Batch, CfgAugmentation, Condition, Denoiser,
    DistributionMatching, Draw, Group, Guidance, Kernel, MaximumMeanDiscrepancy, MeanVariance,
    NoisePath, Normalizer, Objective, Probe, RectifiedFlow, Renoising, Reward, Schedule,
    ScoreIdentity, Shift, Statistics, Steps, Uniform,
};
use tch::Tensor;
use tch_training::Parameters;
use tch_training::seed::begin;
use zimage::ZImageTransformer;
use zimage::distil::{
    Captions, Decay, Distillation, Networks, Processes, Prompts, Readings, Recipe, Record, Rollout,
    Stream, Terms, denoiser, embedded_optimizer,
};
use zimage::emoji::Classifier;

use super::arm::{Arm, OnData, Regularization, RenoisingTimes};
use super::critic::Critic;
use super::on_data;
use super::on_rollout::{off_trajectory, segment_draw};
use super::pairs::PairSets;
use super::prior::{GaussianPrior, small};

/// The last time before the shift from which adversarial distribution matching takes its step of 1/64 in the time
/// that the network sees, at a shift of 1.6 or more.
const LAST_STEP: f64 = 0.99;

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
    /// What rewards and perceptual distances are taken from.
    pub classifier: &'a Classifier,
    /// Noise and the guided teacher's samples, for arms that regress.
    pub pairs: PairSets,
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
        steps: arm.most_steps(),
        transition: arm.transition,
        shift: material.shift,
        dm_shift: material.shift,
        updates: arm.updates,
        fake_updates: arm.fake_updates,
        fake_warmup: arm.fake_warmup,
        batch: arm.batch,
        accumulate: 1,
        student: embedded_optimizer(arm.student_learning_rate),
        fake: embedded_optimizer(arm.fake_learning_rate),
        warmup: arm.warmup,
        // A decay would end some arms before they show what they do.
        decay: Decay::None,
        ema: arm.ema,
        adapter: None,
        fake_adapter: None,
        checkpointing: false,
        skip_nonfinite: 0,
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
    const LOSSES: [&str; 12] = [
        "ca",
        "dm",
        "mean_variance",
        "mmd",
        "gan",
        "adm",
        "adp",
        "sid",
        "reward",
        "consistency",
        "fake",
        "critic",
    ];
    let of_roles = ["_gradient", "_learning_rate"];
    let kept = record
        .into_iter()
        .filter(|(name, _)| name != "loss" && !of_roles.iter().any(|end| name.ends_with(end)));
    let renamed = |(name, value): (String, f64)| {
        let name = if LOSSES.contains(&name.as_str()) { format!("{name}_loss") } else { name };
        (name, value)
    };
    kept.map(renamed).collect()
}

/// The terms of an arm, over what all arms share.
#[derive(Debug)]
pub struct ArmTerms<'a> {
    arm: &'a Arm,
    material: &'a Material<'a>,
    critic: Option<Critic>,
    prior: Option<GaussianPrior>,
}

impl<'a> ArmTerms<'a> {
    /// The terms, and a critic where a regularizer needs one.
    ///
    /// # Errors
    /// If the arm has no term, or libtorch cannot allocate the critic.
    pub fn new(arm: &'a Arm, seed: u64, material: &'a Material<'a>) -> Result<Self> {
        ensure!(arm.has_objective() || arm.on_data.is_some(), "arm {} has no term", arm.name);
        begin(seed, Stream::Critic);
        let settings = embedded_optimizer(arm.fake_learning_rate);
        let critic = || Critic::new(material.teacher, settings);
        let critic = arm.has_critic().then(critic).transpose()?;
        let is_prior =
            |term: &Regularization| matches!(term, Regularization::DiscrepancyToPrior { .. });
        let prior = || GaussianPrior::of(&material.pictures(&material.items)?);
        let prior = arm.regularizers.iter().any(is_prior).then(prior).transpose()?;
        Ok(Self { arm, material, critic, prior })
    }

    /// The arm.
    pub fn arm(&self) -> &Arm {
        self.arm
    }

    /// What all arms share.
    pub fn material(&self) -> &Material<'a> {
        self.material
    }

    /// Whether the stage on data alone has been before an update.
    fn is_past_data(&self, update: u64) -> bool {
        self.arm.first_stage.is_some_and(|updates| update >= updates)
    }

    /// The critic's loss on what the student has made in an update, where it has something to compare.
    fn critic_loss(
        &self,
        update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Option<Tensor>> {
        let Some(rollout) = rollout else {
            let is_adp = self.arm.on_data == Some(OnData::AdversarialPairs);
            let is_adp = is_adp && !self.is_past_data(update);
            return is_adp.then(|| on_data::critic_loss_on_pairs(self, networks)).transpose();
        };
        let steps = rollout.trajectory.draw_steps()?;
        let x = rollout.trajectory.samples_at(&steps)?;
        let cond = rollout.cond_at(&steps)?;
        let batch = Batch::new(&x, &cond)?.with_null(&captions.null);
        Ok(Some(match networks.dm.filter(|_| self.arm.matches_adversarially()) {
            Some(dm) => self.adversarial_matching(dm)?.critic_loss(&batch)?,
            None => {
                let real = captions.real.as_ref().context("the critic lacks real pictures")?;
                self.adversarial()?.critic_loss(&batch.with_real(real)?)?
            }
        }))
    }

    /// Adversarial distribution matching over `dm`.
    fn adversarial_matching<'o>(
        &'o self,
        dm: &'o DistributionMatching<'o>,
    ) -> Result<AdversarialDistributionMatching<'o>> {
        let teacher = denoiser(self.material.teacher, self.material.shift);
        let adm = AdversarialDistributionMatching::new(dm, teacher, self.logits()?);
        Ok(adm.guided(Guidance::new(self.arm.guidance)?))
    }

    /// The log-likelihood that the classifier gives to the pictures asked for.
    fn log_likelihood(&self, x: &Tensor, cond: &Condition) -> Result<Tensor> {
        ensure!(cond.len() == 3, "expected captions, the student's steps and indices");
        let likelihoods = self.material.classifier.logits(x)?.f_log_softmax(1, None)?;
        Ok(likelihoods.f_gather(1, &cond[2].f_unsqueeze(1)?, false)?.f_squeeze_dim(1)?)
    }

    /// A critic's game at all times.
    ///
    /// # Errors
    /// If the arm has no critic.
    pub fn adversarial(&self) -> Result<Adversarial<'_>> {
        let path = RectifiedFlow.shifted(self.material.shift);
        Ok(Adversarial::new(path, self.logits()?))
    }

    /// What the critic says.
    fn logits(&self) -> Result<impl Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor> + '_> {
        let critic = self.critic.as_ref().context("an adversarial term lacks its critic")?;
        Ok(|x: &Tensor, t: &Tensor, c: &Condition| critic.logits(self.material.teacher, x, t, c))
    }
}

impl Terms for ArmTerms<'_> {
    fn objective<'o>(
        &'o self,
        teacher: Denoiser<'o>,
        dm: Option<&'o DistributionMatching<'o>>,
    ) -> Result<Objective<'o>> {
        let group = |renoising: RenoisingTimes| Group::new(renoising.renoising());
        let guidance = Guidance::new(self.arm.guidance)?;
        let engine = CfgAugmentation::new(guidance);
        let mut objective = Objective::new(teacher);
        // The group of the engine waits for distribution matching where the two are coupled.
        let mut coupled = None;
        if let Some(renoising) = self.arm.engine {
            let with_engine = group(renoising).engine("ca", 1.0, engine);
            if self.arm.coupled {
                coupled = Some(with_engine.normalizer(Normalizer::guided(guidance)));
            } else {
                objective = objective.with(with_engine);
            }
        }
        for term in &self.arm.regularizers {
            let other = group(RenoisingTimes::FULL);
            let real = &self.material.images;
            let moments = |statistics| MeanVariance::measured(real, statistics);
            objective = objective.with(match (*term, dm) {
                (Regularization::DistributionMatching(renoising), Some(dm)) => {
                    coupled.take().unwrap_or_else(|| group(renoising)).regularizer("dm", 1.0, dm)
                }
                (Regularization::MeanVariance { weight }, _) => {
                    other.regularizer("mean_variance", weight, moments(Statistics::PerSample)?)
                }
                (Regularization::ChannelMeanVariance { weight }, _) => {
                    other.regularizer("mean_variance", weight, moments(Statistics::PerChannel)?)
                }
                (Regularization::MaximumMeanDiscrepancy { weight }, _) => {
                    let mmd = MaximumMeanDiscrepancy::new(Kernel::gaussian())?.features(small);
                    other.regularizer("mmd", weight, mmd)
                }
                (Regularization::DiscrepancyToPrior { weight }, _) => {
                    let prior = self.prior.as_ref().context("a prior is made for it")?;
                    let mmd = MaximumMeanDiscrepancy::new(Kernel::gaussian())?.features(small);
                    let mmd = mmd.prior(|like: &Tensor| prior.sample(like));
                    other.regularizer("mmd", weight, mmd)
                }
                (Regularization::Adversarial { weight }, _) => {
                    other.regularizer("gan", weight, self.adversarial()?)
                }
                (Regularization::AdversarialDistributionMatching { weight }, Some(dm)) => {
                    // Up to its last step, from which there is none to take.
                    Group::new(Renoising::new(Uniform::new(0.0, LAST_STEP)?)).regularizer(
                        "adm",
                        weight,
                        self.adversarial_matching(dm)?,
                    )
                }
                (Regularization::Divergence(divergence), Some(dm)) => {
                    let gan = self.adversarial()?;
                    let dm = DistributionMatching::new(dm.fake().clone());
                    let dm =
                        dm.divergence(divergence, move |probe: &Probe<'_>| gan.log_ratio(probe));
                    other.regularizer("dm", 1.0, dm)
                }
                (Regularization::ScoreIdentity { alpha }, Some(dm)) => {
                    let sid = ScoreIdentity::new(dm, alpha)?.guided(guidance);
                    other.regularizer("sid", 1.0, sid)
                }
                (Regularization::Reward { weight }, _) => {
                    let score = |x: &Tensor, cond: &Condition| self.log_likelihood(x, cond);
                    other.regularizer("reward", weight, Reward::new(score))
                }
                (term, None) => anyhow::bail!("{term:?} lacks its network"),
            });
        }
        ensure!(coupled.is_none(), "a coupled arm needs distribution matching");
        Ok(objective)
    }

    fn draw(&self, rollout: &Rollout<'_>, steps: &Steps) -> Result<Option<Draw>> {
        let draw = || segment_draw(self.material.shift, &rollout.trajectory, steps);
        self.arm.in_segments.then(draw).transpose()
    }

    fn rollout_steps(&self, update: u64, _most: usize) -> Option<usize> {
        let since = update.checked_sub(self.arm.first_stage.unwrap_or(0))?;
        let steps = &self.arm.steps;
        self.arm.has_objective().then(|| steps[since as usize % steps.len()])
    }

    fn is_flow_map(&self) -> bool {
        matches!(self.arm.on_data, Some(OnData::MeanFlow { .. }))
    }

    fn more_losses(
        &self,
        update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Vec<(Tensor, Readings)>> {
        let is_over = self.is_past_data(update);
        let on_data = self
            .arm
            .on_data
            .filter(|_| !is_over)
            .map(|loss| on_data::loss(loss, self, update, networks, captions));
        let off_rollout = rollout
            .filter(|_| self.arm.off_trajectory)
            .map(|rollout| off_trajectory(self.arm, networks, rollout));
        on_data.into_iter().chain(off_rollout).collect()
    }

    fn has_fake_score(&self) -> bool {
        self.arm.has_fake()
    }

    fn real(&self, items: &[i64]) -> Result<Option<Tensor>> {
        Ok(Some(self.material.pictures(items)?))
    }

    fn is_trained(&self, name: &str) -> bool {
        let parts = &self.arm.trained;
        parts.is_empty() || parts.iter().any(|part| name.contains(part))
    }

    fn train(
        &mut self,
        update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Readings> {
        if self.critic.is_none() {
            return Ok(Readings::default());
        }
        let loss = self.critic_loss(update, networks, captions, rollout)?;
        let (Some(critic), Some(loss)) = (&mut self.critic, loss) else {
            return Ok(Readings::default());
        };
        let norm = critic.trainer.descend(&loss, None, Processes::default())?;
        let mut readings = Readings::default();
        readings.push_norm("critic", &norm)?;
        readings.push("critic", &loss)?;
        Ok(readings)
    }

    fn state(&self) -> Parameters {
        self.critic.iter().flat_map(|critic| critic.trainer.state()).collect()
    }
}
