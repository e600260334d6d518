//! Curves over the updates, spectra, and what observers saw, as SVG and as PNG.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use zimage::distil::FONT;
use zimage::distil::register_font;

use super::experiments::Experiment;
use super::record::{Point, RunRecord};
use super::results::Results;

/// Size of one entry of the legend.
const LEGEND_WIDTH: u32 = 190;
const LEGEND_HEIGHT: u32 = 20;

type Curve = Vec<(f64, f64)>;
type Area<B> = DrawingArea<B, Shift>;
type Drawn = Result<(), Box<dyn std::error::Error>>;

/// Curves under one name: a thin one a seed, a bold one for their mean.
struct Bundle {
    name: String,
    curves: Vec<Curve>,
}

/// One diagram.
struct Panel {
    title: &'static str,
    x_axis: &'static str,
    bundles: Vec<Bundle>,
}

/// Alignment, Fréchet distance, drift and saturation of all arms of an experiment.
///
/// # Errors
/// If the file cannot be written.
pub fn write_curves(path: &Path, results: &Results, experiment: &Experiment) -> Result<()> {
    type Read<'a> = &'a dyn Fn(&Point) -> f64;
    let drift = |point: &Point| results.drift(point.measurement.variance);
    let panels: [(&'static str, Read<'_>); 4] = [
        ("Alignment, %", &|point| 100.0 * point.measurement.alignment),
        ("Fréchet distance", &|point| point.measurement.frechet_distance),
        ("Variance drift against the guided teacher", &drift),
        ("Saturation", &|point| point.measurement.saturation),
    ];
    let panels = panels
        .into_iter()
        .map(|(title, read)| {
            let bundles = bundles(results, experiment, |run| {
                run.points.iter().map(|point| (point.update as f64, read(point))).collect()
            })?;
            Ok(Panel { title, x_axis: "update of the student", bundles })
        })
        .collect::<Result<Vec<_>>>()?;
    write(path, &panels, 2)
}

/// Where the power of the change of the samples is, as shares of all of it over frequencies, at the first
/// measurement after the start and at the last.
///
/// # Errors
/// If the file cannot be written.
pub fn write_spectra(path: &Path, results: &Results, experiment: &Experiment) -> Result<()> {
    let share = |point: Option<&Point>| -> Curve {
        let spectrum = point.map_or(&[][..], |point| &point.change_spectrum);
        let all: f64 = spectrum.iter().sum();
        (0..).zip(spectrum).map(|(ring, power)| (f64::from(ring), power / all)).collect()
    };
    let x_axis = "periods to an image";
    let panels = [
        Panel {
            title: "Share of the change's power, first measurement",
            x_axis,
            bundles: bundles(results, experiment, |run| share(run.points.get(1)))?,
        },
        Panel {
            title: "Last measurement",
            x_axis,
            bundles: bundles(results, experiment, |run| share(run.points.last()))?,
        },
    ];
    write(path, &panels, 2)
}

/// Drift of samples and of what fake score and teacher make of them, for each time that was looked at.
///
/// # Errors
/// If the file cannot be written.
pub fn write_observations(path: &Path, results: &Results, experiment: &Experiment) -> Result<()> {
    const TITLES: [&str; 3] =
        ["Seen at a noisy time, 0.2", "Seen at time 0.5", "Seen at a clean time, 0.8"];
    let runs = || {
        experiment
            .arms
            .iter()
            .filter_map(|arm| results.runs(&arm.name).ok())
            .flat_map(<[RunRecord]>::iter)
    };
    let mut panels = Vec::new();
    for (index, title) in TITLES.into_iter().enumerate() {
        let curves = |read: fn(&super::bench::Observation) -> f64| {
            runs()
                .map(|run| {
                    run.points
                        .iter()
                        .filter_map(|point| {
                            let seen = point.observations.get(index)?;
                            Some((point.update as f64, results.drift(read(seen))))
                        })
                        .collect()
                })
                .collect()
        };
        let bundle = |name: &str, read| Bundle { name: name.to_owned(), curves: curves(read) };
        panels.push(Panel {
            title,
            x_axis: "update of the student",
            bundles: vec![
                bundle("sample", |seen| seen.sample),
                bundle("fake score", |seen| seen.fake),
                bundle("teacher", |seen| seen.teacher),
            ],
        });
    }
    write(path, &panels, 3)
}

fn bundles(
    results: &Results,
    experiment: &Experiment,
    curve: impl Fn(&RunRecord) -> Curve,
) -> Result<Vec<Bundle>> {
    experiment
        .arms
        .iter()
        .map(|arm| {
            let curves = results.runs(&arm.name)?.iter().map(&curve).collect();
            Ok(Bundle { name: arm.name.clone(), curves })
        })
        .collect()
}

impl Bundle {
    fn name(&self) -> &str {
        &self.name
    }

    /// Mean over the curves at the places that all of them have.
    fn mean(&self) -> Curve {
        let shortest = self.curves.iter().map(Vec::len).min().unwrap_or(0);
        let count = self.curves.len() as f64;
        let mean = |index: usize| {
            let sum: f64 = self.curves.iter().map(|curve| curve[index].1).sum();
            (self.curves[0][index].0, sum / count)
        };
        (0..shortest).map(mean).collect()
    }
}

/// Writes `path` with the endings `svg` and `png`.
fn write(path: &Path, panels: &[Panel], columns: usize) -> Result<()> {
    let folder = path.parent().context("a plot needs a folder")?;
    std::fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let rows = panels.len().div_ceil(columns) as u32;
    let names: Vec<&str> =
        panels.first().map_or(&[][..], |panel| &panel.bundles).iter().map(Bundle::name).collect();
    let width = 460 * columns as u32;
    let legend_rows = (names.len() as u32).div_ceil(width / LEGEND_WIDTH);
    let size = (width, 320 * rows + LEGEND_HEIGHT * legend_rows + 8);
    let both = || -> Drawn {
        register_font()?;
        let svg = path.with_extension("svg");
        let svg = SVGBackend::new(&svg, size).into_drawing_area();
        draw(&svg, panels, (rows, columns), &names)?;
        let mut pixels = vec![0; 3 * (size.0 * size.1) as usize];
        let png = BitMapBackend::with_buffer(&mut pixels, size).into_drawing_area();
        draw(&png, panels, (rows, columns), &names)?;
        drop(png);
        image::save_buffer(
            path.with_extension("png"),
            &pixels,
            size.0,
            size.1,
            image::ColorType::Rgb8,
        )?;
        Ok(())
    };
    both().map_err(|error| anyhow!("drawing {}: {error}", path.display()))
}

fn draw<B: DrawingBackend<ErrorType: 'static>>(
    root: &Area<B>,
    panels: &[Panel],
    (rows, columns): (u32, usize),
    names: &[&str],
) -> Drawn {
    root.fill(&WHITE)?;
    let (above, legend) = root.split_vertically(320 * rows);
    for (area, panel) in above.split_evenly((rows as usize, columns)).iter().zip(panels) {
        draw_panel(area, panel)?;
    }
    draw_legend(&legend, names, 460 * columns as u32)?;
    root.present()?;
    Ok(())
}

/// One legend for all diagrams, below them, where it hides no curve.
fn draw_legend<B: DrawingBackend<ErrorType: 'static>>(
    area: &Area<B>,
    names: &[&str],
    width: u32,
) -> Drawn {
    let across = (width / LEGEND_WIDTH) as usize;
    for (index, name) in names.iter().enumerate() {
        let x = 20 + (index % across) as i32 * LEGEND_WIDTH as i32;
        let y = (index / across) as i32 * LEGEND_HEIGHT as i32 + 8;
        area.draw(&PathElement::new([(x, y), (x + 20, y)], color(index).stroke_width(3)))?;
        area.draw(&Text::new((*name).to_owned(), (x + 26, y - 7), (FONT, 13)))?;
    }
    Ok(())
}

/// Colours that those who see few of them tell apart too (Okabe and Ito).
fn color(index: usize) -> RGBColor {
    const COLORS: [(u8, u8, u8); 8] = [
        (0, 114, 178),
        (213, 94, 0),
        (0, 158, 115),
        (204, 121, 167),
        (86, 180, 233),
        (230, 159, 0),
        (0, 0, 0),
        (140, 140, 140),
    ];
    let (red, green, blue) = COLORS[index % COLORS.len()];
    RGBColor(red, green, blue)
}

fn draw_panel<B: DrawingBackend<ErrorType: 'static>>(area: &Area<B>, panel: &Panel) -> Drawn {
    let points = || panel.bundles.iter().flat_map(|bundle| &bundle.curves).flatten();
    let last = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let low = points().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = points().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    if !(low.is_finite() && high.is_finite()) {
        return Ok(());
    }
    let margin = (0.05 * (high - low)).max(1e-3);
    let mut chart = ChartBuilder::on(area)
        .caption(panel.title, (FONT, 16))
        .margin(10)
        .x_label_area_size(32)
        .y_label_area_size(52)
        .build_cartesian_2d(0.0..last, low - margin..high + margin)?;
    chart.configure_mesh().x_desc(panel.x_axis).light_line_style(WHITE).draw()?;
    for (index, bundle) in panel.bundles.iter().enumerate() {
        if bundle.curves.len() > 1 {
            for curve in &bundle.curves {
                chart.draw_series(LineSeries::new(curve.clone(), color(index).mix(0.3)))?;
            }
        }
        chart.draw_series(LineSeries::new(bundle.mean(), color(index).stroke_width(2)))?;
    }
    Ok(())
}
