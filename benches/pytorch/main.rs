//! This crate's half of the comparison with PyTorch; `compare.py` builds and drives it.
//!
//! Reads commands from standard input and answers each with a line:
//!
//! ```text
//! setup WORK..   makes the work ready, runs it once, and answers with numbers that PyTorch must find too
//! run N          does the work N times
//! ```
//! CPU time and memory are measured from outside.

#[path = "../../examples/zimage/mod.rs"]
mod zimage;

mod losses;
mod networks;

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail, ensure};
use tch::{Kind, Tensor};

/// Something to repeat. It answers tensors that tell whether it was done right.
pub type Work = Box<dyn FnMut() -> Result<Vec<Tensor>>>;

fn main() -> Result<()> {
    tch::set_num_threads(1);
    let mut work: Option<Work> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["setup", ref name @ ..] => {
                let found = work.insert(find(name)?)()?;
                let sizes = found.iter().map(size).collect::<Result<Vec<_>>>()?;
                serde_json::to_string(&sizes)?
            }
            ["run", count] => {
                let work = work.as_mut().context("`setup` comes before `run`")?;
                for _ in 0..count.parse().with_context(|| format!("count {count:?}"))? {
                    let _ = work()?;
                }
                "null".into()
            }
            _ => bail!("expected `setup WORK..` or `run N`, found {line:?}"),
        };
        println!("{answer}");
        std::io::stdout().flush()?;
    }
    Ok(())
}

fn find(name: &[&str]) -> Result<Work> {
    match *name {
        ["objective", schedule, kind, batch, draws] => {
            losses::objective(schedule, self::kind(kind)?, batch.parse()?, draws == "drawn")
        }
        ["mean_variance", kind, batch] => losses::mean_variance(self::kind(kind)?, batch.parse()?),
        ["mmd", points, width] => losses::mmd(points.parse()?, width.parse()?),
        ["gan", part, batch] => losses::gan(part, batch.parse()?),
        ["fake", kind, batch] => losses::fake(self::kind(kind)?, batch.parse()?),
        ["transformer", folder, batch, size, caption, pass] => networks::transformer(
            folder,
            batch.parse()?,
            size.parse()?,
            caption.parse()?,
            pass == "train",
        ),
        ["adamw", tensors] => networks::adamw(tensors.parse()?),
        ["training_step", batch, steps] => networks::training_step(batch.parse()?, steps.parse()?),
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

/// The root mean square of a tensor: the absolute value of a scalar.
fn size(tensor: &Tensor) -> Result<f64> {
    let square = tensor.f_to_kind(Kind::Double)?.f_square()?.f_mean(Kind::Double)?;
    Ok(square.f_sqrt()?.f_double_value(&[])?)
}

/// The gradient of a scalar loss in `x`.
pub fn gradient(loss: &Tensor, x: &Tensor) -> Result<Tensor> {
    let gradients = Tensor::f_run_backward(&[loss], &[x], false, false)?;
    let gradient = gradients.into_iter().next().context("a gradient")?;
    ensure!(gradient.defined(), "the loss does not depend on x");
    Ok(gradient)
}
