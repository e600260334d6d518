//! Frames with times of their own: equal ones are one time, different ones are samples.

mod closed_form;
mod draws;
mod given;
mod refused;

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Draw, Edm, Engine, Group,
    Guidance, NoiseAngle, NoisePath, Normalizer, Objective, PostShift, PreShift, Prediction, Probe,
    RectifiedFlow, Regularizer, Result, Schedule, ScoreIdentity, Shift, Subinterval, TrigFlow,
    VariancePreserving, Weighting,
};
use proptest::prelude::*;
use tch::{Kind, Tensor};

use super::common::{gradient, max_difference, paths, sdxl, value, values, wave};

/// The layout of CausVid and Self-Forcing, `[B, F, C, W]`, and the one of diffusers, `[B, C, F, W]`.
const FRAMES_FIRST: [i64; 4] = [2, 5, 3, 4];
const CHANNELS_FIRST: [i64; 4] = [2, 3, 5, 4];

fn double(shape: &[i64], phase: f64) -> Tensor {
    wave(shape, phase, Kind::Double)
}

/// Times, or other numbers per sample or frame, as a factor of `x`.
fn factor(times: &Tensor, x: &Tensor) -> Tensor {
    let mut shape = times.size();
    shape.resize(x.dim(), 1);
    times.view(shape.as_slice())
}

/// A network without structure, in which samples, frames and channels do not mix.
fn network(scale: f64) -> impl Fn(&Tensor, &Tensor, &Condition) -> Tensor {
    move |x: &Tensor, t: &Tensor, c: &Condition| {
        ((x + &c[0]) * scale).sin() + factor(t, x) * x * 0.25
    }
}

/// Times per frame for samples of `shape` from times `[B, F]`.
fn per_frame(times: &Tensor, shape: &[i64]) -> PostShift {
    let times = if shape == CHANNELS_FIRST { times.unsqueeze(1) } else { times.shallow_clone() };
    PostShift::new(times).unwrap()
}

/// Frames as samples, `[B F, C, W]`.
fn as_samples(x: &Tensor) -> Tensor {
    let x = if x.size() == CHANNELS_FIRST { x.transpose(1, 2) } else { x.shallow_clone() };
    x.contiguous().flatten(0, 1)
}

fn all_paths() -> Vec<Box<dyn NoisePath>> {
    let mut all: Vec<Box<dyn NoisePath>> = paths().into();
    all.push(Box::new(Subinterval::new(TrigFlow, 0.6).unwrap()));
    all.push(Box::new(RectifiedFlow.shifted(Shift::new(3.0).unwrap())));
    all
}

/// Everything that a path and a prediction compute at one set of times, and at a later one.
fn results(
    path: &dyn NoisePath,
    [x, noise, cond]: &[Tensor; 3],
    time: &PostShift,
    later: &PostShift,
) -> Result<Vec<Tensor>> {
    let noised = path.renoise(x, time, noise)?;
    let implied = path.implied_noise(&noised, &noise.sin(), time)?;
    let mut all = vec![
        path.implied_sample(&noised, time, &implied, later)?,
        path.segment_noise(later, time, &implied, noise)?,
        NoiseAngle::at(path, time, 0.5)?.cosine(x)?.expand_as(x),
        noised.shallow_clone(),
        implied,
    ];
    let cond = Condition::from(cond.shallow_clone());
    let null = Condition::from(cond[0].cos());
    for prediction in Prediction::ALL {
        let model = Denoiser::new(path, prediction, network(0.7));
        let real = model.predict(&noised, time, &cond)?;
        let null = model.predict(&noised, time, &null)?;
        let guidance = Guidance::new(3.0)?.within(0.3, 0.6)?;
        all.extend([
            real.sample()?.shallow_clone(),
            real.flow_velocity()?,
            real.guided(&null, guidance)?.into_sample()?,
            model.denoising_error(x, time, noise, &cond, None)?,
        ]);
    }
    Ok(all)
}

#[test]
fn frames_with_times_of_their_own_are_samples_on_every_path() -> Result<()> {
    let times = Tensor::linspace(0.1, 0.7, 10, (Kind::Double, tch::Device::Cpu)).view([2, 5]);
    let later: Tensor = &times * 0.5 + 0.45;
    for shape in [FRAMES_FIRST, CHANNELS_FIRST] {
        let data = [0.3, 1.7, 4.0].map(|phase| double(&shape, phase));
        let flat = data.each_ref().map(as_samples);
        for (index, path) in all_paths().iter().enumerate() {
            let found = {
                let [time, later] = [&times, &later].map(|times| per_frame(times, &shape));
                results(&**path, &data, &time, &later)
            };
            let expected = {
                let [time, later] =
                    [&times, &later].map(|times| PostShift::new(times.flatten(0, 1)).unwrap());
                results(&**path, &flat, &time, &later)
            };
            let (found, expected) = (found?, expected?);
            assert_eq!(found.len(), expected.len());
            for (which, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let scale = value(&expected.abs().max()).max(1.0);
                let error = max_difference(&as_samples(found), expected) / scale;
                assert!(error < 1e-14, "path {index}, result {which}, {shape:?}: {error:e}");
            }
        }
    }
    Ok(())
}

#[test]
fn clocks_of_the_paths_take_times_per_frame() -> Result<()> {
    let t = double(&[2, 1, 5], 0.3) * 0.4 + 0.5;
    let flat = t.flatten(0, -1);
    let (edm, linear, table) = (Edm::default(), VariancePreserving::linear(0.1, 20.0)?, sdxl());
    type Clock<'a> = &'a dyn Fn(&Tensor) -> Result<Tensor>;
    let clocks: [Clock; 4] =
        [&|t| edm.sigma(t), &|t| TrigFlow.angle(t), &|t| linear.timestep(t), &|t| {
            table.timestep(t)
        }];
    for clock in clocks {
        let found = clock(&t)?;
        assert_eq!(found.size(), t.size());
        assert!(found.flatten(0, -1).equal(&clock(&flat)?));
    }
    let x = double(&CHANNELS_FIRST, 1.0);
    let wrapped = |x: &Tensor, t: &Tensor| {
        edm.preconditioning(t, 0.5)?.apply(x, |x, c_noise| x.sin() * factor(c_noise, x))
    };
    let found = as_samples(&wrapped(&x, &t)?);
    assert!(max_difference(&found, &wrapped(&as_samples(&x), &flat)?) < 1e-14);
    Ok(())
}

#[test]
fn a_time_of_the_sample_may_meet_times_of_its_frames() -> Result<()> {
    let (x, noise) = (double(&FRAMES_FIRST, 0.2), double(&FRAMES_FIRST, 2.0));
    let time = PostShift::new(Tensor::from_slice(&[0.2, 0.3]))?;
    let frames = PostShift::new(double(&[2, 5], 1.0) * 0.1 + 0.6)?;
    let spread = PostShift::new(time.tensor().view([2, 1]).expand([2, 5], false))?;
    for path in paths() {
        let one = path.implied_sample(&x, &time, &noise, &frames)?;
        assert!(one.equal(&path.implied_sample(&x, &spread, &noise, &frames)?));
        let one = path.segment_noise(&frames, &time, &x, &noise)?;
        assert!(one.equal(&path.segment_noise(&frames, &spread, &x, &noise)?));
        let angle = |time| NoiseAngle::at(&path, time, 1.0);
        let step = angle(&frames)?.minus(&angle(&time)?)?;
        assert!(step.equal(&angle(&frames)?.minus(&angle(&spread)?)?));
    }
    Ok(())
}

/// The losses and gradients of the terms that take times per frame, with the given shapes of draws.
fn trained(shape: &[i64; 4], u: &Tensor, student: &Tensor, frames: bool) -> Result<Vec<Tensor>> {
    let expand = |times: &Tensor| {
        let count = if *shape == CHANNELS_FIRST { vec![2, 1, 5] } else { vec![2, 5] };
        let one = vec![2i64; 1].into_iter().chain(vec![1; count.len() - 1]).collect::<Vec<_>>();
        if frames { times.view(one.as_slice()).expand(&count, false) } else { times.copy() }
    };
    let (cond, null) = (double(shape, 1.1).into(), double(shape, 2.2).into());
    let time = PreShift::new(expand(student))?;
    let (u, noise) = (expand(u), double(shape, 5.0));
    let mut all = Vec::new();
    for prediction in [Prediction::FlowVelocity, Prediction::Noise, Prediction::Velocity] {
        let path = VariancePreserving::linear(0.1, 20.0)?.shifted(Shift::new(2.0)?);
        let model = |scale| Denoiser::new(path.clone(), prediction, network(scale));
        let dm = DistributionMatching::new(model(0.4)).weighting(Weighting::min_snr(5.0)?);
        let sid = ScoreIdentity::new(&dm, 1.2)?;
        let guidance = Guidance::new(4.0)?;
        let x = double(shape, 0.3).set_requires_grad(true);
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
        let draw = |_| Draw { u: u.shallow_clone(), noise: noise.shallow_clone() };
        let mut objectives: Vec<_> = Schedule::ALL
            .into_iter()
            .map(|schedule| {
                let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
                (groups, schedule.objective(model(0.7), guidance, &dm).observed())
            })
            .collect();
        let group = Group::new(decoupled_dmd::Renoising::new(decoupled_dmd::Uniform::FULL));
        objectives.push((1, Objective::new(model(0.7)).with(group.regularizer("sid", 1.0, &sid))));
        for (groups, objective) in &objectives {
            let evaluation = objective.evaluate_at(&batch, (0..*groups).map(draw).collect())?;
            all.extend([gradient(&evaluation.loss, &x), evaluation.loss.detach()]);
            all.extend(evaluation.terms.into_iter().map(|(_, value)| value));
        }
        let time = PostShift::new(u.shallow_clone())?;
        all.push(dm.denoising_loss_per_sample_at(&batch, &time, &noise)?);
    }
    Ok(all)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn equal_frames_are_one_time_to_the_last_bit(
        u in prop::array::uniform2(0.05..0.95f64),
        student in prop::array::uniform2(0.0..0.9f64),
    ) {
        for shape in [FRAMES_FIRST, CHANNELS_FIRST] {
            let at = |frames| {
                let [u, student] = [u, student].map(|values| Tensor::from_slice(&values));
                trained(&shape, &u, &student, frames).unwrap()
            };
            for (which, (found, expected)) in at(true).iter().zip(at(false)).enumerate() {
                prop_assert!(found.equal(&expected), "{which}: {:e}", max_difference(found, &expected));
                prop_assert!(values(found).iter().all(|value| value.is_finite()));
            }
        }
    }
}

#[test]
fn directions_of_frames_are_those_of_samples_under_a_normaliser_of_frames() -> Result<()> {
    let times = Tensor::linspace(0.1, 0.9, 10, (Kind::Double, tch::Device::Cpu)).view([2, 5]);
    for shape in [FRAMES_FIRST, CHANNELS_FIRST] {
        for masked in [false, true] {
            let directions = |flat: bool| -> Result<Vec<Tensor>> {
                let own = |tensor: Tensor| if flat { as_samples(&tensor) } else { tensor };
                let (x, noise) = (own(double(&shape, 0.3)), own(double(&shape, 5.0)));
                let [cond, null] = [1.1, 2.2].map(|phase| own(double(&shape, phase)).into());
                let mask = own(double(&shape, 3.0)).gt(-0.4);
                let tau = match flat {
                    true => PostShift::new(times.flatten(0, 1))?,
                    false => per_frame(&times, &shape),
                };
                let model = |scale| Denoiser::new(TrigFlow, Prediction::Velocity, network(scale));
                let (teacher, dm) = (model(0.7), DistributionMatching::new(model(0.4)));
                let mut batch = Batch::new(&x, &cond)?.with_null(&null);
                if masked {
                    batch = batch.with_mask(&mask)?;
                }
                let guidance = Guidance::new(4.0)?;
                let probe = Probe::at(&teacher, &batch, tau, noise)?
                    .normalizer(Normalizer::guided(guidance).over_frame());
                let ca = CfgAugmentation::new(guidance).direction(&probe)?;
                Ok(vec![ca, dm.direction(&probe)?, dm.loss(&probe)?])
            };
            let (found, expected) = (directions(false)?, directions(true)?);
            for (found, expected) in found.iter().zip(&expected).take(2) {
                assert!(max_difference(&as_samples(found), expected) < 1e-13);
            }
            assert!(max_difference(&found[2], &expected[2]) < 1e-14);
        }
    }
    Ok(())
}
