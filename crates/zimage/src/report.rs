//! What a run leaves behind: the table, report.json and the curves.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;
use serde::Serialize;

use super::distillation::Record;
use super::evaluation::Row;
use super::metrics::Scores;
use super::recipe::Recipe;

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

/// The name of the letters in plots: brought along for PNG files and to measure texts, the reader's in SVG
/// files.
pub const FONT: &str = "sans-serif";

/// Tells the plotting library the letters of [`FONT`].
///
/// # Errors
/// If they are no font.
pub fn register_font() -> Result<()> {
    let letters = epaint_default_fonts::UBUNTU_LIGHT;
    plotters::style::register_font(FONT, FontStyle::Normal, letters)
        .map_err(|_| anyhow!("the letters of the plots are no font"))
}

/// Draws panels over the updates of the student, one curve a name.
///
/// # Errors
/// If the file cannot be written.
pub fn write_curves(path: &Path, history: &[(u64, Record)]) -> Result<()> {
    const PANELS: [(&str, &[&str]); 4] = [
        ("Losses", &["ca", "dm", "fake"]),
        ("Teacher and fake score: cosine of the velocities", &["dm_cos"]),
        ("Gap of the two, and DM over CA", &["dm_rel_gap", "dm_to_ca"]),
        ("Variance drift against the data", &["variance_drift"]),
    ];
    register_font()?;
    draw(path, history, &PANELS).map_err(|error| anyhow!("drawing {}: {error}", path.display()))
}

fn draw(
    path: &Path,
    history: &[(u64, Record)],
    panels: &[(&str, &[&str])],
) -> Result<(), Box<dyn std::error::Error>> {
    let root = SVGBackend::new(path, (1000, 700)).into_drawing_area();
    root.fill(&WHITE)?;
    for (area, (title, names)) in root.split_evenly((2, 2)).iter().zip(panels) {
        let curves: Vec<(&str, Vec<(f64, f64)>)> =
            names.iter().map(|name| (*name, curve(history, name))).collect();
        let points = || curves.iter().flat_map(|(_, points)| points);
        let last = points().map(|(x, _)| *x).fold(1.0, f64::max);
        let low = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
        let high = points().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
        if !(low.is_finite() && high.is_finite()) {
            continue;
        }
        let margin = (0.05 * (high - low)).max(1e-3);
        let mut chart = ChartBuilder::on(area)
            .caption(title, (FONT, 18))
            .margin(12)
            .x_label_area_size(32)
            .y_label_area_size(56)
            .build_cartesian_2d(0.0..last, low - margin..high + margin)?;
        chart.configure_mesh().x_desc("update of the student").light_line_style(WHITE).draw()?;
        for (index, (name, points)) in curves.into_iter().enumerate() {
            let color = Palette99::pick(index).to_rgba();
            chart
                .draw_series(LineSeries::new(points, color.stroke_width(2)))?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 16, y)], color));
        }
        chart.configure_series_labels().background_style(WHITE.mix(0.8)).draw()?;
    }
    root.present()?;
    Ok(())
}

fn curve(history: &[(u64, Record)], name: &str) -> Vec<(f64, f64)> {
    let value = |record: &Record| record.iter().find(|(n, _)| n == name).map(|(_, v)| *v);
    history
        .iter()
        .filter_map(|(update, record)| Some((*update as f64, value(record)?)))
        .filter(|(_, y)| y.is_finite())
        .collect()
}
