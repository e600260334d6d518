//! The table of scores, and report.json.

use std::fmt::{self, Write as _};

use serde::Serialize;

use crate::distil::Recipe;
use crate::emoji::evaluation::Row;
use crate::emoji::scores::Scores;

/// `report.json`.
#[derive(Debug, Serialize)]
pub struct Report {
    pub recipe: Recipe,
    pub device: String,
    pub threads: i32,
    /// Updates that were left out since they were not finite.
    pub skipped: u64,
    /// Of all sessions, without the looks on the way.
    pub training_seconds: f64,
    pub evaluation_seconds: f64,
    pub captions: usize,
    pub rows: Vec<Row>,
    pub summary: Summary,
}

/// The student at its full number of steps against the guided teacher. A ratio to nothing is no number.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Alignment over that of the guided teacher at 50 steps.
    pub alignment_ratio: Option<f64>,
    /// Share of the gap between the unguided few-step teacher and the guided teacher at 50 steps.
    pub gap_closed: Option<f64>,
    /// Fréchet distance over that of the guided teacher at 50 steps.
    pub frechet_ratio: Option<f64>,
    pub variance_drift: f64,
}

impl Summary {
    /// From the scores of guided teacher, unguided few-step teacher and student.
    pub fn new(guided: &Scores, unguided: &Scores, student: &Scores) -> Self {
        let ratio = |part: f64, whole: f64| (whole != 0.0).then_some(part / whole);
        Self {
            alignment_ratio: ratio(student.alignment, guided.alignment),
            gap_closed: ratio(
                student.alignment - unguided.alignment,
                guided.alignment - unguided.alignment,
            ),
            frechet_ratio: ratio(student.frechet_distance, guided.frechet_distance),
            variance_drift: student.variance_drift,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |ratio: Option<f64>, digits: usize, of: &str, otherwise: &str| match ratio {
            Some(ratio) => format!("{:.digits$}% of {of}", 100.0 * ratio),
            None => otherwise.to_owned(),
        };
        let frechet = match self.frechet_ratio {
            Some(ratio) => format!("{ratio:.2} times its Fréchet distance"),
            None => "a teacher without Fréchet distance".to_owned(),
        };
        write!(
            f,
            "{}, {}, {frechet}, variance drift {:+.3}",
            percent(self.alignment_ratio, 1, "its alignment", "a teacher without alignment"),
            percent(self.gap_closed, 0, "the gap closed", "no gap to close"),
            self.variance_drift
        )
    }
}

/// The rows as a table for people.
pub fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{:<28} {:>11} {:>10} {:>8} {:>8} {:>8} {:>10}\n",
        "", "evaluations", "alignment", "at 16px", "Fréchet", "drift", "saturation"
    );
    for row in rows {
        let scores = &row.scores;
        let _ = writeln!(
            text,
            "{:<28} {:>11} {:>9.1}% {:>7.1}% {:>8.3} {:>+8.3} {:>10.3}",
            row.name,
            row.evaluations_per_image,
            100.0 * scores.alignment,
            100.0 * scores.alignment_at_16,
            scores.frechet_distance,
            scores.variance_drift,
            scores.saturation
        );
    }
    text
}
