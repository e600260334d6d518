//! Whatever goes wrong, every rank ends with an error, and soon.

use std::net::TcpListener;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use tch::{Device, Kind, Tensor};
use tch_c10d::{Error, Launch, Options, ProcessGroup, Reduce};

use crate::harness::{self, PATIENCE, free_port, start};

/// The longest wait of ranks that are about to fail.
const TIMEOUT: Duration = Duration::from_secs(2);

/// Beyond the time-outs: a busy machine needs time to start and end processes.
const SLACK: Duration = Duration::from_secs(60);

fn options(connect: Duration) -> Options {
    Options::default().connect_timeout(connect).timeout(TIMEOUT)
}

fn one() -> Tensor {
    Tensor::ones([1000], (Kind::Float, Device::Cpu))
}

/// A rank that joins with a time-out of `seconds` and says how it went.
pub fn connect(seconds: &str) -> String {
    println!("started");
    let timeout = Duration::from_secs_f64(seconds.parse().unwrap());
    match ProcessGroup::new(&Launch::from_env().unwrap(), &options(timeout)) {
        Ok(group) => {
            let mut tensor = one();
            group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
            format!("joined {}", tensor.double_value(&[0]))
        }
        Err(error) => describe(&error),
    }
}

/// The error in a form to compare.
fn describe(error: &Error) -> String {
    eprintln!("{error}");
    match error {
        Error::Absent { missing, .. } => format!("absent {missing:?}"),
        Error::WorldSize { other_rank, other, .. } => format!("rank {other_rank} has size {other}"),
        Error::RankTaken { rank } => format!("taken {rank}"),
        Error::PortInUse { port, .. } => format!("in use {port}"),
        Error::Store { .. } => "store".into(),
        Error::TimedOut { operation, .. } => format!("timed out in {operation}"),
        Error::Peer { operation, .. } => format!("peer lost in {operation}"),
        Error::Broken { operation, since, .. } => format!("{operation} after {since}"),
        other => format!("{other:?}"),
    }
}

/// A rank that comes late is waited for; all work then.
#[test]
fn a_late_rank_is_waited_for() {
    let port = free_port();
    let first = start("connect 60", 1, 2, port);
    first.wait_for("started", PATIENCE);
    std::thread::sleep(Duration::from_millis(1500));
    let second = start("connect 60", 0, 2, port);
    for rank in [first, second] {
        assert_eq!(rank.wait(PATIENCE).result(), "joined 2");
    }
}

/// A rank that does not come is named on all that did.
#[test]
fn a_missing_rank_is_named() {
    let port = free_port();
    let second = start("connect 60", 1, 3, port);
    second.wait_for("started", PATIENCE);
    // Rank 1 tries again about every second to reach the store.
    let first = start("connect 5", 0, 3, port);
    for rank in [first, second] {
        assert_eq!(rank.wait(SLACK).result(), "absent [2]");
    }
}

/// Without rank 0 there is nobody to say what is wrong but the store that does not answer.
#[test]
fn a_missing_store_ends_the_wait() {
    let start_time = Instant::now();
    let ended = start("connect 1", 1, 2, free_port()).wait(SLACK);
    assert_eq!(ended.result(), "store");
    assert!(start_time.elapsed() > Duration::from_secs(1));
}

/// Another program at the port: rank 0 says so, and the others do not wait for ever for its answer.
#[test]
fn a_port_in_use_is_named() {
    let other = TcpListener::bind(("0.0.0.0", free_port())).unwrap();
    let port = other.local_addr().unwrap().port();
    let ranks = [0, 1].map(|rank| start("connect 1", rank, 2, port));
    let ended = ranks.map(|rank| rank.wait(SLACK));
    assert_eq!(ended[0].result(), format!("in use {port}"));
    assert_eq!(ended[1].result(), "store");
}

/// Two numbers of processes: each rank is told of the other.
#[test]
fn a_wrong_number_of_processes_is_named() {
    let port = free_port();
    let ranks = [(0, 2), (1, 3)].map(|(rank, size)| start("connect 30", rank, size, port));
    let ended = ranks.map(|rank| rank.wait(PATIENCE));
    assert_eq!(ended[0].result(), "rank 1 has size 3");
    assert_eq!(ended[1].result(), "rank 0 has size 2");
}

/// Two processes with one rank: the second is refused, and the rank that is missing for it is named.
#[test]
fn a_rank_given_twice_is_named() {
    let port = free_port();
    let twins = [1, 1].map(|rank| start("connect 60", rank, 3, port));
    for rank in &twins {
        rank.wait_for("started", PATIENCE);
    }
    let first = start("connect 5", 0, 3, port);
    let [one, other] = twins;
    let mut results = [first, one, other].map(|rank| rank.wait(SLACK).result().to_owned());
    results.sort();
    assert_eq!(results, ["absent [2]", "absent [2]", "taken 1"]);
}

/// A rank that reduces until it fails, and then once more.
pub fn reduce_for_ever() -> String {
    let group =
        match ProcessGroup::new(&Launch::from_env().unwrap(), &options(Duration::from_secs(3))) {
            Ok(group) => group,
            Err(error) => return describe(&error),
        };
    println!("connected");
    // Larger than the buffers of a connection.
    let mut tensor = Tensor::zeros([1 << 18], (Kind::Float, Device::Cpu));
    loop {
        if let Err(error) = group.all_reduce(&mut tensor, Reduce::Mean) {
            let again = group.barrier().unwrap_err();
            assert!(!error.leaves_group_usable() && matches!(again, Error::Broken { .. }));
            return describe(&error);
        }
    }
}

/// A generator of numbers, by the formula of SplitMix64.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

/// A rank killed at a random moment, while the ranks start or while they reduce: the others end by
/// themselves, with an error. `TCH_C10D_SEED` repeats a run, `TCH_C10D_KILLS` makes it longer.
#[test]
fn a_killed_rank_ends_the_others() {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number("TCH_C10D_SEED").unwrap_or(time.as_nanos() as u64);
    println!("TCH_C10D_SEED={seed}");
    let mut state = seed;
    for attempt in 0..number("TCH_C10D_KILLS").unwrap_or(4) {
        let victim = (next(&mut state) % 3) as usize;
        let port = free_port();
        let mut ranks: Vec<_> =
            (0..3).map(|rank| start("reduce_for_ever", rank, 3, port)).collect();
        let range = if attempt % 4 == 0 {
            1000
        } else {
            // The others may have connected already, or are about to.
            ranks[(next(&mut state) % 3) as usize].wait_for("connected", PATIENCE);
            200
        };
        let moment = Duration::from_millis(next(&mut state) % range);
        std::thread::sleep(moment);
        let mut killed = ranks.remove(victim);
        killed.kill();
        let killed = killed.wait(SLACK);
        assert!(!killed.status.success(), "{}", killed.output);
        let connected = killed.output.contains("connected");
        for rank in ranks {
            let ended = rank.wait(SLACK);
            let result = ended.result();
            println!("rank {victim} killed after {moment:?}, connected: {connected}: {result}");
            let expected: &[&str] = &["peer lost", "timed out", "absent", "store"];
            assert!(expected.iter().any(|words| result.starts_with(words)), "{}", ended.output);
        }
    }
}

/// A rank that stands still without ending, as on a machine that hangs: the others time out.
#[test]
fn a_stopped_rank_times_out() {
    let port = free_port();
    let mut ranks: Vec<_> = (0..2).map(|rank| start("skip_one stop", rank, 2, port)).collect();
    let stopped = ranks.pop().unwrap();
    let first = ranks.pop().unwrap();
    assert_eq!(first.wait(PATIENCE).result(), "timed out in all_reduce");
    drop(stopped);
}

/// Ranks that make different numbers of calls: the one that waits times out, the other then fails too.
#[test]
fn a_skipped_call_times_out() {
    let ended = harness::run("skip_one sleep", 2);
    assert_eq!(ended[0].result(), "timed out in all_reduce");
    assert_eq!(ended[1].result(), "peer lost in barrier");
}

/// A rank that ends before the others is noticed at once.
#[test]
fn a_rank_that_ends_early_is_noticed() {
    let ended = harness::run("skip_one end", 2);
    assert_eq!(ended[0].result(), "peer lost in all_reduce");
    assert_eq!(ended[1].result(), "ended");
}

/// Rank 0 reduces twice, rank 1 once.
pub fn skip_one(then: &str) -> String {
    let launch = Launch::from_env().unwrap();
    let group = ProcessGroup::new(&launch, &options(PATIENCE)).unwrap();
    group.all_reduce(&mut one(), Reduce::Sum).unwrap();
    if group.rank() == 0 {
        return describe(&group.all_reduce(&mut one(), Reduce::Sum).unwrap_err());
    }
    match then {
        "end" => "ended".into(),
        "sleep" => {
            // The process of rank 0 ends after its time-out.
            std::thread::sleep(5 * TIMEOUT / 2);
            describe(&group.barrier().unwrap_err())
        }
        _ => {
            let stop =
                Command::new("kill").args(["-STOP", &std::process::id().to_string()]).status();
            panic!("stopped and continued: {stop:?}");
        }
    }
}

#[test]
fn options_are_checked() {
    let launch = Launch::new(0, 2, "127.0.0.1", 1).unwrap();
    for (options, name) in [
        (Options::default().timeout(Duration::ZERO), "timeout"),
        (Options::default().connect_timeout(Duration::ZERO), "connect_timeout"),
    ] {
        match ProcessGroup::new(&launch, &options) {
            Err(Error::Argument { what, .. }) => assert_eq!(what, name),
            other => panic!("{other:?}"),
        }
    }
}
