//! Every path under every term: boundary values, round trips, the identities of the paper.

use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, Draw, Edm, Error, FewStepGrid, Group,
    Guidance, NoisePath, Objective, PostShift, PreShift, Prediction, RectifiedFlow, Renoising,
    Result, Schedule, Shift, TimeDistribution, TrigFlow, Uniform, VariancePreserving, Weighting,
    engine_fn,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::common::{DOUBLE, gradient, max_difference, paths, sdxl, seeded, value, values, wave};

const SHAPE: [i64; 3] = [3, 2, 4];

fn at(path: &dyn NoisePath, t: f64) -> (f64, f64) {
    let c = path.coefficients(&PostShift::all(t, 1, DOUBLE).unwrap()).unwrap();
    (value(&c.data), value(&c.noise))
}

/// E[x0 | x_t] of data N(condition, variance I) on any path.
fn gaussian(path: &dyn NoisePath, x: &Tensor, t: &Tensor, mean: &Tensor, variance: f64) -> Tensor {
    let c = path.coefficients(&PostShift::new(t.shallow_clone()).unwrap()).unwrap();
    let column = |t: &Tensor| t.to_kind(x.kind()).view([-1, 1, 1]);
    let (a, s) = (column(&c.data), column(&c.noise));
    mean + &a * variance / (a.square() * variance + s.square()) * (x - a * mean)
}

/// The same as a network that predicts the clean sample, with its times passed to `seen`.
fn denoiser<'a>(
    path: &'a dyn NoisePath,
    variance: f64,
    seen: impl Fn(&Tensor) + 'a,
) -> Denoiser<'a> {
    Denoiser::new(path, Prediction::Sample, move |x: &Tensor, t: &Tensor, c: &Condition| {
        seen(t);
        gaussian(path, x, t, &c[0], variance)
    })
}

#[test]
fn the_table_of_sdxl_has_the_known_values() -> Result<()> {
    let path = sdxl();
    let known = [
        (20, 0.98131),
        (399, 0.42609),
        (499, 0.27767),
        (749, 0.05662),
        (979, 0.005913),
        (999, 0.0046601),
    ];
    for (n, abar) in known {
        let (a, s) = at(&path, path.time_of(f64::from(n))?);
        // The known values have four digits or more.
        approx::assert_relative_eq!(a * a, abar, max_relative = 1e-4);
        approx::assert_abs_diff_eq!(a * a + s * s, 1.0, epsilon = 1e-15);
    }
    approx::assert_abs_diff_eq!(at(&path, 0.0).0, 0.0683, epsilon = 5e-5);
    approx::assert_abs_diff_eq!(at(&path, 0.0).1, 0.99767, epsilon = 5e-6);
    Ok(())
}

#[test]
fn times_snap_to_the_timesteps_of_the_table_in_every_precision() -> Result<()> {
    let path = sdxl();
    for kind in [Kind::Double, Kind::Float] {
        let timesteps = |times: &[f64]| {
            values(&path.timestep(&Tensor::from_slice(times).to_kind(kind)).unwrap())
        };
        // DMD2's grid, and diffusers' trailing spacing for 1, 2 and 8 steps.
        let grid = |steps| FewStepGrid::even(steps).unwrap().times().to_vec();
        assert_eq!(timesteps(&grid(1)), [999.0]);
        assert_eq!(timesteps(&grid(2)), [999.0, 499.0]);
        assert_eq!(timesteps(&grid(4)), [999.0, 749.0, 499.0, 249.0]);
        assert_eq!(timesteps(&grid(8))[1..4], [874.0, 749.0, 624.0]);
        assert_eq!(timesteps(&[0.02, 0.98, 1.0, 0.0004, 0.0006]), [979.0, 19.0, 0.0, 999.0, 998.0]);
        // DMD2's clip.
        assert_eq!(timesteps(&[0.019, 0.979]), [980.0, 20.0]);
        let all: Vec<f64> = (0..1000).map(|n| path.time_of(f64::from(n)).unwrap()).collect();
        assert_eq!(timesteps(&all), (0..1000).map(f64::from).collect::<Vec<_>>());
    }
    assert_eq!(path.timestep(&Tensor::from_slice(&[0.5f32]))?.kind(), Kind::Int64);
    // Times off the clock stay in the table.
    assert_eq!(values(&path.timestep(&Tensor::from_slice(&[-0.1, 1.1]))?), [999.0, 0.0]);
    Ok(())
}

#[test]
fn paths_have_their_ends_and_run_from_noise_to_data() -> Result<()> {
    let linear = VariancePreserving::linear(0.1, 20.0)?;
    assert_eq!(at(&RectifiedFlow, 0.0), (0.0, 1.0));
    assert_eq!(at(&RectifiedFlow, 1.0), (1.0, 0.0));
    assert_eq!(at(&TrigFlow, 0.0), (0.0, 1.0));
    assert_eq!(at(&TrigFlow, 1.0), (1.0, 0.0));
    assert_eq!(at(&linear, 1.0), (1.0, 0.0));
    approx::assert_relative_eq!(at(&linear, 0.0).0, (-5.025f64).exp(), max_relative = 1e-14);
    for t in [0.0, 0.25, 1.0] {
        assert_eq!(linear.time_of(1.0 - t)?, t);
        assert_eq!(values(&linear.timestep(&Tensor::from_slice(&[t]))?), [1.0 - t]);
    }
    let edm = Edm::new(0.01, 10.0, 1.0)?;
    approx::assert_relative_eq!(at(&edm, 0.25).1, 0.01 + 0.75 * 9.99, max_relative = 1e-13);
    let edm = Edm::default();
    for (t, sigma) in [(0.0, 80.0), (1.0, 0.002)] {
        assert_eq!(at(&edm, t).0, 1.0);
        approx::assert_relative_eq!(at(&edm, t).1, sigma, max_relative = 1e-13);
        approx::assert_abs_diff_eq!(edm.time_of(sigma)?, t, epsilon = 1e-15);
    }
    for path in &paths() {
        let ratio = |k: i32| at(path, f64::from(k) / 50.0).0 / at(path, f64::from(k) / 50.0).1;
        assert!((0..50).all(|k| ratio(k) < ratio(k + 1)));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_exact_output_of_every_prediction_leads_back_to_the_sample(
        which in 0..5usize,
        prediction in prop::sample::select(&Prediction::ALL[..]),
        t in prop::array::uniform3(prop_oneof![0.001..0.999f64, Just(0.001), Just(0.999)]),
    ) {
        let path = &paths()[which];
        let time = PostShift::new(Tensor::from_slice(&t)).unwrap();
        let (x0, eps) = (wave(&SHAPE, 0.2, Kind::Double), wave(&SHAPE, 3.0, Kind::Double));
        let c = path.coefficients(&time).unwrap();
        let (a, s) = (c.data.view([3, 1, 1]), c.noise.view([3, 1, 1]));
        let output = match prediction {
            Prediction::Sample => x0.shallow_clone(),
            Prediction::Noise => eps.shallow_clone(),
            Prediction::FlowVelocity => &eps - &x0,
            Prediction::Velocity => &a * &eps - &s * &x0,
            _ => -&eps / &s,
        };
        let network = |_: &Tensor, _: &Tensor, _: &Condition| output.shallow_clone();
        let noised = path.renoise(&x0, &time, &eps).unwrap();
        // EDM mixes in noise up to 80 times, and some processors round once where others do twice.
        let size = value(&noised.abs().max()).max(1.0);
        prop_assert!(max_difference(&noised, &(&a * &x0 + &s * &eps)) < 1e-15 * size);
        let denoiser = Denoiser::new(path, prediction, network);
        let back = denoiser.denoise(&noised, &time, &Condition::none()).unwrap();
        prop_assert!(max_difference(&back, &x0) < 1e-12, "{}", max_difference(&back, &x0));
        // And the loss of the exact output is zero.
        let loss = denoiser.denoising_loss(&x0, &time, &eps, &Condition::none()).unwrap();
        prop_assert!(value(&loss) < 1e-20);
    }
}

#[test]
fn coupled_ca_and_dm_are_dmd2_on_every_path() -> Result<()> {
    let alpha = 4.0;
    let (cond, null) = (wave(&SHAPE, 1.1, Kind::Double), wave(&SHAPE, 2.9, Kind::Double));
    let (cond, null) = (Condition::from(cond), Condition::from(null));
    let (u, noise) = (Tensor::from_slice(&[0.2, 0.5, 0.7]), wave(&SHAPE, 5.0, Kind::Double));
    for path in &paths() {
        let x = wave(&SHAPE, 0.3, Kind::Double).set_requires_grad(true);
        let dm = DistributionMatching::new(denoiser(path, 0.8, |_| ()));
        let objective = Schedule::CoupledShared.objective(
            denoiser(path, 0.5, |_| ()),
            Guidance::new(alpha)?,
            &dm,
        );
        let draw = Draw { u: u.shallow_clone(), noise: noise.shallow_clone() };
        let batch = Batch::new(&x, &cond)?.with_null(&null);
        let slope = gradient(&objective.evaluate_at(&batch, vec![draw])?.loss, &x);

        let noised = path.renoise(&x.detach(), &PostShift::new(u.shallow_clone())?, &noise)?;
        let predict = |c: &Condition, v| gaussian(path, &noised, &u, &c[0], v);
        let guided = predict(&null, 0.5) + alpha * (predict(&cond, 0.5) - predict(&null, 0.5));
        let scale = (&x - &guided).abs().mean_dim(&[1i64, 2][..], true, None);
        let step = ((predict(&cond, 0.8) - &guided) / scale).detach();
        let dmd2 = 0.5 * (&x - (&x - step).detach()).square().mean(None);
        let reference = gradient(&dmd2, &x);
        assert!(max_difference(&slope, &reference) < 1e-15);
        assert!(value(&reference.abs().max()) > 1e-4);
    }
    Ok(())
}

#[test]
fn samples_in_float32_stay_so_whatever_the_network_and_the_path_answer_in() -> Result<()> {
    let x = wave(&SHAPE, 0.3, Kind::Float).set_requires_grad(true);
    let cond = Condition::none();
    let time = PostShift::new(Tensor::from_slice(&[0.2f32, 0.5, 0.7]))?;
    let noise = wave(&SHAPE, 5.0, Kind::Float);
    let batch = Batch::new(&x, &cond)?.with_null(&cond);
    let weightings = [
        Weighting::UNIFORM,
        Weighting::measured_as(Prediction::Sample),
        Weighting::min_snr(5.0)?,
        Weighting::edm(0.5)?,
    ];
    for path in &paths() {
        for prediction in Prediction::ALL {
            // As with the clock of a path that is passed on without a cast.
            let network = |x: &Tensor, _: &Tensor, _: &Condition| x.to_kind(Kind::Double) * 0.5;
            let denoiser = || Denoiser::new(path, prediction, network);
            assert_eq!(denoiser().denoise(&x, &time, &cond)?.kind(), Kind::Float);
            let loss = denoiser().denoising_loss(&x, &time, &noise, &cond)?;
            assert_eq!(loss.kind(), Kind::Float);
            for weighting in weightings {
                let dm = DistributionMatching::new(denoiser()).weighting(weighting);
                let loss = dm.denoising_loss_at(&batch, &time, &noise)?;
                assert_eq!(loss.kind(), Kind::Float, "{prediction:?}, {weighting:?}");
            }
            let dm = DistributionMatching::new(denoiser());
            let group = Group::new(Renoising::new(Uniform::new(0.1, 0.9)?));
            let objective = Objective::new(denoiser()).with(group.regularizer("dm", 1.0, &dm));
            let draw = Draw { u: time.tensor().shallow_clone(), noise: noise.shallow_clone() };
            assert_eq!(objective.evaluate_at(&batch, vec![draw])?.loss.kind(), Kind::Float);
        }
    }
    Ok(())
}

#[test]
fn the_four_schedules_look_at_the_cleaner_side_on_every_path() -> Result<()> {
    let _guard = seeded(1);
    let student = [0.0, 0.5, 0.875];
    let shift = Shift::new(3.0)?;
    let above = [[false, false], [false, false], [true, true], [true, false]];
    let (cond, null) = (wave(&SHAPE, 1.0, Kind::Float), wave(&SHAPE, 2.0, Kind::Float));
    let (cond, null) = (Condition::from(cond), Condition::from(null));
    let x = wave(&SHAPE, 0.3, Kind::Float);
    let time = PreShift::new(Tensor::from_slice(&student).to_kind(Kind::Float))?;
    for path in &paths() {
        // The signal-to-noise ratio says which side is cleaner, on the clock of every path.
        let ratio = |t: f64| at(path, t).0 / at(path, t).1;
        let levels = student.map(|t| ratio(shift.of(t)));
        for (schedule, above) in Schedule::ALL.into_iter().zip(above) {
            let times = std::cell::RefCell::new(Vec::new());
            let teacher = denoiser(path, 0.5, |t| times.borrow_mut().push(values(t)));
            let dm = DistributionMatching::new(denoiser(path, 0.8, |_| ()));
            let objective =
                schedule.objective_with_shifts(teacher, Guidance::new(4.0)?, &dm, shift);
            let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
            for _ in 0..60 {
                let _ = objective.evaluate(&batch)?;
            }
            let times = times.borrow();
            let per_step = times.len() / 60;
            assert_eq!(per_step, if schedule == Schedule::CoupledShared { 2 } else { 3 });
            // The first forwards are CA's, the last one is DM's.
            for (term, offset) in [(0, 0), (1, per_step - 1)] {
                let mut rows = times.iter().skip(offset).step_by(per_step);
                let noisier = rows.any(|row| {
                    row.iter().zip(levels).any(|(&tau, level)| ratio(tau) < level * (1.0 - 1e-5))
                });
                assert_eq!(noisier, !above[term], "{schedule:?}, term {term}");
            }
        }
    }
    Ok(())
}

/// Whether the result is the error of a singular end.
fn is_singular<T>(result: Result<T>) -> bool {
    matches!(
        result,
        Err(Error::OutOfRange {
            what: "share of data at the noisiest time" | "share of noise at the cleanest time",
            ..
        })
    )
}

#[test]
fn singular_ends_are_refused_and_the_others_finite() -> Result<()> {
    let x = wave(&SHAPE, 0.3, Kind::Float);
    let cond = Condition::none();
    let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
    let finite = |t: &Tensor| value(&t.isfinite().all()) > 0.0;
    for (which, path) in paths().iter().enumerate() {
        for prediction in Prediction::ALL {
            let divides = matches!(prediction, Prediction::Noise | Prediction::Score);
            let denoiser = Denoiser::new(path, prediction, network);
            for t in [0.0, 1e-5, 1e-3, 0.999, 1.0] {
                let time = PostShift::all(t, 3, (Kind::Float, Device::Cpu))?;
                let case = format!("path {which}, {prediction:?}, {t}");
                let sample = denoiser.denoise(&x, &time, &cond);
                let pair = denoiser.denoise_pair(&x, &time, &cond, &cond);
                // Rectified flow and TrigFlow alone reach a = 0, SDXL's table and EDM never s = 0.
                if divides && t < 1e-4 && (which == 0 || which == 4 && t < 5e-5) {
                    assert!(is_singular(sample) && is_singular(pair), "{case}");
                } else {
                    assert!(finite(&sample?) && finite(&pair?.1), "{case}");
                }
                let loss = denoiser.denoising_loss(&x, &time, &x, &cond);
                if prediction == Prediction::Score && t >= 1.0 && which != 2 && which != 3 {
                    assert!(is_singular(loss), "{case}");
                } else {
                    assert!(finite(&loss?), "{case}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn the_range_of_a_schedule_decides_not_the_draw() -> Result<()> {
    let x = wave(&SHAPE, 0.3, Kind::Float).set_requires_grad(true);
    let cond = Condition::none();
    let batch = Batch::new(&x, &cond)?;
    let evaluate = |path: Box<dyn NoisePath>, times: Uniform, shift: Shift| {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
        let engine = engine_fn(|probe| Ok(probe.teacher_cond()?.f_sub(probe.x())?));
        let group = Group::new(Renoising::new(times).shifted(shift)).engine("e", 1.0, engine);
        let objective = Objective::new(Denoiser::new(path, Prediction::Noise, network)).with(group);
        let draw = Draw { u: Tensor::from_slice(&[0.5f32; 3]), noise: x.detach() };
        objective.evaluate_at(&batch, vec![draw])
    };
    let error = evaluate(Box::new(RectifiedFlow), Uniform::FULL, Shift::NONE).unwrap_err();
    let Error::Term { source, .. } = error else { panic!("{error}") };
    assert!(is_singular(Err::<(), _>(*source)));
    let clipped = Uniform::new(0.02, 0.98)?;
    assert!(evaluate(Box::new(RectifiedFlow), clipped, Shift::NONE).is_ok());
    assert!(evaluate(Box::new(sdxl()), Uniform::FULL, Shift::NONE).is_ok());
    // The bound is that after the shift, which moves times towards the noise end.
    assert!(evaluate(Box::new(RectifiedFlow), clipped, Shift::new(300.0)?).is_err());
    Ok(())
}

#[test]
fn edm_trains_at_its_log_normal_levels() -> Result<()> {
    let _guard = seeded(3);
    let u = Tensor::rand([20_000], DOUBLE);
    let times = decoupled_dmd::LogNormal::default().times(&u, None)?;
    let log = Edm::default().sigma(times.tensor())?.log();
    approx::assert_abs_diff_eq!(value(&log.mean(None)), -1.2, epsilon = 0.03);
    approx::assert_abs_diff_eq!(value(&log.std(true)), 1.2, epsilon = 0.03);
    let given = decoupled_dmd::LogNormal::new(Edm::default(), 0.5, 0.3)?;
    let quartiles = given.times(&Tensor::from_slice(&[0.5, 0.841_344_746_068_542_9]), None)?;
    for (log, expected) in
        values(&Edm::default().sigma(quartiles.tensor())?.log()).iter().zip([0.5, 0.2])
    {
        approx::assert_abs_diff_eq!(*log, expected, epsilon = 1e-12);
    }
    let ends = decoupled_dmd::LogNormal::default().times(&Tensor::from_slice(&[0.0, 1.0]), None)?;
    assert!(values(ends.tensor()).iter().all(|t| (0.0..=1.0).contains(t)));
    Ok(())
}
