//! What a training shows in TensorBoard, by a reader of its event files. Whether TensorBoard's own reader sees the same
//! is checked by `scripts/reference/event_files.py`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::common::seeded;
use super::common::small_pipeline::Workplace;
use super::released::{message, training, training_options};
use super::run;

const PATIENCE: Duration = Duration::from_secs(60);

/// The fields of a message of protocol buffers: number and content, of numbers their bytes.
fn fields(mut bytes: &[u8]) -> Result<Vec<(u64, Vec<u8>)>> {
    fn varint(bytes: &mut &[u8]) -> Result<u64> {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let (byte, rest) = bytes.split_first().context("the end of a message")?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                break;
            }
        }
        Ok(value)
    }
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes)?;
        let size = match key & 7 {
            0 => {
                found.push((key >> 3, varint(&mut bytes)?.to_le_bytes().to_vec()));
                continue;
            }
            1 => 8,
            5 => 4,
            _ => varint(&mut bytes)? as usize,
        };
        let (content, rest) = bytes.split_at_checked(size).context("the end of a message")?;
        found.push((key >> 3, content.to_vec()));
        bytes = rest;
    }
    Ok(found)
}

fn field(message: &[u8], number: u64) -> Result<Option<Vec<u8>>> {
    Ok(fields(message)?.into_iter().find(|(found, _)| *found == number).map(|(_, content)| content))
}

/// What is shown, by tag and step: what the summary's value holds beside its tag.
type Shown = BTreeMap<(String, u64), Vec<(u64, Vec<u8>)>>;

/// Reads the event files of a run as TensorBoard does: the start of a session takes back what is shown from its step
/// on. A point that is shown twice is an error.
pub fn read(folder: &Path) -> Result<Shown> {
    let mut shown = Shown::new();
    let entries = fs::read_dir(folder)?.map(|entry| Ok(entry?.path()));
    let mut paths = entries.collect::<Result<Vec<_>>>()?;
    paths.sort();
    for path in paths {
        let bytes = fs::read(&path)?;
        let mut rest = &bytes[..];
        // A killed process may leave half a record.
        while let Some((length, after)) = rest.split_at_checked(12) {
            let length = u64::from_le_bytes(length[..8].try_into()?) as usize;
            let Some((record, after)) = after.split_at_checked(length + 4) else { break };
            let event = &record[..length];
            let number =
                field(event, 2)?.map(|bytes| Ok::<_, anyhow::Error>(bytes.try_into().ok()));
            let step = number.transpose()?.flatten().map_or(0, u64::from_le_bytes);
            if field(event, 7)?.is_some() {
                shown.retain(|(_, of), _| *of < step);
            }
            for (_, value) in fields(&field(event, 5)?.unwrap_or_default())? {
                let tag = String::from_utf8(field(&value, 1)?.context("no tag")?)?;
                let rest = fields(&value)?.into_iter().filter(|(number, _)| *number != 1).collect();
                ensure!(shown.insert((tag.clone(), step), rest).is_none(), "{tag} at {step} twice");
            }
            rest = after;
        }
    }
    // Of the clock.
    shown.retain(|(tag, _), _| !tag.starts_with("time/"));
    Ok(shown)
}

/// Prompts for previews, in a file of their own.
fn preview_prompts(place: &Workplace) -> Result<String> {
    let path = place.0.path().join("preview.txt");
    fs::write(&path, "A cat\nA boat\nA tree\n")?;
    Ok(path.display().to_string())
}

#[test]
fn what_is_shown_is_that_of_the_metrics_and_once_after_kills() -> Result<()> {
    let shown_every = |prompts: &str| {
        let more = ["--observe-every", "1", "--evaluate-every", "2", "--preview-prompts", prompts];
        more.map(str::to_owned)
    };
    let place = Workplace::new()?;
    let more = shown_every(&preview_prompts(&place)?);
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let output = training(&place, &more)?.output()?;
    let messages = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{messages}");
    assert!(
        messages.contains("1 of the prompts of --preview-prompts are trained on too"),
        "{messages}"
    );
    let shown = read(&place.out().join("tensorboard"))?;

    let metrics = fs::read_to_string(place.out().join("metrics.jsonl"))?;
    for line in metrics.lines() {
        let line: serde_json::Value = serde_json::from_str(line)?;
        let update = line["update"].as_u64().context("no update")?;
        for (name, tag) in [
            ("loss", "loss/loss"),
            ("ca", "loss/ca"),
            ("fake", "loss/fake"),
            ("student_gradient", "gradient_norm/student"),
            ("fake_gradient", "gradient_norm/fake"),
            ("student_learning_rate", "learning_rate/student"),
            ("fake_learning_rate", "learning_rate/fake"),
            ("dm_rel_gap", "dm/dm_rel_gap"),
            ("x_std", "samples/x_std"),
        ] {
            let Some(value) = line[name].as_f64() else { continue };
            let [(2, bytes)] = &shown[&(tag.to_owned(), update)][..] else {
                panic!("{tag} at {update} is no number")
            };
            // JSON is read to the last digit but one.
            let found = f64::from(f32::from_le_bytes(bytes[..].try_into()?));
            assert!((found - value).abs() < 1e-6 * value, "{tag} at {update}: {found}");
            assert!(value > 0.0, "{name} at {update}: {value}");
        }
    }
    for tag in ["gradient_norm/student", "gradient_norm/fake", "learning_rate/fake"] {
        let updates = (1..=4).filter(|update| shown.contains_key(&(tag.to_owned(), *update)));
        assert_eq!(updates.count(), 4, "{tag}");
    }
    assert!(shown.contains_key(&("recipe".to_owned(), 0)));
    for update in [2, 4] {
        let value = &shown[&("preview".to_owned(), update)];
        let picture = fs::read(place.out().join(format!("preview-{update:06}.png")))?;
        assert!(value[0].0 == 4 && value[0].1.ends_with(&picture), "preview at {update}");
    }
    // Three prompts, a row each: a heading, and a caption under each picture of 24 pixels.
    let size = image::image_dimensions(place.out().join("preview-000002.png"))?;
    assert_eq!(size.1, 16 + 3 * (24 + 16));

    let other = Workplace::new()?;
    let more = shown_every(&preview_prompts(&other)?);
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    for number in 1..=2 {
        let mut child = training(&other, &more)?.stderr(Stdio::null()).spawn()?;
        let state = other.out().join(format!("state/{number:06}"));
        let start = Instant::now();
        while !state.exists() && child.try_wait()?.is_none() && start.elapsed() < PATIENCE {
            sleep(Duration::from_millis(1));
        }
        child.kill()?;
        let _ = child.wait()?;
    }
    let output = training(&other, &more)?.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let again = read(&other.out().join("tensorboard"))?;
    assert!(
        fs::read_dir(other.out().join("tensorboard"))?.count() > 1,
        "nothing was left to go on with"
    );
    assert!(again.keys().eq(shown.keys()));
    for (key, value) in &shown {
        assert!(again[key] == *value, "{key:?}");
    }
    Ok(())
}

#[test]
fn prompts_of_previews_are_looked_at_before_any_work() -> Result<()> {
    let place = Workplace::new()?;
    let path = place.0.path().join("preview.txt");
    let many: String = (0..17).map(|number| format!("prompt {number}\n")).collect();
    for (content, complaint) in [
        (None, "preview.txt"),
        (Some(""), "holds no prompts"),
        (Some(many.as_str()), "holds 17 prompts: a preview draws all of them, at most 16"),
    ] {
        if let Some(content) = content {
            fs::write(&path, content)?;
        }
        let options =
            training_options(&place, &["--preview-prompts", &path.display().to_string()])?;
        let _guard = seeded(6);
        let error = message(run(&options), complaint);
        assert!(error.contains(complaint), "{error}");
        assert!(!place.out().exists(), "{complaint}");
    }
    Ok(())
}
