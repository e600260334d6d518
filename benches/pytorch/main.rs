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

#[path = "../works/mod.rs"]
mod works;

use std::io::{BufRead, Write};

use anyhow::{Context, Result, bail};
use tch::{Device, Kind, Tensor};
use works::{Work, find};

fn main() -> Result<()> {
    tch::set_num_threads(1);
    let mut work: Option<Work> = None;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["setup", ref name @ ..] => {
                let found = work.insert(find(name, Device::Cpu)?)()?;
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

/// The root mean square of a tensor: the absolute value of a scalar.
fn size(tensor: &Tensor) -> Result<f64> {
    let square = tensor.f_to_kind(Kind::Double)?.f_square()?.f_mean(Kind::Double)?;
    Ok(square.f_sqrt()?.f_double_value(&[])?)
}
