//! Threads in the place of processes.

use std::cell::Cell;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use decoupled_dmd::{Collective, Result};
use tch::Tensor;

/// A place where threads meet to exchange tensors.
struct Meeting {
    processes: usize,
    round: Mutex<Round>,
    moved: Condvar,
}

#[derive(Default)]
struct Round {
    number: u64,
    given: Vec<Option<Tensor>>,
    whole: Option<Tensor>,
}

impl Meeting {
    fn new(processes: usize) -> Self {
        let given = (0..processes).map(|_| None).collect();
        let round = Mutex::new(Round { given, ..Round::default() });
        Self { processes, round, moved: Condvar::new() }
    }

    fn all_gather(&self, rank: usize, part: &Tensor) -> Result<Tensor, String> {
        let mut round = self.round.lock().map_err(|_| "another thread has failed")?;
        let own = round.number;
        round.given[rank] = Some(part.copy());
        if round.given.iter().all(Option::is_some) {
            let parts: Vec<Tensor> = round.given.iter_mut().filter_map(Option::take).collect();
            round.whole = Some(Tensor::f_stack(&parts, 0).map_err(|error| error.to_string())?);
            round.number += 1;
            self.moved.notify_all();
        } else {
            let patience = Duration::from_secs(20);
            let waited =
                self.moved.wait_timeout_while(round, patience, |round| round.number == own);
            let (after, time) = waited.map_err(|_| "another thread has failed")?;
            if time.timed_out() {
                return Err("another process did not come".into());
            }
            round = after;
        }
        Ok(round.whole.as_ref().ok_or("nothing was gathered")?.copy())
    }
}

/// What each of so many processes makes of its collective, and how often it gathered.
pub fn on_each<T: Send>(
    processes: usize,
    run: impl Fn(&Collective<'_>) -> Result<T> + Sync,
) -> Vec<(T, usize)> {
    let meeting = Meeting::new(processes);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..processes)
            .map(|rank| {
                let (meeting, run) = (&meeting, &run);
                scope.spawn(move || {
                    let calls = Cell::new(0);
                    let exchange = |part: &Tensor| {
                        calls.set(calls.get() + 1);
                        meeting.all_gather(rank, part)
                    };
                    let result = run(&Collective::new(meeting.processes, rank, exchange).unwrap());
                    (result.unwrap_or_else(|error| panic!("rank {rank}: {error:?}")), calls.get())
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}
