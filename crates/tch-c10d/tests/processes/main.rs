//! Groups of several processes on one machine, over Gloo: this program starts itself.

mod faults;
mod harness;
mod launchers;
mod training;
mod values;

// A process takes half a second to start: it checks all that several processes can check in one start.

#[test]
fn two_processes() {
    harness::run_well("all", 2);
}

#[test]
fn four_processes() {
    harness::run_well("all", 4);
}

/// What this program does as a rank; nothing when it runs the tests.
#[test]
fn worker() {
    let Ok(case) = std::env::var(harness::CASE) else { return };
    let (case, argument) = case.split_once(' ').unwrap_or((&case, ""));
    let result = match case {
        "all" => {
            let group = tch_c10d::ProcessGroup::from_env().unwrap();
            assert_eq!(group.local_rank().unwrap(), group.rank());
            values::all(&group);
            training::all(&group);
            "well".into()
        }
        "launched" => launchers::launched(),
        "restarted" => launchers::restarted(),
        "connect" => faults::connect(argument),
        "reduce_for_ever" => faults::reduce_for_ever(),
        "skip_one" => faults::skip_one(argument),
        other => panic!("no case {other}"),
    };
    println!("RESULT {result}");
    // No further test of this program should run in a rank.
    std::process::exit(0);
}
