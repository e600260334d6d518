//! Resuming: kills or interrupts a training, resumes it, and expects the numbers of an undisturbed run.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::Shift;
use serde_json::Value;
use tch_training::run::{INTERRUPTED, StateFolder};
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::{TempDir, tempdir};
use zimage::distil::{Distillation, Intervals, Outcome, Preset, train_student};

use super::common::{seeded, tiny};

/// Tells [`process`] where to write.
const OUT: &str = "ZIMAGE_RESUME_OUT";
/// Makes the evaluations of [`process`] last for minutes.
const SLOW: &str = "ZIMAGE_RESUME_SLOW";
const UPDATES: u64 = 40;
/// Longer than anything here takes, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// Not a test: the process that the tests below start, which trains the tiny model.
#[test]
#[ignore = "started by the other tests, with a folder in the environment"]
fn process() -> Result<()> {
    let out = PathBuf::from(std::env::var_os(OUT).context("no folder")?);
    let slow = std::env::var_os(SLOW).is_some();
    let _guard = seeded(0);
    tch::set_num_threads(1);
    let every = if slow { 1 } else { 0 };
    let intervals = Intervals { save: 1, observe: 2 - every, evaluate: every };
    let mut recipe = Preset::Embedded.recipe(Shift::new(3.0)?)?;
    (recipe.updates, recipe.batch, recipe.steps) = (UPDATES, 2, 2);
    (recipe.fake_warmup, recipe.fake_updates) = (4, 2);
    let teacher = tiny::teacher()?;
    let prompts = tiny::prompts(&teacher)?;
    let mut states = StateFolder::open(&out.join("state"), &recipe)?;
    let mut distillation = Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], [3, 16, 16])?;
    let outcome = train_student(&out, intervals, &mut distillation, &mut states, |_| {
        sleep(PATIENCE);
        bail!("was to be interrupted")
    })?;
    match outcome {
        Outcome::Interrupted => std::process::exit(i32::from(INTERRUPTED)),
        Outcome::Finished { .. } => {
            Ok(write_tensors(&out.join("result.safetensors"), &distillation.state())?)
        }
    }
}

/// A folder and the processes that train in it.
struct Run(TempDir);

impl Run {
    fn command(&self) -> Result<Command> {
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(["--exact", "resume::process", "--ignored", "--nocapture"])
            .env(OUT, self.0.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        Ok(command)
    }

    fn start(&self) -> Result<Child> {
        Ok(self.command()?.stderr(Stdio::null()).spawn()?)
    }

    fn finish(&self) -> Result<()> {
        let output = self.command()?.output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    /// The number of the newest state, 0 for none.
    fn newest(&self) -> u64 {
        let Ok(entries) = fs::read_dir(self.0.path().join("state")) else { return 0 };
        entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .max()
            .unwrap_or(0)
    }

    fn has(&self, name: &str) -> bool {
        self.0.path().join("state").join(name).exists()
    }

    /// The lines of metrics.jsonl but for the clock.
    fn metrics(&self) -> Result<Vec<Value>> {
        fs::read_to_string(self.0.path().join("metrics.jsonl"))?
            .lines()
            .map(|line| {
                let mut line: Value = serde_json::from_str(line)?;
                ensure!(line["seconds"].take().is_number(), "no seconds in {line}");
                Ok(line)
            })
            .collect()
    }

    /// Asserts that result and metrics equal those of `other`, bit for bit.
    fn assert_equals(&self, other: &Self) -> Result<()> {
        let result = |run: &Self| read_tensors(&run.0.path().join("result.safetensors"));
        let (found, expected) = (result(self)?, result(other)?);
        assert!(expected.len() > 100);
        assert!(found.keys().eq(expected.keys()));
        for (name, expected) in &expected {
            assert_eq!(&found[name], expected, "{name}");
        }
        assert_eq!(self.metrics()?, other.metrics()?);
        assert_eq!(self.metrics()?.len() as u64, UPDATES / 2);
        Ok(())
    }
}

fn uninterrupted() -> Result<Run> {
    let run = Run(tempdir()?);
    run.finish()?;
    Ok(run)
}

/// Waits until something has happened or the process has ended.
pub fn wait_until(happened: impl Fn() -> bool, child: &mut Child) -> Result<()> {
    let start = Instant::now();
    while !happened() && child.try_wait()?.is_none() {
        if start.elapsed() > PATIENCE {
            child.kill()?;
            child.wait()?;
            bail!("nothing has happened in {PATIENCE:?}");
        }
        sleep(Duration::from_micros(100));
    }
    Ok(())
}

pub fn wait(child: &mut Child) -> Result<ExitStatus> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if start.elapsed() > PATIENCE / 2 {
            child.kill()?;
            child.wait()?;
            bail!("the process did not end");
        }
        sleep(Duration::from_millis(1));
    }
}

#[cfg(unix)]
fn signal(child: &Child, name: &str) -> Result<()> {
    let status =
        Command::new("kill").args([&format!("-{name}"), &child.id().to_string()]).status()?;
    ensure!(status.success(), "kill -{name}: {status}");
    Ok(())
}

#[test]
fn killed_at_any_moment_a_run_goes_on_to_the_same_result() -> Result<()> {
    let expected = uninterrupted()?;
    let run = Run(tempdir()?);
    let mut kills = 0;
    for attempt in 0u64..12 {
        let newest = run.newest();
        let mut child = run.start()?;
        if attempt > 0 {
            wait_until(|| run.newest() > newest, &mut child)?;
            match attempt % 3 {
                // While the next state is written.
                0 => {
                    let partial = format!("{:06}.partial", run.newest() + 1);
                    wait_until(|| run.has(&partial), &mut child)?;
                    sleep(Duration::from_micros(300 * (attempt / 3)));
                }
                // While the old state is removed.
                1 => {}
                // In one of the next updates.
                _ => sleep(Duration::from_millis(attempt)),
            }
        }
        child.kill()?;
        kills += u32::from(!child.wait()?.success());
    }
    assert!(kills >= 5, "only {kills} processes were killed");
    assert!(!run.0.path().join("result.safetensors").exists(), "nothing was left to go on with");
    run.finish()?;
    run.assert_equals(&expected)
}

#[cfg(unix)]
#[test]
fn an_interrupted_run_saves_and_goes_on_to_the_same_result() -> Result<()> {
    let expected = uninterrupted()?;
    let run = Run(tempdir()?);
    for name in ["INT", "TERM"] {
        let mut child = run.start()?;
        let newest = run.newest();
        wait_until(|| run.newest() > newest, &mut child)?;
        signal(&child, name)?;
        assert_eq!(wait(&mut child)?.code(), Some(i32::from(INTERRUPTED)), "SIG{name}");
        assert!(!run.0.path().join("result.safetensors").exists());
    }
    run.finish()?;
    run.assert_equals(&expected)
}

#[cfg(unix)]
#[test]
fn a_second_signal_leaves_at_once() -> Result<()> {
    let run = Run(tempdir()?);
    let mut child = run.command()?.env(SLOW, "1").spawn()?;
    // Written right before the evaluation.
    let metrics = run.0.path().join("metrics.jsonl");
    wait_until(|| fs::metadata(&metrics).is_ok_and(|file| file.len() > 0), &mut child)?;
    signal(&child, "INT")?;
    let messages = BufReader::new(child.stderr.take().context("stderr")?);
    let told = messages.lines().map_while(Result::ok).any(|line| line.contains("Ctrl-C again"));
    assert!(told, "the first signal says nothing");
    assert!(child.try_wait()?.is_none(), "the first signal did not wait for the evaluation");
    signal(&child, "INT")?;
    assert_eq!(wait(&mut child)?.code(), Some(i32::from(INTERRUPTED)));
    Ok(())
}
