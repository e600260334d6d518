//! Flow maps and MeanFlow against closed forms of Gaussian data and of two modes, in float64.

mod exact;
mod settings;
mod training;

use std::cell::Cell;

use decoupled_dmd::{
    Batch, Condition, Consistency, Denoiser, Engine, Error, FewStepGrid, FlowMap, FlowRule,
    Guidance, MeanFlow, NoisePath, PostShift, Prediction, Probe, RectifiedFlow, Result, Shift,
    Tangent, TrigFlow, Uniform,
};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};

use super::common::{max_difference, seeded, value, values, wave};

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);
const MEAN: f64 = 0.7;
const STD: f64 = 0.5;
const CENTRAL: FlowRule = FlowRule::Eulerian(Tangent::Central { step: 1e-3 });

/// The standard deviation of x_t on rectified flow, `[B, 1]`.
fn spread(t: &Tensor) -> Tensor {
    let t = t.view([-1, 1]);
    (t.square() * (STD * STD) + t.neg().f_add_scalar(1.0).unwrap().square()).sqrt()
}

/// The average flow velocity of the exact map of N(mean, STD^2); at r = t its limit.
fn exact_velocity(x: &Tensor, t: &Tensor, r: &Tensor, mean: f64) -> Tensor {
    let (from, to) = (spread(t), spread(r));
    let length = (r - t).view([-1, 1]);
    let jump = r.view([-1, 1]) * mean + &to / &from * (x - t.view([-1, 1]) * mean);
    let average = (x - jump) / &length;
    // v = E - X with X = mean + t sd^2 / spread^2 (x - t mean).
    let clean = mean + t.view([-1, 1]) * (STD * STD) / from.square() * (x - t.view([-1, 1]) * mean);
    let level = t.view([-1, 1]).neg().f_add_scalar(1.0).unwrap();
    let now = (x - &clean) / level;
    average.where_self(&length.gt(1e-12), &now)
}

fn exact_map<'a>() -> FlowMap<'a> {
    FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| exact_velocity(x, t, r, MEAN))
}

/// The denoiser of N(condition, STD^2) as a network that predicts the flow velocity.
fn teacher<'a>() -> Denoiser<'a> {
    Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        |x: &Tensor, t: &Tensor, c: &Condition| {
            let (a, spread) = (t.view([-1, 1]), spread(t));
            let clean = &c[0] + &a * (STD * STD) / spread.square() * (x - &a * &c[0]);
            (x - clean) / a.neg().f_add_scalar(1.0).unwrap()
        },
    )
}

fn mean_condition() -> Condition {
    Condition::from(Tensor::from(MEAN))
}

fn times(values: &[f64]) -> PostShift {
    PostShift::new(Tensor::from_slice(values)).unwrap()
}

fn largest(tensor: &Tensor) -> f64 {
    value(&tensor.abs().max())
}

/// Root mean square of what a rule asks the map to change, over all elements.
fn residual(
    map: &FlowMap<'_>,
    teacher: &Denoiser<'_>,
    rule: FlowRule,
    from: &PostShift,
    to: &PostShift,
) -> Result<f64> {
    let cond = mean_condition();
    let shape = [from.tensor().size()[0], 3];
    let (x, noise) = (wave(&shape, 0.4, Kind::Double), wave(&shape, 2.0, Kind::Double));
    let mean_flow = MeanFlow::new(map.clone(), teacher.clone())?.rule(rule)?;
    let found = mean_flow.evaluate_at(&Batch::new(&x, &cond)?, &noise, from, to)?;
    assert!(max_difference(&found.loss, &found.squares.mean(None)) < 1e-15);
    Ok(value(&found.squares.mean(None).sqrt()))
}

#[test]
fn the_exact_map_obeys_every_rule() -> Result<()> {
    let (map, teacher) = (exact_map(), teacher());
    let (from, to) = (times(&[0.0, 0.1, 0.4, 0.6]), times(&[0.5, 0.9, 0.7, 0.95]));
    let of = |rule| residual(&map, &teacher, rule, &from, &to);
    for rule in
        [|step| FlowRule::Eulerian(Tangent::Central { step }), |step| FlowRule::Lagrangian { step }]
    {
        let (long, short) = (of(rule(1e-2))?, of(rule(5e-3))?);
        assert!(short < 1e-2, "{short}");
        // Where t = 0 or an end is near, one side of a difference is shorter: between both orders.
        assert!((1.9..4.2).contains(&(long / short)), "{long} {short}");
        assert!(of(rule(1e-5))? < 1e-5);
    }
    let inner = times(&[0.2, 0.3, 0.4, 0.5]);
    let inner_of = |rule| residual(&map, &teacher, rule, &inner, &to);
    let (long, short) =
        (inner_of(CENTRAL)?, inner_of(FlowRule::Eulerian(Tangent::Central { step: 5e-4 }))?);
    assert!((3.9..4.1).contains(&(long / short)), "{long} {short}");
    let ahead = |step| inner_of(FlowRule::Eulerian(Tangent::Ahead { step }));
    assert!((1.9..2.1).contains(&(ahead(1e-3)? / ahead(5e-4)?)));
    // A fraction's residual is the error of its Euler step, of the second order in the share.
    let fraction = |share| of(FlowRule::Fraction { share });
    assert!((3.6..4.4).contains(&(fraction(2e-3)? / fraction(1e-3)?)));
    assert!(fraction(1.0)? > 0.05);
    Ok(())
}

#[test]
fn at_equal_times_every_rule_regresses_the_teachers_velocity() -> Result<()> {
    let (teacher, cond) = (teacher(), mean_condition());
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, _: &Condition| x * 0.3);
    let at = times(&[0.2, 0.5]);
    let (x, noise) = (wave(&[2, 3], 0.4, Kind::Double), wave(&[2, 3], 2.0, Kind::Double));
    let input = RectifiedFlow.renoise(&x, &at, &noise)?;
    let clean = teacher.denoise(&input, &at, &cond)?;
    let velocity = (&input - clean) / at.tensor().neg().f_add_scalar(1.0)?.view([-1, 1]);
    let expected = (&input * 0.3 - velocity).square().mean_dim([1i64].as_slice(), false, None);
    for rule in [
        CENTRAL,
        FlowRule::Eulerian(Tangent::Ahead { step: 1e-3 }),
        FlowRule::Fraction { share: 1.0 },
        FlowRule::Lagrangian { step: 1e-3 },
    ] {
        let mean_flow = MeanFlow::new(map.clone(), teacher.clone())?.rule(rule)?;
        let found = mean_flow.evaluate_at(&Batch::new(&x, &cond)?, &noise, &at, &at)?;
        assert!(max_difference(&found.squares, &expected) < 1e-13, "{rule:?}");
    }
    Ok(())
}

#[test]
fn at_the_clean_end_mean_flow_is_continuous_consistency() -> Result<()> {
    let (teacher, cond) = (teacher(), mean_condition());
    let network = |x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        (x * 0.6 + t.view([-1, 1]) * 0.4).sin() + x * r.view([-1, 1]) * 0.2
    };
    let map = FlowMap::new(network);
    let (from, to) = (times(&[0.15, 0.4, 0.8]), times(&[1.0, 1.0, 1.0]));
    let (x0, noise) = (wave(&[3, 2], 0.4, Kind::Double), wave(&[3, 2], 2.0, Kind::Double));
    let input = RectifiedFlow.renoise(&x0, &from, &noise)?;
    // The gradient in u of the mean square is -2 (target - u) / numel.
    let bias = Tensor::zeros([3, 2], DOUBLE).set_requires_grad(true);
    let biased = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, c: &Condition| {
        network(x, t, r, c) + &bias
    });
    let step = 1e-4;
    let rule = FlowRule::Eulerian(Tangent::Central { step });
    let mean_flow = MeanFlow::new(biased, teacher.clone())?.rule(rule)?;
    let loss = mean_flow.evaluate_at(&Batch::new(&x0, &cond)?, &noise, &from, &to)?.loss;
    loss.backward();
    let change = bias.grad() * (-0.5 * 6.0);

    let student = map.denoiser();
    let x = student.denoise(&input, &from, &cond)?;
    let engine = Consistency::continuous(student, Tangent::Central { step })?.unnormalized();
    let batch = Batch::new(&x, &cond)?.with_student_input(&input, &from)?;
    let tau = PostShift::all(0.5, 3, DOUBLE)?;
    let direction = engine.direction(&Probe::at(&teacher, &batch, tau, x.zeros_like())?)?;
    // df/dt = D (1 - t) / (t n^2), and the target changes u by -df/dt.
    let t = from.tensor().view([-1, 1]);
    let level = t.neg().f_add_scalar(1.0)?;
    let slope = direction * &level / (&t * (t.square() + level.square()));
    let error = max_difference(&change, &slope.neg()) / largest(&change);
    assert!(error < 1e-6, "{error}");

    // A fraction is the discrete model with a step of that share of the way.
    let share = 0.25;
    let rule = FlowRule::Fraction { share };
    let biased = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, c: &Condition| {
        network(x, t, r, c) + &bias
    });
    let _ = bias.grad().zero_();
    let one = times(&[0.2, 0.2, 0.2]);
    let loss = MeanFlow::new(biased, teacher.clone())?.rule(rule)?;
    loss.evaluate_at(&Batch::new(&x0, &cond)?, &noise, &one, &to)?.loss.backward();
    let change = bias.grad() * (-0.5 * 6.0);
    let input = RectifiedFlow.renoise(&x0, &one, &noise)?;
    let student = map.denoiser();
    let x = student.denoise(&input, &one, &cond)?;
    let batch = Batch::new(&x, &cond)?.with_student_input(&input, &one)?;
    let tau = PostShift::all(0.5, 3, DOUBLE)?;
    let discrete = Consistency::discrete(student, share * 0.8)?;
    let direction = discrete.direction(&Probe::at(&teacher, &batch, tau, x.zeros_like())?)?;
    // f = x - (1 - t) u, so the direction in f is -(1 - t) times the change of u.
    assert!(max_difference(&direction, &(change * -0.8)) < 1e-13);
    Ok(())
}

#[test]
fn a_fraction_goes_to_mean_flow_linearly() -> Result<()> {
    let (teacher, cond) = (teacher(), mean_condition());
    let (from, to) = (times(&[0.15, 0.4, 0.3]), times(&[0.9, 0.7, 1.0]));
    let (x0, noise) = (wave(&[3, 2], 0.4, Kind::Double), wave(&[3, 2], 2.0, Kind::Double));
    let bias = Tensor::zeros([3, 2], DOUBLE).set_requires_grad(true);
    let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        (x * 0.6 + t.view([-1, 1]) * 0.4).sin() + x * r.view([-1, 1]) * 0.2 + &bias
    });
    let change = |rule| -> Result<Tensor> {
        let mean_flow = MeanFlow::new(map.clone(), teacher.clone())?.rule(rule)?;
        let loss = mean_flow.evaluate_at(&Batch::new(&x0, &cond)?, &noise, &from, &to)?.loss;
        Ok(Tensor::run_backward(&[&loss], &[&bias], false, false).remove(0) * -3.0)
    };
    let limit = change(FlowRule::Eulerian(Tangent::Central { step: 1e-5 }))?;
    let error = |share: f64| -> Result<f64> {
        Ok(max_difference(&(change(FlowRule::Fraction { share })? / share), &limit))
    };
    let (long, short) = (error(2e-3)?, error(1e-3)?);
    assert!((1.9..2.1).contains(&(long / short)), "{long} {short}");
    Ok(())
}

#[test]
fn jumps_compose_and_samples_are_those_of_the_ode() -> Result<()> {
    let (map, cond) = (exact_map(), mean_condition());
    let x = wave(&[2, 3], 0.1, Kind::Double);
    let (start, middle, end) = (times(&[0.0, 0.2]), times(&[0.4, 0.7]), times(&[0.9, 1.0]));
    let whole = map.jump(&x, &start, &end, &cond)?;
    let half = map.jump(&map.jump(&x, &start, &middle, &cond)?, &middle, &end, &cond)?;
    assert!(max_difference(&whole, &half) < 1e-13);
    let expected = MEAN + &x * STD;
    let shifted = exact_map().shifted(Shift::new(3.0)?);
    for steps in [1, 2, 5] {
        let grid = FewStepGrid::even(steps)?;
        for map in [&map, &shifted] {
            assert!(max_difference(&map.sample(&x, &cond, &grid)?, &expected) < 1e-12);
        }
    }
    let denoised = map.denoiser().denoise(&x, &times(&[0.0, 0.0]), &cond)?;
    assert!(max_difference(&denoised, &expected) < 1e-12);
    assert_eq!(shifted.denoiser().path().shift(), Shift::new(3.0)?);
    Ok(())
}

/// Two modes in one dimension: the ODE keeps the order of points, so M solves CDF_r(M) = CDF_t(x).
#[test]
fn the_map_of_two_modes_obeys_the_rules() -> Result<()> {
    const MODES: [(f64, f64, f64); 2] = [(0.35, -1.2, 0.35), (0.65, 0.9, 0.25)];
    fn deviation(t: f64, std: f64) -> f64 {
        (t * t * std * std + (1.0 - t) * (1.0 - t)).sqrt()
    }
    fn cdf(x: f64, t: f64) -> f64 {
        let normal = |z: f64| value(&Tensor::from(z).special_ndtr());
        MODES.iter().map(|(w, mean, std)| w * normal((x - t * mean) / deviation(t, *std))).sum()
    }
    fn jump(x: f64, t: f64, r: f64) -> f64 {
        let (mut low, mut high, target) = (-12.0, 12.0, cdf(x, t));
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if cdf(middle, r) < target { low = middle } else { high = middle }
        }
        0.5 * (low + high)
    }
    fn clean(x: f64, t: f64) -> f64 {
        let parts = MODES.map(|(weight, mean, std)| {
            let (d, away) = (deviation(t, std), x - t * mean);
            let density = weight / d * (-0.5 * (away / d).powi(2)).exp();
            (density, mean + t * std * std / (d * d) * away)
        });
        parts.iter().map(|(p, m)| p * m).sum::<f64>() / parts.iter().map(|(p, _)| p).sum::<f64>()
    }
    let each = |x: &Tensor, f: &dyn Fn(usize, f64) -> f64| {
        let found: Vec<f64> = values(x).into_iter().enumerate().map(|(i, x)| f(i, x)).collect();
        Tensor::from_slice(&found).view([-1, 1])
    };
    let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        let (t, r) = (values(t), values(r));
        each(x, &|i, x| (x - jump(x, t[i], r[i])) / (r[i] - t[i]))
    });
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::FlowVelocity,
        |x: &Tensor, t: &Tensor, _: &Condition| {
            let t = values(t);
            each(x, &|i, x| (x - clean(x, t[i])) / (1.0 - t[i]))
        },
    );
    let (from, to) = (times(&[0.1, 0.4, 0.6]), times(&[0.5, 0.9, 0.95]));
    let (x, noise) =
        (Tensor::from_slice(&[0.4, -0.9, 1.1]).view([3, 1]), wave(&[3, 1], 0.5, Kind::Double));
    let cond = Condition::none();
    let of = |rule| -> Result<f64> {
        let mean_flow = MeanFlow::new(map.clone(), teacher.clone())?.rule(rule)?;
        let found = mean_flow.evaluate_at(&Batch::new(&x, &cond)?, &noise, &from, &to)?;
        Ok(largest(&found.squares).sqrt())
    };
    for rule in
        [|step| FlowRule::Eulerian(Tangent::Central { step }), |step| FlowRule::Lagrangian { step }]
    {
        let (long, short) = (of(rule(2e-2))?, of(rule(1e-2))?);
        assert!(short < 5e-3 && (3.5..4.5).contains(&(long / short)), "{long} {short}");
    }
    Ok(())
}

#[test]
fn guidance_bakes_in_the_guided_teacher() -> Result<()> {
    // N(0.7) against N(0.2) at alpha 3 is N(1.7).
    let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        exact_velocity(x, t, r, 1.7)
    });
    let (cond, null) = (mean_condition(), Condition::from(Tensor::from(0.2)));
    let (from, to) = (times(&[0.2, 0.4]), times(&[0.9, 1.0]));
    let (x, noise) = (wave(&[2, 3], 0.4, Kind::Double), wave(&[2, 3], 2.0, Kind::Double));
    let of = |guidance: Guidance, null: Option<&Condition>| -> Result<f64> {
        let mut batch = Batch::new(&x, &cond)?;
        if let Some(null) = null {
            batch = batch.with_null(null);
        }
        let mean_flow = MeanFlow::new(map.clone(), teacher())?.guided(guidance);
        Ok(largest(&mean_flow.evaluate_at(&batch, &noise, &from, &to)?.squares).sqrt())
    };
    assert!(of(Guidance::new(3.0)?, Some(&null))? < 1e-4);
    assert!(of(Guidance::NEUTRAL, None)? > 0.1);
    // Outside of its interval guidance does not act.
    let never = Guidance::new(3.0)?.within(0.95, 1.0)?;
    assert!((of(never, None)? - of(Guidance::NEUTRAL, None)?).abs() < 1e-15);
    let missing = of(Guidance::new(3.0)?, None).unwrap_err();
    assert!(matches!(missing, Error::Missing { what: "null condition", .. }));
    Ok(())
}
