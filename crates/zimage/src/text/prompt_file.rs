//! Prompts in a file: a line each, as text or as JSON.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

/// A prompt, and what its pictures should not be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Prompt {
    /// What is drawn.
    pub text: String,
    /// The condition of the null branch, where it is not that of the other prompts.
    pub negative: Option<String>,
}

/// A prompt in JSON.
#[derive(Deserialize)]
struct Line {
    prompt: String,
    negative: Option<String>,
    /// The other name of `negative`.
    negative_prompt: Option<String>,
}

/// The prompts of a file in UTF-8, one a line: text, or in a file whose name ends with `.jsonl` objects with
/// `prompt` and, if wanted, `negative`, or else `negative_prompt`, whose other fields are not looked at. Space around
/// them is dropped, and so are blank lines and whatever occurred before.
///
/// # Errors
/// If the file cannot be read, is not UTF-8, holds no prompt, or a line is not such an object, or is an object of JSON
/// in a file of text; the line is named.
pub fn read_prompts(path: &Path) -> Result<Vec<Prompt>> {
    let bytes = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
    let text = match std::str::from_utf8(&bytes) {
        Ok(text) => text,
        Err(error) => {
            let line =
                bytes[..error.valid_up_to()].iter().filter(|byte| **byte == b'\n').count() + 1;
            bail!("{}: line {line} is not UTF-8", path.display());
        }
    };
    let is_json = path.extension().is_some_and(|end| end.eq_ignore_ascii_case("jsonl"));
    let mut seen = HashSet::new();
    let mut prompts = Vec::new();
    // Some editors put a byte order mark first, which is not part of the prompt.
    let lines = text.strip_prefix('\u{feff}').unwrap_or(text).lines().map(str::trim);
    for (number, line) in (1..).zip(lines).filter(|(_, line)| !line.is_empty()) {
        let prompt = if is_json {
            parse(line).with_context(|| format!("{}: line {number}", path.display()))?
        } else {
            ensure!(
                serde_json::from_str::<Map<String, Value>>(line).is_err(),
                "{}: line {number} is an object of JSON: a file of such lines ends with .jsonl",
                path.display()
            );
            Prompt { text: line.to_owned(), negative: None }
        };
        if seen.insert(prompt.clone()) {
            prompts.push(prompt);
        }
    }
    ensure!(!prompts.is_empty(), "{} holds no prompts; one a line is expected", path.display());
    Ok(prompts)
}

fn parse(line: &str) -> Result<Prompt> {
    const EXPECTED: &str = "an object with a text as its \"prompt\" is expected";
    // Through an object, as an array of texts would do for the fields in order.
    let object: Map<String, Value> = serde_json::from_str(line).context(EXPECTED)?;
    let Line { prompt, negative, negative_prompt } =
        serde_json::from_value(object.into()).context(EXPECTED)?;
    let text = prompt.trim().to_owned();
    ensure!(!text.is_empty(), "its prompt is empty");
    let negative = negative.or(negative_prompt).map(|negative| negative.trim().to_owned());
    Ok(Prompt { text, negative })
}
