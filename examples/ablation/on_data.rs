//! Losses of the student on the real pictures of the captions, noised.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Batch, Consistency, Distance, FlowRule, Group, Guidance, MeanFlow, Objective, PairedRegression,
    Perceptual, PostShift, Renoising, Uniform,
};
use tch::{Kind, Tensor};
use zimage::distil::{Captions, Networks, Readings};

use super::arm::{Arm, ConsistencyForm, OnData, RegressionDistance};
use super::training::Material;

/// Times before the shift at which pictures are noised, off the clean end, where consistency has no direction.
const NOISED: (f64, f64) = (0.0, 0.98);

/// The loss of an update, with a graph to the student, and what it shows.
///
/// # Errors
/// If a setting is out of range, or a network fails.
pub fn loss(
    loss: OnData,
    arm: &Arm,
    update: u64,
    material: &Material<'_>,
    networks: &Networks<'_>,
    captions: &Captions,
) -> Result<(Tensor, Readings)> {
    let guidance = Guidance::new(arm.guidance)?;
    match loss {
        OnData::Consistency { form, weight } => {
            let consistency = consistency(form, networks)?.guided(guidance);
            // The pull towards the teacher's prediction leads in the first quarter, as in sCM.
            consistency.set_warmup((4.0 * update as f64 / arm.updates as f64).min(1.0))?;
            consistency_loss(consistency, weight, networks, captions)
        }
        OnData::MeanFlow { rule } => mean_flow_loss(rule, guidance, networks, captions),
        OnData::Regression(distance) => regression_loss(distance, arm.batch, material, networks),
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
    batch: usize,
    material: &Material<'_>,
    networks: &Networks<'_>,
) -> Result<(Tensor, Readings)> {
    let pairs = material.pairs.as_ref().context("regression needs pairs")?;
    let pair = pairs.draw(batch, material.teacher.device())?;
    let (cond, _) = material.prompts.conditions(&pair.items)?;
    let start = PostShift::all(0.0, batch as i64, (Kind::Float, pair.noise.device()))?;
    let x = networks.student.denoise(&pair.noise, &start, &cond)?;
    let distance = match distance {
        RegressionDistance::Squared => Distance::Squared,
        RegressionDistance::Perceptual => Distance::Perceptual(perceptual(material)?),
    };
    let loss = PairedRegression::new(distance).between(&x, &pair.samples)?;
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
