//! The loss that trains the fake score against reference values from stock PyTorch, made by
//! `scripts/reference/fake_score.py`. `-- --nocapture` shows the errors of each case.

use decoupled_dmd::{Batch, DistributionMatching, Error, PostShift, Prediction, Result, Weighting};
use tch::{Kind, Tensor};

use super::common::reference::{FAKE_GAIN, PATHS, PREDICTIONS, Reference, denoiser, reaches_noise};
use super::common::{DOUBLE, relative};

/// In the order of the reference's rows.
fn all_weightings() -> Result<[(&'static str, Weighting); 8]> {
    Ok([
        ("uniform", Weighting::UNIFORM),
        ("min_snr", Weighting::min_snr(5.0)?),
        ("as_sample", Weighting::measured_as(Prediction::Sample)),
        ("edm", Weighting::edm(0.5)?),
        ("as_noise", Weighting::measured_as(Prediction::Noise)),
        ("as_flow_velocity", Weighting::measured_as(Prediction::FlowVelocity)),
        ("as_velocity", Weighting::measured_as(Prediction::Velocity)),
        ("as_score", Weighting::measured_as(Prediction::Score)),
    ])
}

/// The number of weightings with a finite loss; 0 where the loss is refused, since the target of a score is
/// infinite where the share of noise vanishes.
fn finite_weightings(prediction: Prediction, path: &str, times: &str) -> usize {
    let is_refused = reaches_noise(path, times) || (path, times) == ("vp_linear", "ends");
    match (times, prediction) {
        ("middle" | "bounds", _) => 8,
        (_, Prediction::Score) if is_refused => 0,
        (_, Prediction::Noise) if reaches_noise(path, times) => 2,
        _ => 3,
    }
}

/// The parameters of a case.
struct Case<'a> {
    path: &'a str,
    prediction: Prediction,
    weighting: Weighting,
    times: &'a str,
    mask: Option<&'a str>,
}

impl Case<'_> {
    /// The loss and its gradient in the gains of the network, with inputs in `kind`.
    fn run(&self, reference: &Reference, kind: Kind) -> Result<(Tensor, Tensor)> {
        let wide = if kind == Kind::Double { Kind::Double } else { Kind::Float };
        let input = |name: &str, kind| reference.get(name).to_kind(kind);
        let x = input("x", kind).set_requires_grad(true);
        let cond = input("cond", wide).into();
        // One for each channel and column.
        let gain = Tensor::full([1, 2, 1, 3], FAKE_GAIN, DOUBLE).set_requires_grad(true);
        let fake = denoiser(self.path, self.prediction, gain.shallow_clone())?;
        let dm = DistributionMatching::new(fake).weighting(self.weighting);
        let mut batch = Batch::new(&x, &cond)?;
        if let Some(mask) = self.mask {
            batch = batch.with_mask(reference.get(&format!("mask_{mask}")))?;
        }
        let time = PostShift::new(input(&format!("times_{}", self.times), wide))?;
        let loss = dm.denoising_loss_at(&batch, &time, &input("noise", kind))?;
        assert_eq!(loss.kind(), wide);
        let gradients = Tensor::run_backward(&[&loss], &[&gain, &x], false, false);
        assert!(!gradients[1].defined(), "the student must receive nothing");
        Ok((loss.detach(), gradients[0].flatten(0, -1)))
    }

    /// Compares with a row of the reference.
    fn compare(
        &self,
        reference: &Reference,
        name: &str,
        expected: &Tensor,
        kinds: &[(Kind, [&str; 2])],
    ) -> Result<()> {
        let mut errors = Vec::new();
        let at = if self.times == "bounds" { "_at_bounds" } else { "" };
        for &(kind, what) in kinds {
            let (loss, gradient) = self.run(reference, kind)?;
            let loss = relative(name, &loss, &expected.get(0));
            let gradient = relative(name, &gradient, &expected.narrow(0, 1, 6));
            let bound = |values: &str| reference.bound(&format!("{values}{at}"), kind);
            errors.extend([(what[0], loss, bound("loss")), (what[1], gradient, bound("gradient"))]);
        }
        reference.report(name, &errors);
        Ok(())
    }
}

const EXACT: [(Kind, [&str; 2]); 2] =
    [(Kind::Double, ["loss f64", "gradient f64"]), (Kind::Float, ["loss f32", "gradient f32"])];
/// Samples and noise in bfloat16, all that follows in float32.
const NARROW: [(Kind, [&str; 2]); 1] = [(Kind::BFloat16, ["loss bf16", "gradient bf16"])];

#[test]
fn every_value_of_the_reference() -> Result<()> {
    Reference::check("fake_score", |reference| {
        for (inputs, kinds) in [("exact", &EXACT[..]), ("bf16", &NARROW[..])] {
            for path in PATHS {
                for (name, prediction) in PREDICTIONS {
                    for times in ["middle", "bounds", "near", "ends"] {
                        let finite = finite_weightings(prediction, path, times);
                        if finite == 0 {
                            continue;
                        }
                        let group = format!("{inputs}/{path}/{name}/{times}");
                        let expected = reference.get(&group);
                        assert_eq!(expected.size(), [finite as i64, 7], "{group}");
                        let weightings = all_weightings()?.into_iter().take(finite);
                        for (row, (by, weighting)) in (0..).zip(weightings) {
                            let case = Case { path, prediction, weighting, times, mask: None };
                            let name = format!("{group}/{by}");
                            case.compare(reference, &name, &expected.get(row), kinds)?;
                        }
                    }
                }
            }
        }
        for mask in ["samples", "elements"] {
            let case = Case {
                path: "rectified_flow",
                prediction: Prediction::FlowVelocity,
                weighting: Weighting::min_snr(5.0)?,
                times: "middle",
                mask: Some(mask),
            };
            let name = format!("mask_{mask}/min_snr");
            case.compare(reference, &name, &reference.get(&name).get(0), &EXACT)?;
        }
        Ok(())
    })
}

/// There are no reference values for these.
#[test]
fn infinite_targets_are_refused_and_no_others() -> Result<()> {
    let reference = Reference::open("fake_score")?;
    for path in PATHS {
        for (name, prediction) in PREDICTIONS {
            for times in ["middle", "bounds", "near", "ends"] {
                let weighting = Weighting::UNIFORM;
                let case = Case { path, prediction, weighting, times, mask: None };
                let found = case.run(&reference, Kind::Double);
                if finite_weightings(prediction, path, times) == 0 {
                    let refused = matches!(found, Err(Error::OutOfRange { .. }));
                    assert!(refused, "{path}, {name}, {times}: {found:?}");
                } else {
                    let _ = found?;
                }
            }
        }
    }
    Ok(())
}
