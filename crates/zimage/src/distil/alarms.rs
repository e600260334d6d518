//! Alarms: what the diagnostics of a training say is wrong with it.

use std::collections::VecDeque;

use crate::distil::distillation::{Record, value};

/// Observations that are averaged, since each depends on the noise levels that it drew.
const WINDOW: usize = 3;

/// The update from which observations count: before it student and fake score are the teacher still, and the numbers
/// change fast.
const SETTLED: u64 = 20;

/// What is wrong with a training.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alarm {
    /// Teacher and fake score point away from one another.
    WrongSign,
    /// The fake score knows the student's samples worse than the teacher does.
    FakeBroken,
    /// The fake score is still the teacher.
    FakeLags,
    /// The engine moves the samples, and nothing holds them.
    EngineAlone,
    /// The contrast of the samples runs away.
    Contrast,
    /// The samples become alike.
    Diversity,
}

impl Alarm {
    /// All, the most certain first.
    pub const ALL: [Self; 6] = [
        Self::WrongSign,
        Self::FakeBroken,
        Self::FakeLags,
        Self::EngineAlone,
        Self::Contrast,
        Self::Diversity,
    ];

    /// Its name in metrics.jsonl.
    pub fn name(self) -> &'static str {
        match self {
            Self::WrongSign => "wrong_sign",
            Self::FakeBroken => "fake_broken",
            Self::FakeLags => "fake_lags",
            Self::EngineAlone => "engine_alone",
            Self::Contrast => "contrast",
            Self::Diversity => "diversity",
        }
    }

    /// What it means, and what to do.
    pub fn text(self) -> &'static str {
        match self {
            Self::WrongSign => {
                "teacher and fake score point away from one another (dm_cos below 0): the output or the clock of one of \
                 them has the wrong sign"
            }
            Self::FakeBroken => {
                "the fake score knows the student's samples much worse than the teacher does (dm_error_ratio): its output \
                 has the wrong sign or type, or its learning rate is too high"
            }
            Self::FakeLags => {
                "the fake score is still the teacher (dm_error_ratio and dm_cos are 1): raise its learning rate or its \
                 updates, or distribution matching holds nothing"
            }
            Self::EngineAlone => {
                "CFG Augmentation moves the samples many times as far as distribution matching holds them (dm_to_ca): \
                 lower the guidance, or train the fake score more"
            }
            Self::Contrast => {
                "the contrast of the samples is far from the data's (variance_drift): lower the guidance or the student's \
                 learning rate"
            }
            Self::Diversity => {
                "the samples of a batch become alike (x_spread is half of what it was): the student collapses; an earlier \
                 student is the better one"
            }
        }
    }
}

/// Looks at what is observed while training.
#[derive(Debug, Default)]
pub struct Alarms {
    recent: VecDeque<Record>,
    /// Of the first observation.
    first_spread: Option<f64>,
    raised: Vec<Alarm>,
}

impl Alarms {
    /// Takes what was observed at an update, and gives the alarms that it raises, each once in a training.
    pub fn look(&mut self, update: u64, record: &Record) -> Vec<Alarm> {
        if self.first_spread.is_none() {
            self.first_spread = value(record, "x_spread");
        }
        if update < SETTLED {
            return Vec::new();
        }
        self.recent.push_back(record.clone());
        if self.recent.len() > WINDOW {
            self.recent.pop_front();
        }
        if self.recent.len() < WINDOW {
            return Vec::new();
        }
        let new = Alarm::ALL
            .into_iter()
            .filter(|alarm| !self.raised.contains(alarm) && self.holds(*alarm));
        let new: Vec<Alarm> = new.collect();
        self.raised.extend(&new);
        new
    }

    fn holds(&self, alarm: Alarm) -> bool {
        let is = |name: &str, test: &dyn Fn(f64) -> bool| self.mean(name).is_some_and(test);
        match alarm {
            Alarm::WrongSign => is("dm_cos", &|cos| cos < 0.0),
            Alarm::FakeBroken => is("dm_error_ratio", &|ratio| ratio > 1.5),
            Alarm::FakeLags => {
                is("dm_cos", &|cos| cos > 0.999) && is("dm_error_ratio", &|ratio| ratio > 0.98)
            }
            // A fake score that lags is the reason, then.
            Alarm::EngineAlone => {
                is("dm_to_ca", &|ratio| ratio < 0.11) && !self.holds(Alarm::FakeLags)
            }
            Alarm::Contrast => is("variance_drift", &|drift| drift.abs() > 1.5),
            Alarm::Diversity => is("x_spread", &|spread| {
                self.first_spread.is_some_and(|first| spread < 0.5 * first)
            }),
        }
    }

    /// The mean of a number over the window; `None` where no observation has it.
    fn mean(&self, name: &str) -> Option<f64> {
        let found = self.recent.iter().filter_map(|record| value(record, name));
        let (count, sum) = found.fold((0, 0.0), |(count, sum), value| (count + 1, sum + value));
        (count > 0).then(|| sum / f64::from(count))
    }
}
