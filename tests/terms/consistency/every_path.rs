//! Closed forms of Gaussian data on every path, in float64, and what each form costs.

use super::super::differences::check_orders;
use super::*;

/// a and s of a path at times `[B]`, as `[B, 1]`, differentiable in the times.
fn levels(path: &dyn NoisePath, t: &Tensor) -> (Tensor, Tensor) {
    let at = path.coefficients(&PostShift::new(t.shallow_clone()).unwrap()).unwrap();
    (at.data.view([-1, 1]), at.noise.view([-1, 1]))
}

/// A function of time and its derivative, both `[B, 1]`.
fn with_slope(time: &PostShift, f: impl Fn(&Tensor) -> Tensor) -> (Tensor, Tensor) {
    let leaf = time.tensor().detach().set_requires_grad(true);
    let value = f(&leaf);
    let slope = if value.requires_grad() {
        Tensor::run_backward(&[&value], &[&leaf], false, false).remove(0)
    } else {
        leaf.zeros_like()
    };
    (value.detach(), slope.detach().view([-1, 1]))
}

/// Every path on which time can be differentiated.
fn smooth_paths() -> Vec<Box<dyn NoisePath>> {
    let mut paths = ending_paths();
    paths.push(Box::new(Edm::new(0.05, 4.0, 3.0).unwrap()));
    paths
}

#[test]
fn the_closed_forms_solve_the_teachers_ode() -> Result<()> {
    // dx/dt = a' X + s' E, where s' E is half the derivative of s^2 over v, times x - a mu.
    for path in smooth_paths() {
        let path = &*path;
        let velocity = |x: &Tensor, t: &Tensor| -> Result<Tensor> {
            let time = PostShift::new(t.shallow_clone())?;
            let (a, a_slope) = with_slope(&time, |t| levels(path, t).0);
            let (square, square_slope) = with_slope(&time, |t| levels(path, t).1.square());
            let v = a.square() * (STD * STD) + square;
            let away = x - &a * MEAN;
            let clean = MEAN + &a * (STD * STD) / &v * &away;
            Ok(a_slope * clean + square_slope * 0.5 / v * away)
        };
        let start = Tensor::from_slice(&[0.1, 0.4, 0.7]);
        let end = Tensor::from_slice(&[0.8, 0.95, 0.9]);
        let (a, s) = levels(path, &start);
        let deviation = wave(&[3, 2], 0.4, Kind::Double);
        let from = &a * MEAN + variance(&a, &s).sqrt() * &deviation;
        // Runge and Kutta's rule of the fourth order.
        let (mut x, steps) = (from.copy(), 200);
        let h = (&end - &start) / f64::from(steps);
        let length = h.view([-1, 1]);
        for step in 0..steps {
            let t = &start + &h * f64::from(step);
            let middle = &t + &h * 0.5;
            let one = velocity(&x, &t)?;
            let two = velocity(&(&x + &one * &length * 0.5), &middle)?;
            let three = velocity(&(&x + &two * &length * 0.5), &middle)?;
            let four = velocity(&(&x + &three * &length), &(&t + &h))?;
            x += (one + (two + three) * 2.0 + four) * &length / 6.0;
        }
        let (a, s) = levels(path, &end);
        let expected = &a * MEAN + variance(&a, &s).sqrt() * &deviation;
        assert!(max_difference(&x, &expected) < 1e-8, "{}", max_difference(&x, &expected));
        // The consistency function is the same all along, and at the clean end the sample itself.
        let student = exact_student(path);
        let at = |x: &Tensor, t: &Tensor| {
            student.denoise(x, &PostShift::new(t.shallow_clone())?, &mean_condition())
        };
        assert!(max_difference(&at(&from, &start)?, &at(&x, &end)?) < 1e-7);
    }
    for path in ending_paths() {
        let (x, end) = (wave(&[2, 2], 0.4, Kind::Double), PostShift::all(1.0, 2, DOUBLE)?);
        let found = exact_student(&*path).denoise(&x, &end, &mean_condition())?;
        assert!(max_difference(&found, &x) < 1e-15);
    }
    Ok(())
}

#[test]
fn the_exact_tangent_of_the_consistency_function_is_zero_on_every_path() -> Result<()> {
    let cond = mean_condition();
    for path in smooth_paths() {
        let path = &*path;
        let network = |x: &Tensor, t: &Tensor, c: &Tensor| {
            let (a, s) = levels(path, t);
            c + variance(&a, &s).sqrt().reciprocal() * STD * (x - &a * c)
        };
        let student = differentiable(path, Prediction::Sample, network);
        let (teacher, time) = (teacher(path), times()?);
        let input = inputs(path, &time);
        for std in [1.0, 0.5] {
            let engine = Consistency::continuous(student.clone(), Tangent::Exact)?.data_std(std)?;
            let found = direction(&engine, &student, &teacher, &input, &time, (&cond, None))?;
            assert!(largest(&found) < 1e-11, "{}", largest(&found));
        }
    }
    Ok(())
}

#[test]
fn a_linear_student_has_its_tangent_on_every_path() -> Result<()> {
    // f = mu + k (x - a mu): df/dt = (k' + k v' / (2 v)) (x - a mu), dphi/dt = d (s' a - a' s) / (a^2 d^2 + s^2).
    let cond = mean_condition();
    for path in smooth_paths() {
        let path = &*path;
        let gain = |t: &Tensor| (t * 1.3).sin().view([-1, 1]) + 0.2;
        let network =
            |x: &Tensor, t: &Tensor, c: &Tensor| c + gain(t) * (x - levels(path, t).0 * c);
        let student = differentiable(path, Prediction::Sample, network);
        let (teacher, time) = (teacher(path), times()?);
        let input = inputs(path, &time);
        let (k, k_slope) = with_slope(&time, gain);
        let (a, a_slope) = with_slope(&time, |t| levels(path, t).0);
        let (s, s_slope) = with_slope(&time, |t| levels(path, t).1);
        let v = variance(&a, &s);
        let v_slope = &a * &a_slope * (2.0 * STD * STD) + &s * &s_slope * 2.0;
        let by_time = (k_slope + k * v_slope / (v * 2.0)) * (&input - &a * MEAN);
        for std in [1.0, 0.5] {
            let norm = (&a * std).hypot(&s);
            let angle_slope = (&s_slope * &a - &a_slope * &s) * std / norm.square();
            // D = T / (q d), T = -c df/dphi.
            let expected = &by_time / &angle_slope * (&a * std) / (&s * -std);
            let of = |tangent| -> Result<Tensor> {
                let engine = Consistency::continuous(student.clone(), tangent)?;
                let engine = engine.unnormalized().data_std(std)?;
                direction(&engine, &student, &teacher, &input, &time, (&cond, None))
            };
            let exact = of(Tangent::Exact)?;
            assert!(max_difference(&exact, &expected) < 1e-11 * largest(&expected).max(1.0));
            let central = of(Tangent::Central { step: 1e-4 })?;
            assert!(max_difference(&central, &expected) < 1e-4 * largest(&expected).max(1.0));
        }
    }
    Ok(())
}

#[test]
fn on_trig_flow_the_teacher_itself_turns_by_its_sine() -> Result<()> {
    // Data of unit deviation, student = teacher: df/dphi = -sin(phi) (x - cos(phi) mu).
    let network = |x: &Tensor, t: &Tensor, c: &Tensor| {
        let (a, _) = levels(&TrigFlow, t);
        c + &a * (x - &a * c)
    };
    let student = differentiable(TrigFlow, Prediction::Sample, network);
    let (cond, time) = (mean_condition(), times()?);
    let input = inputs(&TrigFlow, &time);
    let engine = Consistency::continuous(student.clone(), Tangent::Exact)?.unnormalized();
    let found = direction(&engine, &student, &student, &input, &time, (&cond, None))?;
    // D = -c df/dphi / q = c (x - c mu).
    let (c, _) = coefficients(&TrigFlow, time.tensor());
    assert!(max_difference(&found, &(&c * (&input - &c * MEAN))) < 1e-13);
    Ok(())
}

#[test]
fn differences_converge_to_the_exact_tangent_on_every_path() -> Result<()> {
    let cond = mean_condition();
    let network = |x: &Tensor, t: &Tensor, c: &Tensor| {
        (x * 0.8 + t.view([-1, 1]) * c).sin() + x * t.view([-1, 1]) * 0.3
    };
    for path in smooth_paths() {
        let path = &*path;
        let student = differentiable(path, Prediction::Sample, network);
        let (teacher, time) = (teacher(path), times()?);
        let input = inputs(path, &time);
        let of = |tangent| -> Result<Tensor> {
            let engine = Consistency::continuous(student.clone(), tangent)?.unnormalized();
            direction(&engine, &student, &teacher, &input, &time, (&cond, None))
        };
        let exact = of(Tangent::Exact)?;
        let error = |tangent| -> Result<f64> { Ok(max_difference(&of(tangent)?, &exact)) };
        check_orders(error)?;
        let central = |step| error(Tangent::Central { step });
        // Until rounding: a step a thousand times shorter is worse.
        assert!(central(1e-9)? > central(1e-5)?);
    }
    Ok(())
}

#[test]
fn one_network_has_the_same_direction_on_every_path() -> Result<()> {
    // A rectified-flow network asked at x / (a + s) and time a / (a + s).
    let clean = |x: &Tensor, t: &Tensor, c: &Tensor| {
        let t = t.view([-1, 1]);
        let level: Tensor = 1.0 - &t;
        x - level * (x * 0.8 + t * c).sin()
    };
    let flow = differentiable(RectifiedFlow, Prediction::Sample, clean);
    let cond = mean_condition();
    for path in smooth_paths() {
        let path = &*path;
        let wrapped = |x: &Tensor, t: &Tensor, c: &Tensor| {
            let (a, s) = levels(path, t);
            let sum = &a + s;
            clean(&(x / &sum), &(a / sum).view([-1]), c)
        };
        let student = differentiable(path, Prediction::Sample, wrapped);
        let time = times()?;
        let (a, s) = coefficients(path, time.tensor());
        let sum = &a + &s;
        let flow_time = PostShift::new((&a / &sum).view([-1]))?;
        let input = inputs(path, &time);
        let of =
            |student: &Denoiser<'_>, path: &dyn NoisePath, input: &Tensor, time: &PostShift| {
                let engine = Consistency::continuous(student.clone(), Tangent::Exact)?;
                direction(&engine, student, &teacher(path), input, time, (&cond, None))
            };
        let found = of(&student, path, &input, &time)?;
        let expected = of(&flow, &RectifiedFlow, &(&input / &sum), &flow_time)?;
        let error = max_difference(&found, &expected) / largest(&expected);
        assert!(largest(&expected) > 0.1 && error < 1e-10, "{error}");
    }
    Ok(())
}

#[test]
fn the_discrete_fixed_point_holds_on_every_path() -> Result<()> {
    // As on rectified flow, with steps in the clock before the shift.
    const COUNT: usize = 12;
    let cond = mean_condition();
    for path in smooth_paths() {
        let path = &*path;
        let grid: Vec<f64> =
            (0..=COUNT).map(|k| path.shift().of(k as f64 / COUNT as f64)).collect();
        let (a, s) = levels(path, &Tensor::from_slice(&grid));
        let (a, mut s) = (values(&a), values(&s));
        // At the clean end the target is the teacher's sample, on EDM too.
        s[COUNT] = 0.0;
        let mut products = vec![1.0];
        for (i, (now, next)) in grid.iter().zip(&grid[1..]).enumerate().rev() {
            assert!(now < next);
            let k = a[i] * STD * STD / (a[i] * a[i] * STD * STD + s[i] * s[i]);
            let step = a[i + 1] * k + s[i + 1] / s[i] * (1.0 - a[i] * k);
            products.push(products[products.len() - 1] * step);
        }
        products.reverse();
        let (table, shift) = (Tensor::from_slice(&products), path.shift());
        let student =
            Denoiser::new(path, Prediction::Sample, |x: &Tensor, t: &Tensor, c: &Condition| {
                let even = shift.invert(&PostShift::new(t.shallow_clone()).unwrap()).unwrap();
                let index = (even.tensor() * COUNT as f64).round().to_kind(Kind::Int64);
                let factor = table.index_select(0, &index).view([-1, 1]);
                &c[0] + factor * (x - coefficients(path, t).0 * &c[0])
            });
        let time = PostShift::new(Tensor::from_slice(&grid[..COUNT]))?;
        let input = inputs_of(path, &time, COUNT as i64);
        let engine = Consistency::discrete(student.clone(), 1.0 / COUNT as f64)?;
        let found = direction(&engine, &student, &teacher(path), &input, &time, (&cond, None))?;
        assert!(largest(&found) < 1e-12, "{}", largest(&found));
    }
    Ok(())
}

fn inputs_of(path: &dyn NoisePath, time: &PostShift, count: i64) -> Tensor {
    let (a, s) = coefficients(path, time.tensor());
    &a * MEAN + variance(&a, &s).sqrt() * wave(&[count, 3], 0.2, Kind::Double)
}

#[test]
fn a_trained_student_has_the_guided_mean_and_the_same_spread() -> Result<()> {
    // f of mean m and deviation S is x at the clean end for any m and S; it starts as cond's N(0.7, 0.5^2).
    let (cond, null) = (mean_condition(), Condition::from(Tensor::from(0.2)));
    let mut store = nn::VarStore::new(Device::Cpu);
    store.double();
    let start = store.root().var_copy("start", &Tensor::from_slice(&[MEAN, STD]));
    let network = |x: &Tensor, t: &Tensor, _: &Condition| {
        let (a, mean, std) = (t.view([-1, 1]), start.get(0), start.get(1));
        let s: Tensor = 1.0 - &a;
        let spread = (a.square() * std.square() + s.square()).sqrt();
        &mean + std / spread * (x - a * &mean)
    };
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let engine = Consistency::continuous(student.clone(), Tangent::Central { step: 1e-4 })?
        .guided(Guidance::new(3.0)?);
    let teacher = teacher(&RectifiedFlow);
    let time = PostShift::new(Tensor::linspace(0.02, 0.95, 32, DOUBLE))?;
    let tau = || PostShift::all(0.5, 32, DOUBLE);
    let mut optimizer = nn::Adam::default().build(&store, 0.05)?;
    for step in 0..400 {
        let noise = wave(&[32, 3], f64::from(step), Kind::Double) * 1.4;
        let data = wave(&[32, 3], 0.5 + 2.0 * f64::from(step), Kind::Double) * 0.7 + 1.2;
        let input = RectifiedFlow.renoise(&data, &time, &noise)?;
        let x = student.denoise(&input, &time, &cond)?;
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_input(&input, &time)?;
        let probe = Probe::at(&teacher, &batch, tau()?, noise)?;
        let direction = tch::no_grad(|| engine.direction(&probe))?;
        optimizer.set_lr(0.05 * (1.0 - f64::from(step) / 400.0));
        optimizer.backward_step(&probe.loss_of(&direction)?);
    }
    // N(0.2 + 3 (0.7 - 0.2), 0.5^2)
    let found = values(&start);
    assert!((found[0] - 1.7).abs() < 0.01 && (found[1] - STD).abs() < 0.01, "{found:?}");
    Ok(())
}

#[test]
fn forwards_are_counted() -> Result<()> {
    let (students, tangents, teachers, pairs) =
        (Cell::new(0), Cell::new(0), Cell::new(0), Cell::new(0));
    let add = |cell: &Cell<u32>| cell.set(cell.get() + 1);
    let student = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, _: &Tensor, _: &Condition| {
            add(&students);
            x * 0.5
        },
    )
    .tangent(|x: &Tensor, _: &Tensor, _: &Condition, dx: &Tensor, _: &Tensor| {
        add(&tangents);
        (x * 0.5, dx * 0.5)
    });
    let teacher = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, _: &Tensor, _: &Condition| {
            add(&teachers);
            x * 0.3
        },
    );
    let paired = teacher.clone().paired(|x: &Tensor, _: &Tensor, _: &Condition, _: &Condition| {
        add(&pairs);
        (x * 0.3, x * 0.2)
    });
    let (cond, time) = (mean_condition(), times()?);
    let input = inputs(&RectifiedFlow, &time);
    let forms = [
        (None, (1, 0)),
        (Some(Tangent::Ahead { step: 1e-3 }), (1, 0)),
        (Some(Tangent::Central { step: 1e-3 }), (2, 0)),
        (Some(Tangent::Exact), (0, 1)),
    ];
    let count = |engine: &Consistency<'_>, teacher: &Denoiser<'_>| -> Result<[u32; 4]> {
        let counters = [&students, &tangents, &teachers, &pairs];
        counters.iter().for_each(|cell| cell.set(0));
        let _ = direction(engine, &student, teacher, &input, &time, (&cond, Some(&cond)))?;
        // One forward made x.
        students.set(students.get() - 1);
        Ok(counters.map(Cell::get))
    };
    let guided = Guidance::new(3.0)?;
    for (tangent, (student_forwards, products)) in forms {
        // Without guidance the teacher is asked once, with it twice, or once for a pair.
        for (guidance, teacher, asked) in [
            (Guidance::NEUTRAL, &teacher, [1, 0]),
            (guided, &teacher, [2, 0]),
            (guided, &paired, [0, 1]),
        ] {
            let engine = match tangent {
                None => Consistency::discrete(student.clone(), 0.1)?,
                Some(tangent) => Consistency::continuous(student.clone(), tangent)?,
            };
            let engine = engine.guided(guidance);
            let expected = [student_forwards, products, asked[0], asked[1]];
            assert_eq!(count(&engine, teacher)?, expected, "{engine:?}");
            // At the start of a warm-up nothing but the teacher is asked.
            if tangent.is_some() {
                engine.set_warmup(0.0)?;
                assert_eq!(count(&engine, teacher)?, [0, 0, asked[0], asked[1]], "{engine:?}");
            }
        }
    }
    Ok(())
}
