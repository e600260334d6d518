//! The loop over the updates of a distillation: progress, metrics, saving and going on.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use serde_json::{Value, json};
use tch_training::run::{Interrupt, Log, Progress, StateFolder};

use crate::distil::alarms::Alarms;
use crate::distil::distillation::{Distillation, Record};
use crate::distil::terms::Terms;
use crate::progress::progress_bar;

/// What was observed, with the update it was observed at.
pub type History = Vec<(u64, Record)>;

/// A look at the student on the way.
pub struct Preview {
    /// A line for people.
    pub message: String,
    /// What goes to metrics.jsonl.
    pub entry: Value,
}

/// How often things happen in a training: after every so many updates, 0 for never.
#[derive(Clone, Copy, Debug)]
pub struct Intervals {
    /// The state is saved; besides, it is when the run is interrupted and at the end.
    pub save: u64,
    /// The diagnostics go to metrics.jsonl.
    pub observe: u64,
    /// The student is looked at.
    pub evaluate: u64,
}

/// How the updates of a training ended.
pub enum Outcome {
    /// All are done.
    Finished {
        /// What was observed.
        history: History,
        /// Seconds of all sessions.
        seconds: f64,
    },
    /// The user stopped it; the state is saved.
    Interrupted,
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Its student is there.
    Finished,
    /// The user stopped it after so many updates; its state is saved.
    Interrupted(u64),
}

/// Where a training is written to while it goes on.
struct Session<'s> {
    states: &'s mut StateFolder,
    log: Log,
    start: Instant,
    /// Seconds of earlier sessions.
    before: f64,
    /// The update after which the state was saved last.
    saved: Option<u64>,
}

impl Session<'_> {
    fn seconds(&self) -> f64 {
        self.before + self.start.elapsed().as_secs_f64()
    }

    /// Where an update that failed leaves the run.
    fn kept(&self, update: u64, out: &Path) -> String {
        let state = match self.saved {
            Some(saved) => format!("the state after update {saved} is kept in {}", out.display()),
            None => "no state was saved before".to_owned(),
        };
        format!(
            "update {update} of the student; {state}. The draws are the same each time: a lower learning rate \
             of the student or of the fake score, or another seed, leads elsewhere"
        )
    }

    fn save<T: Terms>(&mut self, distillation: &Distillation<'_, T>) -> Result<()> {
        let log_bytes = self.log.sync()?;
        let progress = Progress { seconds: self.seconds(), log_bytes };
        self.saved = Some(distillation.updates());
        Ok(self.states.save(&distillation.state(), progress)?)
    }
}

/// Runs all updates that are left, and shows the progress. Goes on from the state in `states` if there is
/// one; what is observed goes to metrics.jsonl in the folder `out` and is returned. What is wrong by the
/// diagnostics is said once, on standard error and there ([`Alarms`]).
///
/// # Errors
/// If training breaks down, a file cannot be written, or the saved state does not fit.
pub fn train_student<T: Terms>(
    out: &Path,
    intervals: Intervals,
    distillation: &mut Distillation<'_, T>,
    states: &mut StateFolder,
    evaluate: impl Fn(&Distillation<'_, T>) -> Result<Preview>,
) -> Result<Outcome> {
    let interrupt = Interrupt::install("Saving after this update; Ctrl-C again leaves at once")?;
    let updates = distillation.recipe().updates;
    let saved = states.load()?;
    let progress = saved.as_ref().map(|(_, progress)| *progress).unwrap_or_default();
    let is_resumed = saved.is_some();
    // Taken, so that a second copy of the state is not kept until the end.
    if let Some((tensors, _)) = saved {
        distillation.load_state(&tensors)?;
        println!("Going on after update {} of {updates}", distillation.updates());
    }
    let (log, lines) = Log::open(&out.join("metrics.jsonl"), progress.log_bytes)?;
    let lines = lines.unwrap_or_else(|lost| {
        eprintln!("warning: {lost}: the log starts anew, without what was observed before");
        Vec::new()
    });
    let mut history: History = lines.iter().filter_map(observed).collect();
    let mut alarms = Alarms::default();
    for (update, record) in &history {
        // They were raised then.
        let _ = alarms.look(*update, record);
    }
    let mut session = Session {
        states,
        log,
        start: Instant::now(),
        before: progress.seconds,
        saved: is_resumed.then(|| distillation.updates()),
    };

    let bar =
        progress_bar(Some(updates), "{pos}/{len} updates, {elapsed} gone, {eta} left  {msg}")?;
    bar.set_position(distillation.updates());
    bar.reset_eta();
    while distillation.updates() < updates {
        if !distillation.is_warm() {
            bar.set_message("the fake score alone");
            distillation.warm_up()?;
            distillation.check_gradients()?;
            if interrupt.is_requested() {
                session.save(distillation)?;
                return Ok(Outcome::Interrupted);
            }
            bar.reset_eta();
            continue;
        }
        let observe = is_due(distillation.updates() + 1, intervals.observe);
        let record = distillation.step(observe)?;
        let update = distillation.updates();
        let kept = || session.kept(distillation.updates(), out);
        distillation.check_gradients().with_context(kept)?;
        let of = |name: &str| record.iter().find(|(n, _)| n == name).map_or(f64::NAN, |(_, v)| *v);
        if let Some((name, value)) = record.iter().find(|(_, value)| !value.is_finite()) {
            return Err(anyhow!("training broke down: {name} is {value}")).with_context(kept);
        }
        if of("ca") == 0.0 && !distillation.recipe().guidance.is_neutral() {
            return Err(anyhow!(
                "CFG Augmentation is exactly zero: the teacher answers with and without the caption alike. Are \
                 the features of the captions, or the weights that read them, zero?"
            ))
            .with_context(kept);
        }
        bar.set_message(format!("CA {:.3}  DM {:.4}  fake {:.3}", of("ca"), of("dm"), of("fake")));
        bar.inc(1);
        if observe {
            let mut line = serde_json::Map::new();
            line.insert("update".into(), update.into());
            line.insert("seconds".into(), session.seconds().into());
            line.extend(record.iter().map(|(name, value)| (name.clone(), (*value).into())));
            session.log.write(&line.into())?;
            for alarm in alarms.look(update, &record) {
                bar.suspend(|| eprintln!("warning: update {update}: {}", alarm.text()));
                session.log.write(&json!({ "update": update, "alarm": alarm.name() }))?;
            }
            history.push((update, record));
        }
        if is_due(update, intervals.evaluate) {
            let Preview { message, entry } = evaluate(distillation)?;
            bar.suspend(|| println!("update {update}: {message}"));
            session.log.write(&json!({ "update": update, "student": entry }))?;
        }
        let is_last = update == updates;
        let stop = interrupt.is_requested();
        if is_last || stop || is_due(update, intervals.save) {
            session.save(distillation)?;
        }
        if stop {
            return Ok(Outcome::Interrupted);
        }
    }
    interrupt.leave_at_once();
    bar.finish();
    Ok(Outcome::Finished { history, seconds: session.seconds() })
}

/// Whether something that happens every so many updates happens after this one; 0 is never.
fn is_due(update: u64, every: u64) -> bool {
    every > 0 && update.is_multiple_of(every)
}

/// The record in a line of metrics.jsonl, if it holds one.
fn observed(line: &Value) -> Option<(u64, Record)> {
    let update = line["update"].as_u64()?;
    let record: Record = line
        .as_object()?
        .iter()
        .filter(|(name, _)| !["update", "seconds"].contains(&name.as_str()))
        .map(|(name, value)| Some((name.clone(), value.as_f64()?)))
        // A line of an evaluation holds an object, one of an alarm a text.
        .collect::<Option<_>>()?;
    Some((update, record))
}
