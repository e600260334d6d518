//! Curves of a training as a picture.

use std::path::Path;

use anyhow::{Result, anyhow};
use plotters::prelude::*;

use crate::distil::distillation::{Record, value};

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
    history
        .iter()
        .filter_map(|(update, record)| Some((*update as f64, value(record, name)?)))
        // Numbers of a training are float32; beyond them the axis would have no end.
        .filter(|(_, y)| y.abs() <= f64::from(f32::MAX))
        .collect()
}
