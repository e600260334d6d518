//! The table of scores, and report.json.

use std::fmt::Write as _;

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
    pub training_seconds: f64,
    pub evaluation_seconds: f64,
    pub captions: usize,
    pub rows: Vec<Row>,
    pub summary: Summary,
}

/// The student at its full number of steps against the guided teacher.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// Alignment over that of the guided teacher at 50 steps.
    pub alignment_ratio: f64,
    /// Share of the gap between the unguided few-step teacher and the guided teacher at 50 steps.
    pub gap_closed: f64,
    /// Fréchet distance over that of the guided teacher at 50 steps.
    pub frechet_ratio: f64,
    pub variance_drift: f64,
}

impl Summary {
    /// From the scores of guided teacher, unguided few-step teacher and student.
    pub fn new(guided: &Scores, unguided: &Scores, student: &Scores) -> Self {
        Self {
            alignment_ratio: student.alignment / guided.alignment,
            gap_closed: (student.alignment - unguided.alignment)
                / (guided.alignment - unguided.alignment),
            frechet_ratio: student.frechet_distance / guided.frechet_distance,
            variance_drift: student.variance_drift,
        }
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
