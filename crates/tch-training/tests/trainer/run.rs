//! States of a run on disk: after a crash, refused states, and the log.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tch::{Kind, Tensor};
use tch_training::files::write_atomically;
use tch_training::parameters::restore;
use tch_training::run::{EventFile, Log, LostLines, Progress, StateFolder, fingerprint};
use tch_training::{Error, Parameters};
use tempfile::{TempDir, tempdir};

use super::common::{Result, chain, max_difference, wave};

/// A folder of its own for each test.
struct Folder(TempDir);

impl Folder {
    fn states(&self) -> PathBuf {
        self.0.path().join("state")
    }

    fn names(&self) -> Result<Vec<String>> {
        let mut names = fs::read_dir(self.states())?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<Vec<_>>>()?;
        names.sort();
        Ok(names)
    }
}

fn identity() -> Value {
    json!({ "recipe": { "batch": 4, "rate": 0.1 + 0.2 }, "data": "a" })
}

fn tensors(phase: f64) -> Parameters {
    [("one", &[2, 3][..], Kind::Float), ("two", &[4], Kind::BFloat16)]
        .map(|(name, shape, kind)| (name.to_owned(), wave(shape, phase, kind)))
        .into()
}

fn progress(log_bytes: u64) -> Progress {
    Progress { seconds: 1.0 / 3.0, log_bytes }
}

/// Opens the folder and checks that it holds the tensors of one phase.
fn assert_holds(folder: &Path, phase: f64, log_bytes: u64) -> Result<StateFolder> {
    let states = StateFolder::open(folder, &identity())?;
    assert!(states.is_unfinished());
    let (found, at) = states.load()?.expect("a state");
    assert_eq!(at.log_bytes, log_bytes);
    assert_eq!(found.len(), 2);
    for (name, expected) in tensors(phase) {
        assert_eq!(found[&name].kind(), expected.kind(), "{name}");
        assert_eq!(max_difference(&found[&name], &expected), 0.0, "{name}");
    }
    Ok(states)
}

#[test]
fn the_newest_state_is_kept_alone() -> Result<()> {
    let folder = Folder(tempdir()?);
    let mut states = StateFolder::open(&folder.states(), &identity())?;
    assert!(!states.is_unfinished() && states.load()?.is_none());
    for (phase, bytes) in [(0.1, 10), (0.2, 20), (0.3, 30)] {
        states.save(&tensors(phase), progress(bytes))?;
        assert_eq!(folder.names()?.len(), 1);
        drop(assert_holds(&folder.states(), phase, bytes)?);
    }
    // Numbers go on after a restart.
    let mut states = assert_holds(&folder.states(), 0.3, 30)?;
    states.save(&tensors(0.4), progress(40))?;
    assert_eq!(folder.names()?, ["000004"]);
    states.remove()?;
    assert!(!folder.states().exists() && !states.is_unfinished());
    Ok(states.remove()?)
}

#[test]
fn a_crash_at_any_moment_leaves_one_state_and_its_leftovers_go() -> Result<()> {
    let folder = Folder(tempdir()?);
    let path = |name: &str| folder.states().join(name);
    let mut states = StateFolder::open(&folder.states(), &identity())?;
    states.save(&tensors(0.1), progress(1))?;

    // While the next one is written.
    fs::create_dir(path("000002.partial"))?;
    drop(assert_holds(&folder.states(), 0.1, 1)?);
    fs::create_dir(path("000002.partial"))?;
    fs::write(path("000002.partial/state.json"), "{")?;
    fs::write(path("000002.partial/tensors.safetensors.partial"), "half")?;
    drop(assert_holds(&folder.states(), 0.1, 1)?);
    assert_eq!(folder.names()?, ["000001"]);

    // Between the new one's last step and the removal of the old one.
    let copy = |from: &str, to: &str| -> Result<()> {
        fs::create_dir(path(to))?;
        for entry in fs::read_dir(path(from))? {
            let entry = entry?;
            fs::copy(entry.path(), path(to).join(entry.file_name()))?;
        }
        Ok(())
    };
    copy("000001", "kept")?;
    let mut states = assert_holds(&folder.states(), 0.1, 1)?;
    states.save(&tensors(0.2), progress(2))?;
    copy("kept", "000001")?;
    drop(assert_holds(&folder.states(), 0.2, 2)?);

    // While the old one is removed.
    copy("kept", "000001.partial")?;
    fs::remove_file(path("000001.partial/state.json"))?;
    drop(assert_holds(&folder.states(), 0.2, 2)?);
    assert_eq!(folder.names()?, ["000002", "kept"]);
    Ok(())
}

/// What has a number that none could follow is somebody else's.
#[test]
fn numbers_that_cannot_be_counted_on_are_left_alone() -> Result<()> {
    let folder = Folder(tempdir()?);
    let other = folder.states().join(u64::MAX.to_string());
    fs::create_dir_all(&other)?;
    let mut states = StateFolder::open(&folder.states(), &identity())?;
    states.save(&tensors(0.1), progress(1))?;
    drop(assert_holds(&folder.states(), 0.1, 1)?);
    assert!(other.exists());

    let events = folder.0.path().join("tensorboard");
    fs::create_dir_all(&events)?;
    fs::write(events.join(format!("events.out.tfevents.{}", u64::MAX)), "")?;
    for number in 1..=2 {
        drop(EventFile::create(&events, 0)?);
        assert!(events.join(format!("events.out.tfevents.00000{number}")).exists());
    }
    Ok(())
}

#[test]
fn a_save_that_fails_keeps_the_state_before() -> Result<()> {
    let folder = Folder(tempdir()?);
    let mut states = StateFolder::open(&folder.states(), &identity())?;
    states.save(&tensors(0.1), progress(1))?;
    // A file where the new folder would be.
    fs::write(folder.states().join("000002.partial"), "")?;
    let error = chain(&states.save(&tensors(0.2), progress(2)).unwrap_err());
    assert!(error.contains("saving the state to"), "{error}");
    fs::remove_file(folder.states().join("000002.partial"))?;
    drop(assert_holds(&folder.states(), 0.1, 1)?);
    states.save(&tensors(0.2), progress(2))?;
    drop(assert_holds(&folder.states(), 0.2, 2)?);
    Ok(())
}

#[test]
fn the_state_of_another_run_is_refused_with_what_differs() -> Result<()> {
    let folder = Folder(tempdir()?);
    let mut states = StateFolder::open(&folder.states(), &identity())?;
    states.save(&tensors(0.1), progress(1))?;
    for (other, complaint) in [
        (
            json!({ "recipe": { "batch": 5, "rate": 0.1 + 0.2 }, "data": "a" }),
            "recipe.batch is 4 there and 5 here",
        ),
        (
            json!({ "recipe": { "batch": 4, "rate": 0.3 }, "data": "b" }),
            "data is \"a\" there and \"b\" here; recipe.rate is 0.30000000000000004 there and 0.3 here",
        ),
        (
            json!({ "recipe": { "batch": 4 }, "data": "a", "new": 1 }),
            "recipe.rate is 0.30000000000000004 there and null here; new is null there and 1 here",
        ),
    ] {
        let error = StateFolder::open(&folder.states(), &other).unwrap_err();
        assert!(matches!(error, Error::OtherRun { .. }), "{error}");
        assert!(error.to_string().contains(complaint), "{error}");
        drop(assert_holds(&folder.states(), 0.1, 1)?);
    }
    let other = json!({ "recipe": "another" });
    assert!(!StateFolder::open_fresh(&folder.states(), &other)?.is_unfinished());
    assert!(!folder.states().exists());
    Ok(())
}

#[test]
fn damaged_states_are_refused_by_file() -> Result<()> {
    let folder = Folder(tempdir()?);
    let mut states = StateFolder::open(&folder.states(), &identity())?;
    states.save(&tensors(0.1), progress(1))?;
    let description = folder.states().join("000001/state.json");
    let text = fs::read_to_string(&description)?;
    for (damaged, complaint) in [
        ("".to_owned(), "parsing"),
        (text.replace("\"version\": 2", "\"version\": 7"), "version must be 2, found 7"),
        (text.replace("log_bytes", "bytes"), "missing field `log_bytes`"),
    ] {
        fs::write(&description, &damaged)?;
        let error = chain(&StateFolder::open(&folder.states(), &identity()).unwrap_err());
        assert!(error.contains(complaint) && error.contains("state.json"), "{error}");
    }
    fs::write(&description, &text)?;
    let file = folder.states().join("000001/tensors.safetensors");
    let bytes = fs::read(&file)?;
    fs::write(&file, &bytes[..bytes.len() - 3])?;
    let states = StateFolder::open(&folder.states(), &identity())?;
    let error = chain(&states.load().unwrap_err());
    assert!(error.contains("tensors.safetensors"), "{error}");
    Ok(())
}

#[test]
fn restoring_is_all_or_nothing() -> Result<()> {
    let live = tensors(0.1);
    let wrong = [
        ("two is missing", tensors(0.2).into_iter().take(1).collect::<Parameters>()),
        ("three is unexpected", {
            let mut more = tensors(0.2);
            more.insert("three".into(), wave(&[1], 0.0, Kind::Float));
            more
        }),
        ("two has shape [1], expected [4]", {
            let mut shaped = tensors(0.2);
            shaped.insert("two".into(), wave(&[1], 0.0, Kind::BFloat16));
            shaped
        }),
        ("two is Float, expected BFloat16", {
            let mut cast = tensors(0.2);
            cast.insert("two".into(), wave(&[4], 0.0, Kind::Float));
            cast
        }),
    ];
    for (complaint, saved) in wrong {
        let error = restore(&live, &saved).unwrap_err().to_string();
        assert!(error.contains(complaint), "{error}");
        for (name, expected) in tensors(0.1) {
            assert_eq!(max_difference(&live[&name], &expected), 0.0, "{complaint}: {name} changed");
        }
    }
    let leaf: Tensor = live["one"].set_requires_grad(true);
    restore(&live, &tensors(0.2))?;
    assert_eq!(max_difference(&leaf, &tensors(0.2)["one"]), 0.0);
    Ok(())
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_old_one_alone() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("file");
    fs::write(&path, "old")?;
    let full = write_atomically(&path, |path| {
        fs::write(path, "ne")?;
        Err(std::io::Error::other("no space left"))
    });
    let error = full.unwrap_err();
    assert!(matches!(error, Error::Writing { .. }), "{error}");
    assert!(chain(&error).contains("no space left"), "{error}");
    assert_eq!(fs::read(&path)?, b"old");
    assert_eq!(fs::read_dir(folder.path())?.count(), 1);
    Ok(())
}

#[test]
fn a_log_goes_on_where_it_was_saved() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("metrics.jsonl");
    let (mut log, lines) = Log::open(&path, 0)?;
    assert!(lines?.is_empty());
    log.write(&json!({ "update": 1 }))?;
    let saved = log.sync()?;
    log.write(&json!({ "update": 2 }))?;
    drop(log);
    // A line that was being written.
    fs::write(&path, fs::read_to_string(&path)? + "{\"upd")?;

    let (mut log, lines) = Log::open(&path, saved)?;
    assert_eq!(lines?, [json!({ "update": 1 })]);
    log.write(&json!({ "update": 2, "again": true }))?;
    drop(log);
    assert_eq!(fs::read_to_string(&path)?, "{\"update\":1}\n{\"again\":true,\"update\":2}\n");

    // A log that is not the one of the state any more does not keep the run from going on.
    let (_, lines) = Log::open(&path, 1000)?;
    assert!(matches!(lines, Err(LostLines::Short { expected: 1000, .. })), "{lines:?}");
    assert_eq!(fs::read(&path)?, b"");
    fs::remove_file(&path)?;
    assert!(matches!(Log::open(&path, 1000)?.1, Err(LostLines::Short { found: 0, .. })));
    // Nor does one that was begun anew and has grown beyond what was saved.
    fs::write(&path, "{\"update\":1}\n{\"update\":2}\n")?;
    let (_, lines) = Log::open(&path, 16)?;
    assert!(matches!(lines, Err(LostLines::Unreadable { .. })), "{lines:?}");
    assert_eq!(fs::read(&path)?, b"");
    Ok(())
}

#[test]
fn fingerprints_tell_names_lengths_and_contents_apart() -> Result<()> {
    let folder = tempdir()?;
    let file = folder.path().join("file");
    let long = |change: &dyn Fn(&mut Vec<u8>)| -> Result<String> {
        let mut bytes = vec![7; 3 << 20];
        change(&mut bytes);
        fs::write(&file, bytes)?;
        Ok(fingerprint(folder.path())?)
    };
    let original = long(&|_| {})?;
    assert_eq!(original, long(&|_| {})?);
    let mut all = vec![
        original,
        long(&|bytes| bytes[0] = 1)?,
        long(&|bytes| *bytes.last_mut().unwrap() = 1)?,
        // As a merged adapter does: the ends are those of the base.
        long(&|bytes| bytes[(1 << 20)..(2 << 20)].fill(1))?,
        long(&|bytes| bytes.push(7))?,
        long(&|bytes| bytes.truncate(1000))?,
        long(&|bytes| bytes.clear())?,
    ];
    fs::rename(&file, folder.path().join("other"))?;
    all.push(fingerprint(folder.path())?);
    let count = all.len();
    all.sort();
    all.dedup();
    assert_eq!(all.len(), count);
    let error = chain(&fingerprint(&folder.path().join("absent")).unwrap_err());
    assert!(error.contains("absent"), "{error}");
    Ok(())
}
