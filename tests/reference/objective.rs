//! The student's loss against reference values from stock PyTorch, made by
//! `scripts/reference/objective.py`. `-- --nocapture` shows the errors of each case.

use decoupled_dmd::{
    Batch, CfgAugmentation, DistributionMatching, Draw, Error, Evaluation, Group, Guidance,
    Normalizer, Objective, PreShift, Prediction, Renoising, Result, TimeDistribution,
};
use tch::{Kind, Tensor};

use super::common::reference::{
    FAKE_GAIN, PATHS, PREDICTIONS, Reference, TEACHER_GAIN, denoiser, reaches_noise,
};
use super::common::{BFLOAT16, FLOAT64, gradient, relative, value};

const ALPHA: f64 = 4.0;

const NORMALIZERS: [&str; 11] = [
    "off",
    "dmd2",
    "fastgen",
    "fastvideo",
    "simple_tuner",
    "rcm",
    "guided",
    "cdm",
    "conditional_floor_2",
    "port",
    "conditional_batch",
];

fn normalizer(name: &str) -> Result<Normalizer> {
    let alpha = Guidance::new(ALPHA)?;
    Ok(match name {
        "off" => Normalizer::OFF,
        "dmd2" => Normalizer::dmd2(alpha),
        "fastgen" => Normalizer::fastgen(alpha),
        "fastvideo" => Normalizer::fastvideo(alpha),
        "simple_tuner" => Normalizer::guided(alpha).floor(1e-6)?,
        "rcm" => Normalizer::guided(alpha).floor(1e-5)?,
        "guided" => Normalizer::guided(alpha),
        "cdm" => Normalizer::cdm(),
        "conditional_floor_2" => Normalizer::conditional().floor(2.0)?,
        "port" => Normalizer::decoupled_port(),
        "conditional_batch" => Normalizer::conditional().over_batch(),
        _ => panic!("{name}"),
    })
}

/// The draws are the times.
struct Given;

impl TimeDistribution for Given {
    fn times(&self, u: &Tensor, _student: Option<&PreShift>) -> Result<PreShift> {
        PreShift::new(u.shallow_clone())
    }
}

/// The parameters of a case.
#[derive(Clone, Copy)]
struct Case<'a> {
    terms: &'a str,
    normalizer: &'a str,
    path: &'a str,
    times: &'a str,
    teacher: Prediction,
    fake: Prediction,
    mask: Option<&'a str>,
}

const USUAL: Case<'_> = Case {
    terms: "coupled",
    normalizer: "guided",
    path: "rectified_flow",
    times: "middle",
    teacher: Prediction::FlowVelocity,
    fake: Prediction::FlowVelocity,
    mask: None,
};

impl Case<'_> {
    /// The evaluation and x, with inputs in `kind`.
    fn run(&self, reference: &Reference, kind: Kind) -> Result<(Evaluation, Tensor)> {
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let input = |name: &str, kind| reference.get(name).to_kind(kind);
        let x = input("x", kind).set_requires_grad(true);
        let (cond, null) = (input("cond", wide).into(), input("null", wide).into());
        let network = |prediction, gain: f64| denoiser(self.path, prediction, Tensor::from(gain));
        let dm = DistributionMatching::new(network(self.fake, FAKE_GAIN)?);
        let engine = CfgAugmentation::new(Guidance::new(ALPHA)?);
        let normalizer = normalizer(self.normalizer)?;
        let group = || Group::new(Renoising::new(Given)).normalizer(normalizer);
        let objective = Objective::new(network(self.teacher, TEACHER_GAIN)?).observed();
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
        let mut batch = Batch::new(&x, &cond)?.with_null(&null);
        if let Some(mask) = self.mask {
            batch = batch.with_mask(reference.get(&format!("mask_{mask}")))?;
        }
        let evaluation = objective.evaluate_at(&batch, draws)?;
        Ok((evaluation, x))
    }

    /// Compares loss and gradient with the reference's case `name`.
    fn compare(&self, reference: &Reference, name: &str) -> Result<()> {
        let mut errors = Vec::new();
        for (kind, what) in [
            (Kind::Double, ["loss f64", "gradient f64"]),
            (Kind::Float, ["loss f32", "gradient f32"]),
        ] {
            let (evaluation, x) = self.run(reference, kind)?;
            let slope = gradient(&evaluation.loss, &x);
            let loss = reference.error(&format!("{name}:loss"), &evaluation.loss);
            let slope = reference.error(&format!("{name}:gradient"), &slope);
            let bound = |values| reference.bound(values, kind);
            errors.extend([(what[0], loss, bound("loss")), (what[1], slope, bound("gradient"))]);
        }
        reference.report(name, &errors);
        Ok(())
    }

    /// The same with x and noise in bfloat16.
    fn compare_narrow(&self, reference: &Reference, name: &str) -> Result<()> {
        let (evaluation, x) = self.run(reference, Kind::BFloat16)?;
        assert_eq!(evaluation.loss.kind(), Kind::Float);
        let loss = reference.error(&format!("{name}:loss"), &evaluation.loss);
        let slope = gradient(&evaluation.loss, &x);
        assert_eq!(slope.kind(), Kind::BFloat16);
        let slope = reference.error(&format!("{name}:gradient"), &slope);
        // All but the gradient is float32, and that is rounded once.
        let bound = reference.bound("loss", Kind::Float);
        reference.report(name, &[("loss bf16", loss, bound), ("gradient bf16", slope, BFLOAT16)]);
        Ok(())
    }
}

#[test]
fn every_value_of_the_reference() -> Result<()> {
    Reference::check("objective", |reference| {
        normalizers(reference)?;
        dmd2(reference)?;
        masks(reference)?;
        paths_and_predictions(reference)?;
        bfloat16(reference)?;
        diagnostics(reference)
    })
}

fn normalizers(reference: &Reference) -> Result<()> {
    for normalizer in NORMALIZERS {
        for terms in ["ca", "dm", "coupled"] {
            let case = Case { terms, normalizer, ..USUAL };
            case.compare(reference, &format!("{terms}/{normalizer}"))?;
        }
    }
    for normalizer in ["off", "cdm", "port"] {
        let case = Case { terms: "decoupled", normalizer, ..USUAL };
        case.compare(reference, &format!("decoupled/{normalizer}"))?;
    }
    Ok(())
}

/// CA and DM, coupled, are the fused loss of DMD2.
fn dmd2(reference: &Reference) -> Result<()> {
    let (evaluation, x) = Case { normalizer: "dmd2", ..USUAL }.run(reference, Kind::Double)?;
    let error = reference.error("dmd2:gradient", &gradient(&evaluation.loss, &x));
    reference.report("dmd2", &[("gradient f64", error, FLOAT64)]);
    Ok(())
}

fn masks(reference: &Reference) -> Result<()> {
    for mask in ["samples", "elements"] {
        for normalizer in ["cdm", "fastvideo"] {
            let case = Case { normalizer, mask: Some(mask), ..USUAL };
            case.compare(reference, &format!("mask_{mask}/{normalizer}"))?;
        }
    }
    Ok(())
}

fn is_singular(prediction: Prediction, path: &str, times: &str) -> bool {
    reaches_noise(path, times) && matches!(prediction, Prediction::Noise | Prediction::Score)
}

fn paths_and_predictions(reference: &Reference) -> Result<()> {
    for path in PATHS {
        for (index, (name, prediction)) in PREDICTIONS.into_iter().enumerate() {
            let usual = Case { path, teacher: prediction, fake: prediction, ..USUAL };
            for terms in ["coupled", "decoupled"] {
                for normalizer in ["guided", "cdm"] {
                    let case = Case { terms, normalizer, ..usual };
                    case.compare(reference, &format!("{path}/{name}/{terms}/{normalizer}"))?;
                }
            }
            for times in ["bounds", "near", "ends"] {
                if !is_singular(prediction, path, times) {
                    let case = Case { times, ..usual };
                    case.compare(reference, &format!("{path}/{name}/{times}"))?;
                }
            }
            scores(reference, &usual, &format!("{path}/{name}"))?;
            // Next to the clean end a velocity is the small difference x_t - (a + s) x0, 1/50 of x_t and on
            // EDM 1/400, and a gap is the difference of two velocities: float32 has two digits less.
            let clean = Case { times: "bounds", ..usual };
            scores(reference, &clean, &format!("{path}/{name}"))?;
            // A fake score of another prediction type than the teacher's.
            let (other, fake) = PREDICTIONS[(index + 1) % PREDICTIONS.len()];
            let mixed = Case { fake, ..usual };
            let name = format!("{path}/{name}_{other}");
            mixed.compare(reference, &format!("{name}/coupled"))?;
            scores(reference, &mixed, &name)?;
        }
    }
    Ok(())
}

/// Relative gap, cosine and ratio of the scores of teacher and fake, a row each.
fn scores(reference: &Reference, case: &Case<'_>, name: &str) -> Result<()> {
    let values = format!("scores_{}", case.times);
    let name = format!("{name}/{values}");
    let expected = reference.get(&name);
    let mut errors = Vec::new();
    for (kind, what) in [
        (Kind::Double, ["rel_gap f64", "cos f64", "mag_ratio f64"]),
        (Kind::Float, ["rel_gap f32", "cos f32", "mag_ratio f32"]),
    ] {
        let (evaluation, _) = case.run(reference, kind)?;
        let all = evaluation.diagnostics.expect("an observed objective");
        let found = all.term("dm").and_then(|dm| dm.scores.as_ref()).expect("scores of DM");
        for (row, found) in [&found.rel_gap, &found.cos, &found.mag_ratio].into_iter().enumerate() {
            assert_eq!(value(&found.defined().all()), 1.0, "{name}");
            let error = relative(&name, found.values(), &expected.get(row as i64));
            errors.push((what[row], error, reference.bound(&values, kind)));
        }
    }
    reference.report(&name, &errors);
    Ok(())
}

/// Samples and noise in bfloat16 cost the rounding of the gradient, which autograd hands x in its own
/// type, and nothing else.
fn bfloat16(reference: &Reference) -> Result<()> {
    for normalizer in NORMALIZERS {
        for terms in ["ca", "dm"] {
            let case = Case { terms, normalizer, ..USUAL };
            case.compare_narrow(reference, &format!("bf16/{terms}/{normalizer}"))?;
        }
    }
    for (path, prediction) in [
        ("rectified_flow", Prediction::FlowVelocity),
        ("vp_linear", Prediction::Noise),
        ("vp_sdxl", Prediction::Noise),
        ("edm", Prediction::Sample),
        ("trig_flow", Prediction::Velocity),
    ] {
        for times in ["middle", "bounds", "near", "ends"] {
            for normalizer in ["guided", "cdm"] {
                let usual = Case { path, teacher: prediction, fake: prediction, ..USUAL };
                let case = Case { times, normalizer, ..usual };
                case.compare_narrow(reference, &format!("bf16/{path}/{times}/{normalizer}"))?;
            }
        }
    }
    Ok(())
}

fn diagnostics(reference: &Reference) -> Result<()> {
    let case = Case { terms: "decoupled", normalizer: "cdm", ..USUAL };
    for (kind, what) in [(Kind::Double, "diagnostics f64"), (Kind::Float, "diagnostics f32")] {
        let bound = reference.bound("diagnostics", kind);
        let (evaluation, _) = case.run(reference, kind)?;
        let all = evaluation.diagnostics.expect("an observed objective");
        let term = |name: &str| all.term(name).expect("the term");
        let scores = term("dm").scores.as_ref().expect("scores of DM");
        let n = |name: &str| term(name).n.as_ref().expect("a normaliser");
        let rms = |name: &str| term(name).update_rms.as_ref().expect("a size");
        let cos = all.update_cos("ca", "dm")?.expect("two directions");
        let per_sample = [
            ("x_mean", &all.x_mean),
            ("x_std", &all.x_std),
            ("x_rms", &all.x_rms),
            ("ca_n", n("ca")),
            ("dm_n", n("dm")),
            ("ca_update_rms", rms("ca")),
            ("dm_update_rms", rms("dm")),
            ("dm_rel_gap", &scores.rel_gap),
            ("dm_cos", &scores.cos),
            ("dm_mag_ratio", &scores.mag_ratio),
            ("ca_dm_cos", &cos),
        ];
        let per_sample = per_sample.map(|(name, found)| (name, found.values().shallow_clone()));
        let scalars = [
            ("dm_to_ca", all.update_balance("dm", "ca")?),
            ("variance_drift", all.variance_drift(0.4)?),
        ];
        let scalars =
            scalars.map(|(name, found)| (name, Tensor::from_slice(&[found.expect(name)])));
        for (name, found) in per_sample.into_iter().chain(scalars) {
            let name = format!("diagnostics/{name}");
            reference.report(&name, &[(what, reference.error(&name, &found), bound)]);
        }
        let named = all.report()?;
        let found = named.iter().find(|(name, _)| name == "dm_cos").map(|(_, value)| *value);
        let mean = value(&reference.get("diagnostics/dm_cos").mean(None));
        let error = (found.expect("dm_cos") - mean).abs() / mean.abs();
        reference.report("diagnostics/report", &[(what, error, bound)]);
    }
    Ok(())
}

/// There are no reference values for these: where the share of data vanishes, a clean sample cannot be
/// had from the noise or the score, whichever of the two networks predicts it.
#[test]
fn singular_predictions_are_refused_and_no_others() -> Result<()> {
    let reference = Reference::open("objective")?;
    for path in PATHS {
        for times in ["middle", "bounds", "near", "ends"] {
            for (of_teacher, teacher) in PREDICTIONS {
                for (of_fake, fake) in PREDICTIONS {
                    let case = Case { path, times, teacher, fake, ..USUAL };
                    let found = case.run(&reference, Kind::Double).map(|_| ());
                    let name = format!("{path}, {times}, {of_teacher}, {of_fake}: {found:?}");
                    let term = match found {
                        Ok(()) => None,
                        Err(Error::Term { name, source }) => {
                            assert!(matches!(*source, Error::OutOfRange { .. }), "{source}");
                            Some(name)
                        }
                        Err(_) => panic!("{name}"),
                    };
                    // The teacher is called first, for CA; the fake score for DM.
                    let of_teacher = is_singular(teacher, path, times).then_some("ca");
                    let of_fake = is_singular(fake, path, times).then_some("dm");
                    assert_eq!(term.as_deref(), of_teacher.or(of_fake), "{name}");
                }
            }
        }
    }
    Ok(())
}
