//! Prompts with negatives, several sizes, batches in parts, and a fake score of another rank.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::Value;
use tch_training::safetensors::read_tensors;
use zimage::model::Storage;
use zimage::text::read_prompts;

use super::common::max_difference;
use super::common::small_pipeline::Workplace;
use super::my_model::finetuning;
use super::parsed;
use super::released::{message, recipe, student, train, training, wait_for};
use super::run;

/// A file of three prompts, one without a negative of its own.
fn prompts(place: &Workplace) -> Result<String> {
    let path = place.0.path().join("prompts.jsonl");
    let lines = [
        r#"{"prompt": "A red fox", "negative": "blurred"}"#,
        r#"{"prompt": "A cat"}"#,
        r#"{"prompt": "Snow on the hills", "negative": "a long text of what these should not be"}"#,
    ];
    fs::write(&path, lines.join("\n"))?;
    Ok(path.display().to_string())
}

fn options(place: &Workplace) -> Result<Vec<String>> {
    let prompts = prompts(place)?;
    let more = ["--negative-prompt", "a drawing", "--size", "24,32x16", "--batch", "4"];
    let parts = ["--accumulate", "2", "--fake-rank", "3", "--guidance-rescale"];
    let finetuned = finetuning(place, "mine.safetensors")?;
    let files = ["--prompt-file", &prompts, "--teacher-lora", &finetuned, "--base", "int8"];
    let dropped = ["--dropout", "0.1", "--decay", "cosine"];
    let all = files.into_iter().chain(more).chain(parts).chain(dropped);
    Ok(all.map(str::to_owned).collect())
}

fn of(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

#[test]
fn a_training_on_everything_goes_on_to_the_same_student() -> Result<()> {
    let (place, other) = (Workplace::new()?, Workplace::new()?);
    train(&place, &of(&options(&place)?))?;
    let found = student(&place)?;
    let state = fs::read_dir(place.out().join("state"))?.next().expect("a state")?.path();
    let state = read_tensors(&state.join("tensors.safetensors"))?;
    let rank = |role: &str| {
        let of = |name: &&String| name.starts_with(role) && name.ends_with("to_q.lora_A.weight");
        let name = state.keys().find(of).expect("an adapter");
        state[name].size()[0]
    };
    assert_eq!((rank("student.weights"), rank("fake.weights")), (2, 3));

    let options_of_other = options(&other)?;
    let mut child = training(&other, &of(&options_of_other))?.spawn()?;
    wait_for(&mut child, &other.out().join("state/000002"))?;
    child.kill()?;
    ensure!(!child.wait()?.success(), "it was not stopped");
    train(&other, &of(&options_of_other))?;
    assert_eq!(student(&other)?, found);

    // The first size is the student's, another can be asked for.
    let saved: Value =
        serde_json::from_str(&fs::read_to_string(place.out().join("student/recipe.json"))?)?;
    assert_eq!(saved["size"], "24x24");
    let mut sampling = parsed(&place, &["--sample", "A cat", "--float32", "--tensors"])?;
    for (size, pixels) in [(None, [24, 24]), (Some(vec!["32x16".parse()?]), [16, 32])] {
        sampling.size = size;
        let _ = run(&sampling)?;
        let images = read_tensors(&place.out().join("sample.safetensors"))?["images"].size();
        assert_eq!(images[2..], pixels);
    }
    sampling.size = Some(vec!["24".parse()?, "16".parse()?]);
    assert!(message(run(&sampling), "two sizes").contains("--size: pictures of a prompt"));
    Ok(())
}

/// Negative prompts are the null branch: others give another student.
#[test]
fn negative_prompts_and_sizes_matter() -> Result<()> {
    let trained = |more: &[&str]| -> Result<_> {
        let place = Workplace::new()?;
        let prompts = prompts(&place)?;
        train(&place, &[&["--prompt-file", &prompts], more].concat())?;
        student(&place)
    };
    let plain = trained(&[])?;
    let moved = |more: &[&str]| -> Result<f64> {
        let found = trained(more)?;
        let differences = plain.iter().map(|(name, one)| max_difference(one, &found[name]));
        Ok(differences.fold(0.0, f64::max))
    };
    for more in [
        ["--negative-prompt", "a drawing"],
        ["--size", "32x16,24"],
        ["--accumulate", "2"],
        ["--guidance-interval", "0,0.5"],
        ["--decay", "cosine"],
    ] {
        let by = moved(&more)?;
        println!("{more:?}: {by:.1e}");
        assert!(by > 1e-6, "{more:?} changed nothing");
    }
    assert_eq!(moved(&["--accumulate", "1"])?, 0.0);
    Ok(())
}

#[test]
fn what_is_wrong_with_data_is_named() -> Result<()> {
    let place = Workplace::new()?;
    let prompts = place.0.path().join("prompts.txt").display().to_string();
    for (more, part) in [
        (&["--accumulate", "3"][..], "--accumulate: a batch of 4 cannot be computed in 3"),
        (&["--accumulate", "0"], "cannot be computed in 0"),
        (&["--guidance-interval", "0.5,0.2"], "upper end of the interval"),
        (&["--rank", "0", "--fake-rank", "3"], "are about adapters"),
        (&["--updates", "0"], "--updates must be from 1 to"),
        (&["--fake-updates", "18446744073709551615"], "--fake-updates must be from 0 to"),
        (&["--batch", "18446744073709551615"], "--batch must be from 1 to"),
        (&["--steps", "100000001"], "--steps must be from 1 to"),
    ] {
        let options = parsed(&place, &[&["--prompt-file", &prompts], more].concat())?;
        let error = message(recipe(&options), "a recipe");
        assert!(error.contains(part), "{error}");
    }
    let smaller =
        recipe(&parsed(&place, &["--rank", "8", "--fake-rank", "4"])?)?.cautions(Storage::Full, 1);
    assert!(smaller.iter().any(|text| text.contains("rank 4 and the student 8")), "{smaller:?}");
    let larger =
        recipe(&parsed(&place, &["--rank", "8", "--fake-rank", "16"])?)?.cautions(Storage::Full, 1);
    assert!(larger.is_empty(), "{larger:?}");
    // JSON under the name of a text is no prompt, and another spelling of the negative one.
    let lines = r#"{"prompt": "A cat", "negative_prompt": "a dog"}"#;
    let [text, json] = ["mine.txt", "mine.jsonl"].map(|name| place.0.path().join(name));
    for path in [&text, &json] {
        fs::write(path, lines)?;
    }
    let error = message(read_prompts(&text), "JSON in a text");
    assert!(error.contains("line 1 is an object of JSON") && error.contains(".jsonl"), "{error}");
    assert_eq!(read_prompts(&json)?[0].negative.as_deref(), Some("a dog"));
    fs::write(&text, "{a red|a blue} fox\n")?;
    assert_eq!(read_prompts(&text)?[0].text, "{a red|a blue} fox");
    fs::write(&text, r#"["a red fox"]"#)?;
    assert_eq!(read_prompts(&text)?[0].text, r#"["a red fox"]"#);
    fs::write(&json, r#"["a red fox"]"#)?;
    assert!(message(read_prompts(&json), "an array").contains("an object with a text"));
    fs::write(&text, r#"{"caption": "A cat"}"#)?;
    assert!(message(read_prompts(&text), "another object").contains("an object of JSON"));
    fs::write(&json, r#"{"prompt": "a", "negative": "b", "negative_prompt": "c"}"#)?;
    assert_eq!(read_prompts(&json)?[0].negative.as_deref(), Some("b"));

    for size in ["23", "24x", "x24", "24x24x24", "many", "0", "24,0"] {
        let size = parsed(&place, &["--prompt-file", &prompts, "--size", size]);
        let refused = size
            .map_or_else(|error| format!("{error:#}"), |options| message(run(&options), "a size"));
        assert!(refused.contains("size") || refused.contains("pixels"), "{refused}");
    }
    Ok(())
}
