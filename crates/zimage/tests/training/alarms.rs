//! Alarms on what was measured of healthy and of broken trainings of the embedded model.

use zimage::distil::{Alarm, Alarms, Record};

/// A number as it was observed every tenth update from the twentieth on.
type Observed = (&'static str, [f64; 5]);
type Run = [Observed; 5];

/// `zimage_8step --updates 150 --student-lr 1e-4 --fake-lr 4e-4 --guidance 4.5`, seed 0.
const HEALTHY: Run = [
    ("dm_cos", [0.9417, 0.8971, 0.7824, 0.9173, 0.743]),
    ("dm_error_ratio", [0.8422, 0.8245, 0.7618, 0.8818, 0.7764]),
    ("dm_to_ca", [0.2062, 0.343, 0.3526, 0.5011, 0.4558]),
    ("variance_drift", [0.2354, 0.519, 0.4146, 0.5569, 0.7194]),
    ("x_spread", [0.5606, 0.6398, 0.635, 0.6375, 0.7022]),
];

/// Raised alarms, each with the update that raised it.
fn raised(run: &Run) -> Vec<(u64, Alarm)> {
    let mut alarms = Alarms::default();
    let mut raised = Vec::new();
    for (index, update) in (20..).step_by(10).take(5).enumerate() {
        let record: Record =
            run.iter().map(|(name, values)| ((*name).to_owned(), values[index])).collect();
        raised.extend(alarms.look(update, &record).into_iter().map(|alarm| (update, alarm)));
    }
    raised
}

/// The healthy run with other values of some numbers.
fn with(changed: &[Observed]) -> Run {
    HEALTHY.map(|(name, values)| {
        let other = changed.iter().find(|(of, _)| *of == name);
        (name, other.map_or(values, |(_, values)| *values))
    })
}

#[test]
fn a_healthy_run_raises_none() {
    assert_eq!(raised(&HEALTHY), []);
}

#[test]
fn what_is_broken_is_named_once_within_fifty_updates() {
    let cases: [(&[Observed], Alarm); 6] = [
        // The teacher's sign turned, at updates 10, 15, 20, 25, 30 of batches of 8, as all below.
        (&[("dm_cos", [-0.9652, -0.971, -0.9861, -0.9689, -0.9767])], Alarm::WrongSign),
        // The fake score's sign turned.
        (&[("dm_error_ratio", [2.7329, 2.38, 2.3204, 1.9777, 2.0223])], Alarm::FakeBroken),
        // `--fake-updates 1 --fake-lr 1e-6`.
        (
            &[
                ("dm_cos", [1.0, 1.0, 1.0, 0.9999, 1.0]),
                ("dm_error_ratio", [0.9982, 0.9986, 0.9963, 0.9935, 0.9906]),
                ("dm_to_ca", [0.001, 0.0013, 0.0014, 0.0032, 0.0089]),
            ],
            Alarm::FakeLags,
        ),
        // `--guidance 20`.
        (&[("dm_to_ca", [0.0142, 0.0168, 0.0189, 0.0346, 0.0717])], Alarm::EngineAlone),
        // Made up.
        (&[("variance_drift", [1.0, 1.5, 2.0, 2.5, 3.0])], Alarm::Contrast),
        (&[("x_spread", [0.46, 0.3, 0.1, 0.1, 0.0])], Alarm::Diversity),
    ];
    for (changed, expected) in cases {
        let found = raised(&with(changed));
        let [(update, alarm)] = found[..] else { panic!("{expected:?}: {found:?}") };
        assert_eq!(alarm, expected);
        // A collapse is measured by the start, which takes the first window.
        assert!(
            update <= if expected == Alarm::Diversity { 60 } else { 50 },
            "{expected:?}: {update}"
        );
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
