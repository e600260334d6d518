//! Starts by launchers that may not be there: these tests run when they are asked for, and say what they miss.

use std::process::Command;
use std::time::Duration;

use tch::Tensor;
use tch_c10d::{ProcessGroup, Reduce};

use crate::harness::{self, CASE, PATIENCE, Rank, free_port};

/// A rank of any launcher: says who it is and what the ranks add up to.
pub fn launched() -> String {
    let group = ProcessGroup::from_env().unwrap();
    let mut sum = Tensor::from(group.rank() as f64);
    group.all_reduce(&mut sum, Reduce::Sum).unwrap();
    let (rank, local) = (group.rank(), group.local_rank().unwrap());
    format!("rank {rank} of {}, {local} here, sum {}", group.world_size(), sum.double_value(&[]))
}

/// A rank whose group loses a member in the first attempt: torchrun starts all anew.
pub fn restarted() -> String {
    let attempt = std::env::var("TORCHELASTIC_RESTART_COUNT").unwrap();
    let group = ProcessGroup::from_env().unwrap();
    group.barrier().unwrap();
    if attempt == "0" && group.rank() == 1 {
        std::process::exit(7);
    }
    let mut sum = Tensor::from(group.rank() as f64);
    match group.all_reduce(&mut sum, Reduce::Sum) {
        Ok(()) => {
            format!("attempt {attempt}, rank {}, sum {}", group.rank(), sum.double_value(&[]))
        }
        Err(error) => {
            eprintln!("attempt {attempt}: {error}");
            std::process::exit(8)
        }
    }
}

/// What all ranks printed, sorted, after a launcher's run that must succeed.
fn results(command: Command, case: &str) -> Vec<String> {
    let label = format!("{command:?}");
    let mut ended = Rank::spawn(command, format!("{case}: {label}")).wait(PATIENCE);
    assert!(ended.status.success(), "{label}: {:?}\n{}", ended.status, ended.output);
    ended.results.sort();
    ended.results
}

fn two_ranks() -> [String; 2] {
    [0, 1].map(|rank| format!("rank {rank} of 2, {rank} here, sum 1"))
}

/// A command to run, or what is missing.
fn find(launcher: &str, check: &[&str], advice: &str) -> Command {
    let found = Command::new(launcher).args(check).output();
    let works = found.as_ref().is_ok_and(|output| output.status.success());
    assert!(works, "{launcher} {check:?} does not run: {advice}\n{found:?}");
    Command::new(launcher)
}

#[test]
#[ignore = "needs OpenMPI's mpirun (Debian: openmpi-bin)"]
fn mpirun() {
    let mut command = find("mpirun", &["--version"], "install OpenMPI (Debian: openmpi-bin)");
    command
        .args([
            "-n",
            "2",
            "--oversubscribe",
            "--allow-run-as-root",
            "-x",
            CASE,
            "-x",
            "MASTER_PORT",
        ])
        .arg(std::env::current_exe().unwrap())
        .args(harness::arguments())
        .env(CASE, "launched")
        .env("MASTER_PORT", free_port().to_string());
    assert_eq!(results(command, "launched"), two_ranks());
}

/// torchrun as a module of the Python that `PYTHON` names, `python3` by default.
fn torchrun(more: &[&str], case: &str) -> Command {
    let python = std::env::var("PYTHON").unwrap_or_else(|_| "python3".into());
    let advice = "PYTHON must name a Python that can import a complete torch (pip install torch)";
    let mut command = find(&python, &["-c", "import torch.distributed.run"], advice);
    command
        .args(["-m", "torch.distributed.run", "--no-python", "--nproc-per-node=2"])
        .args(["--monitor-interval=0.2", "--rdzv-backend=c10d"])
        .arg(format!("--rdzv-endpoint=127.0.0.1:{}", free_port()))
        .args(more)
        .arg(std::env::current_exe().unwrap())
        .args(harness::arguments())
        .env(CASE, case);
    command
}

#[test]
#[ignore = "needs a Python that can import torch (pip install torch; PYTHON names it)"]
fn torchrun_starts() {
    assert_eq!(results(torchrun(&[], "launched"), "launched"), two_ranks());
}

#[test]
#[ignore = "needs a Python that can import torch (pip install torch; PYTHON names it)"]
fn torchrun_restarts() {
    let found = results(torchrun(&["--max-restarts=1"], "restarted"), "restarted");
    assert_eq!(found, [0, 1].map(|rank| format!("attempt 1, rank {rank}, sum 1")));
}

/// SLURM is not here: its variables, as `srun` sets them, on processes that are started by hand.
#[test]
fn variables_of_srun() {
    let port = free_port().to_string();
    let ranks = [0, 1].map(|rank: usize| {
        let mut command = harness::program("launched");
        command
            .env("SLURM_PROCID", rank.to_string())
            .env("SLURM_LOCALID", rank.to_string())
            .env("SLURM_NTASKS", "2")
            .env("SLURM_NODELIST", "localhost")
            .env("MASTER_PORT", &port);
        Rank::spawn(command, format!("srun {rank}"))
    });
    let ended = ranks.map(|rank| rank.wait(Duration::from_secs(120)).result().to_owned());
    assert_eq!(ended, two_ranks());
}
