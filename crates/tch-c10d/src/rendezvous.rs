//! How the processes of a launch find each other, and how they learn that they do not fit together.
//!
//! Every rank writes the number of processes that it was started for into the store. Rank 0 waits for all,
//! compares, and writes a verdict that all ranks read. So a rank that is missing, that is there twice or
//! that counts differently is named on every rank, before a connection is made.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ffi::{Failure, Store};
use crate::launch::StoreAddress;
use crate::{Error, Launch, Result};

/// Opens the store and returns it when all ranks are there.
pub(crate) fn meet(launch: &Launch, address: &StoreAddress, timeout: Duration) -> Result<Store> {
    let rank = launch.rank();
    let start = Instant::now();
    let server = rank == 0 && !address.served;
    let prefix = format!("tch-c10d/{}/{}", address.restarts, count_groups(rank, address));
    let store =
        Store::open(&address.host, address.port, server, timeout, &prefix).map_err(|failure| {
            if server && failure.reason.contains("EADDRINUSE") {
                Error::PortInUse { rank, port: address.port }
            } else {
                store_error(rank, address, failure)
            }
        })?;
    let failed = |failure| store_error(rank, address, failure);
    let left = || timeout.saturating_sub(start.elapsed());

    if store.add(&format!("taken/{rank}"), 1).map_err(failed)? > 1 {
        return Err(Error::RankTaken { rank });
    }
    store.set(&format!("size/{rank}"), &launch.world_size().to_string()).map_err(failed)?;
    if rank == 0 {
        let verdict = judge(&store, launch.world_size(), left);
        store.set("verdict", &verdict.to_text()).map_err(failed)?;
        if !verdict.is_good() {
            wait_for_readers(&store, launch.world_size());
        }
        verdict.into_result(launch, start.elapsed())?;
    } else {
        // Rank 0 may have come later, and waits for as long as this rank.
        let text =
            store.get("verdict", left() + timeout + Duration::from_secs(1)).map_err(failed)?;
        store.set(&format!("read/{rank}"), "").map_err(failed)?;
        Verdict::from_text(&text)
            .ok_or_else(|| {
                failed(Failure { timed_out: false, reason: format!("verdict {text:?}") })
            })?
            .into_result(launch, timeout)?;
    }
    Ok(store)
}

fn store_error(rank: usize, address: &StoreAddress, failure: Failure) -> Error {
    Error::Store { rank, address: address.to_string(), reason: failure.reason }
}

/// How many groups this rank made at this address before: each has its own keys in the store.
fn count_groups(rank: usize, address: &StoreAddress) -> u64 {
    static GROUPS: Mutex<BTreeMap<String, u64>> = Mutex::new(BTreeMap::new());
    let mut groups = GROUPS.lock().unwrap_or_else(PoisonError::into_inner);
    let count = groups.entry(format!("{rank} at {address}")).or_default();
    *count += 1;
    *count - 1
}

/// What rank 0 found.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// All ranks of this number of processes are there.
    Good { world_size: usize },
    /// Ranks that did not come.
    Absent { missing: Vec<usize> },
    /// A rank that was started for another number of processes than rank 0.
    Size { rank: usize, size: usize, world_size: usize },
    /// The store failed on rank 0.
    Failed { reason: String },
}

/// Waits on rank 0 for the numbers of all ranks.
fn judge(store: &Store, world_size: usize, left: impl Fn() -> Duration) -> Verdict {
    let mut missing = Vec::new();
    for rank in 0..world_size {
        // After the time is up, a short look at the other ranks: which of them are there?
        let wait = left().max(Duration::from_millis(10));
        match store.get(&format!("size/{rank}"), wait) {
            Ok(text) => match text.parse() {
                Ok(size) if size == world_size => {}
                Ok(size) => return Verdict::Size { rank, size, world_size },
                Err(_) => {
                    return Verdict::Failed { reason: format!("size of rank {rank} is {text:?}") };
                }
            },
            Err(failure) if failure.timed_out => missing.push(rank),
            Err(failure) => return Verdict::Failed { reason: failure.reason },
        }
    }
    if missing.is_empty() { Verdict::Good { world_size } } else { Verdict::Absent { missing } }
}

/// Keeps the store up until the others know why the launch ends, for two seconds at most.
fn wait_for_readers(store: &Store, world_size: usize) {
    let end = Instant::now() + Duration::from_secs(2);
    for rank in 1..world_size {
        let left = end.saturating_duration_since(Instant::now());
        // Ranks that never came cannot read: only those that came are waited for.
        let came = store.get(&format!("size/{rank}"), Duration::from_millis(1)).is_ok();
        if came && store.get(&format!("read/{rank}"), left).is_err() {
            return;
        }
    }
}

impl Verdict {
    fn is_good(&self) -> bool {
        matches!(self, Self::Good { .. })
    }

    fn to_text(&self) -> String {
        match self {
            Self::Good { world_size } => format!("good {world_size}"),
            Self::Absent { missing } => {
                // A store's value is short: the first ranks tell which machine is missing.
                let ranks: Vec<_> = missing.iter().take(64).map(usize::to_string).collect();
                format!("absent {}", ranks.join(" "))
            }
            Self::Size { rank, size, world_size } => format!("size {rank} {size} {world_size}"),
            Self::Failed { reason } => format!("failed {reason}"),
        }
    }

    fn from_text(text: &str) -> Option<Self> {
        let (word, rest) = text.split_once(' ')?;
        let numbers =
            || rest.split(' ').map(|number| number.parse().ok()).collect::<Option<Vec<_>>>();
        Some(match word {
            "good" => Self::Good { world_size: rest.parse().ok()? },
            "absent" => Self::Absent { missing: numbers()? },
            "size" => match numbers()?.as_slice() {
                &[rank, size, world_size] => Self::Size { rank, size, world_size },
                _ => return None,
            },
            "failed" => Self::Failed { reason: rest.to_owned() },
            _ => return None,
        })
    }

    fn into_result(self, launch: &Launch, waited: Duration) -> Result<()> {
        let (rank, own) = (launch.rank(), launch.world_size());
        match self {
            Self::Good { world_size } if world_size == own => Ok(()),
            Self::Good { world_size } => {
                Err(Error::WorldSize { rank, own, other_rank: 0, other: world_size })
            }
            Self::Absent { missing } => Err(Error::Absent { rank, missing, waited }),
            Self::Size { rank: other_rank, size, world_size } => {
                // Seen from a rank that differs from rank 0, rank 0 is the other.
                let (other_rank, other) =
                    if size == own { (0, world_size) } else { (other_rank, size) };
                Err(Error::WorldSize { rank, own, other_rank, other })
            }
            Self::Failed { reason } => Err(Error::Store { rank, address: "rank 0".into(), reason }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_survive_the_store() {
        for verdict in [
            Verdict::Good { world_size: 8 },
            Verdict::Absent { missing: vec![3, 5] },
            Verdict::Size { rank: 1, size: 3, world_size: 2 },
            Verdict::Failed { reason: "it rains".into() },
        ] {
            assert_eq!(Verdict::from_text(&verdict.to_text()), Some(verdict));
        }
        for text in ["", "good", "good x", "size 1 2", "absent 1 x", "fine 3"] {
            assert_eq!(Verdict::from_text(text), None, "{text}");
        }
    }

    #[test]
    fn every_rank_sees_the_other_as_the_one_that_differs() {
        let launch = |rank, size| Launch::new(rank, size, "127.0.0.1", 1).unwrap();
        let verdict = || Verdict::Size { rank: 1, size: 3, world_size: 2 };
        let seen = |rank, own| match verdict().into_result(&launch(rank, own), Duration::ZERO) {
            Err(Error::WorldSize { other_rank, other, .. }) => (other_rank, other),
            other => panic!("{other:?}"),
        };
        assert_eq!(seen(0, 2), (1, 3));
        assert_eq!(seen(1, 3), (0, 2));
        let good = Verdict::Good { world_size: 2 }.into_result(&launch(2, 3), Duration::ZERO);
        assert!(matches!(good, Err(Error::WorldSize { other_rank: 0, other: 2, own: 3, .. })));
    }
}
