//! The derivatives of the example `exact_tangent`: forward mode, the network's own product, and reverse mode
//! twice agree, and the dual level of forward mode is closed on every way out.

use std::panic::{AssertUnwindSafe, catch_unwind};

use anyhow::{Result, bail};
use decoupled_dmd::{Condition, Denoiser, PostShift, Prediction, RectifiedFlow};
use tch::{Device, Kind, Tensor, nn};

use super::common::{DOUBLE, assert_float64, max_difference, seeded, wave};
use super::forward_mode::along;
use super::ways::{Mlp, twice_reversed};

/// The derivative of the square is 2 x dx: whether forward mode works at this moment.
fn squares_are_differentiated() -> Result<()> {
    let (x, dx) = (wave(&[3, 2], 0.3, Kind::Double), wave(&[3, 2], 2.0, Kind::Double));
    let (value, tangent) = along([(&x, &dx)], |[x]| Ok(x.f_square()?))?;
    assert!(max_difference(&value, &x.square()) <= 0.0);
    assert!(max_difference(&tangent, &(&x * &dx * 2.0)) < 1e-15);
    Ok(())
}

/// Libtorch refuses a dual tensor where no level is open. Tests hold the lock of `seeded`: the level is that of
/// the process.
fn no_level_is_open() -> bool {
    let x = wave(&[2], 0.3, Kind::Double);
    Tensor::f_internal_make_dual(&x, &x, 0).is_err()
}

#[test]
fn three_ways_agree_with_each_other_and_with_differences() -> Result<()> {
    let _guard = seeded(1);
    let mut store = nn::VarStore::new(Device::Cpu);
    let mlp = Mlp::new(&store.root(), 3, 16);
    store.double();
    let mlp_of = |x: &Tensor, t: &Tensor| mlp.forward(x, t);
    let (x, dx) = (wave(&[4, 3], 0.3, Kind::Double), wave(&[4, 3], 2.0, Kind::Double));
    let (t, dt) = (Tensor::from_slice(&[0.1, 0.4, 0.7, 0.9]), Tensor::ones([4], DOUBLE));
    let inputs = [(&x, &dx), (&t, &dt)];
    let own = mlp.forward_along(&x, &t, &dx, &dt)?;
    for (way, found) in [
        ("forward mode", along(inputs, |[x, t]| mlp_of(x, t))?),
        ("reversed twice", twice_reversed(inputs, |[x, t]| mlp_of(x, t))?),
    ] {
        assert_float64(way, &found.0, &own.0);
        assert_float64(way, &found.1, &own.1);
        assert!(!found.0.requires_grad() && !found.1.requires_grad());
    }
    let h = 1e-5;
    let at = |h: f64| mlp_of(&(&x + &dx * h), &(&t + &dt * h));
    let central = (at(h)? - at(-h)?) / (2.0 * h);
    assert!(max_difference(&central, &own.1) < 1e-9);
    Ok(())
}

#[test]
fn a_denoiser_takes_the_derivative_through_its_closure() -> Result<()> {
    let _guard = seeded(4);
    let network = |x: &Tensor, t: &Tensor| -> Result<Tensor> { Ok(x.f_sin()? * t.f_unsqueeze(1)?) };
    let student =
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, |x, t, _: &Condition| network(x, t))
            .tangent(|x, t, _: &Condition, dx, dt| {
                along([(x, dx), (t, dt)], |[x, t]| network(x, t))
            });
    let (x, velocity) = (wave(&[2, 3], 0.3, Kind::Double), wave(&[2, 3], 2.0, Kind::Double));
    let times = Tensor::from_slice(&[0.25, 0.75]);
    let time = PostShift::new(times.shallow_clone())?;
    let (_, found) = student.predict_along(&x, &time, &Condition::none(), &velocity)?;
    let expected = x.cos() * &velocity * times.unsqueeze(1) + x.sin();
    assert_float64("derivative", &found, &expected);
    Ok(())
}

#[test]
fn the_level_is_closed_after_a_failure() -> Result<()> {
    let _guard = seeded(2);
    let x = wave(&[1, 2, 4, 8], 0.3, Kind::Double);
    let refused = along([(&x, &x)], |_| bail!("no network"));
    assert_eq!(refused.unwrap_err().to_string(), "no network");
    assert!(no_level_is_open());
    squares_are_differentiated()?;

    // Fused attention has no forward derivative. The math kernel has.
    let fused = along([(&x, &x)], |[x]| {
        let none = None::<&Tensor>;
        Ok(Tensor::f_scaled_dot_product_attention(x, x, x, none, 0.0, false, None::<f64>, false)?)
    });
    let message = format!("{:#}", fused.unwrap_err());
    assert!(message.contains("forward AD"), "{message}");
    assert!(no_level_is_open());
    squares_are_differentiated()?;
    let attention = |x: &Tensor| -> Result<Tensor> {
        let none = None::<&Tensor>;
        let (output, _) = Tensor::f_internal_scaled_dot_product_attention_math(
            x,
            x,
            x,
            none,
            0.0,
            false,
            none,
            None::<f64>,
            false,
        )?;
        Ok(output)
    };
    let (_, tangent) = along([(&x, &x)], |[x]| attention(x))?;
    let central = (attention(&(&x * 1.00001))? - attention(&(&x * 0.99999))?) / 2e-5;
    assert!(max_difference(&tangent, &central) < 1e-9);

    // A direction of another shape fails while the level is open.
    assert!(along([(&x, &x.get(0).get(0))], |[x]| Ok(x.shallow_clone())).is_err());
    assert!(no_level_is_open());

    let panicked =
        catch_unwind(AssertUnwindSafe(|| along([(&x, &x)], |_| panic!("in the network"))));
    assert!(panicked.is_err() && no_level_is_open());
    squares_are_differentiated()
}

#[test]
fn levels_do_not_nest_and_threads_take_turns() -> Result<()> {
    let _guard = seeded(3);
    let x = wave(&[3, 2], 0.3, Kind::Double);
    let nested = along([(&x, &x)], |[outer]| {
        assert!(!no_level_is_open());
        along([(&x, &x)], |[inner]| Ok(inner + outer)).map(|found| found.0)
    });
    assert!(nested.unwrap_err().to_string().contains("does not nest"));
    squares_are_differentiated()?;
    let threads: Vec<_> = (0..4)
        .map(|_| std::thread::spawn(|| (0..50).try_for_each(|_| squares_are_differentiated())))
        .collect();
    for thread in threads {
        thread.join().expect("no panic")?;
    }
    assert!(no_level_is_open());
    Ok(())
}

#[test]
fn a_network_that_ignores_its_input_has_no_slope() -> Result<()> {
    let _guard = seeded(5);
    let x = wave(&[3, 2], 0.3, Kind::Double);
    let (value, tangent) = along([(&x, &x)], |_| Ok(Tensor::f_ones([3, 2], DOUBLE)?))?;
    assert!(max_difference(&tangent, &value.zeros_like()) <= 0.0);
    let (_, tangent) = twice_reversed([(&x, &x), (&x, &x)], |[x, _]| Ok(x.f_mul_scalar(2.0)?))?;
    assert!(max_difference(&tangent, &(&x * 2.0)) < 1e-15);
    Ok(())
}
