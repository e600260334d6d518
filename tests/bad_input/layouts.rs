//! Tensors that are not strided, sparse ones and those in the blocks of oneDNN, are refused by name; and so are
//! observations that are no numbers of samples.

use decoupled_dmd::*;
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, paths, wave};

const SHAPE: [i64; 4] = [2, 3, 4, 4];
const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

fn samples() -> Tensor {
    wave(&SHAPE, 0.0, Kind::Float)
}

/// A tensor in other layouts.
fn elsewise(tensor: &Tensor) -> [Tensor; 2] {
    [tensor.to_sparse_sparse_dim(tensor.dim() as i64), tensor.to_mkldnn()]
}

/// The argument that has the wrong layout.
fn refused<T>(result: Result<T>) -> &'static str {
    match result.err() {
        Some(Error::Layout { what }) => what,
        Some(other) => panic!("{other}"),
        None => "nothing",
    }
}

#[test]
fn parts_of_a_batch() -> Result<()> {
    let (x, cond) = (samples(), Condition::none());
    let time = PostShift::all(0.5, 2, FLOAT)?;
    for odd in elsewise(&x) {
        let batch = || Batch::new(&x, &cond);
        assert_eq!(refused(Batch::new(&odd, &cond)), "x");
        assert_eq!(refused(batch()?.with_real(&odd)), "real samples");
        assert_eq!(refused(batch()?.with_target(&odd)), "target");
        assert_eq!(refused(batch()?.with_student_input(&odd, &time)), "student input");
    }
    let mask = x.gt(0.0).to_sparse_sparse_dim(4);
    assert_eq!(refused(Batch::new(&x, &cond)?.with_mask(&mask)), "mask");
    let message = Error::Layout { what: "x" }.to_string();
    assert_eq!(message, "x: expected a strided tensor, found a sparse one or one of oneDNN");
    Ok(())
}

#[test]
fn arguments_of_functions() -> Result<()> {
    let (x, cond) = (samples(), Condition::from(samples()));
    let (teacher, time) = (gaussian_teacher(0.5), PostShift::all(0.5, 2, FLOAT)?);
    let batch = Batch::new(&x, &cond)?;
    let augmentation = Augmentation::new().colour();
    let dm = DistributionMatching::new(gaussian_teacher(0.8));
    for odd in elsewise(&x) {
        assert_eq!(refused(surrogate(&odd, &x)), "x");
        assert_eq!(refused(surrogate(&x, &odd)), "direction");
        assert_eq!(refused(move_toward([(&odd, &x)], 0.5)), "parameter to move");
        assert_eq!(refused(move_toward([(&x, &odd)], 0.5)), "target of a parameter");
        let noise = odd.shallow_clone();
        assert_eq!(refused(Probe::at(&teacher, &batch, time.shallow_clone(), noise)), "noise");
        assert_eq!(refused(teacher.denoise(&odd, &time, &cond)), "noised sample");
        assert_eq!(refused(dm.denoising_loss_at(&batch, &time, &odd)), "noise");
        let answer = |_: &Tensor, _: &Tensor, _: &Condition| odd.shallow_clone();
        let network = Denoiser::new(RectifiedFlow, Prediction::Sample, answer);
        assert_eq!(refused(network.denoise(&x, &time, &cond)), "network output");
        for path in paths() {
            assert_eq!(refused(path.renoise(&odd, &time, &x)), "x0");
            assert_eq!(refused(path.renoise(&x, &time, &odd)), "noise");
            assert_eq!(refused(path.start(&odd)), "noise");
        }
        let measured = MeanVariance::measured(&odd, Statistics::PerSample);
        assert_eq!(refused(measured), "real samples");
        let mmd = MaximumMeanDiscrepancy::new(Kernel::Energy)?;
        assert_eq!(refused(mmd.between(&odd, &x)), "x");
        assert_eq!(refused(PairedRegression::new(Distance::Squared).between(&x, &odd)), "target");
        assert_eq!(refused(augmentation.draw(&odd)), "samples to augment");
        let sampler = Sampler::new(&teacher, FewStepGrid::even(2)?, Transition::Ddim);
        assert_eq!(refused(sampler.sample(&odd, &cond)), "noise");
    }
    for odd in elsewise(&Tensor::from_slice(&[0.2f32, 0.7])) {
        assert_eq!(refused(PreShift::new(odd.shallow_clone())), "pre-shift time");
        let renoising = Renoising::new(Uniform::FULL);
        assert_eq!(refused(renoising.at(&RectifiedFlow, &odd, None)), "draw");
        assert_eq!(refused(Edm::default().sigma(&odd)), "t");
    }
    let steps = Tensor::from_slice(&[0i64, 1]).to_sparse_sparse_dim(1);
    assert_eq!(refused(Steps::new(steps)), "steps");
    Ok(())
}

#[test]
fn an_observation_is_a_number_or_one_for_each_sample() -> Result<()> {
    let (x, cond) = (samples(), Condition::from(samples()));
    let observe = |value: Tensor| {
        let term = regularizer_fn(move |probe: &Probe<'_>| {
            probe.observe("heat", || Ok(value.shallow_clone()))?;
            Ok(probe.x().f_mean(Kind::Float)?)
        });
        let group = Group::new(Renoising::new(Uniform::FULL)).regularizer("mine", 1.0, term);
        let objective = Objective::new(gaussian_teacher(0.5)).with(group).observed();
        let draw = Draw { u: Tensor::from_slice(&[0.3f32, 0.4]), noise: samples() };
        match objective.evaluate_at(&Batch::new(&x, &cond)?, vec![draw]) {
            Err(Error::Term { source, .. }) => Err(*source),
            other => other,
        }
    };
    for good in [Tensor::from(1.0f32), Tensor::from(3i64), Tensor::from_slice(&[true, false])] {
        assert!(observe(good.shallow_clone()).is_ok(), "{good:?}");
    }
    for size in [&[7i64][..], &[2, 2], &[1], &[0], &SHAPE] {
        let error = observe(Tensor::ones(size, FLOAT)).unwrap_err();
        assert!(matches!(error, Error::Shape { what: "heat", .. }), "{error}");
    }
    assert!(matches!(observe(Tensor::new()), Err(Error::Shape { what: "heat", .. })));
    let complex = Tensor::ones([2], (Kind::ComplexFloat, Device::Cpu));
    assert!(matches!(observe(complex), Err(Error::Kind { what: "heat", .. })));
    for odd in elsewise(&Tensor::from_slice(&[0.2f32, 0.7])) {
        assert_eq!(refused(observe(odd)), "heat");
    }
    Ok(())
}

#[test]
fn a_long_number_is_written_with_an_exponent() {
    for (value, written) in [
        (1e300, "found 1e300"),
        (-2.5e-320, "found -2.5e-320"),
        (1e6, "found 1e6"),
        (0.0, "found 0"),
        (-0.25, "found -0.25"),
        (999_999.0, "found 999999"),
        (f64::NAN, "found NaN"),
        (f64::INFINITY, "found inf"),
    ] {
        let error = Error::OutOfRange { what: "shift", requirement: "positive", value }.to_string();
        assert!(error.ends_with(written), "{error}");
    }
}
