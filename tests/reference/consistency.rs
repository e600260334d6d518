//! Consistency and flow maps against stock PyTorch in float64, in three types.
//!
//! `scripts/reference/consistency.py` writes the values; `-- --nocapture` shows the errors of each case.
//! `Tangent::Exact` is taken by forward mode, as in the example `exact_tangent`.

use decoupled_dmd::{
    Batch, Condition, Consistency, Denoiser, Engine, FlowMap, FlowRule, Guidance, MeanFlow,
    NoisePath, PostShift, Prediction, Probe, Result, Tangent,
};
use tch::{Device, Kind, Tensor};

use super::common::reference::{
    MASKS, PREDICTIONS, Reference, TEACHER_GAIN, USUAL, denoiser, leaf, wide,
};
use super::common::{self, BFLOAT16, gradient, seeded};
use super::forward_mode;

const ALPHA: f64 = 3.0;
const STUDENT_GAIN: f64 = 0.7;

fn alpha(is_guided: bool) -> Guidance {
    if is_guided { Guidance::new(ALPHA).unwrap() } else { Guidance::NEUTRAL }
}

/// A network with its derivative by forward mode.
fn with_tangent(path: &str, prediction: Prediction, gain: &Tensor) -> Result<Denoiser<'static>> {
    let plain = denoiser(path, prediction, gain.shallow_clone())?;
    let network = denoiser(path, Prediction::Sample, gain.shallow_clone())?;
    Ok(plain.tangent(move |x, t, cond: &Condition, dx, dt| {
        // What predicts the clean sample answers its own output.
        forward_mode::along([(x, dx), (t, dt)], |[x, t]| {
            let time = PostShift::new(t.shallow_clone())?;
            Ok(network.denoise(x, &time, cond)?)
        })
    }))
}

type Case = (&'static str, Option<Tangent>, f64, Option<f64>, f64, bool);

/// Name; derivative, or the step of the discrete form; w; kappa; the deviation of the data; guidance.
const CASES: [Case; 16] = {
    const CENTRAL: Option<Tangent> = Some(Tangent::Central { step: 1e-3 });
    const LONG: Option<Tangent> = Some(Tangent::Central { step: 1e-2 });
    const AHEAD: Option<Tangent> = Some(Tangent::Ahead { step: 1.0 / 64.0 });
    const EXACT: Option<Tangent> = Some(Tangent::Exact);
    const KAPPA: Option<f64> = Some(0.1);
    [
        ("discrete", None, 0.1, None, 1.0, false),
        ("discrete_guided", None, 0.1, None, 1.0, true),
        ("discrete_normalized", None, 0.02, KAPPA, 1.0, false),
        ("central", CENTRAL, 1.0, KAPPA, 1.0, false),
        ("central_warm_guided", CENTRAL, 0.5, KAPPA, 0.5, true),
        ("central_plain", LONG, 1.0, None, 1.0, false),
        ("ahead", AHEAD, 1.0, KAPPA, 1.0, false),
        ("ahead_warm_guided", AHEAD, 0.5, None, 0.5, true),
        ("exact", EXACT, 1.0, KAPPA, 1.0, false),
        ("exact_guided", EXACT, 1.0, KAPPA, 1.0, true),
        ("exact_warm", EXACT, 0.5, KAPPA, 1.0, false),
        ("exact_warm_guided", EXACT, 0.5, KAPPA, 0.5, true),
        ("exact_plain", EXACT, 1.0, None, 0.5, false),
        ("exact_kappa", EXACT, 1.0, Some(2.0), 1.0, false),
        ("pull", EXACT, 0.0, KAPPA, 1.0, true),
        ("pull_plain", EXACT, 0.0, None, 0.5, false),
    ]
};

fn engine<'a>(student: Denoiser<'a>, case: Case) -> Result<Consistency<'a>> {
    let (_, tangent, number, kappa, std, is_guided) = case;
    let engine = match tangent {
        None => Consistency::discrete(student, number)?,
        Some(tangent) => {
            let engine = Consistency::continuous(student, tangent)?;
            engine.set_warmup(number)?;
            engine
        }
    };
    let engine = engine.guided(alpha(is_guided)).data_std(std)?;
    match kappa {
        Some(kappa) => engine.normalized(kappa),
        None => Ok(engine.unnormalized()),
    }
}

fn consistency(
    reference: &Reference,
    (path, prediction): (&str, Prediction),
    case: Case,
    (mask, kind): (Option<&str>, Kind),
    name: &str,
) -> Result<()> {
    let values = match (case.0.split('_').next(), case.2) {
        (Some("pull"), _) => "pull",
        (Some(form), _) => form,
        _ => unreachable!(),
    };
    let wide = wide(kind);
    let input = |name: &str| reference.get(name).to_kind(wide);
    let (cond, null) = (input("cond").into(), input("null").into());
    let times = if values == "discrete" { "times_discrete" } else { "times_consistency" };
    let time = PostShift::new(input(times))?;
    let noised = common::reference::path(path)?.renoise(&input("x"), &time, &input("noise"))?;
    let gain = leaf(&Tensor::from(STUDENT_GAIN), wide);
    let student = with_tangent(path, prediction, &gain)?;
    let teacher = denoiser(path, prediction, Tensor::from(TEACHER_GAIN))?;
    // In bfloat16 the samples of the batch are not quite the student's.
    let x = if kind == Kind::BFloat16 {
        leaf(&input("x"), kind)
    } else {
        student.denoise(&noised, &time, &cond)?
    };
    let mut batch = Batch::new(&x, &cond)?.with_null(&null).with_student_input(&noised, &time)?;
    if let Some(mask) = mask {
        batch = batch.with_mask(reference.get(&format!("mask_{mask}")))?;
    }
    let tau = PostShift::all(0.5, 3, (wide, Device::Cpu))?;
    let probe = Probe::at(&teacher, &batch, tau, x.detach().zeros_like())?;
    let direction = {
        let _no_grad = tch::no_grad_guard();
        engine(student, case)?.direction(&probe)?
    };
    let loss = probe.loss_of(&direction)?;
    assert_eq!((direction.kind(), loss.kind()), (wide, wide));
    let mut found = vec![("loss", loss.detach()), ("gradient", gradient(&loss, &x))];
    if kind != Kind::BFloat16 {
        found.push(("gain", gradient(&loss, &gain)));
    }
    let mut errors = Vec::new();
    for (what, found) in &found {
        let of = format!("{what}_{values}");
        let is_narrow = found.kind() == Kind::BFloat16;
        let bound = reference.bound(&format!("consistency_{of}"), kind);
        // A difference is divided by its step, and its last digits with it.
        let is_divided = kind == Kind::Double && ["central", "ahead"].contains(&values);
        let bound = if is_divided { 10.0 * bound } else { bound };
        let error = reference.error(&format!("{name}:{of}"), found);
        let bound = if is_narrow { BFLOAT16 } else { bound };
        errors.push((format!("consistency {of} {kind:?}"), error, bound));
    }
    let errors: Vec<_> =
        errors.iter().map(|(what, error, bound)| (&**what, *error, *bound)).collect();
    reference.report(name, &errors);
    Ok(())
}

const RULES: [(&str, FlowRule); 6] = [
    ("fraction_0.25", FlowRule::Fraction { share: 0.25 }),
    ("fraction_1.0", FlowRule::Fraction { share: 1.0 }),
    ("exact", FlowRule::Eulerian(Tangent::Exact)),
    ("central", FlowRule::Eulerian(Tangent::Central { step: 1e-3 })),
    ("ahead", FlowRule::Eulerian(Tangent::Ahead { step: 1e-3 })),
    ("lagrangian", FlowRule::Lagrangian { step: 1e-3 }),
];

fn average(
    x: &Tensor,
    (t, r): (&Tensor, &Tensor),
    cond: &Condition,
    gain: &Tensor,
    offset: &Tensor,
) -> Tensor {
    let (t, r) = (t.view([-1, 1, 1, 1]), r.view([-1, 1, 1, 1]));
    gain * (x + &cond[0]).sin() * (t + 0.5) * (&r * 0.5 + 1.0) + r * x * 0.1 + offset
}

fn mean_flow(
    reference: &Reference,
    prediction: Prediction,
    (values, rule): (&str, FlowRule),
    (is_guided, power): (bool, f64),
    (mask, kind): (Option<&str>, Kind),
    name: &str,
) -> Result<()> {
    let wide = wide(kind);
    let input = |name: &str, kind| reference.get(name).to_kind(kind);
    let (cond, null) = (input("cond", wide).into(), input("null", wide).into());
    let (x, noise) = (input("x", kind), input("noise", kind));
    let (gain, offset) = (leaf(&Tensor::from(STUDENT_GAIN), wide), leaf(&x.zeros_like(), wide));
    let map = FlowMap::new(|x, t, r, cond: &Condition| average(x, (t, r), cond, &gain, &offset));
    let map = map.tangent(|x, (t, r), cond: &Condition, along| {
        forward_mode::along([(x, along), (t, &t.f_ones_like()?)], |[x, t]| {
            Ok(average(x, (t, r), cond, &gain, &offset))
        })
    });
    let teacher = denoiser("rectified_flow", prediction, Tensor::from(TEACHER_GAIN))?;
    let term = MeanFlow::new(map.clone(), teacher)?.rule(rule)?.guided(alpha(is_guided));
    let mut batch = Batch::new(&x, &cond)?.with_null(&null);
    if let Some(mask) = mask {
        batch = batch.with_mask(reference.get(&format!("mask_{mask}")))?;
    }
    let time = |name| PostShift::new(input(name, wide));
    let (from, to) = (time("times_from")?, time("times_to")?);
    let found = term.adaptive(power, 1e-3)?.evaluate_at(&batch, &noise, &from, &to)?;
    let gradients = Tensor::run_backward(&[&found.loss], &[&offset, &gain], false, false);
    assert_eq!((found.loss.kind(), found.squares.kind()), (wide, wide));
    let [by_offset, by_gain] = &gradients[..] else { unreachable!() };
    let mut errors = Vec::new();
    for (what, found) in [
        ("loss", &found.loss.detach()),
        ("squares", &found.squares),
        ("gradient", by_offset),
        ("gain", by_gain),
    ] {
        let of = format!("{what}_{values}");
        let bound = reference.bound(&format!("mean_flow_{of}"), kind);
        errors.push((
            format!("mean_flow {of} {kind:?}"),
            reference.error(&format!("{name}:{of}"), found),
            bound,
        ));
    }
    let errors: Vec<_> =
        errors.iter().map(|(what, error, bound)| (&**what, *error, *bound)).collect();
    reference.report(name, &errors);
    Ok(())
}

#[test]
fn every_consistency_and_flow_map_value_of_the_reference() -> Result<()> {
    // Dual levels are those of the process: other tests ask whether one is open.
    let _guard = seeded(0);
    Reference::check("consistency", |reference| {
        for kind in [Kind::Double, Kind::Float] {
            for (path, usual) in USUAL {
                for (shown, prediction) in PREDICTIONS {
                    for case in CASES {
                        let name = format!("{path}/{shown}/{}", case.0);
                        consistency(reference, (path, prediction), case, (None, kind), &name)?;
                    }
                }
                let (shown, _) = PREDICTIONS.into_iter().find(|of| of.1 == usual).unwrap();
                for case in CASES {
                    let name = format!("{path}/{shown}/{}", case.0);
                    if ["discrete_normalized", "central", "ahead", "exact_warm_guided"]
                        .contains(&case.0)
                    {
                        for mask in MASKS {
                            let name = format!("{name}/mask_{mask}");
                            consistency(reference, (path, usual), case, (Some(mask), kind), &name)?;
                        }
                    }
                    if kind == Kind::Float
                        && ["discrete", "ahead", "exact_warm_guided", "pull"].contains(&case.0)
                    {
                        let name = format!("{name}/bf16");
                        consistency(reference, (path, usual), case, (None, Kind::BFloat16), &name)?;
                    }
                }
            }
            let flow = Prediction::FlowVelocity;
            for rule in RULES {
                for (shown, prediction) in PREDICTIONS {
                    if rule.0 != "lagrangian" || prediction == flow {
                        let name = format!("mean_flow/{shown}/{}", rule.0);
                        mean_flow(reference, prediction, rule, (false, 0.0), (None, kind), &name)?;
                    }
                }
                let name = |rest: &str| format!("mean_flow/flow_velocity/{}/{rest}", rule.0);
                for (shown, power) in [("guided", 0.0), ("guided_half", 0.5), ("guided_one", 1.0)] {
                    mean_flow(reference, flow, rule, (true, power), (None, kind), &name(shown))?;
                }
                for mask in MASKS {
                    let name = name(&format!("mask_{mask}"));
                    mean_flow(reference, flow, rule, (false, 0.0), (Some(mask), kind), &name)?;
                }
                if kind == Kind::Float {
                    let narrow = (None, Kind::BFloat16);
                    mean_flow(reference, flow, rule, (false, 0.5), narrow, &name("bf16"))?;
                }
            }
        }
        Ok(())
    })
}
