//! The loop over the updates of a distillation: progress, metrics, saving and going on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow};
use indicatif::{HumanDuration, ProgressBar};
use serde_json::{Value, json};
use tch_training::run::{Interrupt, Log, Progress, StateFolder};

use crate::distil::alarms::Alarms;
use crate::distil::distillation::{Distillation, MadeBy, Record, value};
use crate::distil::recipe::Decay;
use crate::distil::tensorboard::Board;
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
    /// Numbers for TensorBoard, and a PNG file.
    pub scores: Record,
    pub picture: Option<PathBuf>,
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
        /// Seconds of all sessions, without the looks at the student.
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

/// Where a training is written to while it goes on: what the first process has.
struct Session<'s> {
    states: &'s mut StateFolder,
    log: Log,
    board: Board,
    history: History,
    alarms: Alarms,
    /// When the session would have begun without its looks at the student.
    start: Instant,
    /// Seconds of earlier sessions.
    before: f64,
    /// The update after which the state was saved last.
    saved: Option<u64>,
}

impl<'s> Session<'s> {
    /// Goes on from the state in `states` if there is one.
    fn open<T: Terms>(
        out: &Path,
        states: &'s mut StateFolder,
        distillation: &mut Distillation<'_, T>,
    ) -> Result<Self> {
        let saved = states.load()?;
        let progress = saved.as_ref().map(|(_, progress)| *progress).unwrap_or_default();
        let is_resumed = saved.is_some();
        // Taken, so that a second copy of the state is not kept until the end.
        if let Some((tensors, _)) = saved {
            let MadeBy { processes, updates: planned } = distillation.load_state(&tensors)?;
            let now = distillation.processes().count() as u64;
            let made_by = if processes == now {
                String::new()
            } else {
                format!(
                    ", which {processes} processes made, with {now}: it draws other numbers from here"
                )
            };
            let (update, updates) = (distillation.updates(), distillation.recipe().updates);
            println!("Going on after update {update} of {updates}{made_by}");
            if planned != updates && distillation.recipe().decay != Decay::None {
                println!(
                    "It was begun for {planned} updates: from here its learning rate falls towards {updates}"
                );
            }
        }
        let (log, lines) = Log::open(&out.join("metrics.jsonl"), progress.log_bytes)?;
        let lines = lines.unwrap_or_else(|lost| {
            eprintln!("warning: {lost}: the log starts anew, without what was observed before");
            Vec::new()
        });
        let resumed = is_resumed.then(|| distillation.updates());
        let board = Board::open(out, resumed, distillation.recipe())?;
        let history: History = lines.iter().filter_map(observed).collect();
        let mut alarms = Alarms::default();
        for (update, record) in &history {
            // They were raised then.
            let _ = alarms.look(*update, record);
        }
        Ok(Self {
            states,
            log,
            board,
            history,
            alarms,
            start: Instant::now(),
            before: progress.seconds,
            saved: resumed,
        })
    }

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
             of the student or of the fake score, or another seed, leads elsewhere, and single updates can be left out \
             (--skip-nonfinite)"
        )
    }

    fn save<T: Terms>(&mut self, distillation: &Distillation<'_, T>) -> Result<()> {
        let log_bytes = self.log.sync()?;
        let progress = Progress { seconds: self.seconds(), log_bytes };
        self.saved = Some(distillation.updates());
        Ok(self.states.save(&distillation.state(), progress)?)
    }

    /// Says that the last update was left out.
    fn leave_out<T: Terms>(
        &mut self,
        why: &str,
        distillation: &Distillation<'_, T>,
        bar: &ProgressBar,
    ) -> Result<()> {
        let (update, count) = (distillation.updates(), distillation.skipped());
        let most = distillation.recipe().skip_nonfinite;
        let what = match update {
            0 => "a warm-up of the fake score".to_owned(),
            update => format!("update {update}"),
        };
        let text = format!("{what} was left out, {count} of at most {most}: {why}");
        bar.suspend(|| eprintln!("warning: {text}"));
        Ok(self.log.write(&json!({ "update": update, "skipped": why }))?)
    }

    fn observe(&mut self, update: u64, record: Record, bar: &ProgressBar) -> Result<()> {
        let (mut line, seconds) = (serde_json::Map::new(), self.seconds());
        line.insert("update".into(), update.into());
        line.insert("seconds".into(), seconds.into());
        line.extend(record.iter().map(|(name, value)| (name.clone(), (*value).into())));
        self.log.write(&line.into())?;
        self.board.observe(update, seconds, &record)?;
        for alarm in self.alarms.look(update, &record) {
            bar.suspend(|| eprintln!("warning: update {update}: {}", alarm.text()));
            self.log.write(&json!({ "update": update, "alarm": alarm.name() }))?;
            self.board.alarm(update, alarm)?;
        }
        self.history.push((update, record));
        Ok(())
    }
}

/// Runs all updates that are left, and shows the progress. Goes on from the state in `states` if there is
/// one; what is observed goes to metrics.jsonl and to event files for TensorBoard in the folder `out`, and is
/// returned. What is wrong by the diagnostics is said once, on standard error and there ([`Alarms`]).
///
/// Of several processes, the first alone has `states`: it gives the others what it goes on from, and writes and
/// evaluates for all. A signal to one of them stops all, after the same update.
///
/// # Errors
/// If training breaks down, a process is lost, a file cannot be written, or the saved state does not fit.
pub fn train_student<'s, T: Terms>(
    out: &Path,
    intervals: Intervals,
    distillation: &mut Distillation<'_, T>,
    states: impl Into<Option<&'s mut StateFolder>>,
    evaluate: impl Fn(&Distillation<'_, T>) -> Result<Preview>,
) -> Result<Outcome> {
    let interrupt = Interrupt::install("Saving after this update; Ctrl-C again leaves at once")?;
    let updates = distillation.recipe().updates;
    let open = |states| Session::open(out, states, distillation);
    let mut session = states.into().map(open).transpose()?;
    let processes = distillation.processes();
    distillation.share()?;
    let (start, before) = (distillation.updates(), processes.statistics());

    let bar = match session {
        Some(_) => progress_bar(Some(updates), "{pos}/{len} updates, {elapsed} gone, {msg}")?,
        None => ProgressBar::hidden(),
    };
    bar.set_position(distillation.updates());
    let mut warm_since = Instant::now();
    while distillation.updates() < updates {
        if !distillation.is_warm() {
            bar.set_message("the fake score alone");
            distillation.warm_up()?;
            distillation.check_finite()?;
            if let (Some(session), Some(why)) = (&mut session, distillation.skipped_for()) {
                session.leave_out(why, distillation, &bar)?;
            }
            if processes.any(interrupt.is_requested())? {
                save(&mut session, distillation)?;
                processes.leave_together();
                return Ok(Outcome::Interrupted);
            }
            warm_since = Instant::now();
            continue;
        }
        let observe = is_due(distillation.updates() + 1, intervals.observe);
        let record = distillation.step(observe)?;
        let update = distillation.updates();
        let kept = || match &session {
            Some(session) => session.kept(distillation.updates(), out),
            None => format!("update {update} of the student"),
        };
        distillation.check_finite().with_context(kept)?;
        let skipped_for = distillation.skipped_for();
        let of = |name: &str| value(&record, name).unwrap_or(f64::NAN);
        let guidance = distillation.recipe().guidance;
        // Within an interval, a batch may lie outside.
        let must_guide = !guidance.is_neutral() && guidance.interval().is_none();
        if of("ca") == 0.0 && must_guide && skipped_for.is_none() {
            return Err(anyhow!(
                "CFG Augmentation is exactly zero: the teacher answers with and without the caption alike. Are \
                 the features of the captions, or the weights that read them, zero?"
            ))
            .with_context(kept);
        }
        let left = time_left(warm_since, update - start, updates - update);
        let [ca, dm, fake] = ["ca", "dm", "fake"].map(of);
        bar.set_message(format!("{left:#} left  CA {ca:.3}  DM {dm:.4}  fake {fake:.3}"));
        bar.inc(1);
        if let Some(session) = &mut session {
            if let Some(why) = skipped_for {
                session.leave_out(why, distillation, &bar)?;
            } else if observe {
                session.observe(update, record, &bar)?;
            }
            if is_due(update, intervals.evaluate) {
                let look = Instant::now();
                let preview = evaluate(distillation)?;
                session.start += look.elapsed();
                bar.suspend(|| println!("update {update}: {}", preview.message));
                session.log.write(&json!({ "update": update, "student": preview.entry }))?;
                session.board.preview(update, &preview)?;
            }
        }
        let is_last = update == updates;
        let stop = processes.any(interrupt.is_requested())?;
        if is_last || stop || is_due(update, intervals.save) {
            save(&mut session, distillation)?;
        }
        if stop {
            processes.leave_together();
            return Ok(Outcome::Interrupted);
        }
    }
    processes.leave_together();
    interrupt.leave_at_once();
    bar.finish();
    let Some(session) = session else {
        return Ok(Outcome::Finished { history: History::new(), seconds: 0.0 });
    };
    let skipped = distillation.skipped();
    if skipped > 0 {
        println!("Left out since they were not finite: {skipped} of {updates} updates");
    }
    if let Some(exchanged) = processes.exchanged(before, updates - start) {
        println!("{exchanged}");
    }
    Ok(Outcome::Finished { seconds: session.seconds(), history: session.history })
}

fn save<T: Terms>(
    session: &mut Option<Session<'_>>,
    distillation: &Distillation<'_, T>,
) -> Result<()> {
    session.as_mut().map_or(Ok(()), |session| session.save(distillation))
}

/// By the mean time of the updates since `start`: that of the last few is noise, as machines have other work to do.
fn time_left(start: Instant, done: u64, left: u64) -> HumanDuration {
    HumanDuration(start.elapsed().mul_f64(left as f64 / done.max(1) as f64))
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
