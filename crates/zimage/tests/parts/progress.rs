//! Progress where nobody watches a terminal.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::Duration;

use anyhow::Result;
use zimage::progress::progress_lines;

/// What was written, by whoever holds a copy.
#[derive(Clone, Default)]
struct Written(Arc<Mutex<Vec<u8>>>);

impl Written {
    fn lines(&self) -> Vec<String> {
        let text = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        text.lines().map(str::to_owned).collect()
    }
}

impl Write for Written {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const TEMPLATE: &str = "{pos}/{len} updates  {msg}";

#[test]
fn a_line_now_and_then_and_no_control_codes() -> Result<()> {
    let written = Written::default();
    let pause = Duration::from_millis(40);
    let bar = progress_lines(Some(6), TEMPLATE, pause, Box::new(written.clone()))?;
    for update in 1..=6 {
        bar.set_message(format!("loss {update}"));
        bar.inc(1);
        if update % 2 == 0 {
            sleep(pause);
        }
    }
    bar.finish();
    // Each on the first occasion after the pause: the next message, or the end.
    assert_eq!(
        written.lines(),
        ["2/6 updates  loss 3", "4/6 updates  loss 5", "6/6 updates  loss 6"]
    );
    Ok(())
}

#[test]
fn short_work_prints_nothing() -> Result<()> {
    let written = Written::default();
    let hour = Duration::from_secs(3600);
    let bar = progress_lines(None, TEMPLATE, hour, Box::new(written.clone()))?;
    bar.set_length(3);
    for _ in 0..3 {
        bar.inc(1);
    }
    bar.finish_and_clear();
    assert!(written.lines().is_empty(), "{:?}", written.lines());
    Ok(())
}

/// Lines that the program prints beside the progress are left whole.
#[test]
fn what_is_printed_beside_it_is_not_lost() -> Result<()> {
    let written = Written::default();
    let bar = progress_lines(Some(2), TEMPLATE, Duration::ZERO, Box::new(written.clone()))?;
    bar.inc(1);
    let mut other = written.clone();
    bar.suspend(|| writeln!(other, "update 1: a look"))?;
    let lines = written.lines();
    assert!(lines.contains(&"update 1: a look".to_owned()), "{lines:?}");
    assert!(
        lines.iter().all(|line| line == "1/2 updates" || line == "update 1: a look"),
        "{lines:?}"
    );
    Ok(())
}
