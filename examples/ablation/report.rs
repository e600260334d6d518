//! `docs/reproduction.md` from its template and the result files: every number comes from a file.
//!
//! | placeholder | becomes |
//! |---|---|
//! | `{{value ARM FIELD}}` | mean over seeds, with its 95 % interval |
//! | `{{forwards ARM}}` | forwards of an update of the student, on one sample |
//! | `{{at ARM UPDATE FIELD}}` | the same at one update, for what is measured at each, also in so many steps |
//! | `{{seen ARM TIME WHO}}` | last drift of `sample`, `fake` or `teacher` before an observer at this time |
//! | `{{paired ONE TWO FIELD}}` | mean difference of the two over common seeds, with its interval |
//! | `{{verdict ONE TWO FIELD}}` | whether that interval leaves out zero, and on which side |
//! | `{{teacher guided FIELD}}`, `{{teacher 4 FIELD}}`, `{{teacher real FIELD}}` | guided teacher, unguided one at 4 steps, real pictures |
//! | `{{table EXPERIMENT}}` | one row an arm |
//! | `{{steps EXPERIMENT STEPS}}` | one row an arm, its student in so many steps after the last update |
//! | `{{curves EXPERIMENT}}`, `{{spectra EXPERIMENT}}`, `{{observations EXPERIMENT}}` | a plot |
//! | `{{strips EXPERIMENT}}` | pictures of seed 0 over training |
//! | `{{picture NAME}}` | a picture by name |
//! | `{{when EXPERIMENT}}`, `{{unless EXPERIMENT}}` .. `{{end}}` | the text between, if every arm has a run, or if not |
//! | `{{runs}}` | how many runs there are, and what is missing |

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::bench::Measurement;
use super::plots;
use super::results::{Field, Results, Score};
use super::statistics::Interval;

/// Stands where a picture would.
const NO_PICTURE: &str = "*not run*";

/// Writes the document and its plots. Pictures are those that the runs have left in `figures`.
///
/// # Errors
/// If a placeholder is not known, or a file cannot be read or written.
pub fn write(template: &str, document: &Path, figures: &Path, results: &Results) -> Result<()> {
    let folder = document.parent().context("the document needs a folder")?;
    let link = figures.strip_prefix(folder).unwrap_or(figures).display().to_string();
    let report = Report { results, figures, link };
    // What the template says about itself is not for the document.
    let comment = template.strip_prefix("<!--").and_then(|rest| rest.split_once("-->\n"));
    let template = comment.map_or(template, |(_, rest)| rest);
    let mut text = String::new();
    let template = report.chosen(template)?;
    let mut rest = template.as_str();
    while let Some((before, after)) = rest.split_once("{{") {
        let (placeholder, after) = after.split_once("}}").context("a placeholder does not end")?;
        text.push_str(before);
        let filled = report.fill(placeholder).with_context(|| format!("{{{{{placeholder}}}}}"))?;
        text.push_str(&filled);
        rest = after;
    }
    text.push_str(rest);
    fs::write(document, text).with_context(|| format!("writing {}", document.display()))
}

struct Report<'a> {
    results: &'a Results,
    figures: &'a Path,
    /// The folder of the figures, as the document refers to it.
    link: String,
}

impl Report<'_> {
    /// The template with the text of finished or of unfinished experiments only.
    fn chosen(&self, template: &str) -> Result<String> {
        let mut text = String::new();
        let mut rest = template;
        loop {
            let start = ["{{when ", "{{unless "].iter().filter_map(|mark| rest.find(mark)).min();
            let Some(start) = start else { break };
            text.push_str(&rest[..start]);
            let (mark, after) =
                rest[start + 2..].split_once("}}").context("a mark does not end")?;
            let (block, after) = after
                .split_once("{{end}}")
                .with_context(|| format!("{{{{{mark}}}}} has no {{{{end}}}}"))?;
            let (word, experiment) = mark.split_once(' ').context("a mark names an experiment")?;
            if self.is_run(experiment)? == (word == "when") {
                text.push_str(block);
            }
            rest = after;
        }
        text.push_str(rest);
        Ok(text)
    }

    /// Whether every arm of an experiment has a run.
    fn is_run(&self, experiment: &str) -> Result<bool> {
        let arms = &self.results.experiment(experiment)?.arms;
        let missing = arms
            .iter()
            .map(|arm| Ok(self.results.runs(&arm.name)?.is_empty()))
            .collect::<Result<Vec<_>>>()?;
        Ok(!missing.contains(&true))
    }

    fn fill(&self, placeholder: &str) -> Result<String> {
        let words: Vec<&str> = placeholder.split_whitespace().collect();
        match *words {
            ["value", arm, field] => {
                let field = Field::named(field)?;
                Ok(shown(self.results.interval(arm, field)?, field, field.is_signed()))
            }
            ["forwards", name] => {
                let mut arms = self.results.experiments.iter().flat_map(|e| &e.arms);
                let arm = arms.find(|arm| arm.name == name).context("there is no such arm")?;
                Ok(format!("{:.1}", arm.forwards()))
            }
            ["at", arm, update, field] => self.at(arm, update.parse()?, Field::named(field)?),
            ["seen", arm, time, who] => self.seen(arm, time.parse()?, who),
            ["paired", one, two, field] => {
                let field = Field::named(field)?;
                Ok(shown(self.results.paired(one, two, field)?, field, true))
            }
            ["verdict", one, two, field] => {
                Ok(verdict(self.results.paired(one, two, Field::named(field)?)?))
            }
            ["teacher", which, field] => self.teacher(which, Field::named(field)?),
            ["table", experiment] => self.table(experiment),
            ["steps", experiment, steps] => self.steps(experiment, steps.parse()?),
            ["curves", name] => self.plot(name, "curves", plots::write_curves),
            ["spectra", name] => self.plot(name, "spectra", plots::write_spectra),
            ["observations", name] => self.plot(name, "observations", plots::write_observations),
            ["strips", experiment] => self.strips(experiment),
            ["picture", name] => self.picture(name),
            ["runs"] => self.runs(),
            _ => bail!("not a placeholder"),
        }
    }

    fn teacher(&self, which: &str, field: Field) -> Result<String> {
        ensure!(!matches!(field, Field::AtSteps(..)), "the steps of the teacher come first");
        let reference = &self.results.reference;
        let measurement: &Measurement = match which {
            "guided" => &reference.guided,
            "real" => &reference.real,
            steps => {
                let steps = steps.parse().context("expected guided, real or a number of steps")?;
                reference.unguided.get(&steps).context("not measured at these steps")?
            }
        };
        Ok(number(self.measured(measurement, field)?, field.digits(), field.is_signed()))
    }

    fn measured(&self, measurement: &Measurement, field: Field) -> Result<f64> {
        Ok(match field {
            Field::Alignment | Field::AtSteps(_, Score::Alignment) => 100.0 * measurement.alignment,
            Field::Frechet | Field::AtSteps(_, Score::Frechet) => measurement.frechet_distance,
            Field::Drift | Field::AtSteps(_, Score::Drift) => {
                self.results.drift(measurement.variance)
            }
            Field::Saturation => measurement.saturation,
            _ => bail!("not a field of one measurement"),
        })
    }

    fn at(&self, arm: &str, update: u64, field: Field) -> Result<String> {
        let points = self.results.runs(arm)?.iter().flat_map(|run| &run.points);
        let values = points
            .filter(|point| point.update == update)
            .map(|point| {
                let measurement = match field {
                    Field::AtSteps(steps, _) => point.at_steps.get(&steps),
                    _ => Some(&point.measurement),
                };
                self.measured(measurement.context("not measured at these steps")?, field)
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(shown(Interval::of(&values), field, field.is_signed()))
    }

    fn seen(&self, arm: &str, time: f64, who: &str) -> Result<String> {
        let last = self.results.runs(arm)?.iter().filter_map(|run| run.points.last());
        let mut drifts = Vec::new();
        for seen in last.flat_map(|point| &point.observations) {
            if (seen.time - time).abs() < 1e-9 {
                let variance = match who {
                    "sample" => seen.sample,
                    "fake" => seen.fake,
                    "teacher" => seen.teacher,
                    _ => bail!("expected sample, fake or teacher"),
                };
                drifts.push(self.results.drift(variance));
            }
        }
        Ok(shown(Interval::of(&drifts), Field::Drift, true))
    }

    /// One row an arm, the teacher below.
    fn table(&self, experiment: &str) -> Result<String> {
        const FIELDS: [Field; 5] = [
            Field::LateAlignment,
            Field::LateFrechet,
            Field::BestFrechet,
            Field::Drift,
            Field::Saturation,
        ];
        let mut text = String::from(
            "| arm | seeds | alignment, % | Fréchet distance | its best on the way | last drift | \
             last saturation |\n|---|---|---|---|---|---|---|\n",
        );
        let experiment = self.results.experiment(experiment)?;
        for arm in &experiment.arms {
            let runs = self.results.runs(&arm.name)?;
            write!(text, "| {} | {}", arm.name, runs.len())?;
            for field in FIELDS {
                let interval = self.results.interval(&arm.name, field)?;
                write!(text, " | {}", shown(interval, field, field.is_signed()))?;
            }
            let broken = runs.iter().filter(|run| run.broken_after.is_some()).count();
            let note = if broken > 0 { format!(" ({broken} not finite)") } else { String::new() };
            writeln!(text, "{note} |")?;
        }
        let mut steps: Vec<usize> =
            experiment.arms.iter().flat_map(|arm| arm.steps.clone()).collect();
        steps.sort_unstable();
        steps.dedup();
        let unguided = steps.iter().map(|steps| {
            let plural = if *steps == 1 { "" } else { "s" };
            (format!("teacher, {steps} step{plural}, unguided"), steps.to_string())
        });
        let guided = ("teacher, 50 steps, guided".to_owned(), "guided".to_owned());
        for (name, which) in unguided.chain([guided]) {
            let value = |field| self.teacher(&which, field);
            writeln!(
                text,
                "| *{name}* | | {} | {} | | {} | {} |",
                value(Field::Alignment)?,
                value(Field::Frechet)?,
                value(Field::Drift)?,
                value(Field::Saturation)?
            )?;
        }
        Ok(text)
    }

    fn steps(&self, experiment: &str, steps: usize) -> Result<String> {
        let mut text = String::from(
            "| arm | forwards an update | alignment, % | Fréchet distance | drift | diversity |\n|---|---|---|---|---|---|\n",
        );
        let arms = self.results.experiment(experiment)?.arms.iter();
        for arm in arms.filter(|arm| arm.measured_at.contains(&steps)) {
            write!(text, "| {} | {:.1}", arm.name, arm.forwards())?;
            for (_, score) in Score::ALL {
                let field = Field::AtSteps(steps, score);
                let interval = self.results.interval(&arm.name, field)?;
                write!(text, " | {}", shown(interval, field, field.is_signed()))?;
            }
            writeln!(text, " |")?;
        }
        for (name, which) in
            [("unguided, as many steps", steps.to_string()), ("guided, 50 steps", "guided".into())]
        {
            let value = |field| self.teacher(&which, field);
            let diversity = if which == "guided" { "1.00" } else { "" };
            writeln!(
                text,
                "| *teacher, {name}* | | {} | {} | {} | {diversity} |",
                value(Field::Alignment)?,
                value(Field::Frechet)?,
                value(Field::Drift)?
            )?;
        }
        Ok(text)
    }

    fn plot(
        &self,
        name: &str,
        kind: &str,
        draw: impl Fn(&Path, &Results, &super::experiments::Experiment) -> Result<()>,
    ) -> Result<String> {
        let file = format!("{name}-{kind}.svg");
        draw(&self.figures.join(&file), self.results, self.results.experiment(name)?)?;
        Ok(format!("![{kind} of the experiment {name}]({}/{file})", self.link))
    }

    fn strips(&self, experiment: &str) -> Result<String> {
        let arms = &self.results.experiment(experiment)?.arms;
        let present: Vec<&str> = arms
            .iter()
            .map(|arm| arm.name.as_str())
            .filter(|arm| self.figures.join(format!("{arm}.png")).exists())
            .collect();
        if present.is_empty() {
            return Ok(NO_PICTURE.to_owned());
        }
        // Three to a row: that many fit a page.
        let mut text = String::new();
        for row in present.chunks(3) {
            writeln!(text, "| {} |\n|{}", row.join(" | "), "---|".repeat(row.len()))?;
            let images = row.iter().map(|arm| format!("![{arm}]({}/{arm}.png)", self.link));
            writeln!(text, "| {} |\n", images.collect::<Vec<_>>().join(" | "))?;
        }
        Ok(text.trim_end().to_owned())
    }

    fn picture(&self, name: &str) -> Result<String> {
        let file = format!("{name}.png");
        if !self.figures.join(&file).exists() {
            return Ok(NO_PICTURE.to_owned());
        }
        Ok(format!("![{name}]({}/{file})", self.link))
    }

    /// How many runs there are, and which are not.
    fn runs(&self) -> Result<String> {
        let mut missing = Vec::new();
        let mut names: Vec<(&str, usize)> = Vec::new();
        for experiment in &self.results.experiments {
            for arm in &experiment.arms {
                let found = self.results.runs(&arm.name)?.len();
                if !names.iter().any(|(name, _)| *name == arm.name) {
                    names.push((&arm.name, found));
                }
                if (found as u64) < experiment.seeds {
                    let wanted = experiment.seeds;
                    missing
                        .push(format!("{} ({}: {found} of {wanted})", arm.name, experiment.name));
                }
            }
        }
        let total: usize = names.iter().map(|(_, count)| count).sum();
        let rest = if missing.is_empty() {
            "none is missing".to_owned()
        } else {
            format!("not finished, arm by arm (experiment: seeds): {}", missing.join(", "))
        };
        Ok(format!("{total} runs of {} arms; {rest}", names.len()))
    }
}

fn number(value: f64, digits: usize, signed: bool) -> String {
    if signed { format!("{value:+.digits$}") } else { format!("{value:.digits$}") }
}

fn shown(interval: Option<Interval>, field: Field, signed: bool) -> String {
    let Some(Interval { mean, half_width, .. }) = interval else { return "not run".to_owned() };
    let digits = field.digits();
    let mean = number(mean, digits, signed);
    half_width.map_or_else(|| mean.clone(), |half| format!("{mean} ± {half:.digits$}"))
}

fn verdict(interval: Option<Interval>) -> String {
    let Some(interval) = interval else { return "not run".to_owned() };
    let side = if interval.mean > 0.0 { "higher" } else { "lower" };
    match interval {
        Interval { half_width: None, .. } => format!("{side} in the one seed that was run"),
        _ if interval.excludes_zero() => {
            format!("{side} over {} seeds, the interval leaves out zero", interval.count)
        }
        _ => format!("not told apart over {} seeds: the interval holds zero", interval.count),
    }
}
