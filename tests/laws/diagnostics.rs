//! Diagnostics: values by hand, undefined numbers, samples that are not finite, observations of custom terms.

mod graphs;
mod updates;

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Denoiser, Diagnostics, DistributionMatching, Draw, Error,
    Group, Guidance, MeanVariance, NoisePath, Normalizer, Objective, PostShift, Prediction,
    RectifiedFlow, Renoising, Result, Uniform, default_device, engine_fn,
};
use tch::{Kind, Tensor};

use super::common::{self, gaussian_teacher, seeded, value, wave};

const SHAPE: [i64; 4] = [3, 2, 4, 4];

struct Setting {
    x: Tensor,
    mask: Option<Tensor>,
    guidance: f64,
    /// The same for teacher and fake score, which then agree.
    fake_variance: f64,
    times: [f64; 3],
    normalizer: Normalizer,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            x: wave(&SHAPE, 0.3, Kind::Double),
            mask: None,
            guidance: 4.0,
            fake_variance: 0.8,
            times: [0.2, 0.5, 0.7],
            normalizer: Normalizer::default(),
        }
    }
}

impl Setting {
    fn diagnostics(&self) -> Result<Diagnostics> {
        let (cond, null) = (
            Condition::from(wave(&SHAPE, 1.1, Kind::Double)),
            Condition::from(wave(&SHAPE, 2.9, Kind::Double)),
        );
        let dm = DistributionMatching::new(gaussian_teacher(self.fake_variance));
        let mut batch = Batch::new(&self.x, &cond)?.with_null(&null);
        if let Some(mask) = &self.mask {
            batch = batch.with_mask(mask)?;
        }
        let objective = Objective::new(gaussian_teacher(0.5)).observed().with(
            Group::new(Renoising::new(Uniform::FULL))
                .normalizer(self.normalizer)
                .engine("ca", 1.0, CfgAugmentation::new(Guidance::new(self.guidance)?))
                .regularizer("dm", 1.0, &dm)
                .regularizer("mv", 1.0, MeanVariance::per_sample(0.0, 1.0)?),
        );
        let noise = wave(&SHAPE, 5.0, Kind::Double);
        let draw = Draw { u: Tensor::from_slice(&self.times), noise };
        Ok(objective.evaluate_at(&batch, vec![draw])?.diagnostics.expect("an observed objective"))
    }
}

fn names(all: &Diagnostics) -> Result<Vec<String>> {
    Ok(all.report()?.into_iter().map(|(name, _)| name).collect())
}

#[test]
fn every_number_of_the_table_is_in_the_report() -> Result<()> {
    let all = Setting::default().diagnostics()?;
    let expected = [
        "x_mean",
        "x_std",
        "x_rms",
        "x_spread",
        "not_finite",
        "ca_update_rms",
        "ca_n",
        "ca_n_min",
        "ca_share_on_floor",
        "dm_rel_gap",
        "dm_cos",
        "dm_mag_ratio",
        "dm_error_ratio",
        "dm_update_rms",
        "dm_n",
        "dm_n_min",
        "dm_share_on_floor",
        "dm_to_ca",
        "ca_dm_cos_std",
        "ca_dm_cos_min",
        "ca_dm_cos_max",
        "ca_dm_cos",
    ];
    assert_eq!(names(&all)?, expected);
    let tau: Vec<f64> = common::values(&all.term("dm").expect("dm").tau);
    assert_eq!(tau, [0.2, 0.5, 0.7]);
    assert!(all.term("mv").is_some_and(|mv| mv.update_rms.is_none() && mv.n.is_none()));
    assert!(all.term("nobody").is_none());
    Ok(())
}

#[test]
fn cosines_with_nothing_are_none_and_not_nan() -> Result<()> {
    // Neutral guidance: an engine without an update.
    let all = Setting { guidance: 1.0, ..Setting::default() }.diagnostics()?;
    let cos = all.update_cos("ca", "dm")?.expect("two directions");
    assert_eq!(cos.to_vec()?, [None, None, None]);
    assert_eq!((cos.mean()?, all.update_balance("dm", "ca")?), (None, None));
    assert!(!names(&all)?.iter().any(|name| name.starts_with("ca_dm_cos") || name == "dm_to_ca"));
    assert!(all.update_cos("ca", "x")?.is_none() && all.update_cos("mv", "dm")?.is_none());
    assert!(all.update_cos("ca", "mv")?.is_none() && all.update_balance("x", "ca")?.is_none());

    // The clean end: both scores return the sample.
    let all = Setting { times: [1.0, 0.5, 1.0], ..Setting::default() }.diagnostics()?;
    let scores = all.term("dm").and_then(|dm| dm.scores.as_ref()).expect("scores");
    for numbers in [&scores.rel_gap, &scores.cos, &scores.mag_ratio, &scores.error_ratio] {
        let numbers = numbers.to_vec()?;
        assert!(numbers[0].is_none() && numbers[1].is_some() && numbers[2].is_none());
    }
    Ok(())
}

#[test]
fn a_fake_that_has_caught_up_has_no_gap() -> Result<()> {
    let all = Setting { fake_variance: 0.5, ..Setting::default() }.diagnostics()?;
    let scores = all.term("dm").and_then(|dm| dm.scores.as_ref()).expect("scores");
    assert_eq!(scores.rel_gap.mean()?, Some(0.0));
    approx::assert_relative_eq!(scores.cos.mean()?.unwrap(), 1.0, max_relative = 1e-14);
    approx::assert_relative_eq!(scores.mag_ratio.mean()?.unwrap(), 1.0, max_relative = 1e-14);
    // Nor does it know the student's samples better than the teacher does: gap and cosine look best, and this warns.
    approx::assert_relative_eq!(scores.error_ratio.mean()?.unwrap(), 1.0, max_relative = 1e-14);
    Ok(())
}

#[test]
fn the_error_of_the_fake_score_is_measured_by_the_teachers() -> Result<()> {
    let mask = wave(&SHAPE, 4.0, Kind::Double).gt(-0.4);
    for mask in [None, Some(mask)] {
        let setting = Setting { mask, ..Setting::default() };
        let all = setting.diagnostics()?;
        let found = all
            .term("dm")
            .and_then(|dm| dm.scores.as_ref())
            .expect("scores")
            .error_ratio
            .to_vec()?;
        let time = PostShift::new(Tensor::from_slice(&setting.times))?;
        let noise = wave(&SHAPE, 5.0, Kind::Double);
        let noised = RectifiedFlow.renoise(&setting.x, &time, &noise)?;
        let cond = Condition::from(wave(&SHAPE, 1.1, Kind::Double));
        let errors = [setting.fake_variance, 0.5].map(|variance| {
            let error = gaussian_teacher(variance).denoise(&noised, &time, &cond)? - &setting.x;
            let kept = setting
                .mask
                .as_ref()
                .map_or_else(|| error.ones_like(), |mask| mask.to_kind(Kind::Double));
            Ok::<_, Error>((error.square() * kept).sum_dim_intlist(
                [1i64, 2, 3].as_slice(),
                false,
                None::<Kind>,
            ))
        });
        let [fake, teacher] = errors;
        let expected: Vec<f64> = common::values(&(fake? / teacher?).sqrt());
        for (found, expected) in found.into_iter().zip(expected) {
            approx::assert_relative_eq!(found.expect("defined"), expected, max_relative = 1e-12);
        }
    }
    Ok(())
}

#[test]
fn samples_that_become_alike_are_seen() -> Result<()> {
    let plain = Setting::default();
    let spread = |x: &Tensor, mask: Option<Tensor>| {
        Setting { x: x.copy(), mask, ..Setting::default() }.diagnostics()?.spread()
    };
    let expected = plain.x.var_dim(0, true, false).mean(Kind::Double).sqrt().double_value(&[]);
    approx::assert_relative_eq!(spread(&plain.x, None)?.unwrap(), expected, max_relative = 1e-12);
    let alike = plain.x.narrow(0, 0, 1).expand_as(&plain.x).copy();
    assert!(spread(&alike, None)?.is_some_and(|spread| spread < 1e-15));
    // A sample that is not finite, or left out, is none of them.
    let two = plain.x.index_select(0, &Tensor::from_slice(&[0i64, 2]));
    let expected = two.var_dim(0, true, false).mean(Kind::Double).sqrt().double_value(&[]);
    let broken = plain.x.copy();
    let _ = broken.get(1).fill_(f64::INFINITY);
    let left_out = Some(Tensor::from_slice(&[true, false, true]));
    for found in [spread(&broken, None)?, spread(&plain.x, left_out)?] {
        approx::assert_relative_eq!(found.unwrap(), expected, max_relative = 1e-12);
    }
    assert_eq!(spread(&plain.x, Some(Tensor::from_slice(&[true, false, false])))?, None);
    Ok(())
}

#[test]
fn bad_samples_are_counted_and_left_out() -> Result<()> {
    let clean = Setting::default().diagnostics()?;
    assert_eq!(clean.not_finite()?, 0.0);
    let bad = Setting::default();
    let _ = bad.x.get(1).get(0).fill_(f64::NAN);
    let bad = bad.diagnostics()?;
    approx::assert_relative_eq!(bad.not_finite()?, 1.0 / 3.0);
    assert!(names(&bad)?.len() == names(&clean)?.len());
    let rms = |all: &Diagnostics| all.term("ca").unwrap().update_rms.as_ref().unwrap().to_vec();
    let (bad_rms, rms) = (rms(&bad)?, rms(&clean)?);
    assert_eq!(bad_rms, [rms[0], None, rms[2]]);
    Ok(())
}

#[test]
fn a_mask_takes_elements_and_samples_out() -> Result<()> {
    let mask = Tensor::from_slice(&[true, false, true]);
    let all = Setting { mask: Some(mask), ..Setting::default() }.diagnostics()?;
    let plain = Setting::default().diagnostics()?;
    let std = plain.x_std.to_vec()?;
    assert_eq!(all.x_std.to_vec()?, [std[0], None, std[2]]);
    let n = |all: &Diagnostics| all.term("dm").unwrap().n.as_ref().unwrap().to_vec();
    assert_eq!(n(&all)?, [n(&plain)?[0], None, n(&plain)?[2]]);
    let drift = all.variance_drift(1.0)?.unwrap();
    let variance = |index: usize| std[index].unwrap().powi(2);
    approx::assert_relative_eq!(drift, ((variance(0) + variance(2)) / 2.0).ln(), epsilon = 1e-14);
    let half = all.variance_drift(2.0)?.unwrap();
    approx::assert_relative_eq!(half, drift - 2f64.ln(), epsilon = 1e-14);
    assert!(all.variance_drift(f64::INFINITY).is_err() && all.variance_drift(-1.0).is_err());
    assert!(matches!(
        all.variance_drift(0.0),
        Err(Error::OutOfRange { what: "target variance", .. })
    ));
    Ok(())
}

#[test]
fn the_share_on_the_floor_is_seen() -> Result<()> {
    for (floor, share) in [(1e-6, 0.0), (1e6, 1.0)] {
        let normalizer = Normalizer::conditional().floor(floor)?;
        let all = Setting { normalizer, ..Setting::default() }.diagnostics()?;
        for term in ["ca", "dm"] {
            let on_guard = all.term(term).unwrap().on_guard.as_ref().unwrap();
            assert_eq!(on_guard.mean()?, Some(share));
        }
    }
    let all = Setting { normalizer: Normalizer::OFF, ..Setting::default() }.diagnostics()?;
    assert!(all.term("ca").is_some_and(|ca| ca.n.is_none() && ca.update_rms.is_some()));
    Ok(())
}

#[test]
fn terms_of_one_s_own_observe_what_they_like() -> Result<()> {
    let _guard = seeded(0);
    let x = wave(&[2, 3], 0.0, Kind::Float).to_device(default_device());
    let cond = Condition::none();
    let own = engine_fn(|probe| {
        probe.observe("mean", || Ok(probe.noised().f_mean(None)?))?;
        probe.observe("of_sample", || Ok(Tensor::from_slice(&[1.0f32, 4.0])))?;
        probe.observe("broken", || Ok(Tensor::from(f64::NAN)))?;
        Ok(probe.noised().f_neg()?)
    });
    let same = |x: &Tensor, _: &Tensor, _: &Condition| x.shallow_clone();
    let objective = Objective::new(Denoiser::new(RectifiedFlow, Prediction::Sample, same))
        .observed()
        .with(Group::new(Renoising::new(Uniform::FULL)).engine("own", 1.0, own));
    let all = objective.evaluate(&Batch::new(&x, &cond)?)?.diagnostics.expect("observed");
    let observed: Vec<_> = all.terms[0].1.observations.iter().map(|(name, _)| *name).collect();
    assert_eq!(observed, ["mean", "of_sample", "broken"]);
    let report = all.report()?;
    let found = |name: &str| report.iter().find(|(n, _)| n == name).map(|(_, value)| *value);
    // Made on the CPU, wherever the samples are.
    assert_eq!(found("own_of_sample"), Some(2.5));
    assert_eq!(found("own_broken"), None);
    assert!(found("own_mean").is_some() && found("own_update_rms").is_some());
    assert!(!value(&all.terms[0].1.observations[0].1).is_nan());
    Ok(())
}

#[test]
fn one_element_makes_a_sample_bad_whatever_its_axes() -> Result<()> {
    let cond = Condition::none();
    for shape in [&[3, 4][..], &[3, 2, 4], &[3, 2, 2, 3], &[3, 2, 2, 2, 2]] {
        let spoilt = |tensor: &Tensor, sample: i64, value: f64| {
            let bad = tensor.detach().copy();
            let _ = bad.get(sample).view([-1]).get(-1).fill_(value);
            bad
        };
        let x = wave(shape, 0.3, Kind::Float);
        let engine = |bad: bool| {
            engine_fn(move |probe| {
                let direction = probe.noised().f_zeros_like()?;
                Ok(if bad { spoilt(&direction, 2, f64::INFINITY) } else { direction })
            })
        };
        for (bad_x, bad_direction, expected) in
            [(false, false, 0.0), (true, false, 1.0), (false, true, 1.0), (true, true, 2.0)]
        {
            let x = if bad_x { spoilt(&x, 1, f64::NAN) } else { x.shallow_clone() };
            let group = Group::new(Renoising::new(Uniform::FULL));
            let objective = Objective::new(gaussian_teacher(0.5)).observed().with(group.engine(
                "own",
                1.0,
                engine(bad_direction),
            ));
            let draw = Draw { u: Tensor::from_slice(&[0.2f32, 0.5, 0.7]), noise: x.zeros_like() };
            let evaluation = objective.evaluate_at(&Batch::new(&x, &cond)?, vec![draw])?;
            let share = evaluation.diagnostics.expect("observed").not_finite()?;
            approx::assert_relative_eq!(share, expected / 3.0);
        }
    }
    Ok(())
}

#[test]
fn what_is_below_a_hundred_rounding_steps_has_no_angle() -> Result<()> {
    let cond = Condition::none();
    for (kind, step) in [
        (Kind::Double, f64::EPSILON),
        (Kind::Float, f64::from(f32::EPSILON)),
        // Computed in float32.
        (Kind::BFloat16, f64::from(f32::EPSILON)),
    ] {
        let x = wave(&SHAPE, 0.3, kind);
        for (steps, is_there) in [(50.0, false), (200.0, true)] {
            let size = steps * step;
            // A velocity in proportion to the noised sample, and directions about 0.
            let near = |factor: f64| {
                let network = move |x: &Tensor, _: &Tensor, _: &Condition| x - x * (factor * size);
                Denoiser::new(RectifiedFlow, Prediction::Sample, network)
            };
            let of_size = |size: f64| engine_fn(move |p| Ok(p.noised().f_full_like(size)?));
            let dm = DistributionMatching::new(near(8.0));
            let objective = Objective::new(near(1.0)).observed().with(
                Group::new(Renoising::new(Uniform::FULL))
                    .engine("small", 1.0, of_size(size))
                    .engine("large", 1.0, of_size(-1.0))
                    .regularizer("dm", 1.0, &dm),
            );
            let u = Tensor::from_slice(&[0.2, 0.5, 0.7]).to_kind(kind);
            let draw = Draw { u, noise: wave(&SHAPE, 5.0, kind) };
            let evaluation = objective.evaluate_at(&Batch::new(&x, &cond)?, vec![draw])?;
            let all = evaluation.diagnostics.expect("observed");
            let scores = all.term("dm").and_then(|dm| dm.scores.as_ref()).expect("scores");
            let angle = all.update_cos("small", "large")?.expect("two directions");
            for (numbers, expected) in [(&angle, -1.0), (&scores.cos, 1.0), (&scores.rel_gap, 7.0)]
            {
                match numbers.mean()? {
                    Some(found) if is_there => {
                        approx::assert_relative_eq!(found, expected, max_relative = 0.05);
                    }
                    found => assert!(!is_there && found.is_none(), "{kind:?} {steps} {found:?}"),
                }
            }
        }
    }
    Ok(())
}
