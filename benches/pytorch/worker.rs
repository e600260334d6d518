//! This crate's half of the comparison with PyTorch: `compare.py` and `scripts/profile` build and drive it.
//!
//! Reads commands from standard input and answers each with a line:
//!
//! ```text
//! setup WORK..   makes the work ready, runs it once, and answers with numbers that PyTorch must find too
//! run N          does the work N times
//! ```
//! CPU time and memory are measured from outside.

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
                let told = found.iter().map(tell).collect::<Result<Vec<_>>>()?;
                serde_json::to_string(&told)?
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

/// The root mean square of a tensor and five elements, evenly spaced; `eager.py` tells the same.
fn tell(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = tensor.f_to_kind(Kind::Double)?.f_reshape([-1])?;
    let size = flat.f_square()?.f_mean(Kind::Double)?.f_sqrt()?.f_double_value(&[])?;
    let count = i64::try_from(flat.numel())?;
    let elements = (0..5).map(|k| Ok(flat.f_double_value(&[(2 * k + 1) * count / 10])?));
    std::iter::once(Ok(size)).chain(elements).collect()
}
