//! Reference values from stock PyTorch, which `scripts/reference/` writes, and the crate's errors from them.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use decoupled_dmd::{
    Condition, Denoiser, Edm, NoisePath, Prediction, RectifiedFlow, Result, TrigFlow,
    VariancePreserving,
};
use tch::{Kind, Tensor};

use super::tensors::{FLOAT64, bound_of, relative};

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

/// A path of each kind, with the prediction that is usual on it.
pub const USUAL: [(&str, Prediction); 3] = [
    ("rectified_flow", Prediction::FlowVelocity),
    ("edm", Prediction::Sample),
    ("trig_flow", Prediction::Velocity),
];
pub const MASKS: [&str; 2] = ["samples", "elements"];

/// The type of everything but samples, which may be bfloat16.
pub fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// A copy to differentiate by.
pub fn leaf(tensor: &Tensor, kind: Kind) -> Tensor {
    tensor.to_kind(kind).detach().set_requires_grad(true)
}

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
