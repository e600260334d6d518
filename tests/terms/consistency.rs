//! Consistency against closed forms of Gaussian data, in float64.

mod contract;
mod every_path;
mod gaussian;
mod training;

use std::cell::Cell;

use decoupled_dmd::{
    Batch, Condition, Consistency, Denoiser, Distance, Edm, Engine, Error, Group, Guidance,
    NoisePath, Objective, PairedRegression, PostShift, Prediction, Probe, RectifiedFlow, Renoising,
    Result, Tangent, TrigFlow, Uniform, VariancePreserving, engine_fn, testing,
};
use gaussian::{
    DOUBLE, MEAN, STD, coefficients, differentiable, direction, ending_paths, exact_student,
    flow_exact, flow_teacher, inputs, largest, mean_condition, teacher, times, variance,
};
use tch::{Device, Kind, Tensor, nn, nn::OptimizerConfig};

use super::common::{max_difference, sdxl, seeded, value, values, wave};

#[test]
fn the_consistency_function_stays_where_it_is() -> Result<()> {
    let cond = mean_condition();
    for path in ending_paths() {
        let path = &*path;
        let (student, teacher, time) = (exact_student(path), teacher(path), times()?);
        let input = inputs(path, &time);
        let size = |tangent| -> Result<f64> {
            let engine = Consistency::continuous(student.clone(), tangent)?;
            Ok(largest(&direction(&engine, &student, &teacher, &input, &time, (&cond, None))?))
        };
        // Central differences are of the second order, one-sided ones of the first.
        let central = [2e-3, 1e-3].map(|step| size(Tangent::Central { step }).unwrap());
        let ahead = [2e-4, 1e-4].map(|step| size(Tangent::Ahead { step }).unwrap());
        assert!((3.6..4.4).contains(&(central[0] / central[1])), "{central:?}");
        assert!((1.8..2.2).contains(&(ahead[0] / ahead[1])), "{ahead:?}");
        assert!(central[1] < 0.05 && size(Tangent::Central { step: 1e-4 })? < 5e-4);
        // The discrete direction is the error of one step of the teacher.
        let discrete = |step: f64| -> Result<f64> {
            let engine = Consistency::discrete(student.clone(), step)?;
            Ok(largest(&direction(&engine, &student, &teacher, &input, &time, (&cond, None))?))
        };
        let (long, short) = (discrete(2e-3)?, discrete(1e-3)?);
        assert!((3.5..4.5).contains(&(long / short)), "{long} {short}");
    }
    let student = differentiable(RectifiedFlow, Prediction::Sample, flow_exact);
    let (teacher, time) = (teacher(&RectifiedFlow), times()?);
    let input = inputs(&RectifiedFlow, &time);
    let engine = Consistency::continuous(student.clone(), Tangent::Exact)?;
    let exact = direction(&engine, &student, &teacher, &input, &time, (&cond, None))?;
    assert!(largest(&exact) < 1e-12, "{}", largest(&exact));
    Ok(())
}

#[test]
fn a_linear_student_has_the_tangent_worked_out_by_hand() -> Result<()> {
    // Student and teacher are the denoiser of N(0.7, 0.5^2) on rectified flow, at t = 0.37:
    // T = t n sd^2 (1 - t) / v^2 (x - t mu), D = T / (rms T + 0.1) n / (1 - t).
    let (t, x) = (0.37, [1.3, -0.2, 0.6]);
    let n = (t * t + (1.0 - t) * (1.0_f64 - t)).sqrt();
    let v = t * t * STD * STD + (1.0 - t) * (1.0 - t);
    let tangent = x.map(|x| t * n * STD * STD * (1.0 - t) / (v * v) * (x - t * MEAN));
    let rms = (tangent.iter().map(|t| t * t).sum::<f64>() / 3.0).sqrt();
    let by_hand = tangent.map(|tangent| tangent / (rms + 0.1) * n / (1.0 - t));
    for (found, expected) in by_hand.iter().zip([1.075_72, -0.474_31, 0.352_37]) {
        approx::assert_abs_diff_eq!(*found, expected, epsilon = 1e-5);
    }
    let student = differentiable(RectifiedFlow, Prediction::Sample, flow_teacher);
    let input = Tensor::from_slice(&x).view([1, 3]);
    let time = PostShift::all(t, 1, DOUBLE)?;
    let cond = mean_condition();
    let of = |engine: Consistency<'_>| {
        direction(&engine, &student, &teacher(&RectifiedFlow), &input, &time, (&cond, None))
    };
    let exact = of(Consistency::continuous(student.clone(), Tangent::Exact)?)?;
    let plain = of(Consistency::continuous(student.clone(), Tangent::Exact)?.unnormalized())?;
    for (i, (found, plain)) in values(&exact).iter().zip(values(&plain)).enumerate() {
        approx::assert_abs_diff_eq!(*found, by_hand[i], epsilon = 1e-12);
        approx::assert_abs_diff_eq!(plain, tangent[i] * n / (1.0 - t), epsilon = 1e-12);
    }
    let central = of(Consistency::continuous(student.clone(), Tangent::Central { step: 1e-4 })?)?;
    assert!(max_difference(&central, &exact) < 1e-6);
    Ok(())
}

#[test]
fn the_exact_tangent_is_that_of_differences_for_every_prediction_and_path() -> Result<()> {
    let cond = mean_condition();
    let network = |x: &Tensor, t: &Tensor, c: &Tensor| {
        (x * 0.8 + t.view([-1, 1]) * c).sin() + x * t.view([-1, 1]) * 0.3
    };
    let paths: [&dyn NoisePath; 4] = [
        &RectifiedFlow,
        &TrigFlow,
        &Edm::new(0.05, 4.0, 3.0)?,
        &VariancePreserving::linear(0.1, 8.0)?,
    ];
    for path in paths {
        let (teacher, time) = (teacher(path), times()?);
        let input = inputs(path, &time);
        for prediction in Prediction::ALL {
            let student = differentiable(path, prediction, network);
            let of = |tangent, std: f64| -> Result<Tensor> {
                let engine = Consistency::continuous(student.clone(), tangent)?;
                let engine = engine.unnormalized().data_std(std)?;
                direction(&engine, &student, &teacher, &input, &time, (&cond, None))
            };
            for std in [1.0, 0.5] {
                let (exact, central) =
                    (of(Tangent::Exact, std)?, of(Tangent::Central { step: 1e-5 }, std)?);
                let size = largest(&exact).max(1.0);
                let error = max_difference(&exact, &central) / size;
                assert!(error < 1e-6, "{prediction:?} {std}: {error}");
            }
        }
    }
    Ok(())
}

#[test]
fn the_tangent_is_the_same_on_every_path() -> Result<()> {
    // A rectified-flow network, as it is and wrapped as TrigFlow: sigma = q / (c + q), input x / (c + q).
    let velocity = |x: &Tensor, t: &Tensor, c: &Tensor| (x * 0.8 + t.view([-1, 1]) * c).sin();
    let angle =
        |t: &Tensor| t.view([-1, 1]).neg().f_add_scalar(1.0).unwrap() * std::f64::consts::FRAC_PI_2;
    let wrapped = move |x: &Tensor, t: &Tensor, c: &Tensor| {
        let (cosine, sine) = (angle(t).cos(), angle(t).sin());
        let sum = &cosine + &sine;
        let sigma = &sine / &sum;
        let input = x / &sum;
        let time: Tensor = 1.0 - sigma.view([-1]);
        let clean = &input - &sigma * velocity(&input, &time, c);
        (&cosine * x - clean) / sine
    };
    let flow = differentiable(RectifiedFlow, Prediction::FlowVelocity, velocity);
    let trig = differentiable(TrigFlow, Prediction::Velocity, wrapped);
    let cond = mean_condition();
    let time = times()?;
    let (a, s) = coefficients(&RectifiedFlow, time.tensor());
    let trig_time = PostShift::new((s.atan2(&a) * (-2.0 / std::f64::consts::PI) + 1.0).view([-1]))?;
    let input = inputs(&RectifiedFlow, &time);
    let norm = a.hypot(&s);
    let of = |student: &Denoiser<'_>, path: &dyn NoisePath, input: &Tensor, time: &PostShift| {
        let engine = Consistency::continuous(student.clone(), Tangent::Exact)?;
        direction(&engine, student, &teacher(path), input, time, (&cond, None))
    };
    let on_flow = of(&flow, &RectifiedFlow, &input, &time)?;
    let on_trig = of(&trig, &TrigFlow, &(&input / &norm), &trig_time)?;
    assert!(largest(&on_flow) > 0.1);
    let error = max_difference(&on_flow, &on_trig) / largest(&on_flow);
    assert!(error < 1e-10, "{error}");
    Ok(())
}

#[test]
fn a_discrete_model_has_its_fixed_point_at_products_of_the_steps() -> Result<()> {
    // m(t, l) = a_l k + s_l / s (1 - a k), k = a sd^2 / v; f(x, t_i) = mu + (product from i) (x - a mu).
    let step = |t: f64, l: f64| {
        let (a, s) = (t, 1.0 - t);
        let k = a * STD * STD / (a * a * STD * STD + s * s);
        l * k + (1.0 - l) / s * (1.0 - a * k)
    };
    let cond = mean_condition();
    for (count, printed) in
        [(4usize, 0.340_54), (10, 0.430_78), (16, 0.455_68), (48, 0.484_80), (64, 0.488_56)]
    {
        let grid: Vec<f64> = (0..=count).map(|k| k as f64 / count as f64).collect();
        let mut products = vec![1.0];
        for pair in grid.windows(2).rev() {
            products.push(products[products.len() - 1] * step(pair[0], pair[1]));
        }
        products.reverse();
        approx::assert_abs_diff_eq!(products[0], printed, epsilon = 1e-5);
        let table = Tensor::from_slice(&products);
        let student = Denoiser::new(
            RectifiedFlow,
            Prediction::Sample,
            |x: &Tensor, t: &Tensor, c: &Condition| {
                let index = (t * count as f64).round().to_kind(Kind::Int64);
                let factor = table.index_select(0, &index).view([-1, 1]);
                &c[0] + factor * (x - t.view([-1, 1]) * &c[0])
            },
        );
        let time = PostShift::new(Tensor::from_slice(&grid[..count]))?;
        let input = wave(&[count as i64, 3], 0.2, Kind::Double);
        let engine = Consistency::discrete(student.clone(), 1.0 / count as f64)?;
        let found =
            direction(&engine, &student, &teacher(&RectifiedFlow), &input, &time, (&cond, None))?;
        assert!(largest(&found) < 1e-13, "{count}: {}", largest(&found));
    }
    Ok(())
}

#[test]
fn warm_up_goes_from_the_teachers_sample_to_the_tangent() -> Result<()> {
    let calls = Cell::new(0);
    let network = |x: &Tensor, t: &Tensor, _: &Condition| {
        calls.set(calls.get() + 1);
        x * t.view([-1, 1]) * 0.9
    };
    let student = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let (cond, time) = (mean_condition(), times()?);
    let (input, teacher) = (inputs(&RectifiedFlow, &time), teacher(&RectifiedFlow));
    let engine =
        Consistency::continuous(student.clone(), Tangent::Central { step: 1e-3 })?.unnormalized();
    let at = |share: f64| -> Result<(Tensor, usize)> {
        engine.set_warmup(share)?;
        let before = calls.get();
        let found = direction(&engine, &student, &teacher, &input, &time, (&cond, None))?;
        // One call made x.
        Ok((found, calls.get() - before - 1))
    };
    let (start, end, middle) = (at(0.0)?, at(1.0)?, at(0.25)?);
    assert_eq!((start.1, end.1, middle.1), (0, 2, 2));
    let (a, s) = coefficients(&RectifiedFlow, time.tensor());
    let norm = a.hypot(&s);
    let (c, q) = (&a / &norm, &s / &norm);
    let x = student.denoise(&input, &time, &cond)?;
    let pull = c.square() / q.square() * (teacher.denoise(&input, &time, &cond)? - x);
    assert!(max_difference(&start.0, &pull) < 1e-12);
    assert!(max_difference(&middle.0, &(&start.0 * 0.75 + &end.0 * 0.25)) < 1e-12);
    for share in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(engine.set_warmup(share), Err(Error::OutOfRange { .. })));
    }
    Ok(())
}

#[test]
fn the_gradient_is_that_of_scm_in_the_networks_parameters() -> Result<()> {
    // sCM: 0.5 mean (F - sg F - g / (rms g + kappa))^2 with g = cos(phi) df/dphi.
    let weight = Tensor::from_slice(&[0.3, -0.8]).set_requires_grad(true);
    let network = |x: &Tensor, t: &Tensor, c: &Condition| {
        (x * weight.get(0) + t.view([-1, 1]) * weight.get(1) * &c[0]).sin()
    };
    let student = Denoiser::new(TrigFlow, Prediction::Velocity, network);
    let (cond, time) = (mean_condition(), times()?);
    let (input, teacher) = (inputs(&TrigFlow, &time), teacher(&TrigFlow));
    let x = student.denoise(&input, &time, &cond)?;
    let batch = Batch::new(&x, &cond)?.with_student_input(&input, &time)?;
    let tangent = Tangent::Central { step: 1e-4 };
    let group = Group::new(Renoising::new(Uniform::FULL)).engine(
        "consistency",
        1.0,
        Consistency::continuous(student.clone(), tangent)?,
    );
    let _guard = seeded(1);
    let loss = Objective::new(teacher.clone()).with(group).evaluate(&batch)?.loss;
    let found = Tensor::run_backward(&[&loss], &[&weight], true, false).remove(0);

    // The same by hand: df/dphi by differences along the teacher's rotation.
    let (c, q) = coefficients(&TrigFlow, time.tensor());
    let clean = teacher.denoise(&input, &time, &cond)?;
    let noise = (&input - &c * &clean) / &q;
    let h = 1e-4;
    let f_at = |by: f64| -> Result<Tensor> {
        let moved = PostShift::new(time.tensor() + by)?;
        let (c, q) = coefficients(&TrigFlow, moved.tensor());
        student.denoise(&(c * &clean + q * &noise), &moved, &cond)
    };
    // t + h is an angle smaller by h pi / 2.
    let slope = (f_at(h)? - f_at(-h)?) / (-2.0 * h * std::f64::consts::FRAC_PI_2);
    let g = (&c * slope).detach();
    let rms = g.square().mean_dim([1i64].as_slice(), true, None).sqrt();
    let g = &g / (rms + 0.1);
    let output = network(&input, time.tensor(), &cond);
    let scm = (&output - output.detach() - g).square().mean(None) * 0.5;
    let expected = Tensor::run_backward(&[&scm], &[&weight], false, false).remove(0);
    assert!(max_difference(&found, &expected) < 1e-9 * largest(&expected).max(1.0));
    Ok(())
}
