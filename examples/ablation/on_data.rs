//! Losses of the student on the real pictures of the captions, noised.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Adversarial, Batch, Condition, Consistency, Distance, FlowRule, GanLoss, Group, Guidance,
    MeanFlow, Objective, PairedRegression, Perceptual, PostShift, Power, Renoising, Uniform,
};
use tch::{Kind, Tensor};
use zimage::distil::{Captions, Networks, Readings};

use super::arm::{ConsistencyForm, OnData, RegressionDistance};
use super::training::{ArmTerms, Material};

/// Times before the shift at which pictures are noised, off the clean end, where consistency has no direction.
const NOISED: (f64, f64) = (0.0, 0.98);

/// The loss of an update, with a graph to the student, and what it shows.
///
/// # Errors
/// If a setting is out of range, or a network fails.
pub fn loss(
    loss: OnData,
    terms: &ArmTerms<'_>,
    update: u64,
    networks: &Networks<'_>,
    captions: &Captions,
) -> Result<(Tensor, Readings)> {
    let arm = terms.arm();
    let guidance = Guidance::new(arm.guidance)?;
    match loss {
        OnData::Consistency { form, weight } => {
            let consistency = consistency(form, networks)?.guided(guidance);
            // The pull towards the teacher's prediction leads in the first quarter, as in sCM.
            consistency.set_warmup((4.0 * update as f64 / arm.updates as f64).min(1.0))?;
            consistency_loss(consistency, weight, networks, captions)
        }
        OnData::MeanFlow { rule } => mean_flow_loss(rule, guidance, networks, captions),
        OnData::Regression(distance) => regression_loss(distance, terms, networks),
        OnData::AdversarialPairs => adversarial_loss_on_pairs(terms, networks),
    }
}

fn consistency<'n>(form: ConsistencyForm, networks: &Networks<'n>) -> Result<Consistency<'n>> {
    let student = networks.student.clone();
    Ok(match form {
        ConsistencyForm::Discrete { step } => Consistency::discrete(student, step)?,
        ConsistencyForm::Continuous(tangent) => Consistency::continuous(student, tangent)?,
    })
}

fn consistency_loss(
    consistency: Consistency<'_>,
    weight: f64,
    networks: &Networks<'_>,
    captions: &Captions,
) -> Result<(Tensor, Readings)> {
    let real = captions.real.as_ref().context("consistency needs real pictures")?;
    let path = networks.teacher.path();
    let (low, high) = NOISED;
    let time = Renoising::new(Uniform::new(low, high)?).draw(path, real, None)?;
    let input = path.renoise(real, &time, &real.f_randn_like()?)?;
    let x = networks.student.denoise(&input, &time, &captions.cond)?;
    let batch = Batch::new(&x, &captions.cond)?
        .with_null(&captions.null)
        .with_student_input(&input, &time)?;
    // The engine looks at the student's input: the times of its group are not used.
    let group = Group::new(Renoising::new(Uniform::FULL));
    let objective = Objective::new(networks.teacher.clone())
        .with(group.engine("consistency", weight, consistency))
        .observed();
    let evaluation = objective.evaluate(&batch)?;
    let scalars = evaluation.scalars()?.into_iter();
    let mut readings = Readings::default();
    readings.observe(scalars.filter(|(name, _)| name.starts_with("consistency")))?;
    Ok((evaluation.loss, readings))
}

fn mean_flow_loss(
    rule: FlowRule,
    guidance: Guidance,
    networks: &Networks<'_>,
    captions: &Captions,
) -> Result<(Tensor, Readings)> {
    let real = captions.real.as_ref().context("MeanFlow needs real pictures")?;
    let map = networks.flow_map.clone().context("MeanFlow needs a flow map")?;
    let mean_flow = MeanFlow::new(map, networks.teacher.clone())?
        .rule(rule)?
        .guided(guidance)
        .times(Uniform::FULL);
    let batch = Batch::new(real, &captions.cond)?.with_null(&captions.null);
    let evaluation = mean_flow.evaluate(&batch)?;
    let mut readings = Readings::default();
    readings.push("mean_flow_loss", &evaluation.squares.f_mean(Kind::Double)?)?;
    Ok((evaluation.loss, readings))
}

fn regression_loss(
    distance: RegressionDistance,
    terms: &ArmTerms<'_>,
    networks: &Networks<'_>,
) -> Result<(Tensor, Readings)> {
    let (arm, material) = (terms.arm(), terms.material());
    let pair = material.pairs.of(arm)?.draw(arm.batch, material.teacher.device())?;
    let (cond, _) = material.prompts.conditions(&pair.items)?;
    let start = PostShift::all(0.0, arm.batch as i64, (Kind::Float, pair.noise.device()))?;
    let x = networks.student.denoise(&pair.noise, &start, &cond)?;
    let distance = match distance {
        RegressionDistance::Squared => Distance::Squared,
        RegressionDistance::Perceptual => Distance::Perceptual(perceptual(material)?),
    };
    let mut regression = PairedRegression::new(distance);
    if let Some(augmentation) = arm.augmentation {
        regression = regression.augmented(augmentation);
    }
    let loss = regression.between(&x, &pair.samples)?;
    let mut readings = Readings::default();
    readings.push("regression_loss", &loss)?;
    Ok((loss, readings))
}

/// The classifier's layers, all channels alike.
fn perceptual<'a>(material: &Material<'a>) -> Result<Perceptual<'a>> {
    let classifier = material.classifier;
    let options = (Kind::Float, classifier.device());
    let weights = classifier.channels().map(|channels| Tensor::f_ones([channels], options));
    let weights = weights.collect::<Result<Vec<_>, _>>()?;
    Ok(Perceptual::new(move |x: &Tensor| classifier.activations(x), weights)?)
}

/// Predictions of the student between noise and sample of pairs, with its graph, as ADP has them: at the third powers
/// of even numbers, which gather at the noise.
struct BetweenPairs {
    x: Tensor,
    /// The samples of the pairs.
    ends: Tensor,
    cond: Condition,
}

impl BetweenPairs {
    fn draw(terms: &ArmTerms<'_>, networks: &Networks<'_>) -> Result<Self> {
        let (arm, material) = (terms.arm(), terms.material());
        let pair = material.pairs.of(arm)?.draw(arm.batch, material.teacher.device())?;
        let (cond, _) = material.prompts.conditions(&pair.items)?;
        let path = networks.teacher.path();
        let time = Renoising::new(Power::new(3.0)?).draw(path, &pair.samples, None)?;
        let input = path.renoise(&pair.samples, &time, &pair.noise)?;
        let x = networks.student.denoise(&input, &time, &cond)?;
        Ok(Self { x, ends: pair.samples, cond })
    }

    fn batch(&self) -> Result<Batch<'_>> {
        Ok(Batch::new(&self.x, &self.cond)?.with_real(&self.ends)?)
    }
}

fn hinge<'t>(terms: &'t ArmTerms<'_>) -> Result<Adversarial<'t>> {
    Ok(terms.adversarial()?.gan_loss(GanLoss::Hinge))
}

fn adversarial_loss_on_pairs(
    terms: &ArmTerms<'_>,
    networks: &Networks<'_>,
) -> Result<(Tensor, Readings)> {
    let made = BetweenPairs::draw(terms, networks)?;
    let group = Group::new(Renoising::new(Uniform::FULL)).regularizer("adp", 1.0, hinge(terms)?);
    let objective = Objective::new(networks.teacher.clone()).with(group);
    let evaluation = objective.evaluate(&made.batch()?)?;
    let mut readings = Readings::default();
    readings.push("adp", &evaluation.loss)?;
    Ok((evaluation.loss, readings))
}

/// The critic's loss on new pairs.
///
/// # Errors
/// If the arm has no pairs or no critic, or a network fails.
pub fn critic_loss_on_pairs(terms: &ArmTerms<'_>, networks: &Networks<'_>) -> Result<Tensor> {
    let made = {
        let _guard = tch::no_grad_guard();
        BetweenPairs::draw(terms, networks)?
    };
    Ok(hinge(terms)?.critic_loss(&made.batch()?)?)
}
