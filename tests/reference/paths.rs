//! Paths and predictions against float64 PyTorch; `scripts/reference/paths.py` writes the values.
//!
//! The printed errors are relative to the largest number of the sample: in the first column to the largest
//! term of the formula (the bound that holds in any precision), in the second to the result, which is
//! smaller where terms cancel.

use decoupled_dmd::{
    Condition, Denoiser, Edm, Error, LogNormal, LogitNormal, NoisePath, PostShift, Prediction,
    Result, TimeDistribution, VariancePreserving,
};
use tch::{Kind, Tensor};

use super::common::reference::{PATHS, PREDICTIONS, Reference, path};
use super::common::{gradient, max_difference, value, values};

/// The largest error over samples `[B, ..]`, relative to `size` `[B]`; samples of size 0 must agree.
fn relative(found: &Tensor, expected: &Tensor, size: &Tensor) -> f64 {
    let error = (found.to_kind(Kind::Double) - expected).abs().view([size.size()[0], -1]);
    value(&(error.amax([1i64], false) / size.clamp_min(1e-300)).max())
}

fn largest(tensor: &Tensor) -> Tensor {
    tensor.abs().view([tensor.size()[0], -1]).amax([1i64], false)
}

/// Rows at which the reference is finite; the others are singular.
fn finite_rows(expected: &Tensor) -> Tensor {
    let finite = expected.isfinite().view([expected.size()[0], -1]).all_dim(1, false);
    finite.nonzero().flatten(0, -1)
}

/// Prints the errors of a case of `kind` and requires the first to be within the bound.
fn report(reference: &Reference, kind: &str, case: &str, (to_terms, to_result): (f64, f64)) {
    let computed = if kind == "f64" { Kind::Double } else { Kind::Float };
    let bound = reference.bound("f32", computed);
    let what = ["terms", "result"].map(|of| format!("{kind} to {of}"));
    let errors = [(what[0].as_str(), to_terms, bound), (&what[1], to_result, f64::INFINITY)];
    reference.report(&format!("{kind} {case}"), &errors);
}

#[test]
fn every_value_of_the_reference() -> Result<()> {
    Reference::check("paths", |reference| {
        for kind in ["f64", "f32", "bf16"] {
            for name in PATHS {
                compare(reference, kind, name)?;
            }
        }
        table_of_sdxl(reference)?;
        preconditioning_of_edm(reference)?;
        normal_samplers(reference)
    })
}

fn compare(reference: &Reference, kind: &str, name: &str) -> Result<()> {
    let input = |what: &str| reference.get(&format!("{kind}.{what}"));
    let (t, x0, eps) = (input("t"), input("x0"), input("eps"));
    let of_path = |what: &str| reference.get(&format!("{kind}.{name}.{what}"));

    let report = |what: &str, errors| report(reference, kind, &format!("{name} {what}"), errors);
    let path = &*path(name)?;
    let time = PostShift::new(t.shallow_clone())?;
    let found = path.coefficients(&time)?;
    for (what, found) in [("a", &found.data), ("s", &found.noise)] {
        let error = relative(found, of_path(what), of_path(what));
        report(what, (error, error));
    }
    let (a, s) = (of_path("a").view([-1, 1]), of_path("s").view([-1, 1]));
    let terms = largest(&((&a * x0).abs() + (&s * eps).abs()));
    let (found, expected) = (path.renoise(x0, &time, eps)?, of_path("noised"));
    let result = relative(&found, expected, &largest(expected));
    report("noised", (relative(&found, expected, &terms), result));

    for (label, prediction) in PREDICTIONS {
        let of_prediction = |what: &str| of_path(&format!("{label}.{what}"));
        let target = of_prediction("target");
        let rows = finite_rows(target);
        let pick = |tensor: &Tensor| tensor.index_select(0, &rows);
        let found = self::target(path, prediction, &pick(t), &pick(x0), &pick(eps))?;
        let terms =
            largest(&pick(x0)).maximum(&largest(&pick(eps))).maximum(&largest(&pick(target)));
        let expected = pick(target);
        let result = relative(&found, &expected, &largest(&expected));
        let terms = relative(&found, &expected, &terms);
        report(&format!("{label} target"), (terms, result));
        if rows.size() != t.size() {
            let singular = self::target(path, prediction, t, x0, eps);
            assert!(matches!(singular, Err(Error::OutOfRange { .. })), "{name} {label}");
        }

        let expected = of_prediction("x0");
        let rows = finite_rows(expected);
        let pick = |tensor: &Tensor| tensor.index_select(0, &rows);
        let found =
            clean(path, prediction, &pick(t), &pick(of_path("noised_in")), &pick(input("out")))?;
        let (expected, terms) = (pick(expected), pick(of_prediction("size")));
        let result = relative(&found, &expected, &largest(&expected));
        let terms = relative(&found, &expected, &terms);
        report(&format!("{label} x0"), (terms, result));
        if rows.size() != t.size() {
            let singular = clean(path, prediction, t, of_path("noised_in"), input("out"));
            assert!(matches!(singular, Err(Error::OutOfRange { .. })), "{name} {label}");
        }
    }
    Ok(())
}

/// The training target: the loss of a network with the output 0 has the gradient -2 target / numel.
fn target(
    path: &dyn NoisePath,
    prediction: Prediction,
    t: &Tensor,
    x0: &Tensor,
    eps: &Tensor,
) -> Result<Tensor> {
    let kind = if x0.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let answer = x0.zeros_like().to_kind(kind).set_requires_grad(true);
    let network = |_: &Tensor, _: &Tensor, _: &Condition| answer.shallow_clone();
    let time = PostShift::new(t.shallow_clone())?;
    let denoiser = Denoiser::new(path, prediction, network);
    let loss = denoiser.denoising_loss(x0, &time, eps, &Condition::none())?;
    Ok(gradient(&loss, &answer) * (-0.5 * x0.numel() as f64))
}

/// x0-hat for a given output of the network.
fn clean(
    path: &dyn NoisePath,
    prediction: Prediction,
    t: &Tensor,
    noised: &Tensor,
    answer: &Tensor,
) -> Result<Tensor> {
    let network = |_: &Tensor, _: &Tensor, _: &Condition| answer.shallow_clone();
    let time = PostShift::new(t.shallow_clone())?;
    let clean =
        Denoiser::new(path, prediction, network).denoise(noised, &time, &Condition::none())?;
    let kind = if noised.kind() == Kind::Double { Kind::Double } else { Kind::Float };
    assert_eq!(clean.kind(), kind);
    Ok(clean)
}

fn table_of_sdxl(reference: &Reference) -> Result<()> {
    let path = VariancePreserving::scaled_linear(0.00085, 0.012, 1000)?;
    let timestep = path.timestep(reference.get("f64.t"))?;
    assert_eq!(values(&timestep), values(reference.get("sdxl.timestep")));
    let times = [20.0, 399.0, 499.0, 749.0, 979.0, 999.0].map(|n| path.time_of(n).unwrap());
    let a = path.coefficients(&PostShift::new(Tensor::from_slice(&times))?)?.data;
    let expected = reference.get("sdxl.alphas_cumprod");
    let error = relative(&a.square(), expected, expected);
    report(reference, "f64", "vp_sdxl alphas_cumprod", (error, error));
    Ok(())
}

fn preconditioning_of_edm(reference: &Reference) -> Result<()> {
    let found = Edm::default().preconditioning(reference.get("f64.t"), 0.5)?;
    let factors = [
        ("c_skip", &found.skip),
        ("c_out", &found.output),
        ("c_in", &found.input),
        ("c_noise", &found.noise),
    ];
    for (name, found) in factors {
        let expected = reference.get(&format!("edm.{name}"));
        let error = relative(found, expected, &expected.abs());
        report(reference, "f64", &format!("edm {name}"), (error, error));
    }
    let expected = reference.get("edm.denoised");
    for (kind, of) in [("f64", Kind::Double), ("f32", Kind::Float)] {
        let out = reference.get("f64.out").to_kind(of);
        let network = |x: &Tensor, c: &Tensor| &out + x * c.view([-1, 1]);
        let found = found.apply(&reference.get("f64.x0").to_kind(of), network)?;
        assert_eq!(found.kind(), of);
        let error = relative(&found, expected, &largest(expected));
        report(reference, kind, "edm denoised", (error, error));
    }
    Ok(())
}

fn normal_samplers(reference: &Reference) -> Result<()> {
    let u = reference.get("sampler.u");
    let logit = LogitNormal::new(0.5, 1.5)?.times(u, None)?;
    let log = LogNormal::default().times(u, None)?;
    for (name, found) in [("logit_normal", &logit), ("log_normal", &log)] {
        let expected = reference.get(&format!("sampler.{name}"));
        let error = max_difference(found.tensor(), expected);
        report(reference, "f64", &format!("sampler {name}"), (error, error));
    }
    Ok(())
}
