//! What the benchmarks repeat, by name.

mod losses;
mod networks;

use anyhow::{Context, Result, bail, ensure};
use losses::Draws;
use tch::{Device, Kind, Tensor};

/// Something to repeat. It answers tensors that tell whether it was done right.
pub type Work = Box<dyn FnMut() -> Result<Vec<Tensor>>>;

/// The work of a name, ready on `device`.
///
/// ```text
/// objective SCHEDULE KIND BATCH given|drawn|observed
/// mean_variance KIND BATCH
/// fake KIND BATCH                                    the fake score's loss
/// mmd POINTS WIDTH
/// gan generator|critic BATCH
/// transformer FOLDER BATCH SIZE CAPTION forward|train
/// s3dit WIDTH LAYERS BATCH SIZE KIND forward|train   a random transformer
/// adapter WIDTH RANK BATCH SIZE
/// loading FOLDER
/// adamw TENSORS
/// training_step BATCH STEPS
/// nothing                                            what a process has before any work
/// ```
///
/// # Errors
/// If the name is none of these, or what it asks for cannot be made.
pub fn find(name: &[&str], device: Device) -> Result<Work> {
    let typed = |name: &str| Ok::<_, anyhow::Error>((kind(name)?, device));
    match *name {
        ["objective", schedule, kind, batch, draws] => {
            let draws = match draws {
                "given" => Draws::Given,
                "drawn" => Draws::Drawn,
                "observed" => Draws::Observed,
                _ => bail!("expected given, drawn or observed, found {draws:?}"),
            };
            losses::objective(schedule, batch.parse()?, draws, typed(kind)?)
        }
        ["mean_variance", kind, batch] => losses::mean_variance(batch.parse()?, typed(kind)?),
        ["fake", kind, batch] => losses::fake(batch.parse()?, typed(kind)?),
        ["mmd", points, width] => losses::mmd(points.parse()?, width.parse()?, device),
        ["gan", part, batch] => losses::gan(part, batch.parse()?, device),
        ["transformer", folder, batch, size, caption, pass] => networks::transformer(
            folder,
            batch.parse()?,
            size.parse()?,
            caption.parse()?,
            pass == "train",
            device,
        ),
        ["s3dit", width, layers, batch, size, kind, pass] => networks::random_transformer(
            width.parse()?,
            layers.parse()?,
            batch.parse()?,
            size.parse()?,
            pass == "train",
            typed(kind)?,
        ),
        ["adapter", width, rank, batch, size] => {
            networks::adapter(width.parse()?, rank.parse()?, batch.parse()?, size.parse()?, device)
        }
        ["loading", folder] => Ok(networks::loading(folder, device)),
        ["adamw", tensors] => networks::adamw(tensors.parse()?, device),
        ["training_step", batch, steps] => {
            networks::training_step(batch.parse()?, steps.parse()?, device)
        }
        ["nothing", ..] => Ok(Box::new(|| Ok(Vec::new()))),
        _ => bail!("unknown work {name:?}"),
    }
}

fn kind(name: &str) -> Result<Kind> {
    match name {
        "float32" => Ok(Kind::Float),
        "bfloat16" => Ok(Kind::BFloat16),
        _ => bail!("expected float32 or bfloat16, found {name:?}"),
    }
}

/// The gradient of a scalar loss in `x`.
fn gradient(loss: &Tensor, x: &Tensor) -> Result<Tensor> {
    let gradients = Tensor::f_run_backward(&[loss], &[x], false, false)?;
    let gradient = gradients.into_iter().next().context("a gradient")?;
    ensure!(gradient.defined(), "the loss does not depend on x");
    Ok(gradient)
}
