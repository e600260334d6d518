//! Shapes and types: every term takes samples of any shape and floating-point type.

use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, CriticPenalty, Denoiser, DistributionMatching,
    Draw, Estimator, GanLoss, Group, Guidance, Kernel, MaximumMeanDiscrepancy, MeanVariance,
    Objective, PostShift, PreShift, Prediction, RectifiedFlow, Renoising, Result, Schedule, Shift,
    Statistics, Uniform,
};
use proptest::prelude::*;
use tch::{Device, Kind, Tensor};

use super::common::{
    self, BFLOAT16, float32_bound, gaussian_teacher, gradient, max_difference, seeded, value, wave,
};

/// Tensors of one shape, in one type.
struct Setting {
    x: Tensor,
    cond: Condition,
    null: Condition,
    real: Tensor,
    noise: Tensor,
    u: Tensor,
}

impl Setting {
    fn new(shape: &[i64], kind: Kind) -> Self {
        let u = Tensor::from_slice(&[0.3, 0.5, 0.7, 0.8]).narrow(0, 0, shape[0]);
        Self {
            x: wave(shape, 0.3, kind).set_requires_grad(true),
            cond: wave(shape, 1.1, kind).into(),
            null: wave(shape, 2.9, kind).into(),
            real: wave(shape, 4.0, kind),
            noise: wave(shape, 5.0, kind),
            u: u.to_kind(wide(kind)),
        }
    }

    /// The same numbers in a wider type.
    fn widened(&self, kind: Kind) -> Self {
        let wide = |tensor: &Tensor| tensor.detach().to_kind(kind);
        Self {
            x: wide(&self.x).set_requires_grad(true),
            cond: wide(&self.cond[0]).into(),
            null: wide(&self.null[0]).into(),
            real: wide(&self.real),
            noise: wide(&self.noise),
            u: wide(&self.u),
        }
    }

    fn batch(&self) -> Result<Batch<'_>> {
        Batch::new(&self.x, &self.cond)?.with_null(&self.null).with_real(&self.real)
    }

    /// The loss of a group of one term.
    fn loss_of<'a>(&'a self, term: impl FnOnce(Group<'a>) -> Group<'a>) -> Result<Tensor> {
        let group = term(Group::new(Renoising::new(Uniform::FULL)));
        let draw = Draw { u: self.u.shallow_clone(), noise: self.noise.shallow_clone() };
        let objective = Objective::new(gaussian_teacher(0.5)).with(group);
        Ok(objective.evaluate_at(&self.batch()?, vec![draw])?.loss)
    }
}

/// The type that is computed in.
fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double { Kind::Double } else { Kind::Float }
}

/// The distance from float64 of what is computed in float32, in proportion to the largest number: the worst of 1500
/// random cases was 1.5e-6 for a gradient (MMD, whose sums cancel) and 5.8e-7 for the loss of a network.
const DISTANCE: f64 = 1.5e-6;

/// A number in float16, of eleven bits, is off by half a unit of its last.
const HALF: f64 = 1.0 / 2048.0;

/// The largest error of a gradient in relation to its largest element: float32's, and of a narrower type one
/// rounding of what was computed in float32.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::BFloat16 => BFLOAT16 + float32_bound(DISTANCE),
        Kind::Half => HALF + float32_bound(DISTANCE),
        Kind::Float => float32_bound(DISTANCE),
        _ => 0.0,
    }
}

/// Checks a loss of samples in any type, and its gradient in the samples.
fn check(name: &str, s: &Setting, loss: impl Fn(&Setting) -> Result<Tensor>) {
    let found = loss(s).unwrap();
    assert_eq!((found.size(), found.kind()), (vec![], wide(s.x.kind())), "{name}");
    assert!(value(&found).is_finite(), "{name}");
    let slope = gradient(&found, &s.x);
    assert_eq!((slope.size(), slope.kind()), (s.x.size(), s.x.kind()), "{name}");
    assert_eq!(slope.device(), s.x.device(), "{name}");
    let double = s.widened(Kind::Double);
    let expected = gradient(&loss(&double).unwrap(), &double.x);
    let largest = value(&expected.abs().max());
    // NaN is above every tolerance.
    let error = max_difference(&slope, &expected);
    assert!(largest > 0.0 && error <= tolerance(s.x.kind()) * largest, "{name}: {error} {largest}");
}

fn engines_and_directions(s: &Setting) {
    let guidance = Guidance::new(4.0).unwrap();
    check("ca", s, |s| s.loss_of(|g| g.engine("ca", 1.0, CfgAugmentation::new(guidance))));
    check("dm", s, |s| {
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        s.loss_of(|g| g.regularizer("dm", 1.0, dm))
    });
}

fn statistics(s: &Setting) {
    check("per sample", s, |s| {
        s.loss_of(|g| g.regularizer("mv", 1.0, MeanVariance::per_sample(0.1, 0.7).unwrap()))
    });
    if s.x.dim() > 2 {
        check("per channel", s, |s| {
            let target = Tensor::linspace(0.2, 0.9, s.x.size()[1], common::DOUBLE);
            let term = MeanVariance::per_channel(&target, &target)?;
            s.loss_of(|g| g.regularizer("mv", 1.0, term))
        });
    }
    // Targets are measured in any type too.
    for statistics in [Statistics::PerSample, Statistics::PerChannel] {
        let axes = if statistics == Statistics::PerSample { 1 } else { 2 };
        let count: i64 = s.x.size().iter().skip(axes).product();
        if s.x.dim() > axes && count > 1 {
            let (mean, variance) = MeanVariance::measured(&s.real, statistics).unwrap().target();
            assert_eq!((mean.kind(), variance.kind()), (Kind::Double, Kind::Double));
        }
    }
}

fn discrepancies(s: &Setting) {
    let estimators: &[Estimator] = match s.x.size()[0] {
        1 => &[Estimator::Biased],
        _ => &[Estimator::Biased, Estimator::Unbiased],
    };
    for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
        for &estimator in estimators {
            check(&format!("{kernel:?} {estimator:?}"), s, |s| {
                let term = MaximumMeanDiscrepancy::new(kernel.clone())?.estimator(estimator);
                s.loss_of(|g| g.regularizer("mmd", 1.0, term))
            });
        }
    }
}

fn critics(s: &Setting) {
    let weight = Tensor::from(0.8f32).set_requires_grad(true);
    let critic = |x: &Tensor, t: &Tensor, c: &Condition| {
        let seen = (x * &weight + &c[0] * 0.5).sin().flatten(1, -1);
        seen.mean_dim(&[1i64][..], true, None) + t.unsqueeze(1)
    };
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        let gan = || Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
        check(&format!("{gan_loss:?}"), s, |s| s.loss_of(|g| g.regularizer("gan", 1.0, gan())));
        for penalty in [
            CriticPenalty::R1 { gamma: 0.1 },
            CriticPenalty::ApproximateR1 { weight: 1.0, sigma: 0.1 },
        ] {
            let gan = gan().penalty(penalty).unwrap();
            own_loss(&format!("{gan_loss:?} {penalty:?}"), s, &weight, |s| {
                let time = PostShift::new(s.u.shallow_clone())?;
                gan.critic_loss_at(&s.batch()?, &time, &s.noise, &s.noise)
            });
        }
    }
}

fn fakes(s: &Setting) {
    let weight = Tensor::from(0.8f32).set_requires_grad(true);
    for prediction in Prediction::ALL {
        let network = |x: &Tensor, _: &Tensor, c: &Condition| x * &weight + &c[0];
        let fake = Denoiser::new(RectifiedFlow, prediction, network);
        let dm = DistributionMatching::new(fake);
        own_loss(&format!("{prediction:?}"), s, &weight, |s| {
            let time = PostShift::new(s.u.shallow_clone())?;
            dm.denoising_loss_at(&s.batch()?, &time, &s.noise)
        });
    }
}

/// Checks the loss of a network, and its gradient in a parameter.
fn own_loss(name: &str, s: &Setting, weight: &Tensor, loss: impl Fn(&Setting) -> Result<Tensor>) {
    let of = |s: &Setting| {
        let loss = loss(s).unwrap();
        assert_eq!((loss.size(), loss.kind()), (vec![], wide(s.x.kind())), "{name}");
        let slope = gradient(&loss, weight);
        assert_eq!((slope.size(), slope.kind()), (vec![], Kind::Float), "{name}");
        [value(&loss), value(&slope)]
    };
    for (found, expected) in of(s).into_iter().zip(of(&s.widened(Kind::Double))) {
        // Losses are computed in float32 or wider for samples of every type; terms of a sum may cancel. NaN
        // is above every tolerance.
        let error = (found - expected).abs();
        let bound = float32_bound(DISTANCE) * expected.abs().max(0.1);
        assert!(error <= bound, "{name}: {found} for {expected}");
        assert!(expected != 0.0, "{name}");
    }
}

#[test]
fn the_gradient_of_several_terms_is_rounded_once() {
    let narrow = Setting::new(&[3, 4, 5], Kind::BFloat16);
    let slope = |s: &Setting| {
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let ca = CfgAugmentation::new(Guidance::new(4.0).unwrap());
        let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.sin().flatten(1, -1);
        let gan = Adversarial::new(RectifiedFlow, critic);
        let mmd = MaximumMeanDiscrepancy::new(Kernel::gaussian()).unwrap();
        let mean_variance = MeanVariance::per_sample(0.1, 0.7).unwrap();
        let loss = s.loss_of(|group| {
            let group = group.engine("ca", 1.0, ca).regularizer("dm", 1.0, dm);
            let group = group.regularizer("mv", 1.0, mean_variance);
            group.regularizer("mmd", 1.0, mmd).regularizer("gan", 1.0, gan)
        });
        let loss = loss.unwrap();
        gradient(&loss, &s.x)
    };
    let expected = slope(&narrow.widened(Kind::Float)).to_kind(Kind::BFloat16);
    assert!(expected.any().int64_value(&[]) == 1);
    assert_eq!(slope(&narrow), expected);
}

#[test]
fn networks_never_get_a_time_wider_than_the_sample() -> Result<()> {
    let _guard = seeded(1);
    for (kind, expected) in
        [(Kind::Float, Kind::Float), (Kind::BFloat16, Kind::Float), (Kind::Double, Kind::Double)]
    {
        let s = Setting::new(&[2, 3], kind);
        // As written in Rust: float64.
        let student = PreShift::new(Tensor::from_slice(&[0.25, 0.5]))?;
        let time = PostShift::new(Tensor::from_slice(&[0.3, 0.6]))?;
        let batch = s.batch()?.with_student_time(&student)?;
        let network = |x: &Tensor, t: &Tensor, _: &Condition| {
            assert_eq!((x.kind(), t.kind()), (expected, expected));
            x * 0.5
        };
        let model = || Denoiser::new(RectifiedFlow, Prediction::Sample, network);
        let dm = DistributionMatching::new(model());
        let shift = Shift::new(3.0)?;
        let guidance = Guidance::new(4.0)?;
        for schedule in Schedule::ALL {
            let _ =
                schedule.objective_with_shifts(model(), guidance, &dm, shift).evaluate(&batch)?;
        }
        let _loss = dm.denoising_loss_at(&batch, &time, &s.noise)?;
        let wide = s.x.detach().to_kind(expected);
        let _pair = model().denoise_pair(&wide, &time, &s.cond, &s.null)?;
        let gan = Adversarial::new(RectifiedFlow, network);
        let _loss = gan.critic_loss_at(&batch, &time, &s.noise, &s.noise)?;
    }
    // Asked directly, it gets them as they are.
    let narrow = (Kind::BFloat16, Device::Cpu);
    let network = |x: &Tensor, t: &Tensor, _: &Condition| {
        assert_eq!((x.kind(), t.kind()), (Kind::BFloat16, Kind::BFloat16));
        x * 0.5
    };
    let model = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
    let (noised, time) = (Tensor::ones([2, 3], narrow), PostShift::all(0.5, 2, narrow)?);
    let sample = model.denoise(&noised, &time, &Condition::none())?;
    assert_eq!(sample.kind(), Kind::Float);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn terms_take_any_shape_and_type(
        shape in prop::collection::vec(1..=4i64, 2..=5),
        kind in prop::sample::select(&[Kind::Float, Kind::Double, Kind::BFloat16, Kind::Half][..]),
    ) {
        let s = Setting::new(&shape, kind);
        engines_and_directions(&s);
        statistics(&s);
        discrepancies(&s);
        critics(&s);
        fakes(&s);
    }
}
