//! Several processes that train one student. Their ranks are this program, started again.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::Shift;
use serde_json::{Value, json};
use tch::Kind;
use tch_c10d::{Launch, Options, ProcessGroup};
use tch_training::Parameters;
use tch_training::run::{INTERRUPTED, StateFolder};
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::{TempDir, tempdir};
use zimage::distil::{
    Distillation, Intervals, Outcome, Preset, Preview, Processes, Recipe, seed_of_rank,
    train_student,
};

use super::common::{float32_bound, relative, seeded, tiny};
use super::resume::{PATIENCE, wait, wait_until};

/// Tells [`process`] where to write.
const OUT: &str = "ZIMAGE_PROCESSES_OUT";
/// Makes [`process`] take one update of known draws and leave.
const ONCE: &str = "ZIMAGE_PROCESSES_ONCE";
/// The update after which the first process gets a signal.
const SIGNAL: &str = "ZIMAGE_PROCESSES_SIGNAL";
/// Makes a caption of the second process not a number, and tells how many updates may be left out.
const BROKEN: &str = "ZIMAGE_PROCESSES_BROKEN";
const UPDATES: u64 = 12;
const SIZE: [i64; 3] = [3, 16, 16];

fn recipe() -> Result<Recipe> {
    let mut recipe = Preset::Embedded.recipe(Shift::new(3.0)?)?;
    (recipe.updates, recipe.batch, recipe.steps) = (UPDATES, 4, 2);
    (recipe.fake_warmup, recipe.fake_updates) = (2, 1);
    Ok(recipe)
}

/// One whose moments after the first update are a tenth of the gradient.
fn one_update() -> Result<Recipe> {
    let mut recipe = Recipe { fake_warmup: 0, ..recipe()? };
    for settings in [&mut recipe.student, &mut recipe.fake] {
        (settings.max_gradient_norm, settings.betas.0) = (None, 0.9);
    }
    Ok(recipe)
}

/// Not a test: a rank, which the tests below start.
#[test]
#[ignore = "started by the other tests, with a folder in the environment"]
fn process() -> Result<()> {
    let out = PathBuf::from(std::env::var_os(OUT).context("no folder")?);
    let _guard = seeded(0);
    tch::set_num_threads(1);
    let group = ProcessGroup::new(&Launch::from_env()?, &Options::default().timeout(PATIENCE))?;
    let is_once = std::env::var_os(ONCE).is_some();
    let mut recipe = if is_once { one_update()? } else { recipe()? };
    let teacher = tiny::teacher()?;
    let mut prompts = tiny::prompts(&teacher)?;
    if let Ok(most) = std::env::var(BROKEN) {
        recipe.skip_nonfinite = most.parse()?;
        prompts = tiny::waves(&teacher, group.rank() == 1)?;
    }
    let new = Distillation::new(recipe.clone(), &teacher, &prompts, &[0, 1, 2], SIZE)?;
    let mut distillation = new.among(&group)?;
    let result = out.join(format!("result-{}.safetensors", group.rank()));
    if is_once {
        let record = distillation.step(false)?;
        let record: Value = record.into_iter().map(|(name, value)| (name, json!(value))).collect();
        fs::write(result.with_extension("json"), record.to_string())?;
        return Ok(write_tensors(&result, &distillation.state())?);
    }
    let signal: Option<u64> =
        std::env::var(SIGNAL).ok().map(|update| update.parse()).transpose()?;
    let open = || StateFolder::open(&out.join("state"), &recipe);
    let mut states = (group.rank() == 0).then(open).transpose()?;
    let intervals = Intervals { save: 1, observe: 2, evaluate: u64::from(signal.is_some()) };
    let outcome = train_student(&out, intervals, &mut distillation, states.as_mut(), |d| {
        // Once: a second signal would leave at once.
        if signal == Some(d.updates()) {
            let own = std::process::id().to_string();
            ensure!(Command::new("kill").args(["-TERM", &own]).status()?.success());
        }
        let (message, scores, picture) = (String::new(), Vec::new(), None);
        Ok(Preview { message, entry: json!({}), scores, picture })
    })?;
    match outcome {
        Outcome::Interrupted => std::process::exit(i32::from(INTERRUPTED)),
        Outcome::Finished { .. } => Ok(write_tensors(&result, &distillation.state())?),
    }
}

/// A port outside the range from which the system serves connections.
fn free_port() -> Result<u16> {
    const COUNT: u16 = 10_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let own = (std::process::id() as u16).wrapping_mul(61);
    (0..COUNT)
        .map(|_| 20_000 + own.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % COUNT)
        .find(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok())
        .context("no port is free")
}

/// A folder and the processes that train in it.
struct Run(TempDir);

impl Run {
    fn new() -> Result<Self> {
        Ok(Self(tempdir()?))
    }

    fn out(&self) -> &Path {
        self.0.path()
    }

    /// So many ranks, with variables of the environment.
    fn start(&self, processes: usize, variables: &[(&str, &str)]) -> Result<Vec<Child>> {
        let port = free_port()?.to_string();
        let rank = |rank: usize| -> Result<Child> {
            let mut command = Command::new(std::env::current_exe()?);
            command
                .args(["--exact", "processes::process", "--ignored", "--nocapture"])
                .env(OUT, self.out())
                .env("RANK", rank.to_string())
                .env("WORLD_SIZE", processes.to_string())
                .env("MASTER_ADDR", "127.0.0.1")
                .env("MASTER_PORT", &port)
                .envs(variables.iter().copied())
                .stdout(fs::File::create(self.out().join(format!("output-{rank}")))?)
                .stderr(Stdio::from(fs::File::create(self.out().join(format!("errors-{rank}")))?));
            Ok(command.spawn()?)
        };
        (0..processes).map(rank).collect()
    }

    /// Runs so many ranks to their end, each of which must have this exit status.
    fn end(&self, processes: usize, variables: &[(&str, &str)], status: i32) -> Result<()> {
        for (rank, mut child) in self.start(processes, variables)?.into_iter().enumerate() {
            let found = wait(&mut child)?;
            ensure!(found.code() == Some(status), "rank {rank}: {found}: {}", self.errors(rank)?);
        }
        Ok(())
    }

    fn errors(&self, rank: usize) -> Result<String> {
        let read = |stream| fs::read_to_string(self.out().join(format!("{stream}-{rank}")));
        Ok(read("output")? + &read("errors")?)
    }

    fn result(&self, rank: usize) -> Result<Parameters> {
        Ok(read_tensors(&self.out().join(format!("result-{rank}.safetensors")))?)
    }

    /// What so many ranks have come to, which must be the same for all.
    fn result_of_all(&self, processes: usize) -> Result<Parameters> {
        let first = self.result(0)?;
        for rank in 1..processes {
            assert_same(&self.result(rank)?, &first);
        }
        Ok(first)
    }

    /// The tensors of the newest state.
    fn state(&self) -> Result<Parameters> {
        let folder = self.out().join("state").join(format!("{:06}", self.newest()));
        Ok(read_tensors(&folder.join("tensors.safetensors"))?)
    }

    /// The number of the newest state, 0 for none.
    fn newest(&self) -> u64 {
        let Ok(entries) = fs::read_dir(self.out().join("state")) else { return 0 };
        let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        numbers.max().unwrap_or(0)
    }
}

fn count(state: &Parameters, name: &str) -> i64 {
    state[name].int64_value(&[])
}

#[track_caller]
fn assert_same(found: &Parameters, expected: &Parameters) {
    assert!(found.keys().eq(expected.keys()));
    for (name, expected) in expected {
        assert_eq!(&found[name], expected, "{name}");
    }
}

/// Moments after one update of two processes are the mean of those that each makes alone: the gradient is that of
/// both batches.
#[test]
fn gradients_and_numbers_are_those_of_both_processes() -> Result<()> {
    let run = Run::new()?;
    run.end(2, &[(ONCE, "1")], 0)?;
    let together = run.result_of_all(2)?;
    assert_eq!(count(&together, "processes"), 2);
    let records = [0, 1].map(|rank| fs::read(run.out().join(format!("result-{rank}.json"))));
    let [record, other] = records;
    let record = record?;
    assert_eq!(record, other?);
    let record: Value = serde_json::from_slice(&record)?;

    let _guard = seeded(0);
    tch::set_num_threads(1);
    let teacher = tiny::teacher()?;
    let prompts = tiny::prompts(&teacher)?;
    let alone = |rank: usize| -> Result<(Parameters, f64)> {
        let recipe = one_update()?;
        let recipe = Recipe { seed: seed_of_rank(recipe.seed, rank), batch: 2, ..recipe };
        let mut one = Distillation::new(recipe, &teacher, &prompts, &[0, 1, 2], SIZE)?;
        let record = one.step(false)?;
        let loss = record.iter().find(|(name, _)| name == "loss").context("no loss")?.1;
        Ok((one.state(), loss))
    };
    let (one, two) = (alone(0)?, alone(1)?);
    let mean = (one.1 + two.1) / 2.0;
    let found = record["loss"].as_f64().context("no loss")?;
    assert!((found - mean).abs() <= 1e-12 * mean.abs(), "{found}, expected {mean}");
    let (mut compared, mut apart) = (0, 0.0_f64);
    for (name, found) in together.iter().filter(|(name, _)| name.ends_with("exp_avg")) {
        let [one, two] = [&one.0, &two.0].map(|state| state[name].to_kind(Kind::Double));
        let mean = (&one + two) / 2.0;
        if mean.abs().max().double_value(&[]) == 0.0 {
            continue;
        }
        let (error, bound) = (relative(name, found, &mean), float32_bound(0.0));
        assert!(error <= bound, "{name}: {error:e} > {bound:e}");
        apart = apart.max(relative(name, &one, &mean));
        compared += 1;
    }
    assert!(compared > 50 && apart > 0.1, "{compared} tensors, {apart:e} apart");
    Ok(())
}

/// Runs go on with as many processes, with fewer and with more, after a signal to one rank and after its death.
#[cfg(unix)]
#[test]
fn a_run_goes_on_whatever_becomes_of_a_process() -> Result<()> {
    let expected = Run::new()?;
    expected.end(2, &[], 0)?;
    let expected = expected.result_of_all(2)?;
    assert_eq!(count(&expected, "updates") as u64, UPDATES);

    // A signal to one stops both after the same update.
    let run = Run::new()?;
    let status = i32::from(INTERRUPTED);
    run.end(2, &[(SIGNAL, "3")], status)?;
    let state = run.state()?;
    assert!(
        (3..UPDATES as i64).contains(&count(&state, "updates")) && count(&state, "processes") == 2
    );
    run.end(2, &[], 0)?;
    assert_same(&run.result_of_all(2)?, &expected);

    // Killed, a process takes the other with it, which says so.
    let run = Run::new()?;
    let mut ranks = run.start(2, &[])?;
    wait_until(|| run.newest() > 2, &mut ranks[0])?;
    ranks[1].kill()?;
    ranks[1].wait()?;
    let start = Instant::now();
    assert!(!wait(&mut ranks[0])?.success(), "it went on alone");
    // At once, and not after the time-out of the group.
    let time = start.elapsed();
    assert!(time < PATIENCE / 4, "the other ended after {time:?}");
    let errors = run.errors(0)?;
    assert!(errors.contains("rank 0: "), "{errors}");
    assert!(!run.out().join("result-0.safetensors").exists(), "nothing was left to go on with");
    run.end(2, &[], 0)?;
    assert_same(&run.result(0)?, &expected);

    for (before, after) in [(2, 1), (1, 2)] {
        let run = Run::new()?;
        run.end(before, &[(SIGNAL, "3")], status)?;
        let found = run.state()?;
        let made_by = found.get("processes").map_or(1, |count| count.int64_value(&[]));
        assert_eq!(made_by, before as i64);
        run.end(after, &[], 0)?;
        let result = run.result_of_all(after)?;
        assert_eq!(count(&result, "updates") as u64, UPDATES);
        let said = run.errors(0)?;
        let expected = format!("which {before} processes made, with {after}");
        assert!(said.contains(&expected), "{said}");
    }
    Ok(())
}

/// What is not finite on one is left out by all, and the run says whose it was where none may be left out.
#[test]
fn all_leave_out_what_is_not_finite_on_one() -> Result<()> {
    let run = Run::new()?;
    run.end(2, &[(BROKEN, "100")], 0)?;
    let state = run.result_of_all(2)?;
    let (skipped, updates) = (count(&state, "skipped_updates"), count(&state, "updates"));
    assert!(updates as u64 == UPDATES && (1..updates).contains(&skipped), "{skipped}");
    for (name, tensor) in &state {
        assert!(bool::try_from(tensor.isfinite().all())?, "{name}");
    }
    let said = run.errors(0)?;
    assert!(said.contains(&format!("{skipped} of at most 100: ")), "{said}");
    assert!(said.contains("gradients of ranks [1] are not"), "{said}");

    let run = Run::new()?;
    for mut rank in run.start(2, &[(BROKEN, "0")])? {
        assert!(!wait(&mut rank)?.success(), "it went on");
    }
    let said = run.errors(0)?;
    assert!(said.contains("gradients of ranks [1] are not"), "{said}");
    Ok(())
}

#[test]
fn what_cannot_be_parted_is_refused() -> Result<()> {
    let alone = ProcessGroup::alone();
    let processes = Processes::from(&alone);
    assert_eq!((processes.count(), processes.rank(), processes.part(3)?), (1, 0, 3));
    assert!(processes.any(true)? && !processes.any(false)?);
    assert!(processes.statistics().is_none());
    assert_eq!(seed_of_rank(7, 0), 7);
    assert_ne!(seed_of_rank(7, 1), seed_of_rank(7, 2));
    let error = processes.part(0).unwrap_err().to_string();
    assert!(error.contains("cannot be parted"), "{error}");
    Ok(())
}
