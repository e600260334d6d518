//! Runs that go on, and runs that must not.

use std::fs;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use tch_training::Parameters;
use tch_training::files::write_json;
use tch_training::run::Progress;
use tch_training::safetensors::read_tensors;
use zimage::distil::{Recipe, Start, open_states};

use super::commands::advice;
use super::common::small_pipeline::Workplace;
use super::parsed;
use super::released::{message, recipe, student, train, training, wait_for};
use super::tensorboard;

#[test]
fn two_processes_do_not_share_a_folder() -> Result<()> {
    let place = Workplace::new()?;
    let options = parsed(&place, &[])?;
    fs::create_dir_all(&options.out)?;
    let (recipe, beside) = (recipe(&options)?, serde_json::json!({}));
    let open = || open_states(&options.out, (&recipe, &beside), Start::Resume);
    let (_states, lock) = open()?;
    let error = message(open(), "a second process");
    assert!(error.contains("another process is at work in"), "{error}");
    drop(lock);
    let _ = open()?;
    Ok(())
}

#[test]
fn a_finished_run_is_not_written_over_by_its_own_command() -> Result<()> {
    let place = Workplace::new()?;
    let options = parsed(&place, &[])?;
    fs::create_dir_all(&options.out)?;
    let (recipe, beside) = (recipe(&options)?, serde_json::json!({}));
    let report = options.out.join("report.json");
    let finished = || write_json(&report, &serde_json::json!({ "recipe": recipe }));
    finished()?;
    let open = |start| open_states(&options.out, (&recipe, &beside), start);
    let error = open(Start::Resume).err().context("a finished run was accepted")?;
    assert!(error.to_string().contains("is finished, after 3000 updates"), "{error}");
    assert!(advice(&error).is_some_and(|advice| advice.contains("--fresh")));
    let (mut states, lock) = open(parsed(&place, &["--fresh"])?.start())?;
    assert!(!report.exists());
    drop(lock);
    // With more updates it goes on, if its state is there, whatever number of them may be left out.
    let more = Recipe { updates: 3001, skip_nonfinite: 3, ..recipe.clone() };
    let go_on = || open_states(&options.out, (&more, &beside), Start::Resume);
    finished()?;
    let error = message(go_on(), "a run without a state");
    assert!(error.contains("its state is gone"), "{error}");
    states.save(&Parameters::new(), Progress::default())?;
    let _ = go_on()?;
    assert!(message(open(Start::Resume), "a finished run").contains("is finished"));
    let other = Recipe { batch: 5, ..more };
    let error = open_states(&options.out, (&other, &beside), Start::Resume);
    let error = message(error, "another run");
    assert!(error.contains("batch is 4 there and 5 here"), "{error}");
    Ok(())
}

/// Trained on with more updates, a finished run is the run of so many updates, where the rate does not depend on
/// their number.
#[test]
fn a_finished_run_goes_on_with_more_updates() -> Result<()> {
    let (whole, parts) = (Workplace::new()?, Workplace::new()?);
    let run = |place: &Workplace, updates: &str| {
        let every = ["--save-every", "0", "--observe-every", "1"];
        train(place, &[&["--decay", "none", "--updates", updates][..], &every].concat())
    };
    run(&whole, "4")?;
    run(&parts, "2")?;
    let half = student(&parts)?;
    run(&parts, "4")?;
    assert_eq!(student(&parts)?, student(&whole)?);
    assert!(half != student(&parts)?);
    let read = |place: &Workplace| fs::read_to_string(place.out().join("report.json"));
    assert!(read(&parts)?.contains("\"updates\": 4"));
    assert!(read(&parts)?.contains("\"skipped\": 0"));
    // The event files too: no update is shown twice.
    let shown = tensorboard::read(&parts.out().join("tensorboard"))?;
    let updates = shown.keys().filter(|(tag, _)| tag == "loss/loss").map(|(_, update)| *update);
    assert_eq!(updates.collect::<Vec<_>>(), [1, 2, 3, 4]);
    Ok(())
}

/// Stopped, a run goes on to another number of updates, but not to one that it is past.
#[test]
fn another_number_of_updates_is_said_and_never_fewer_than_made() -> Result<()> {
    let place = Workplace::new()?;
    let mut child = training(&place, &["--updates", "2000"])?.spawn()?;
    wait_for(&mut child, &place.out().join("state/000003"))?;
    child.kill()?;
    ensure!(!child.wait()?.success(), "it was not stopped");
    // It may have gone on for a while.
    let state = fs::read_dir(place.out().join("state"))?.map(|entry| Ok(entry?.path()));
    let newest = state
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .filter(|path| path.extension().is_none())
        .max();
    let tensors = read_tensors(&newest.context("a state")?.join("tensors.safetensors"))?;
    let next = (tensors["updates"].int64_value(&[]) + 1).to_string();
    let output = training(&place, &["--updates", "1"])?.output()?;
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(!output.status.success() && message.contains("it cannot go back"), "{message}");
    assert!(message.contains("of 2000, and 1 are asked for"), "{message}");
    assert!(!place.out().join("report.json").exists());

    let output = training(&place, &["--updates", &next])?.stdout(Stdio::piped()).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let expected =
        format!("begun for 2000 updates: from here its learning rate falls towards {next}");
    assert!(said.contains(&expected), "{said}");
    Ok(())
}
