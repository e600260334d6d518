//! Losses of the student on the real pictures of the captions, noised.

use anyhow::{Context, Result};
use decoupled_dmd::{
    Batch, Consistency, FlowRule, Group, Guidance, MeanFlow, Objective, Renoising,
    Uniform,
};
use tch::Tensor;
use zimage::distil::{Captions, Networks, Record};

use super::arm::{Arm, ConsistencyForm, OnData};

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
    networks: &Networks<'_>,
    captions: &Captions,
) -> Result<(Tensor, Record)> {
    let guidance = Guidance::new(arm.guidance)?;
    match loss {
        OnData::Consistency { form, weight } => {
            let consistency = consistency(form, networks)?.guided(guidance);
            // The pull towards the teacher's prediction leads in the first quarter, as in sCM.
            consistency.set_warmup((4.0 * update as f64 / arm.updates as f64).min(1.0))?;
            consistency_loss(consistency, weight, networks, captions)
        }
        OnData::MeanFlow { rule } => mean_flow_loss(rule, guidance, networks, captions),
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
) -> Result<(Tensor, Record)> {
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
    let record = evaluation.report()?.into_iter();
    let record = record.filter(|(name, _)| name.starts_with("consistency")).collect();
    Ok((evaluation.loss, record))
}

fn mean_flow_loss(
    rule: FlowRule,
    guidance: Guidance,
    networks: &Networks<'_>,
    captions: &Captions,
) -> Result<(Tensor, Record)> {
    let real = captions.real.as_ref().context("MeanFlow needs real pictures")?;
    let map = networks.flow_map.clone().context("MeanFlow needs a flow map")?;
    let mean_flow = MeanFlow::new(map, networks.teacher.clone())?
        .rule(rule)?
        .guided(guidance)
        .times(Uniform::FULL);
    let batch = Batch::new(real, &captions.cond)?.with_null(&captions.null);
    let evaluation = mean_flow.evaluate(&batch)?;
    let raw = f64::try_from(evaluation.squares.f_mean(tch::Kind::Double)?)?;
    Ok((evaluation.loss, vec![("mean_flow_loss".to_owned(), raw)]))
}
