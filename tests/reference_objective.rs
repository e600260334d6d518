//! The objective against reference values from stock PyTorch, made by
//! `scripts/reference/objective.py`. `-- --nocapture` shows the worst error of each case.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::{gradient, value};
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Evaluation, Floor,
    Group, Guidance, Normalizer, Objective, PostShift, PreShift, Prediction, RectifiedFlow,
    Renoising, Result, Shift, TimeSampler, Weighting,
};
use tch::{Kind, Tensor};

const ALPHA: f64 = 4.0;
const TEACHER_GAIN: f64 = 0.8;
const FAKE_GAIN: f64 = 0.6;

struct Reference {
    tensors: BTreeMap<String, Tensor>,
}

impl Reference {
    fn read() -> Self {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/objective.safetensors");
        let tensors = Tensor::read_safetensors(file).expect("the reference file");
        Self { tensors: tensors.into_iter().collect() }
    }

    fn get(&self, name: &str) -> Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no {name}")).shallow_clone()
    }

    /// Relative to the largest number of the reference.
    fn error(&self, name: &str, found: &Tensor) -> f64 {
        let expected = self.get(name).to_kind(Kind::Double);
        assert_eq!(found.size(), expected.size(), "{name}");
        let worst = (found.to_kind(Kind::Double) - &expected).abs().max();
        value(&(worst / expected.abs().max().clamp_min(1e-300)))
    }

    fn cases(&self, group: &str) -> Vec<String> {
        let prefix = format!("{group}/");
        let name = |key: &String| Some(key.strip_prefix(&prefix)?.split(':').next()?.to_owned());
        self.tensors.keys().filter_map(name).collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// Prints the errors of one case and requires each within its tolerance.
fn report(case: &str, errors: &[(&str, f64, f64)]) {
    let shown: Vec<_> = errors.iter().map(|(what, e, _)| format!("{what} {e:.1e}")).collect();
    println!("{case:<34} {}", shown.join("  "));
    for (what, error, tolerance) in errors {
        assert!(error <= tolerance, "{case}, {what}: {error:e} > {tolerance:e}");
    }
}

fn network(x: &Tensor, t: &Tensor, c: &Tensor, gain: &Tensor) -> Tensor {
    let t: Tensor = t.view([-1, 1, 1, 1]) + 0.5;
    gain.to_kind(x.kind()) * (x + c.to_kind(x.kind())).sin() * t + x * 0.1
}

fn denoiser<'a>(prediction: Prediction, gain: f64) -> Denoiser<'a> {
    trainable(prediction, Tensor::from(gain))
}

fn trainable<'a>(prediction: Prediction, gain: Tensor) -> Denoiser<'a> {
    Denoiser::new(RectifiedFlow, prediction, move |x: &Tensor, t: &Tensor, c: &Condition| {
        network(x, t, &c[0], &gain)
    })
}

fn prediction(name: &str) -> Prediction {
    match name {
        "sample" => Prediction::Sample,
        "noise" => Prediction::Noise,
        "flow_velocity" => Prediction::FlowVelocity,
        "velocity" => Prediction::Velocity,
        "score" => Prediction::Score,
        _ => panic!("{name}"),
    }
}

fn normalizer(name: &str) -> Result<Normalizer> {
    let alpha = Guidance::new(ALPHA)?;
    Ok(match name {
        "off" => Normalizer::OFF,
        "dmd2" => Normalizer::dmd2(alpha),
        "fastgen" => Normalizer::fastgen(alpha),
        "fastvideo" => Normalizer::fastvideo(alpha),
        "simple_tuner" => Normalizer::guided(alpha).floor(Floor::new(1e-6)?),
        "rcm" => Normalizer::guided(alpha).floor(Floor::new(1e-5)?),
        "guided" => Normalizer::guided(alpha),
        "cdm" => Normalizer::cdm(),
        "conditional_floor_2" => Normalizer::conditional().floor(Floor::new(2.0)?),
        "port" => Normalizer::decoupled_port(),
        "conditional_batch" => Normalizer::conditional().over_batch(),
        _ => panic!("{name}"),
    })
}

fn weighting(name: &str) -> Result<Weighting> {
    Ok(match name {
        "uniform" => Weighting::UNIFORM,
        "min_snr" => Weighting::min_snr(5.0)?,
        "edm" => Weighting::edm(0.5)?,
        other => Weighting::measured_as(prediction(other.trim_start_matches("as_"))),
    })
}

/// The draws are the times.
struct Given;

impl TimeSampler for Given {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        PreShift::new(u.shallow_clone())
    }
}

/// What distinguishes a case of the student's loss.
struct Case<'a> {
    terms: &'a str,
    normalizer: &'a str,
    times: &'a str,
    prediction: Prediction,
    mask: Option<&'a str>,
}

impl Case<'_> {
    /// The evaluation and x, with inputs in `kind`.
    fn run(&self, reference: &Reference, kind: Kind) -> Result<(Evaluation, Tensor)> {
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let input = |name: &str, kind| reference.get(name).to_kind(kind);
        let x = input("x", kind).set_requires_grad(true);
        let (cond, null) = (input("cond", wide).into(), input("null", wide).into());
        let dm = DistributionMatching::new(denoiser(self.prediction, FAKE_GAIN), Shift::NONE);
        let engine = CfgAugmentation::new(Guidance::new(ALPHA)?);
        let normalizer = normalizer(self.normalizer)?;
        let group = || Group::new(Renoising::new(Given)).normalizer(normalizer);
        let objective = Objective::new(denoiser(self.prediction, TEACHER_GAIN)).observed();
        let objective = match self.terms {
            "ca" => objective.with(group().engine("ca", 1.0, engine)),
            "dm" => objective.with(group().regularizer("dm", 1.0, &dm)),
            "coupled" => {
                objective.with(group().engine("ca", 1.0, engine).regularizer("dm", 1.0, &dm))
            }
            "decoupled" => objective
                .with(group().engine("ca", 1.0, engine))
                .with(group().regularizer("dm", 1.0, &dm)),
            _ => panic!("{}", self.terms),
        };
        let draw = |times: &str, noise: &str| Draw {
            u: input(&format!("times_{times}"), wide),
            noise: input(noise, kind),
        };
        let mut draws = vec![draw(self.times, "noise")];
        if self.terms == "decoupled" {
            draws.push(draw("dm", "noise_dm"));
        }
        let mut batch = Batch::new(&x, &cond)?.null(&null);
        if let Some(mask) = self.mask {
            batch = batch.mask(&reference.get(&format!("mask_{mask}")))?;
        }
        let evaluation = objective.evaluate_at(&batch, draws)?;
        Ok((evaluation, x))
    }

    /// Compares loss and gradient with those of the reference's case `name`.
    fn compare(&self, reference: &Reference, name: &str) -> Result<()> {
        let mut errors = Vec::new();
        for (kind, what, tolerance) in [
            (Kind::Double, ["loss f64", "gradient f64"], 1e-12),
            (Kind::Float, ["loss f32", "gradient f32"], 1e-6),
        ] {
            let (evaluation, x) = self.run(reference, kind)?;
            let slope = gradient(&evaluation.loss, &x);
            let loss = reference.error(&format!("{name}:loss"), &evaluation.loss);
            let slope = reference.error(&format!("{name}:gradient"), &slope);
            errors.extend([(what[0], loss, tolerance), (what[1], slope, tolerance)]);
        }
        report(name, &errors);
        Ok(())
    }
}

const USUAL: Case<'_> = Case {
    terms: "coupled",
    normalizer: "guided",
    times: "middle",
    prediction: Prediction::FlowVelocity,
    mask: None,
};

#[test]
fn the_student_s_loss_and_gradient() -> Result<()> {
    let reference = Reference::read();
    for terms in ["ca", "dm", "coupled", "decoupled"] {
        for normalizer in &reference.cases(terms) {
            let case = Case { terms, normalizer, ..USUAL };
            case.compare(&reference, &format!("{terms}/{normalizer}"))?;
        }
    }
    for (group, times) in
        [("prediction", "middle"), ("bounds", "bounds"), ("near", "near"), ("ends", "ends")]
    {
        for name in &reference.cases(group) {
            let case = Case { times, prediction: prediction(name), ..USUAL };
            let is_singular = matches!(case.prediction, Prediction::Noise | Prediction::Score);
            if is_singular && ["near", "ends"].contains(&times) {
                assert!(case.run(&reference, Kind::Double).is_err(), "{group}/{name}");
                continue;
            }
            case.compare(&reference, &format!("{group}/{name}"))?;
        }
    }
    for mask in ["samples", "elements"] {
        for normalizer in ["cdm", "fastvideo"] {
            let case = Case { normalizer, mask: Some(mask), ..USUAL };
            case.compare(&reference, &format!("mask_{mask}/{normalizer}"))?;
        }
    }
    Ok(())
}

#[test]
fn the_coupled_gradient_is_that_of_dmd2() -> Result<()> {
    let reference = Reference::read();
    let (evaluation, x) = Case { normalizer: "dmd2", ..USUAL }.run(&reference, Kind::Double)?;
    let error = reference.error("dmd2:gradient", &gradient(&evaluation.loss, &x));
    report("dmd2", &[("gradient f64", error, 1e-12)]);
    Ok(())
}

#[test]
fn inputs_in_bfloat16_cost_only_the_rounding_of_the_gradient() -> Result<()> {
    let reference = Reference::read();
    for normalizer in &reference.cases("bf16") {
        let (evaluation, x) = Case { normalizer, ..USUAL }.run(&reference, Kind::BFloat16)?;
        let name = format!("bf16/{normalizer}");
        let loss = reference.error(&format!("{name}:loss"), &evaluation.loss);
        let slope = gradient(&evaluation.loss, &x);
        assert_eq!(slope.kind(), Kind::BFloat16);
        let slope = reference.error(&format!("{name}:gradient"), &slope);
        // Autograd hands x a gradient of its own type: two terms, each rounded, then their sum.
        report(&name, &[("loss", loss, 1e-6), ("gradient", slope, 8e-3)]);
    }
    Ok(())
}

#[test]
fn the_loss_of_the_fake_score_for_every_prediction_and_weighting() -> Result<()> {
    let reference = Reference::read();
    let mut cases = Vec::new();
    for (group, times) in [("fake", "middle"), ("fake_bounds", "bounds")] {
        for case in reference.cases(group) {
            let (of, by) = case.split_once('/').expect("prediction/weighting");
            cases.push((format!("{group}/{case}"), prediction(of), weighting(by)?, times, None));
        }
    }
    for name in reference.cases("fake_ends") {
        let by = weighting(&name)?;
        cases.push((format!("fake_ends/{name}"), Prediction::FlowVelocity, by, "ends", None));
    }
    for mask in ["samples", "elements"] {
        let (name, by) = (format!("mask_{mask}/fake"), weighting("min_snr")?);
        cases.push((name, Prediction::FlowVelocity, by, "middle", Some(mask)));
    }
    for (name, prediction, weighting, times, mask) in cases {
        let mut errors = Vec::new();
        for (kind, what, tolerance) in [
            (Kind::Double, ["loss f64", "gradient f64"], 1e-12),
            (Kind::Float, ["loss f32", "gradient f32"], 1e-6),
        ] {
            let input = |name: &str| reference.get(name).to_kind(kind);
            let (x, cond) = (input("x").set_requires_grad(true), input("cond").into());
            let gain = Tensor::from(FAKE_GAIN).set_requires_grad(true);
            let fake = trainable(prediction, gain.shallow_clone());
            let dm = DistributionMatching::new(fake, Shift::NONE).weighting(weighting);
            let mut batch = Batch::new(&x, &cond)?;
            if let Some(mask) = mask {
                batch = batch.mask(&reference.get(&format!("mask_{mask}")))?;
            }
            let time = PostShift::new(input(&format!("times_{times}")))?;
            let loss = dm.denoising_loss_at(&batch, &time, &input("noise"))?;
            let gradients = Tensor::run_backward(&[&loss], &[&gain, &x], false, false);
            assert!(!gradients[1].defined(), "{name}: the student must receive nothing");
            let loss = reference.error(&format!("{name}:loss"), &loss);
            let slope = reference.error(&format!("{name}:gradient"), &gradients[0]);
            errors.extend([(what[0], loss, tolerance), (what[1], slope, tolerance)]);
        }
        report(&name, &errors);
    }
    Ok(())
}

#[test]
fn the_diagnostics() -> Result<()> {
    let reference = Reference::read();
    let case = Case { terms: "decoupled", normalizer: "cdm", ..USUAL };
    let (evaluation, _) = case.run(&reference, Kind::Double)?;
    let all = evaluation.diagnostics.expect("an observed objective");
    let term = |name: &str| all.term(name).expect("the term");
    let scores = term("dm").scores.as_ref().expect("scores of DM");
    let cos = all.update_cos("ca", "dm")?.expect("two directions");
    let one = |value: Option<f64>| Tensor::from_slice(&[value.expect("defined")]);
    let n = |name: &str| term(name).n.as_ref().expect("a normaliser").values().shallow_clone();
    let rms = |name: &str| term(name).update_rms.as_ref().expect("a size").values().shallow_clone();
    for (name, found) in [
        ("x_mean", all.x_mean.values().shallow_clone()),
        ("x_std", all.x_std.values().shallow_clone()),
        ("x_rms", all.x_rms.values().shallow_clone()),
        ("ca_n", n("ca")),
        ("dm_n", n("dm")),
        ("ca_update_rms", rms("ca")),
        ("dm_update_rms", rms("dm")),
        ("dm_rel_gap", scores.rel_gap.values().shallow_clone()),
        ("dm_cos", scores.cos.values().shallow_clone()),
        ("dm_mag_ratio", scores.mag_ratio.values().shallow_clone()),
        ("ca_dm_cos", cos.values().shallow_clone()),
        ("dm_to_ca", one(all.update_balance("dm", "ca")?)),
        ("variance_drift", one(all.variance_drift(0.4)?)),
    ] {
        let error = reference.error(&format!("diagnostics:{name}"), &found);
        report(&format!("diagnostics:{name}"), &[("f64", error, 1e-12)]);
    }
    let named = all.report()?;
    let mean = value(&reference.get("diagnostics:dm_cos").mean(None));
    let found = named.iter().find(|(name, _)| name == "dm_cos").map(|(_, value)| *value);
    approx::assert_relative_eq!(found.expect("dm_cos"), mean, max_relative = 1e-12);
    Ok(())
}

#[test]
fn no_reference_is_left_unread() {
    let groups = [
        "ca",
        "dm",
        "coupled",
        "decoupled",
        "prediction",
        "bounds",
        "near",
        "ends",
        "mask_samples",
        "mask_elements",
        "bf16",
        "fake",
        "fake_bounds",
        "fake_ends",
    ];
    for name in Reference::read().tensors.keys() {
        let group = name.split(['/', ':']).next().unwrap_or_default();
        let input = ["x", "noise", "noise_dm", "cond", "null", "dmd2", "diagnostics"];
        let input = input.contains(&group) || group.starts_with("times_") || !name.contains(':');
        assert!(input || groups.contains(&group), "{name}");
    }
}
