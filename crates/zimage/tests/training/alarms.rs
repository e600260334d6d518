//! Alarms on what was observed in healthy and in broken trainings of the embedded model.

use zimage::distil::{Alarm, Alarms, Record};

/// What was observed.
const OBSERVED: &str = include_str!("observed.tsv");
const NAMES: [&str; 5] = ["dm_cos", "dm_error_ratio", "dm_to_ca", "variance_drift", "x_spread"];

/// A training: the name of the alarm that it must raise, and what was observed at which update.
struct Run {
    expected: &'static str,
    title: &'static str,
    observed: Vec<(u64, Record)>,
}

fn runs() -> Vec<Run> {
    let mut runs = Vec::new();
    for line in OBSERVED.lines().filter(|line| !line.starts_with('#')) {
        if let Some(heading) = line.strip_prefix("> ") {
            let (expected, title) = heading.split_once('\t').expect("an alarm and how it was made");
            runs.push(Run { expected, title, observed: Vec::new() });
            continue;
        }
        let numbers: Vec<f64> =
            line.split('\t').map(|number| number.parse().expect("a number")).collect();
        let named = NAMES.map(str::to_owned).into_iter().zip(numbers[1..].iter().copied());
        let observed = (numbers[0] as u64, named.collect());
        runs.last_mut().expect("a heading").observed.push(observed);
    }
    runs
}

/// Raised alarms, each with the update that raised it.
fn raised(observed: &[(u64, Record)]) -> Vec<(u64, Alarm)> {
    let mut alarms = Alarms::default();
    let look = |(update, record): &(u64, Record)| {
        alarms.look(*update, record).into_iter().map(|alarm| (*update, alarm)).collect::<Vec<_>>()
    };
    observed.iter().flat_map(look).collect()
}

#[test]
fn a_broken_run_is_named_within_fifty_updates_and_a_healthy_one_is_not() {
    let runs = runs();
    assert_eq!(runs.len(), 10);
    for Run { expected, title, observed } in &runs {
        let found = raised(observed);
        if *expected == "healthy" {
            assert_eq!(found, [], "{title}");
            continue;
        }
        let Some((update, first)) = found.first() else { panic!("{title}: no alarm") };
        assert_eq!(first.name(), *expected, "{title}: {found:?}");
        assert!(*update <= 50, "{title}: {update}");
        // What is wrong has one name.
        assert_eq!(found.len(), 1, "{title}: {found:?}");
    }
}

#[test]
fn contrast_and_diversity_are_looked_at() {
    for (name, values, expected) in [
        ("variance_drift", [0.2, 1.0, 2.0, 2.5], Alarm::Contrast),
        ("x_spread", [0.46, 0.3, 0.1, 0.1], Alarm::Diversity),
    ] {
        let observed: Vec<(u64, Record)> = (20..)
            .step_by(10)
            .zip(values)
            .map(|(at, value)| (at, vec![(name.to_owned(), value)]))
            .collect();
        assert_eq!(raised(&observed), [(50, expected)]);
    }
}

#[test]
fn what_is_not_observed_raises_none() {
    let mut alarms = Alarms::default();
    for update in 1..200 {
        // Student and fake score start equal to the teacher.
        let early = vec![("dm_cos".to_owned(), 1.0)];
        let record = if update < 20 { early } else { vec![("ca".to_owned(), 1.0)] };
        assert_eq!(alarms.look(update, &record), []);
    }
}
