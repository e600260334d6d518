//! The updates of terms that are losses, beside those of directions.

use decoupled_dmd::{
    Batch, Condition, Error, Group, Objective, Renoising, Result, Uniform, engine_fn,
    regularizer_fn,
};
use tch::{Kind, Tensor};

use super::SHAPE;
use crate::common::{gaussian_teacher, gradient, max_difference, seeded, wave};

#[test]
fn the_update_of_a_loss_is_that_of_the_direction_with_its_gradient() -> Result<()> {
    let x = wave(&SHAPE, 0.3, Kind::Double).set_requires_grad(true);
    let cond = Condition::none();
    let target = wave(&SHAPE, 2.0, Kind::Double);
    let mask = Tensor::from_slice(&[true, false, true]);
    for batch in [Batch::new(&x, &cond)?, Batch::new(&x, &cond)?.with_mask(&mask)?] {
        let batch = batch.with_target(&target)?;
        let learned = Tensor::from(0.7).set_requires_grad(true);
        let pairs = regularizer_fn(|probe| {
            let scaled = probe.masked(&(probe.x() - &target))? * &learned;
            Ok(scaled.square().mean(None))
        });
        let objective = Objective::new(gaussian_teacher(1.0)).observed().with(
            Group::new(Renoising::new(Uniform::FULL))
                .engine("direction", 1.0, engine_fn(|probe| Ok((&target - probe.x()) * 2.0 * 0.49)))
                .regularizer("loss", 2.0, pairs),
        );
        let _guard = seeded(4);
        let evaluation = objective.evaluate(&batch)?;
        let diagnostics = evaluation.diagnostics.as_ref().expect("observed");
        let rms = |name| diagnostics.term(name).and_then(|term| term.update_rms.as_ref());
        let (found, expected) = (rms("loss").expect("a loss"), rms("direction").expect("too"));
        for (found, expected) in found.to_vec()?.iter().zip(expected.to_vec()?) {
            assert_eq!(found.is_some(), expected.is_some());
            let difference = found.unwrap_or(0.0) - expected.unwrap_or(0.0);
            assert!(difference.abs() < 1e-14, "{difference:e}");
        }
        let cos = diagnostics.update_cos("direction", "loss")?.expect("both");
        assert!(cos.min()?.is_some_and(|cos| (cos - 1.0).abs() < 1e-14));
        // Looking at it has changed nothing, also for what is behind the samples.
        let gradient = gradient(&evaluation.loss, &x);
        let difference: Tensor = x.detach() - &target;
        let kept = match batch.mask() {
            Some(mask) => difference.where_self(mask, &difference.zeros_like()),
            None => difference,
        };
        assert!(max_difference(&gradient, &(kept * (0.98 * 3.0 / x.numel() as f64))) < 1e-14);
    }
    Ok(())
}

#[test]
fn a_loss_without_a_way_to_the_samples_is_refused() -> Result<()> {
    let x = wave(&SHAPE, 0.3, Kind::Double).set_requires_grad(true);
    let cond = Condition::none();
    let inert = regularizer_fn(|probe| Ok(probe.noised().f_square()?.f_mean(None)?));
    let objective = Objective::new(gaussian_teacher(1.0)).with(
        Group::new(Renoising::new(Uniform::FULL))
            .engine("beside", 1.0, engine_fn(|probe| Ok(probe.x().f_neg()?)))
            .regularizer("inert", 1.0, inert),
    );
    let _guard = seeded(5);
    let refused = objective.evaluate(&Batch::new(&x, &cond)?).unwrap_err();
    let Error::Term { name, source } = refused else { panic!("{refused}") };
    assert!(name == "inert" && matches!(*source, Error::NoGradient { what: "loss" }));
    // Samples without a graph are looked at, not trained.
    let still = x.detach();
    assert!(objective.evaluate(&Batch::new(&still, &cond)?).is_ok());
    let _no_grad = tch::no_grad_guard();
    assert!(objective.evaluate(&Batch::new(&x, &cond)?).is_ok());
    Ok(())
}

#[test]
fn a_loss_that_is_not_finite_is_in_the_report() -> Result<()> {
    let x = wave(&SHAPE, 0.3, Kind::Double).set_requires_grad(true);
    let cond = Condition::none();
    let broken = regularizer_fn(|probe| Ok(probe.x().f_mean(None)? * f64::NAN));
    let objective = Objective::new(gaussian_teacher(1.0))
        .observed()
        .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("broken", 1.0, broken));
    let _guard = seeded(6);
    let report = objective.evaluate(&Batch::new(&x, &cond)?)?.report()?;
    let of = |name| report.iter().find(|(of, _)| of == name).map(|(_, value)| *value);
    assert!(of("loss").is_some_and(f64::is_nan) && of("broken").is_some_and(f64::is_nan));
    assert!(of("x_std").is_some_and(f64::is_finite) && of("broken_update_rms").is_none());
    assert!(of("not_finite").is_some_and(|share| share == 1.0));
    Ok(())
}
