//! What a training shows in TensorBoard.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use tch_training::run::{EventFile, Shown};

use crate::distil::alarms::Alarm;
use crate::distil::distillation::Record;
use crate::distil::recipe::Recipe;
use crate::distil::training_loop::Preview;

/// The folder of the event files beside metrics.jsonl.
pub(super) const FOLDER: &str = "tensorboard";

/// The event file of a session.
pub(super) struct Board {
    events: EventFile,
    /// Update and seconds of the last observation in this session.
    last: Option<(u64, f64)>,
}

impl Board {
    /// Begins a file in the folder `out` for a training that goes on after the update `resumed`, or begins.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn open(out: &Path, resumed: Option<u64>, recipe: &Recipe) -> Result<Self> {
        let first = resumed.map_or(0, |update| update + 1);
        let mut events = EventFile::create(&out.join(FOLDER), first)?;
        if resumed.is_none() {
            let text = format!("```json\n{}\n```", serde_json::to_string_pretty(recipe)?);
            events.write(0, &[("recipe", Shown::Text(&text))])?;
        }
        Ok(Self { events, last: None })
    }

    /// Shows what was observed at an update, `seconds` after the training began.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn observe(&mut self, update: u64, seconds: f64, record: &Record) -> Result<()> {
        let mut named: Vec<(String, f64)> =
            record.iter().map(|(name, value)| (tag(name), *value)).collect();
        if let Some((before, then)) = self.last.replace((update, seconds)) {
            let each = (seconds - then) / (update - before).max(1) as f64;
            named.push(("time/seconds_per_update".to_owned(), each));
        }
        self.numbers(update, &named)
    }

    /// Shows an alarm as a text.
    ///
    /// # Errors
    /// If it cannot be written.
    pub(super) fn alarm(&mut self, update: u64, alarm: Alarm) -> Result<()> {
        let text = format!("**{}**: {}", alarm.name(), alarm.text());
        Ok(self.events.write(update, &[("alarms", Shown::Text(&text))])?)
    }

    /// Shows the picture of a preview, and its scores.
    ///
    /// # Errors
    /// If the picture cannot be read, or the file not be written.
    pub(super) fn preview(&mut self, update: u64, preview: &Preview) -> Result<()> {
        if let Some(path) = &preview.picture {
            let png = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
            self.events.write(update, &[("preview", Shown::Picture(&png))])?;
        }
        let scores = preview.scores.iter();
        let named: Vec<_> =
            scores.map(|(name, value)| (format!("evaluation/{name}"), *value)).collect();
        self.numbers(update, &named)
    }

    fn numbers(&mut self, update: u64, named: &[(String, f64)]) -> Result<()> {
        if named.is_empty() {
            return Ok(());
        }
        let shown: Vec<(&str, Shown<'_>)> =
            named.iter().map(|(tag, value)| (tag.as_str(), Shown::Number(*value))).collect();
        Ok(self.events.write(update, &shown)?)
    }
}

/// Where a number of a record is shown: losses, then what belongs to a role by quantity, the rest under the term that
/// it is of, or under the samples. The name stays whole, for the guide and metrics.jsonl know it by that.
fn tag(name: &str) -> String {
    for (suffix, group) in [("_gradient", "gradient_norm"), ("_learning_rate", "learning_rate")] {
        if let Some(role) = name.strip_suffix(suffix) {
            return format!("{group}/{role}");
        }
    }
    let group = match name.split_once('_') {
        Some(("x" | "variance" | "not", _)) => "samples",
        Some((term, _)) => term,
        None => "loss",
    };
    format!("{group}/{name}")
}

#[cfg(test)]
mod tests {
    use super::tag;

    #[test]
    fn numbers_are_shown_in_groups() {
        for (name, expected) in [
            ("loss", "loss/loss"),
            ("ca", "loss/ca"),
            ("fake", "loss/fake"),
            ("student_gradient", "gradient_norm/student"),
            ("fake_learning_rate", "learning_rate/fake"),
            ("dm_rel_gap", "dm/dm_rel_gap"),
            ("ca_dm_cos", "ca/ca_dm_cos"),
            ("x_spread", "samples/x_spread"),
            ("variance_drift", "samples/variance_drift"),
            ("not_finite", "samples/not_finite"),
        ] {
            assert_eq!(tag(name), expected);
        }
    }
}
