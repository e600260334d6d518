//! Reference values from stock PyTorch, which `scripts/reference/` writes, and the crate's errors from them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use decoupled_dmd::{
    Condition, Denoiser, Edm, NoisePath, Prediction, RectifiedFlow, Result, TrigFlow,
    VariancePreserving,
};
use tch::{Kind, Tensor};

use super::value;

/// What float64 may be off, in proportion to the largest number expected: thousands of roundings.
pub const FLOAT64: f64 = 1e-12;

/// A number in bfloat16, of eight bits, is off by half a unit of its last.
pub const BFLOAT16: f64 = 1.0 / 256.0;

/// How many times the distance of PyTorch's float32 from float64 a float32 answer may be from the reference.
///
/// CPUs round in different orders, so no bound is that of one machine: the files hold the distance, which
/// `scripts/reference/precision.py` measures. PyTorch's own is up to 2.1 times as large on one CPU as on
/// another (an AMD EPYC with AVX2, the same with plain kernels, and the machine of earlier files), and ours
/// may be off to the other side of its answer. The worst found on the EPYC is half the bound.
pub const MARGIN: f64 = 4.0;

/// The bound of an error in float32 where PyTorch's is `distance`, both in proportion to the largest number
/// expected. An answer that PyTorch happens to round well is not asked for better than the type has it.
pub fn float32_bound(distance: f64) -> f64 {
    MARGIN * distance.max(f64::from(f32::EPSILON))
}

/// The bound of the float32 tensor `name`, or of a kind of tensors, by the distance that stands in its file.
pub fn bound_of(file: &BTreeMap<String, Tensor>, name: &str) -> f64 {
    let distance = file.get(&format!("{name}:distance"));
    float32_bound(value(distance.unwrap_or_else(|| panic!("no distance of {name}"))))
}

/// Asserts that `found`, computed in float32, is the tensor `name` of a file.
pub fn assert_float32(found: &Tensor, file: &BTreeMap<String, Tensor>, name: &str) {
    let (error, bound) = (relative(name, found, &file[name]), bound_of(file, name));
    println!("{name}: {error:.1e} of {bound:.1e}");
    assert!(error <= bound, "{name}: {error:e} > {bound:e}");
}

/// Asserts that `other` is `one`, computed in another order, but for rounding in float32: that it is no
/// farther from it than `one`, a few times, from `exact`, the same in float64.
pub fn assert_rounding(what: &str, one: &Tensor, other: &Tensor, exact: &Tensor) {
    let (error, bound) = (relative(what, other, one), float32_bound(relative(what, one, exact)));
    println!("{what}: {error:.1e} of {bound:.1e}");
    assert!(error <= bound, "{what}: {error:e} > {bound:e}");
}

/// Asserts that two ways to compute the same in float64 agree.
pub fn assert_float64(what: &str, found: &Tensor, expected: &Tensor) {
    assert_eq!((found.kind(), expected.kind()), (Kind::Double, Kind::Double), "{what}");
    let error = relative(what, found, expected);
    println!("{what}: {error:.1e}");
    assert!(error <= FLOAT64, "{what}: {error:e}");
}

/// One file of reference values, with a record of the tensors that were read and the cases that disagreed.
pub struct Reference {
    tensors: BTreeMap<String, Tensor>,
    read: RefCell<BTreeSet<String>>,
    disagree: RefCell<Vec<String>>,
    worst: RefCell<BTreeMap<String, (f64, String)>>,
}

impl Reference {
    /// Opens `tests/reference/NAME.safetensors`, to take inputs from it.
    pub fn open(name: &str) -> Result<Self> {
        let file = format!("{}/tests/reference/{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
        Ok(Self {
            tensors: Tensor::read_safetensors(file)?.into_iter().collect(),
            read: RefCell::default(),
            disagree: RefCell::default(),
            worst: RefCell::default(),
        })
    }

    /// Runs all checks of a file, then requires that every case agreed and every tensor was read: a
    /// case that is in the file and in no check would otherwise pass.
    pub fn check(name: &str, checks: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let reference = Self::open(name)?;
        checks(&reference)?;
        for (what, (error, case)) in &*reference.worst.borrow() {
            println!("worst {what:<18} {error:.1e}  {case}");
        }
        let disagree = reference.disagree.borrow();
        assert!(disagree.is_empty(), "{} errors:\n{}", disagree.len(), disagree.join("\n"));
        let read = reference.read.borrow();
        let unread: Vec<_> = reference.tensors.keys().filter(|key| !read.contains(*key)).collect();
        assert!(unread.is_empty(), "no check reads {unread:?}");
        Ok(())
    }

    pub fn get(&self, name: &str) -> &Tensor {
        self.read.borrow_mut().insert(name.to_owned());
        self.tensors.get(name).unwrap_or_else(|| panic!("no {name}"))
    }

    /// The bound of a kind of values in a type: of float32 by the distance in the file.
    pub fn bound(&self, values: &str, kind: Kind) -> f64 {
        let _read = self.get(&format!("{values}:distance"));
        if kind == Kind::Double { FLOAT64 } else { bound_of(&self.tensors, values) }
    }

    /// The error of `found`, relative to the largest number of the reference.
    pub fn error(&self, name: &str, found: &Tensor) -> f64 {
        relative(name, found, self.get(name))
    }

    /// Prints the errors of one case, each with its tolerance, and remembers those beyond it.
    pub fn report(&self, case: &str, errors: &[(&str, f64, f64)]) {
        let shown: Vec<_> = errors.iter().map(|(what, e, _)| format!("{what} {e:.1e}")).collect();
        println!("{case:<46} {}", shown.join("  "));
        for &(what, error, tolerance) in errors {
            // NaN is beyond every tolerance.
            if error.is_nan() || error > tolerance {
                let line = format!("{case}, {what}: {error:e} > {tolerance:e}");
                self.disagree.borrow_mut().push(line);
            }
            let mut worst = self.worst.borrow_mut();
            let entry = worst.entry(what.to_owned()).or_default();
            if entry.1.is_empty() || error.is_nan() || error > entry.0 {
                *entry = (error, case.to_owned());
            }
        }
    }
}

/// The largest error of `found`, relative to the largest number expected.
pub fn relative(name: &str, found: &Tensor, expected: &Tensor) -> f64 {
    let expected = expected.to_kind(Kind::Double);
    assert_eq!(found.size(), expected.size(), "{name}");
    let worst = (found.to_kind(Kind::Double) - &expected).abs().max();
    value(&(worst / expected.abs().max().clamp_min(1e-300)))
}

pub const PATHS: [&str; 5] = ["rectified_flow", "vp_linear", "vp_sdxl", "edm", "trig_flow"];

pub fn path(name: &str) -> Result<Box<dyn NoisePath>> {
    Ok(match name {
        "rectified_flow" => Box::new(RectifiedFlow),
        "vp_linear" => Box::new(VariancePreserving::linear(0.1, 20.0)?),
        "vp_sdxl" => Box::new(VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?),
        "edm" => Box::new(Edm::default()),
        "trig_flow" => Box::new(TrigFlow),
        _ => panic!("{name}"),
    })
}

/// Whether a path has a share of data below 1e-4 at the noise end of the times `near` and `ends`.
pub fn reaches_noise(path: &str, times: &str) -> bool {
    ["near", "ends"].contains(&times) && ["rectified_flow", "trig_flow"].contains(&path)
}

pub const PREDICTIONS: [(&str, Prediction); 5] = [
    ("sample", Prediction::Sample),
    ("noise", Prediction::Noise),
    ("flow_velocity", Prediction::FlowVelocity),
    ("velocity", Prediction::Velocity),
    ("score", Prediction::Score),
];

pub const TEACHER_GAIN: f64 = 0.8;
pub const FAKE_GAIN: f64 = 0.6;

/// The network of `scripts/reference/setting.py`, whose gain can be trained.
pub fn denoiser(path: &str, prediction: Prediction, gain: Tensor) -> Result<Denoiser<'static>> {
    let scales_input = path == "edm";
    let network = move |x: &Tensor, t: &Tensor, c: &Condition| -> Result<Tensor> {
        let column = |values: &Tensor| values.to_kind(x.kind()).view([-1, 1, 1, 1]);
        let x = if scales_input {
            x * column(&Edm::default().preconditioning(t, 0.5)?.input)
        } else {
            x.shallow_clone()
        };
        let wave = (&x + c[0].to_kind(x.kind())).sin();
        Ok(gain.to_kind(x.kind()) * wave * (column(t) + 0.5) + x * 0.1)
    };
    Ok(Denoiser::new(self::path(path)?, prediction, network))
}
