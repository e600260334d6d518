//! Starts this test program again as the ranks of a group, and waits for them in bounded time.

use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The variable that tells a process of this program that it is a rank, and what to do.
pub const CASE: &str = "TCH_C10D_CASE";

/// How long ranks that should not fail may take: long, for the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A port that is free, and outside the range from which the system serves connections: one from that range
/// could be taken by a rank of another test before rank 0 opens it.
pub fn free_port() -> u16 {
    const FIRST: u16 = 15_000;
    const COUNT: u16 = 15_000;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let own = std::process::id() as u16;
    (0..COUNT)
        .map(|_| {
            let step = NEXT.fetch_add(1, Ordering::Relaxed);
            FIRST + own.wrapping_mul(61).wrapping_add(step) % COUNT
        })
        .find(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok())
        .expect("a free port")
}

/// This program, about to act as `case`.
pub fn program(case: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(arguments()).env(CASE, case);
    command
}

/// The arguments that make this program run nothing but `worker`.
pub fn arguments() -> [&'static str; 3] {
    ["worker", "--exact", "--nocapture"]
}

/// A running rank; killed when it is dropped.
pub struct Rank {
    child: Child,
    label: String,
    output: Arc<Mutex<String>>,
    readers: Vec<JoinHandle<()>>,
}

/// How a rank ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    /// What it printed after `RESULT `.
    pub results: Vec<String>,
    pub output: String,
}

/// Starts rank `rank` of `world_size`.
pub fn start(case: &str, rank: usize, world_size: usize, port: u16) -> Rank {
    let mut command = program(case);
    command
        .env("RANK", rank.to_string())
        .env("LOCAL_RANK", rank.to_string())
        .env("WORLD_SIZE", world_size.to_string())
        .env("MASTER_ADDR", "127.0.0.1")
        .env("MASTER_PORT", port.to_string());
    Rank::spawn(command, format!("{case}: rank {rank} of {world_size}"))
}

impl Rank {
    pub fn spawn(mut command: Command, label: String) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let output = Arc::new(Mutex::new(String::new()));
        let readers = vec![
            read(child.stdout.take().unwrap(), Arc::clone(&output)),
            read(child.stderr.take().unwrap(), Arc::clone(&output)),
        ];
        Self { child, label, output, readers }
    }

    /// Waits until the rank prints a line that begins with `words`.
    pub fn wait_for(&self, words: &str, patience: Duration) {
        let deadline = Instant::now() + patience;
        while !self.output.lock().unwrap().lines().any(|line| line.starts_with(words)) {
            assert!(Instant::now() < deadline, "{}: not {words} in {patience:?}", self.label);
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends it without warning.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Waits for the end, and fails if it does not come in time.
    pub fn wait(mut self, patience: Duration) -> Ended {
        let deadline = Instant::now() + patience;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                self.kill();
                let output = self.all_output();
                panic!("{} did not end within {patience:?}:\n{output}", self.label);
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let output = self.all_output();
        let results = output
            .lines()
            .filter_map(|line| line.split_once("RESULT ").map(|(_, result)| result.to_owned()));
        Ended { status, results: results.collect(), output }
    }

    /// What it printed until its end, on both streams.
    fn all_output(&mut self) -> String {
        for reader in self.readers.drain(..) {
            reader.join().unwrap();
        }
        self.output.lock().unwrap().clone()
    }
}

/// Collects the lines of a stream, on a thread of its own.
fn read(stream: impl Read + Send + 'static, output: Arc<Mutex<String>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(stream).lines() {
            let mut output = output.lock().unwrap();
            output.push_str(&line.unwrap());
            output.push('\n');
        }
    })
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Ended {
    /// The one result of a rank that ended by itself.
    pub fn result(&self) -> &str {
        assert!(self.status.success(), "{:?}:\n{}", self.status, self.output);
        match self.results.as_slice() {
            [result] => result,
            other => panic!("{other:?}:\n{}", self.output),
        }
    }
}

/// Runs all ranks of a group to their ends.
pub fn run(case: &str, world_size: usize) -> Vec<Ended> {
    let port = free_port();
    let ranks: Vec<_> = (0..world_size).map(|rank| start(case, rank, world_size, port)).collect();
    ranks.into_iter().map(|rank| rank.wait(PATIENCE)).collect()
}

/// Runs all ranks of a group, each of which must say that all is well.
pub fn run_well(case: &str, world_size: usize) {
    for ended in run(case, world_size) {
        assert_eq!(ended.result(), "well", "{}", ended.output);
    }
}
