//! AdamW: exact when resumed, and equal to libtorch's own.

use tch::nn::OptimizerConfig;
use tch::{Device, Kind, Tensor, nn};
use tch_training::safetensors::{read_tensors, write_tensors};
use tch_training::{AdamW, AdamWSettings, Error};
use tempfile::tempdir;

use super::common::Result;

fn wave(shape: &[i64]) -> Tensor {
    let values: Vec<f32> =
        (0..shape.iter().product::<i64>()).map(|i| (0.3 * i as f32).sin()).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// Leaves to optimise.
fn leaves() -> Vec<(String, Tensor)> {
    leaves_in(Kind::Float)
}

fn leaves_in(kind: Kind) -> Vec<(String, Tensor)> {
    [("matrix", &[4, 3][..]), ("vector", &[3])]
        .map(|(name, shape)| (name.to_owned(), wave(shape).to_kind(kind).set_requires_grad(true)))
        .into()
}

fn handles(parameters: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    parameters.iter().map(|(name, tensor)| (name.clone(), tensor.shallow_clone())).collect()
}

/// A loss that depends on the step and, at the start, has a long gradient.
fn loss(parameters: &[(String, Tensor)], step: usize) -> Tensor {
    let (matrix, vector) = (&parameters[0].1, &parameters[1].1);
    (matrix.mv(vector).sum(None::<Kind>) - step as f64).square()
        + matrix.pow_tensor_scalar(4.0).sum(None::<Kind>)
}

fn run(
    parameters: &[(String, Tensor)],
    optimizer: &mut AdamW,
    steps: std::ops::Range<usize>,
) -> Result<()> {
    for step in steps {
        optimizer.zero_grad()?;
        loss(parameters, step).backward();
        let _ = optimizer.step()?;
    }
    Ok(())
}

#[test]
fn a_resumed_optimizer_continues_bitwise() -> Result<()> {
    let settings = AdamWSettings { max_gradient_norm: Some(0.5), ..AdamWSettings::default() };
    let straight = leaves();
    run(&straight, &mut AdamW::new(handles(&straight), settings)?, 0..10)?;

    let first = leaves();
    let mut optimizer = AdamW::new(handles(&first), settings)?;
    run(&first, &mut optimizer, 0..5)?;
    let mut state = optimizer.state();
    state.extend(handles(&first));
    let folder = tempdir()?;
    let path = folder.path().join("adamw.safetensors");
    write_tensors(&path, &state)?;

    let state = read_tensors(&path)?;
    let second: Vec<(String, Tensor)> = leaves()
        .into_iter()
        .map(|(name, _)| (name.clone(), state[&name].copy().set_requires_grad(true)))
        .collect();
    let mut optimizer = AdamW::new(handles(&second), settings)?;
    let is_moment = |name: &str| name != "matrix" && name != "vector";
    let moments = state.into_iter().filter(|(name, _)| is_moment(name)).collect();
    optimizer.load_state(&moments)?;
    run(&second, &mut optimizer, 5..10)?;
    for ((name, expected), (_, found)) in straight.iter().zip(&second) {
        assert_eq!(expected, found, "{name}");
        assert_ne!(found, &wave(&found.size()), "{name}");
    }
    Ok(())
}

#[test]
fn incomplete_state_is_refused() -> Result<()> {
    let mut optimizer = AdamW::new(leaves(), AdamWSettings::default())?;
    let mut state = optimizer.state();
    state.remove("vector.exp_avg_sq");
    let error = optimizer.load_state(&state).expect_err("an entry is missing");
    assert!(error.to_string().contains("vector.exp_avg_sq"), "{error}");
    Ok(())
}

#[test]
fn the_step_returns_the_norm_and_clips_by_it() -> Result<()> {
    let parameters = leaves_in(Kind::Double);
    let settings = AdamWSettings { max_gradient_norm: Some(0.5), ..AdamWSettings::default() };
    let mut optimizer = AdamW::new(handles(&parameters), settings)?;
    loss(&parameters, 0).backward();
    let norm = |parameters: &[(String, Tensor)]| -> Result<f64> {
        let squares =
            parameters.iter().map(|(_, p)| f64::try_from(p.grad().square().sum(Kind::Double)));
        Ok(squares.sum::<Result<f64, tch::TchError>>()?.sqrt())
    };
    let before = norm(&parameters)?;
    let returned = f64::try_from(optimizer.step()?)?;
    println!("{returned} for {before}, then {}", norm(&parameters)?);
    assert!(before > 1.0 && (returned - before).abs() < 1e-12 * before);
    // The optimizer guards the quotient by 1e-6.
    assert!((norm(&parameters)? - 0.5).abs() < 1e-6);
    Ok(())
}

#[test]
fn adamw_agrees_with_libtorch() -> Result<()> {
    let settings =
        AdamWSettings { learning_rate: 0.05, weight_decay: 0.1, ..AdamWSettings::default() };
    // Without the vector, whose weights do not decay here.
    let ours = leaves_in(Kind::Double).swap_remove(0).1;
    let mut optimizer = AdamW::new(vec![("matrix".into(), ours.shallow_clone())], settings)?;

    let store = nn::VarStore::new(Device::Cpu);
    let theirs = store.root().var_copy("matrix", &ours.detach());
    let mut reference = nn::AdamW { wd: 0.1, ..nn::AdamW::default() }.build(&store, 0.05)?;
    for _ in 0..5 {
        optimizer.zero_grad()?;
        ours.pow_tensor_scalar(4.0).sum(Kind::Double).backward();
        let _ = optimizer.step()?;
        reference.backward_step(&theirs.pow_tensor_scalar(4.0).sum(Kind::Double));
    }
    let difference = f64::try_from((&ours - theirs).abs().max())?;
    // The fused kernel takes the count of steps in float32.
    assert!(difference <= 4.0 * f64::from(f32::EPSILON), "{difference}");
    Ok(())
}

/// The vector has no gradient at the first step and one at the second.
#[test]
fn steps_are_counted_where_there_is_a_gradient() -> Result<()> {
    let parameters = leaves();
    let (matrix, vector) = (&parameters[0].1, &parameters[1].1);
    let mut optimizer = AdamW::new(handles(&parameters), AdamWSettings::default())?;
    let counts = |optimizer: &AdamW| {
        let state = optimizer.state();
        ["matrix.step", "vector.step"].map(|name| state[name].double_value(&[]))
    };
    matrix.square().sum(Kind::Float).backward();
    let _ = optimizer.step()?;
    assert_eq!(counts(&optimizer), [1.0, 0.0]);
    assert_eq!(vector, &wave(&[3]));
    vector.square().sum(Kind::Float).backward();
    let _ = optimizer.step()?;
    assert_eq!(counts(&optimizer), [2.0, 1.0]);
    assert_ne!(vector, &wave(&[3]));

    optimizer.zero_grad()?;
    for (name, parameter) in &parameters {
        assert_eq!(parameter.grad(), parameter.zeros_like(), "{name}");
    }
    Ok(())
}

/// A step along a gradient that is not finite is none, with and without clipping.
#[test]
fn a_gradient_that_is_not_finite_changes_nothing() -> Result<()> {
    for max_gradient_norm in [None, Some(0.5)] {
        let parameters = leaves();
        let settings = AdamWSettings { max_gradient_norm, ..AdamWSettings::default() };
        let mut optimizer = AdamW::new(handles(&parameters), settings)?;
        run(&parameters, &mut optimizer, 0..3)?;
        let all = |optimizer: &AdamW| {
            let tensors = optimizer.state().into_iter().chain(optimizer.parameters());
            tensors.map(|(name, tensor)| (name, tensor.copy())).collect::<Vec<_>>()
        };
        let before = all(&optimizer);
        for bad in [f64::NAN, f64::INFINITY] {
            optimizer.zero_grad()?;
            (loss(&parameters, 3) * bad).backward();
            let norm = f64::try_from(optimizer.step()?)?;
            assert!(!norm.is_finite(), "{norm}");
            assert_eq!(all(&optimizer), before);
        }
        // The run goes on as if it had not been there.
        let straight = leaves();
        run(&straight, &mut AdamW::new(handles(&straight), settings)?, 0..5)?;
        run(&parameters, &mut optimizer, 3..5)?;
        assert_eq!(parameters, straight);
    }
    Ok(())
}

#[test]
fn settings_names_and_gradients_are_checked() -> Result<()> {
    let nan = f64::NAN;
    let base = AdamWSettings::default();
    for (settings, name) in [
        (AdamWSettings { learning_rate: -1.0, ..base }, "learning_rate"),
        (AdamWSettings { learning_rate: nan, ..base }, "learning_rate"),
        (AdamWSettings { betas: (1.0, 0.9), ..base }, "a beta"),
        (AdamWSettings { betas: (0.9, nan), ..base }, "a beta"),
        (AdamWSettings { eps: f64::INFINITY, ..base }, "eps"),
        (AdamWSettings { weight_decay: -0.1, ..base }, "weight_decay"),
        (AdamWSettings { max_gradient_norm: Some(0.0), ..base }, "max_gradient_norm"),
    ] {
        let error = AdamW::new(leaves(), settings).unwrap_err();
        assert!(matches!(error, Error::OutOfRange { what, .. } if what == name), "{error}");
        // Changed on the way, they are looked at by the next step.
        let mut optimizer = AdamW::new(leaves(), base)?;
        optimizer.settings = settings;
        assert!(matches!(optimizer.step(), Err(Error::OutOfRange { .. })), "{name}");
    }
    let mut twice = leaves();
    twice.extend(leaves());
    let error = AdamW::new(twice, base).unwrap_err();
    assert!(matches!(&error, Error::SameName { name } if name == "matrix"), "{error}");
    let mut still = AdamW::new(leaves(), base)?;
    assert!(matches!(still.step(), Err(Error::NoGradient)));
    Ok(())
}
