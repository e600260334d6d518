//! The distributions of the crate as one type, for configurations.

use tch::Tensor;

use crate::error::Result;
use crate::renoising::{AboveStudent, LogNormal, LogitNormal, Power, TimeDistribution, Uniform};
use crate::time::PreShift;

/// Any distribution of this crate: the type to name in a configuration that chooses among them, as
/// `{"uniform": {"low": 0.02, "high": 0.98}}`.
///
/// ```
/// # use decoupled_dmd::{Renoising, Times, Uniform};
/// let renoising = Renoising::new(Times::from(Uniform::FULL));
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum Times {
    /// Evenly over a range.
    Uniform(Uniform),
    /// Evenly above the student's time.
    AboveStudent(AboveStudent),
    /// The sigmoid of a normal number.
    LogitNormal(LogitNormal),
    /// Normal in ln sigma, on the path of EDM.
    LogNormal(LogNormal),
    /// A power of an even number.
    Power(Power),
}

impl TimeDistribution for Times {
    fn times(&self, u: &Tensor, student: Option<&PreShift>) -> Result<PreShift> {
        match self {
            Self::Uniform(times) => times.times(u, student),
            Self::AboveStudent(times) => times.times(u, student),
            Self::LogitNormal(times) => times.times(u, student),
            Self::LogNormal(times) => times.times(u, student),
            Self::Power(times) => times.times(u, student),
        }
    }
}

macro_rules! from_distribution {
    ($($type:ident),+) => {
        $(impl From<$type> for Times {
            fn from(times: $type) -> Self {
                Self::$type(times)
            }
        })+
    };
}

from_distribution!(Uniform, AboveStudent, LogitNormal, LogNormal, Power);
