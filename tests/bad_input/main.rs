//! Bad input: wrong arguments return the documented error that names them; nothing panics.

#[path = "../common/mod.rs"]
mod common;
mod failures;
mod layouts;
#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod out_of_memory;
mod tensors;

use common::{gaussian_teacher, seeded, wave};
use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Edm, Error, Group, Guidance,
    LogNormal, LogitNormal, MeanVariance, Normalizer, Objective, PostShift, PreShift, Prediction,
    Probe, RectifiedFlow, Renoising, Result, Shift, Uniform, UpdateRatio, VariancePreserving,
    engine_fn, move_toward, regularizer_fn, surrogate,
};
use tch::{Device, Kind, Tensor};

const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn samples() -> Tensor {
    wave(&[2, 3, 4], 0.0, Kind::Float).set_requires_grad(true)
}

fn is_shape<T>(result: Result<T>, argument: &str) -> bool {
    matches!(result, Err(Error::Shape { what, .. }) if what == argument)
}

fn is_kind<T>(result: Result<T>, argument: &str) -> bool {
    matches!(result, Err(Error::Kind { what, .. }) if what == argument)
}

#[test]
fn a_batch_checks_what_it_is_given() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    for bad in [Tensor::new(), Tensor::from(1.0), wave(&[3], 0.0, Kind::Float)] {
        assert!(is_shape(Batch::new(&bad, &cond), "x"));
    }
    assert!(is_shape(Batch::new(&Tensor::zeros([0, 3], FLOAT), &cond), "x"));
    let integers = Tensor::zeros([2, 3], (Kind::Int64, Device::Cpu));
    assert!(is_kind(Batch::new(&integers, &cond), "x"));

    let batch = || Batch::new(&x, &cond);
    assert!(batch()?.with_real(&wave(&[5, 3, 4], 0.0, Kind::Float)).is_ok());
    assert!(is_shape(batch()?.with_real(&wave(&[5, 3, 5], 0.0, Kind::Float)), "real samples"));
    assert!(is_kind(batch()?.with_real(&integers.unsqueeze(2)), "real samples"));
    let time = PreShift::all(0.5, 3, FLOAT)?;
    assert!(is_shape(batch()?.with_student_time(&time), "student time"));

    let missing = batch()?.null().unwrap_err();
    assert_eq!(missing.to_string(), "there is no null condition: add it with Batch::with_null");
    let missing = batch()?.real().unwrap_err();
    assert!(matches!(missing, Error::Missing { what: "real samples", setter: "Batch::with_real" }));
    Ok(())
}

#[test]
fn samples_and_times_that_are_no_batch_are_told_what_is_wanted() -> Result<()> {
    let cond = Condition::none();
    let wanted = |error: Error| match error {
        Error::Shape { expected, .. } => expected,
        other => panic!("{other}"),
    };
    for size in [&[][..], &[3], &[0, 3], &[3, 0]] {
        let x = Tensor::zeros(size, FLOAT);
        let error = Batch::new(&x, &cond).unwrap_err();
        assert_eq!(wanted(error), "[B, ..] with B >= 1 and no empty axis", "{size:?}");
    }
    for size in [&[][..], &[0]] {
        assert_eq!(wanted(PreShift::new(Tensor::zeros(size, FLOAT)).unwrap_err()), "[B]");
    }
    Ok(())
}

#[test]
fn a_mask_is_boolean_and_fits_the_samples() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let mask = |size: &[i64], kind| {
        let mask = Tensor::ones(size, (kind, Device::Cpu));
        Batch::new(&x, &cond)?.with_mask(&mask).map(|_| ())
    };
    for size in [&[2i64][..], &[2, 1, 1], &[1, 3, 4], &[2, 3, 4]] {
        assert!(mask(size, Kind::Bool).is_ok(), "{size:?}");
    }
    for size in [&[3i64][..], &[], &[3, 4], &[2, 3, 5], &[2, 3, 4, 1], &[1]] {
        assert!(is_shape(mask(size, Kind::Bool), "mask"), "{size:?}");
    }
    for kind in [Kind::Float, Kind::Int64] {
        assert!(is_kind(mask(&[2], kind), "mask"));
    }
    assert!(is_shape(Batch::new(&x, &cond)?.with_mask(&Tensor::new()), "mask"));
    Ok(())
}

#[test]
fn settings_out_of_range_are_named() -> Result<()> {
    let named = |error: Error, argument: &str| matches!(error, Error::OutOfRange { what, .. } if what == argument);
    // 1e-50 and 1e50 are 0 and infinity in float32.
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-50, 1e50] {
        assert!(named(Normalizer::conditional().floor(bad).unwrap_err(), "normaliser floor"));
        assert!(named(Shift::new(bad).unwrap_err(), "shift"));
        let error = Normalizer::conditional().epsilon(bad).unwrap_err();
        assert!(named(error, "normaliser epsilon"));
    }
    assert!(named(UpdateRatio::new(0).unwrap_err(), "fake updates per student update"));
    assert!(named(UpdateRatio::alternating(1).unwrap_err(), "iterations per student update"));
    let phi = Tensor::zeros([2], FLOAT);
    assert!(named(move_toward([(&phi, &phi)], 1.5).unwrap_err(), "share to move"));
    let theta = Tensor::zeros([3], FLOAT);
    assert!(is_shape(move_toward([(&phi, &theta)], 0.5), "target of a parameter"));
    let labels = Tensor::zeros([2], (Kind::Int64, Device::Cpu));
    assert!(is_kind(move_toward([(&phi, &labels)], 0.5), "target of a parameter"));
    Ok(())
}

#[test]
fn parameters_that_cannot_be_moved_are_refused() {
    let (phi, undefined) = (Tensor::zeros([2], FLOAT), Tensor::new());
    assert!(is_shape(move_toward([(&undefined, &phi)], 0.5), "parameter to move"));
    assert!(is_shape(move_toward([(&phi, &undefined)], 0.5), "target of a parameter"));
    assert!(is_shape(move_toward([(&undefined, &undefined)], 0.5), "parameter to move"));
    let theta = Tensor::ones([2], FLOAT);
    for kind in [Kind::BFloat16, Kind::Half, Kind::Int64] {
        // 0.001 is below half a rounding step of bfloat16: nothing would move.
        assert!(is_kind(move_toward([(&phi.to_kind(kind), &theta)], 0.001), "parameter to move"));
    }
    let narrow = theta.to_kind(Kind::BFloat16);
    assert!(move_toward([(&phi, &narrow)], 0.001).is_ok() && phi.double_value(&[0]) > 0.0009);
}

#[test]
fn one_time_for_all_needs_samples_and_a_floating_type() {
    for batch in [0, -1] {
        let count = |error: Error| matches!(error, Error::OutOfRange { what: "number of samples", value, .. } if value == batch as f64);
        assert!(count(PreShift::all(0.5, batch, FLOAT).unwrap_err()));
        assert!(count(PostShift::all(0.5, batch, FLOAT).unwrap_err()));
    }
    for kind in [Kind::Int64, Kind::Bool, Kind::ComplexFloat] {
        assert!(is_kind(PreShift::all(1.0, 2, (kind, Device::Cpu)), "pre-shift time"));
        assert!(is_kind(PostShift::all(1.0, 2, (kind, Device::Cpu)), "post-shift time"));
    }
}

#[test]
fn a_loss_is_a_floating_point_scalar() -> Result<()> {
    let _guard = seeded(6);
    let (x, cond) = (samples(), Condition::none());
    let refused = |loss: Tensor| {
        let term = regularizer_fn(move |_| Ok(loss.shallow_clone()));
        let objective = Objective::new(gaussian_teacher(0.5))
            .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("odd", 1.0, term));
        match objective.evaluate(&Batch::new(&x, &cond).unwrap()).unwrap_err() {
            Error::Term { name, source } if name == "odd" => *source,
            other => panic!("{other}"),
        }
    };
    for size in [&[2i64][..], &[1], &[2, 3, 4]] {
        let error = refused(Tensor::ones(size, FLOAT));
        assert!(matches!(error, Error::Shape { what: "loss", ref found, .. } if found == size));
    }
    assert!(matches!(refused(Tensor::new()), Error::Shape { what: "loss", .. }));
    assert!(matches!(refused(Tensor::from(1i64)), Error::Kind { what: "loss", .. }));
    Ok(())
}

#[test]
fn a_probe_checks_tau_and_noise() -> Result<()> {
    let (x, cond, teacher) = (samples(), Condition::none(), gaussian_teacher(0.5));
    let batch = Batch::new(&x, &cond)?;
    let at = |tau: f64, count, noise| {
        Probe::at(&teacher, &batch, PostShift::all(tau, count, FLOAT)?, noise)
    };
    assert!(at(0.5, 2, x.detach()).is_ok());
    assert!(is_shape(at(0.5, 3, x.detach()), "tau"));
    assert!(is_shape(at(0.5, 2, wave(&[2, 3], 0.0, Kind::Float)), "noise"));
    for tau in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(at(tau, 2, x.detach()), Err(Error::OutOfRange { .. })));
    }
    Ok(())
}

#[test]
fn a_network_that_fails_or_answers_in_the_wrong_shape_is_reported() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let time = PostShift::all(0.5, 2, FLOAT)?;
    let flat = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, _: &Tensor, _: &Condition| x.flatten(1, -1),
    );
    assert!(is_shape(flat.denoise(&x, &time, &cond), "network output"));
    assert!(is_shape(flat.denoising_loss(&x, &time, &x, &cond), "network output"));
    assert!(is_shape(flat.denoise(&x, &PostShift::all(0.5, 5, FLOAT)?, &cond), "time"));

    let failing = Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        |x: &Tensor, _: &Tensor, _: &Condition| x.f_view([-7]),
    );
    let error = failing.denoise(&x, &time, &cond).unwrap_err();
    assert!(matches!(&error, Error::Network { .. }), "{error}");
    let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(source.contains("invalid shape dimension -7"), "{source}");
    Ok(())
}

#[test]
fn directions_must_be_like_the_samples() -> Result<()> {
    let _guard = seeded(1);
    let (x, cond) = (samples(), Condition::none());
    assert!(is_shape(surrogate(&x, &wave(&[2, 3], 0.0, Kind::Float)), "direction"));
    for none in [Tensor::new(), Tensor::from(1.0), Tensor::zeros([2, 0], FLOAT)] {
        assert!(is_shape(surrogate(&none, &none), "x"));
    }
    let integers = Tensor::ones([2, 3], (Kind::Int64, Device::Cpu));
    assert!(is_kind(surrogate(&integers, &integers), "x"));
    let scalar = engine_fn(|probe| Ok(probe.noised().f_mean(None)?));
    let objective = Objective::new(gaussian_teacher(0.5))
        .with(Group::new(Renoising::new(Uniform::FULL)).engine("scalar", 1.0, scalar));
    let error = objective.evaluate(&Batch::new(&x, &cond)?).unwrap_err();
    let Error::Term { name, source } = error else { panic!("{error}") };
    assert_eq!(name, "scalar");
    assert!(matches!(*source, Error::Shape { what: "direction", .. }));
    Ok(())
}

#[test]
fn an_objective_refuses_bad_weights_no_terms_and_missing_draws() -> Result<()> {
    let _guard = seeded(2);
    let (x, cond) = (samples(), Condition::none());
    let batch = Batch::new(&x, &cond)?;
    let empty = Objective::new(gaussian_teacher(0.5)).evaluate(&batch);
    assert!(matches!(empty, Err(Error::OutOfRange { what: "number of terms", .. })));
    let term = || regularizer_fn(|probe| Ok(probe.x().f_square()?.f_mean(None)?));
    let group =
        |weight| Group::new(Renoising::new(Uniform::FULL)).regularizer("l2", weight, term());
    for weight in [f64::NAN, f64::INFINITY, 1e39, -1e39] {
        let objective = Objective::new(gaussian_teacher(0.5)).with(group(weight));
        let error = objective.evaluate(&batch).unwrap_err();
        assert!(matches!(error, Error::Term { ref name, .. } if name == "l2"), "{error}");
    }
    let objective = Objective::new(gaussian_teacher(0.5)).with(group(2.0));
    let error = objective.evaluate_at(&batch, Vec::new()).unwrap_err();
    assert!(matches!(error, Error::OutOfRange { what: "number of draws", .. }));
    // In one group or in two.
    let same = group(1.0).regularizer("l2", 1.0, term());
    for objective in [
        Objective::new(gaussian_teacher(0.5)).with(same),
        Objective::new(gaussian_teacher(0.5)).with(group(1.0)).with(group(2.0)),
    ] {
        let error = objective.evaluate(&batch).unwrap_err();
        assert!(matches!(error, Error::SameName { ref name } if name == "l2"), "{error}");
    }
    Ok(())
}

#[test]
fn a_constant_sample_on_the_teachers_prediction_stays_finite() -> Result<()> {
    let _guard = seeded(4);
    // The teacher returns x exactly: difference and normaliser are both zero.
    let x = Tensor::full([2, 3, 4], 0.5, FLOAT).set_requires_grad(true);
    let cond = Condition::none();
    let fixed = x.detach();
    let same = |_: &Tensor, _: &Tensor, _: &Condition| fixed.shallow_clone();
    let dm = DistributionMatching::new(Denoiser::new(RectifiedFlow, Prediction::Sample, same));
    let normalizer = Normalizer::guided(Guidance::new(4.0)?);
    let objective = Objective::new(Denoiser::new(RectifiedFlow, Prediction::Sample, same)).with(
        Group::new(Renoising::new(Uniform::FULL))
            .normalizer(normalizer)
            .engine("ca", 1.0, CfgAugmentation::new(Guidance::new(4.0)?))
            .regularizer("dm", 1.0, &dm)
            .regularizer("statistics", 1.0, MeanVariance::per_sample(0.0, 1.0)?),
    );
    let evaluation = objective.evaluate(&Batch::new(&x, &cond)?.with_null(&cond))?;
    evaluation.loss.backward();
    assert!(evaluation.loss.double_value(&[]).is_finite());
    assert!(x.grad().isfinite().all().int64_value(&[]) == 1);
    Ok(())
}

#[test]
fn a_bad_sample_does_not_touch_the_others() -> Result<()> {
    let cond = Condition::from(wave(&[2, 3, 4], 2.0, Kind::Float));
    let null = Condition::from(wave(&[2, 3, 4], 4.0, Kind::Float));
    let gradient = |poison: bool| -> Result<Tensor> {
        let _guard = seeded(5);
        let x = wave(&[2, 3, 4], 0.0, Kind::Float);
        if poison {
            let _ = x.get(0).fill_(f64::NAN);
        }
        let x = x.set_requires_grad(true);
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let guidance = Guidance::new(4.0)?;
        let objective =
            decoupled_dmd::Schedule::CoupledShared.objective(gaussian_teacher(0.5), guidance, &dm);
        objective.evaluate(&Batch::new(&x, &cond)?.with_null(&null))?.loss.backward();
        Ok(x.grad().get(1))
    };
    assert!(gradient(true)?.equal(&gradient(false)?));
    Ok(())
}

#[test]
fn bad_parameters_of_paths_are_refused() {
    let refused = |result: Result<VariancePreserving>, argument: &str| matches!(result, Err(Error::OutOfRange { what, .. }) if what == argument);
    for (low, high, argument) in [
        (-0.1, 20.0, "beta_min"),
        (f64::NAN, 1.0, "beta_min"),
        (f64::INFINITY, 1.0, "beta_min"),
        (0.1, 0.05, "beta_max"),
        (0.0, 0.0, "beta_max"),
        (0.1, f64::INFINITY, "beta_max"),
    ] {
        assert!(refused(VariancePreserving::linear(low, high), argument), "{low} {high}");
    }
    for (low, high, steps, argument) in [
        (0.0, 0.1, 9, "beta_start"),
        (1.0, 1.5, 9, "beta_start"),
        (0.2, 0.1, 9, "beta_end"),
        (0.1, 1.0, 9, "beta_end"),
        (0.1, f64::NAN, 9, "beta_end"),
        (0.1, 0.2, 1, "number of levels"),
        (0.1, 0.2, usize::MAX, "number of levels"),
    ] {
        let made = VariancePreserving::scaled_linear(low, high, steps);
        assert!(refused(made, argument), "{low} {high} {steps}");
    }
    for table in
        [vec![0.9, 0.9], vec![0.5, 0.6], vec![1.1], vec![1.0, 0.5], vec![-0.1], vec![0.9, f64::NAN]]
    {
        assert!(refused(VariancePreserving::from_alphas_cumprod(table), "alphas_cumprod"));
    }
    let empty = VariancePreserving::from_alphas_cumprod(Vec::new());
    assert!(matches!(empty, Err(Error::Shape { what: "alphas_cumprod", .. })));
    let table = VariancePreserving::scaled_linear(0.00085, 0.012, 1000).unwrap();
    for n in [-1.0, 1000.0, f64::NAN] {
        assert!(matches!(table.time_of(n), Err(Error::OutOfRange { what: "timestep", .. })));
    }
    let linear = VariancePreserving::linear(0.1, 20.0).unwrap();
    for r in [-0.1, 1.1, f64::NAN] {
        assert!(matches!(linear.time_of(r), Err(Error::OutOfRange { what: "timestep", .. })));
    }
    for (low, high, rho) in
        [(0.0, 80.0, 7.0), (2.0, 1.0, 7.0), (0.1, f64::NAN, 7.0), (0.1, 1.0, 0.5), (0.1, 1.0, 1e17)]
    {
        assert!(matches!(Edm::new(low, high, rho), Err(Error::OutOfRange { .. })));
    }
    let edm = Edm::default();
    assert!(matches!(edm.time_of(81.0), Err(Error::OutOfRange { what: "sigma", .. })));
    let t = Tensor::from_slice(&[0.5f32]);
    let zero = edm.preconditioning(&t, 0.0);
    assert!(matches!(zero, Err(Error::OutOfRange { what: "sigma_data", .. })));
    let wrong = edm
        .preconditioning(&t, 0.5)
        .and_then(|p| p.apply(&Tensor::zeros([1, 3], FLOAT), |_, c: &Tensor| c.shallow_clone()));
    assert!(matches!(wrong, Err(Error::Shape { what: "network output", .. })));
    for (mean, std) in [(0.0, 0.0), (0.0, f64::NAN), (f64::NAN, 1.0), (f64::INFINITY, 1.0)] {
        assert!(matches!(LogNormal::new(edm, mean, std), Err(Error::OutOfRange { .. })));
        assert!(matches!(LogitNormal::new(mean, std), Err(Error::OutOfRange { .. })));
    }
    // Finite in float64 alone, too: coefficients are float32.
    assert!(VariancePreserving::linear(0.1, 1e39).is_err() && Edm::new(0.002, 80.0, 1e39).is_err());
}
