//! Progress of long work: a bar on a terminal, a line every half minute elsewhere.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

const HALF_A_MINUTE: Duration = Duration::from_secs(30);

/// Shows the progress of `length` steps, or of a number not known yet, on standard error; `template` is
/// indicatif's, without the bar itself.
///
/// # Errors
/// If the template is wrong.
pub fn progress_bar(length: Option<u64>, template: &str) -> Result<ProgressBar> {
    if !io::stderr().is_terminal() {
        return progress_lines(length, template, HALF_A_MINUTE, Box::new(io::stderr()));
    }
    let style = ProgressStyle::with_template(&format!("{{bar:30}} {template}"))?;
    Ok(ProgressBar::with_draw_target(length, ProgressDrawTarget::stderr()).with_style(style))
}

/// The progress as lines to `output`, at least `every` apart: for logs, where a bar cannot be redrawn.
///
/// # Errors
/// If the template is wrong.
pub fn progress_lines(
    length: Option<u64>,
    template: &str,
    every: Duration,
    output: Box<dyn Write + Send>,
) -> Result<ProgressBar> {
    let state = State { line: String::new(), last: Instant::now(), output };
    let lines = Lines { every, state: Mutex::new(state) };
    let target = ProgressDrawTarget::term_like(Box::new(lines));
    Ok(ProgressBar::with_draw_target(length, target)
        .with_style(ProgressStyle::with_template(template)?))
}

/// What indicatif takes for a terminal: it keeps the line that is drawn, and prints it now and then.
struct Lines {
    every: Duration,
    state: Mutex<State>,
}

struct State {
    line: String,
    last: Instant,
    output: Box<dyn Write + Send>,
}

impl Lines {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Lines {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lines").field("every", &self.every).finish_non_exhaustive()
    }
}

impl TermLike for Lines {
    fn width(&self) -> u16 {
        200
    }

    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write_str(text)
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.state().line.push_str(text);
        Ok(())
    }

    fn clear_line(&self) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        let line = std::mem::take(&mut state.line);
        let line = line.trim();
        if line.is_empty() || state.last.elapsed() < self.every {
            return Ok(());
        }
        state.last = Instant::now();
        writeln!(state.output, "{line}")
    }
}
