//! The program as two processes that a launcher starts together.

use std::net::TcpListener;
use std::process::Stdio;

use anyhow::{Result, ensure};
use tch_c10d::Launch;

use super::commands;
use super::common::small_pipeline::Workplace;
use super::released::{student, training};
use super::{parsed, run};

#[test]
fn two_processes_train_one_student() -> Result<()> {
    let place = Workplace::new()?;
    // Outside the range from which the system serves connections.
    let free = |port: &u16| TcpListener::bind(("0.0.0.0", *port)).is_ok();
    let first = 18_000 + std::process::id() as u16 % 1_000;
    let port = (first..first + 1_000).find(free).expect("a free port").to_string();
    let rank = |rank: &str| -> Result<_> {
        let mut command = training(&place, &["--evaluate-every", "2"])?;
        command
            .envs([("RANK", rank), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1")])
            .env("MASTER_PORT", &port)
            .stdout(Stdio::piped());
        Ok(command.spawn()?)
    };
    let ranks = [rank("0")?, rank("1")?];
    let mut said = Vec::new();
    for child in ranks {
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        said.push(String::from_utf8(output.stdout)?);
    }
    assert!(said[0].contains("2 processes: "), "{}", said[0]);
    assert!(!said[1].contains("student"), "the second one talks too: {}", said[1]);
    for name in ["samples.png", "metrics.jsonl", "report.json", "preview-000004.png"] {
        assert!(place.out().join(name).exists(), "{name}");
    }
    let together = student(&place)?;
    let alone = Workplace::new()?;
    ensure!(training(&alone, &[])?.status()?.success());
    // Of half the batch each, and other draws.
    assert!(together.keys().eq(student(&alone)?.keys()) && together != student(&alone)?);
    Ok(())
}

#[test]
fn what_processes_cannot_do_is_refused() -> Result<()> {
    let place = Workplace::new()?;
    let launch = Launch::new(1, 2, "127.0.0.1", 1)?;
    for arguments in [&["--sample", "A cat"][..], &["--plan"]] {
        let error = commands::run(&parsed(&place, arguments)?, &launch).unwrap_err().to_string();
        assert!(error.contains("2 processes were started"), "{error}");
    }
    // Of another autoencoder, which the plan does not need.
    std::fs::remove_dir_all(place.model().join("vae"))?;
    let file = place.model().join("transformer/config.json");
    let config = std::fs::read_to_string(&file)?;
    std::fs::write(&file, config.replace("\"in_channels\": 4", "\"in_channels\": 16"))?;
    let plan = |processes: &str| {
        run(&parsed(&place, &["--plan", "--size", "64", "--batch", "4", "--processes", processes])?)
    };
    plan("2")?;
    for processes in ["0", "3"] {
        let error = plan(processes).unwrap_err().to_string();
        assert!(error.contains("--batch 4 cannot be parted among"), "{error}");
    }
    Ok(())
}
