//! Means and confidence intervals over seeds.

/// 0.975 quantiles of Student's t for 1, 2, .. degrees of freedom.
const QUANTILES: [f64; 20] = [
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281, 2.2010,
    2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
];

/// A mean and the half width of its 95 % interval under Student's t.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    pub mean: f64,
    /// `None` for a single value.
    pub half_width: Option<f64>,
    pub count: usize,
}

impl Interval {
    /// Over values, one a seed; `None` without any.
    pub fn of(values: &[f64]) -> Option<Self> {
        let count = values.len();
        let mean = values.iter().sum::<f64>() / count as f64;
        let degrees = count.checked_sub(1)?;
        let half_width = (degrees > 0).then(|| {
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            let deviation = (squares / degrees as f64).sqrt();
            quantile(degrees) * deviation / (count as f64).sqrt()
        });
        Some(Self { mean, half_width, count })
    }

    /// Whether the interval lies on one side of zero.
    pub fn excludes_zero(&self) -> bool {
        self.half_width.is_some_and(|half_width| self.mean.abs() > half_width)
    }
}

/// 0.975 quantile of Student's t; beyond the table the last entry, which is slightly too large.
pub fn quantile(degrees: usize) -> f64 {
    QUANTILES[degrees.clamp(1, QUANTILES.len()) - 1]
}
