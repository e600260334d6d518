//! Mistakes that implementations of the method have made, or could make, by number. Numbers 9 to 11, about one
//! regularizer each, are in `tests/terms/`.

use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, Coefficients, Condition, Denoiser, DistributionMatching,
    Draw, Engine, Error, FewStepGrid, Group, Guidance, NoisePath, Normalizer, Objective, PostShift,
    PreShift, Prediction, Probe, RectifiedFlow, Regularizer, Renoising, Result, Shift, Uniform,
    Weighting,
};
use tch::{Kind, Tensor};

use super::common::{
    Calls, DOUBLE, counting_teacher, float32_bound, gaussian_denoiser, gaussian_teacher, gradient,
    max_difference, paths, relative, sdxl, value, values, wave,
};

struct Setting {
    x: Tensor,
    cond: Condition,
    null: Condition,
}

fn setting(kind: Kind) -> Setting {
    let condition = |phase| wave(&[3, 2, 4], phase, kind).into();
    let x = wave(&[3, 2, 4], 0.3, kind).set_requires_grad(true);
    Setting { x, cond: condition(1.1), null: condition(2.9) }
}

impl Setting {
    fn batch(&self) -> Batch<'_> {
        Batch::new(&self.x, &self.cond).unwrap().with_null(&self.null)
    }
}

/// The probe's tau and noise, the same in all tests.
fn probe<'a>(teacher: &'a Denoiser<'a>, batch: &'a Batch<'a>) -> Result<Probe<'a>> {
    let kind = if batch.x().kind() == Kind::Double { Kind::Double } else { Kind::Float };
    let tau = PostShift::new(Tensor::from_slice(&[0.2, 0.5, 0.7]).to_kind(kind))?;
    Probe::at(teacher, batch, tau, wave(&[3, 2, 4], 5.0, batch.x().kind()))
}

/// A network with one output for all inputs.
fn constant<'a>(answer: &Tensor) -> Denoiser<'a> {
    let answer = answer.detach();
    Denoiser::new(
        RectifiedFlow,
        Prediction::Sample,
        move |_: &Tensor, _: &Tensor, _: &Condition| answer.shallow_clone(),
    )
}

#[test]
fn pitfall_1_tau_of_ca_is_on_the_clean_side_and_an_empty_range_stays_in_bounds() -> Result<()> {
    let student = PreShift::new(Tensor::from_slice(&[0.0, 0.5, 0.875, 1.0]))?;
    let shift = Shift::new(3.0)?;
    let renoising = Renoising::new(AboveStudent::new(0.0, 0.98)?).shifted(shift);
    let at_student = shift.apply(&student)?;
    for u in [0.0, 0.3, 0.999] {
        let tau = renoising.at(&RectifiedFlow, &Tensor::full([4], u, DOUBLE), Some(&student))?;
        // The range above the last student is empty: the bound, not beyond it and not NaN.
        approx::assert_relative_eq!(values(tau.tensor())[3], shift.of(0.98), epsilon = 1e-15);
        // Above in the paper's clock is less noise to the data on every path.
        for (which, path) in paths().iter().enumerate() {
            let levels = |time: &PostShift| -> Result<Vec<f64>> {
                let Coefficients { data, noise } = path.coefficients(time)?;
                Ok(values(&(noise / data)))
            };
            let (levels, of_student) = (levels(&tau)?, levels(&at_student)?);
            for index in 0..3 {
                let (level, limit) = (levels[index], of_student[index]);
                let is_cleaner = if u > 0.0 { level < limit } else { level <= limit };
                assert!(is_cleaner, "path {which}, draw {u}, student {index}: {level} {limit}");
            }
            assert!(levels[3].is_finite(), "path {which}");
        }
        // A table counts its noise: a smaller index.
        let table = sdxl();
        let index =
            |time: &PostShift| -> Result<Vec<f64>> { Ok(values(&table.timestep(time.tensor())?)) };
        let (index, of_student) = (index(&tau)?, index(&at_student)?);
        assert!((0..3).all(|k| index[k] < of_student[k] + f64::from(u <= 0.0)), "{index:?}");
    }
    Ok(())
}

#[test]
fn pitfall_2_neutral_guidance_is_exactly_zero_without_the_null_branch() -> Result<()> {
    let (s, calls) = (setting(Kind::Float), Calls::default());
    let (teacher, batch) = (counting_teacher(&calls, 0.5), Batch::new(&s.x, &s.cond)?);
    let probe = probe(&teacher, &batch)?;
    let direction = CfgAugmentation::new(Guidance::from_w(0.0)?).direction(&probe)?;
    assert!(values(&direction).iter().all(|v| v.to_bits() == 0));
    assert_eq!(calls.count(), 0);
    for w in [0.0, 0.5, 3.0, 7.5] {
        assert_eq!(Guidance::from_w(w)?.w(), w);
        assert_eq!(Guidance::new(w + 1.0)?, Guidance::from_w(w)?);
    }
    Ok(())
}

#[test]
fn pitfall_3_shared_tau_is_dmd2_only_with_a_common_normaliser() -> Result<()> {
    let s = setting(Kind::Double);
    let guidance = Guidance::new(4.0)?;
    let noise = wave(&[3, 2, 4], 5.0, Kind::Double);
    let u = Tensor::from_slice(&[0.2, 0.5, 0.7]);
    let slope = |common: bool| -> Result<Tensor> {
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let engine = CfgAugmentation::new(guidance);
        let group = |normalizer| Group::new(Renoising::new(Uniform::FULL)).normalizer(normalizer);
        let objective = Objective::new(gaussian_teacher(0.5));
        let objective = if common {
            let shared = group(Normalizer::dmd2(guidance));
            objective.with(shared.engine("ca", 1.0, engine).regularizer("dm", 1.0, &dm))
        } else {
            objective
                .with(group(Normalizer::dmd2(guidance)).engine("ca", 1.0, engine))
                .with(group(Normalizer::decoupled_port()).regularizer("dm", 1.0, &dm))
        };
        let draw = || Draw { u: u.shallow_clone(), noise: noise.shallow_clone() };
        let draws = if common { vec![draw()] } else { vec![draw(), draw()] };
        Ok(gradient(&objective.evaluate_at(&s.batch(), draws)?.loss, &s.x))
    };
    let t = u.view([3, 1, 1]);
    let level: Tensor = 1.0 - &t;
    let noised = (&t * &s.x + level * &noise).detach();
    let cond = gaussian_denoiser(&noised, &u, &s.cond[0], 0.5);
    let null = gaussian_denoiser(&noised, &u, &s.null[0], 0.5);
    let fake = gaussian_denoiser(&noised, &u, &s.cond[0], 0.8);
    let guided = &null + 4.0 * (cond - &null);
    let n = (&s.x - &guided).abs().mean_dim(&[1i64, 2][..], true, None);
    let dmd2 = ((fake - guided) / n / s.x.numel() as f64).detach();
    assert!(max_difference(&slope(true)?, &dmd2) < 1e-16);
    assert!(max_difference(&slope(false)?, &dmd2) > 1e-3);
    Ok(())
}

#[test]
fn pitfall_4_the_gradient_is_minus_update_over_numel_and_for_the_student_alone() -> Result<()> {
    let s = setting(Kind::Double);
    let weights = [0.5, 0.8].map(|w| Tensor::from(w).set_requires_grad(true));
    let learned = |weight: &Tensor| {
        let weight = weight.shallow_clone();
        Denoiser::new(
            RectifiedFlow,
            Prediction::Sample,
            move |x: &Tensor, _: &Tensor, c: &Condition| x * &weight + &c[0],
        )
    };
    let (teacher, batch) = (learned(&weights[0]), s.batch());
    let dm = DistributionMatching::new(learned(&weights[1]));
    let probe = probe(&teacher, &batch)?;
    assert!(!probe.noised().requires_grad(), "x_tau must be detached");
    let direction = dm.direction(&probe)?;
    assert!(!direction.requires_grad());
    let loss = dm.loss(&probe)?;
    let [teacher_weight, fake_weight] = &weights;
    let gradients =
        Tensor::run_backward(&[&loss], &[&s.x, teacher_weight, fake_weight], true, false);
    let expected = -direction / s.x.numel() as f64;
    assert!(max_difference(&gradients[0], &expected) < 1e-16);
    assert!(!gradients[1].defined() && !gradients[2].defined());
    Ok(())
}

/// Two numbers as a path, to stand at one time of a discrete schedule.
struct At(f64, f64);

impl NoisePath for At {
    fn coefficients(&self, time: &PostShift) -> Result<Coefficients> {
        let all = |value: f64| time.tensor().full_like(value);
        Ok(Coefficients { data: all(self.0), noise: all(self.1) })
    }
}

#[test]
fn pitfall_5_conversions_hold_at_the_ends_where_they_are_defined() -> Result<()> {
    let x0 = wave(&[3, 2, 4], 0.3, Kind::Double);
    let noise = wave(&[3, 2, 4], 5.0, Kind::Double);
    let none = Condition::none();
    // The exact output for a known pair, and x0-hat from it.
    let error = |path: &At, prediction: Prediction| -> Result<f64> {
        let (a, s) = (path.0, path.1);
        let output = match prediction {
            Prediction::Sample => x0.shallow_clone(),
            Prediction::Noise => noise.shallow_clone(),
            Prediction::FlowVelocity => &noise - &x0,
            Prediction::Velocity => a * &noise - s * &x0,
            _ => &noise / -s,
        };
        let network = |_: &Tensor, _: &Tensor, _: &Condition| output.shallow_clone();
        let denoiser = Denoiser::new(path, prediction, network);
        let time = PostShift::all(0.5, 3, DOUBLE)?;
        let noised = path.renoise(&x0, &time, &noise)?;
        Ok(max_difference(&denoiser.denoise(&noised, &time, &none)?, &x0))
    };
    let everywhere = [Prediction::Sample, Prediction::FlowVelocity, Prediction::Velocity];
    for prediction in everywhere {
        assert!(error(&At(0.0, 1.0), prediction)? < 1e-15, "{prediction:?} at noise");
    }
    for prediction in everywhere.into_iter().chain([Prediction::Noise]) {
        assert!(error(&At(1.0, 0.0), prediction)? < 1e-15, "{prediction:?} at data");
    }
    // Pure noise says nothing about x0: refused, not converted to an infinity.
    for prediction in [Prediction::Noise, Prediction::Score] {
        let found = error(&At(0.0, 1.0), prediction);
        assert!(matches!(found, Err(Error::OutOfRange { .. })), "{prediction:?}: {found:?}");
    }
    // SDXL's last step, n = 999: not quite pure noise, errors of eps-hat count 14.6 times.
    let abar: f64 = 0.004_660_1;
    let sdxl = At(abar.sqrt(), (1.0 - abar).sqrt());
    approx::assert_relative_eq!(sdxl.1 / sdxl.0, 14.6, max_relative = 1e-2);
    for prediction in Prediction::ALL {
        assert!(error(&sdxl, prediction)? < 1e-14, "{prediction:?} at n = 999");
    }
    Ok(())
}

#[test]
fn pitfall_6_the_sign_of_a_flow_model_is_undone_in_its_closure() -> Result<()> {
    let s = setting(Kind::Double);
    let (teacher, batch) = (gaussian_teacher(0.5), s.batch());
    let probe = probe(&teacher, &batch)?;
    let x0 = probe.teacher_cond()?;
    // u = eps - x0 = (x_t - x0) / sigma, of the same Gaussian.
    let flow = |x: &Tensor, sigma: &Tensor, c: &Tensor| {
        let t: Tensor = 1.0 - sigma;
        (x - gaussian_denoiser(x, &t, c, 0.5)) / sigma.view([-1, 1, 1])
    };
    let diffusers = |x: &Tensor, t: &Tensor, c: &Condition| flow(x, &(1.0 - t), &c[0]);
    let z_image_network = |x: &Tensor, t: &Tensor, c: &Tensor| -flow(x, &(1.0 - t), c);
    let z_image = |x: &Tensor, t: &Tensor, c: &Condition| -z_image_network(x, t, &c[0]);
    for denoiser in [
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, diffusers),
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, z_image),
    ] {
        let found = denoiser.denoise(probe.noised(), probe.tau(), &s.cond)?;
        assert!(max_difference(&found, x0) < 1e-14);
    }
    // With x itself for the fake prediction, a small step leads to the teacher's, not away from it.
    let dm = DistributionMatching::new(constant(&s.x));
    let moved = &s.x - gradient(&dm.loss(&probe)?, &s.x);
    let distance = |x: &Tensor| value(&(x - x0).square().sum(Kind::Double));
    assert!(distance(&moved) < distance(&s.x));
    Ok(())
}

#[test]
fn pitfall_7_the_normaliser_is_bounded_per_sample_and_wide() -> Result<()> {
    // On the reference: 0 / floor is 0; 0 / 0 without a guard is NaN, and is not hidden.
    let s = setting(Kind::Double);
    let (on_it, batch) = (constant(&s.x), s.batch());
    let dm = DistributionMatching::new(constant(&s.x));
    let floored = dm.direction(&probe(&on_it, &batch)?)?;
    assert_eq!(value(&floored.abs().max()), 0.0);
    let unguarded = probe(&on_it, &batch)?.normalizer(Normalizer::conditional().unguarded());
    assert!(values(&dm.direction(&unguarded)?).iter().all(|v| v.is_nan()));

    // Samples in bfloat16 are normalised in float32.
    let narrow = setting(Kind::BFloat16);
    let (teacher, batch) = (gaussian_teacher(0.5), narrow.batch());
    let dm = DistributionMatching::new(gaussian_teacher(0.8));
    let probe_narrow = probe(&teacher, &batch)?;
    let direction = dm.direction(&probe_narrow)?;
    assert_eq!(direction.kind(), Kind::Float);
    let cond = probe_narrow.teacher_cond()?;
    let distance = (narrow.x.to_kind(Kind::Float) - cond).abs();
    let distance = distance.mean_dim(&[1i64, 2][..], true, None).clamp_min(0.1);
    let difference = direction * distance;
    let time = probe_narrow.tau();
    let fake = gaussian_denoiser(probe_narrow.noised(), time.tensor(), &narrow.cond[0], 0.8);
    assert!(relative("difference", &difference, &(cond - fake)) <= float32_bound(0.0));

    // One NaN sample is its own matter, unless the mean is over the batch.
    let bad = s.x.detach().copy();
    let _ = bad.get(1).get(0).get(0).fill_(f64::NAN);
    let direction_of = |x: &Tensor, normalizer| -> Result<Tensor> {
        let batch = Batch::new(x, &s.cond)?.with_null(&s.null);
        dm.direction(&probe(&teacher, &batch)?.normalizer(normalizer))
    };
    let guidance = Guidance::new(4.0)?;
    for normalizer in [Normalizer::cdm(), Normalizer::dmd2(guidance), Normalizer::fastgen(guidance)]
    {
        let (spoilt, clean) = (direction_of(&bad, normalizer)?, direction_of(&s.x, normalizer)?);
        for index in [0, 2] {
            assert_eq!(max_difference(&spoilt.get(index), &clean.get(index)), 0.0);
        }
        assert!(values(&spoilt.get(1)).iter().any(|v| v.is_nan()), "NaN must stay visible");
    }
    let whole = direction_of(&bad, Normalizer::fastvideo(guidance))?;
    assert!(values(&whole).iter().all(|v| v.is_nan()));
    Ok(())
}

#[test]
fn pitfall_8_times_are_drawn_before_the_shift_and_shifted_once() -> Result<()> {
    let shift = Shift::new(3.0)?;
    approx::assert_relative_eq!(shift.of(0.75), 0.5);
    let student = PreShift::all(0.75, 2, DOUBLE)?;
    let renoising = Renoising::new(AboveStudent::FULL).shifted(shift);
    let u = Tensor::from_slice(&[0.0, 0.5]);
    let tau = renoising.at(&RectifiedFlow, &u, Some(&student))?;
    // U(0.75, 1) and then the shift; shifting twice would begin at 0.25.
    let expected = [0.5, shift.of(0.875)];
    for (tau, expected) in values(tau.tensor()).into_iter().zip(expected) {
        approx::assert_relative_eq!(tau, expected, max_relative = 1e-14);
    }
    // The grid of the student hands out its times before the shift.
    let grid = FewStepGrid::even(4)?.shifted(shift);
    assert_eq!(grid.times(), [0.0, 0.25, 0.5, 0.75]);
    let back = shift.invert(&tau)?;
    approx::assert_relative_eq!(values(back.tensor())[1], 0.875, max_relative = 1e-14);
    Ok(())
}

#[test]
fn pitfall_12_losses_of_the_fake_agree_up_to_the_weights_of_their_type() -> Result<()> {
    let s = setting(Kind::Double);
    let batch = s.batch();
    let noise = wave(&[3, 2, 4], 5.0, Kind::Double);
    // One belief about x0, told in each type.
    let belief = |x: &Tensor| (x * 0.7).sin();
    for t in [0.1, 0.5, 0.9] {
        let (a, level): (f64, f64) = (t, 1.0 - t);
        let time = PostShift::all(t, 3, DOUBLE)?;
        let loss = |prediction: Prediction, weighting: Weighting| -> Result<f64> {
            let told = move |x: &Tensor, _: &Tensor, _: &Condition| {
                let x0 = belief(x);
                let eps = (x - a * &x0) / level;
                match prediction {
                    Prediction::Sample => x0,
                    Prediction::Noise => eps,
                    Prediction::FlowVelocity => eps - x0,
                    Prediction::Velocity => a * eps - level * x0,
                    _ => eps / -level,
                }
            };
            let fake = Denoiser::new(RectifiedFlow, prediction, told);
            let dm = DistributionMatching::new(fake).weighting(weighting);
            Ok(value(&dm.denoising_loss_at(&batch, &time, &noise)?))
        };
        let sample = loss(Prediction::Sample, Weighting::UNIFORM)?;
        for (prediction, factor) in Prediction::ALL.into_iter().zip([
            1.0,
            (a / level).powi(2),
            1.0 / level.powi(2),
            ((a * a + level * level) / level).powi(2),
            (a / level.powi(2)).powi(2),
        ]) {
            let own = loss(prediction, Weighting::UNIFORM)?;
            approx::assert_relative_eq!(own, factor * sample, max_relative = 1e-11);
            for weighting in [
                Weighting::measured_as(Prediction::Sample),
                Weighting::min_snr(5.0)?,
                Weighting::edm(0.5)?,
            ] {
                let reference = loss(Prediction::Sample, weighting)?;
                let found = loss(prediction, weighting)?;
                approx::assert_relative_eq!(found, reference, max_relative = 1e-11);
            }
        }
    }
    Ok(())
}
