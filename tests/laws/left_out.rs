//! What a mask, given frames or a weight of 0 leaves out: no term trains on it, and it spoils nothing.

use decoupled_dmd::{
    AboveStudent, Adversarial, AdversarialDistributionMatching, Batch, CfgAugmentation, Condition,
    Consistency, Denoiser, Distance, DistributionMatching, Draw, Error, FlowMap, FlowRule, Group,
    Guidance, Kernel, MaximumMeanDiscrepancy, MeanFlow, MeanVariance, NoisePath, Objective,
    PairedRegression, Perceptual, PostShift, PreShift, Prediction, RectifiedFlow, Renoising,
    Result, Reward, ScoreIdentity, Shift, Uniform,
};
use tch::{IndexOp, Kind, Tensor};

use super::common::{gradient, seeded, value, values, wave};

/// Two samples of three frames.
const SHAPE: [i64; 3] = [2, 3, 4];

fn double(phase: f64) -> Tensor {
    wave(&SHAPE, phase, Kind::Double)
}

/// A network in which every frame sees the others.
fn mixing<'a>(path: impl NoisePath + 'a, gain: f64) -> Denoiser<'a> {
    let network = move |x: &Tensor, _: &Tensor, c: &Condition| {
        (x * gain + x.mean_dim([1i64].as_slice(), true, None) + &c[0]).tanh()
    };
    Denoiser::new(path, Prediction::FlowVelocity, network)
}

fn flow<'a>(gain: f64) -> Denoiser<'a> {
    mixing(RectifiedFlow, gain)
}

fn critic(x: &Tensor, t: &Tensor, _: &Condition) -> Tensor {
    x.flatten(1, -1).sin().mean_dim([1i64].as_slice(), true, None) + t.unsqueeze(1)
}

/// The negative square of what changes from frame to frame.
fn stillness(x: &Tensor, _: &Condition) -> Tensor {
    let change = x.narrow(1, 1, 2) - x.narrow(1, 0, 2);
    -change.square().flatten(1, -1).sum_dim_intlist([1i64].as_slice(), false, None)
}

fn group<'a>() -> Group<'a> {
    Group::new(Renoising::new(Uniform::new(0.05, 0.9).unwrap()))
}

/// What a batch needs besides its samples.
struct Setting {
    cond: Condition,
    null: Condition,
    others: Tensor,
    student: PreShift,
    time: PostShift,
}

fn setting() -> Result<Setting> {
    let times = || Tensor::from_slice(&[0.2, 0.5]);
    Ok(Setting {
        cond: double(1.1).into(),
        null: double(2.2).into(),
        others: double(3.3),
        student: PreShift::new(times())?,
        time: PostShift::new(times())?,
    })
}

impl Setting {
    fn batch<'b>(&'b self, x: &'b Tensor) -> Result<Batch<'b>> {
        Batch::new(x, &self.cond)?
            .with_null(&self.null)
            .with_real(&self.others)?
            .with_target(&self.others)?
            .with_student_time(&self.student)?
            .with_student_input(&self.others, &self.time)
    }
}

fn draw() -> Draw {
    Draw { u: Tensor::from_slice(&[0.4, 0.7]), noise: double(5.0) }
}

/// Samples of which one frame, which is left out, holds `filling`; and a mask of the others.
fn with_a_hole(filling: f64) -> (Tensor, Tensor) {
    let (x, mask) = (double(0.3), Tensor::ones(SHAPE, (Kind::Bool, tch::Device::Cpu)));
    let _ = x.i((0, 1)).fill_(filling);
    let _ = mask.i((0, 1)).fill_(0.0);
    (x.set_requires_grad(true), mask)
}

/// Every term alone, by name.
fn terms<'a>(dm: &'a DistributionMatching<'a>) -> Result<Vec<(&'static str, Group<'a>)>> {
    let guidance = Guidance::new(3.0)?;
    let features = |x: &Tensor| vec![x.cumsum(1, None).sin()];
    let perceptual = Perceptual::new(features, vec![Tensor::from_slice(&[1.0, 0.5, 2.0])])?;
    let adm = AdversarialDistributionMatching::new(dm, flow(0.7), critic).guided(guidance);
    let pairs = |distance| PairedRegression::new(distance);
    let mmd = MaximumMeanDiscrepancy::new(Kernel::gaussian())?;
    let consistency = Consistency::discrete(flow(0.5), 0.2)?;
    Ok(vec![
        ("CA", group().engine("term", 1.0, CfgAugmentation::new(guidance))),
        ("consistency", group().engine("term", 1.0, consistency)),
        ("DM", group().regularizer("term", 1.0, dm)),
        ("SiD", group().regularizer("term", 1.0, ScoreIdentity::new(dm, 1.2)?)),
        ("SIM", group().regularizer("term", 1.0, ScoreIdentity::pseudo_huber(dm, 0.1)?)),
        ("ADM", group().regularizer("term", 1.0, adm)),
        ("GAN", group().regularizer("term", 1.0, Adversarial::new(RectifiedFlow, critic))),
        ("moments", group().regularizer("term", 1.0, MeanVariance::per_sample(0.1, 0.8)?)),
        ("MMD", group().regularizer("term", 1.0, mmd)),
        ("pairs", group().engine_loss("term", 1.0, pairs(Distance::Squared))),
        ("features", group().engine_loss("term", 1.0, pairs(Distance::Perceptual(perceptual)))),
        ("reward", group().engine_loss("term", 1.0, Reward::new(stillness))),
    ])
}

#[test]
fn no_term_moves_a_masked_element_or_is_spoilt_by_its_value() -> Result<()> {
    let _guard = seeded(1);
    let setting = setting()?;
    let dm = DistributionMatching::new(flow(0.4));
    for filling in [0.3, 50.0, f64::NAN, f64::INFINITY] {
        for (name, group) in terms(&dm)? {
            let (x, mask) = with_a_hole(filling);
            let (input, _) = with_a_hole(filling);
            let input = input.detach();
            let batch = setting.batch(&x)?.with_student_input(&input, &setting.time)?;
            let batch = batch.with_mask(&mask)?;
            let objective = Objective::new(flow(0.7)).with(group).observed();
            let evaluation = objective.evaluate_at(&batch, vec![draw()])?;
            let gradient = gradient(&evaluation.loss, &x);
            let what = format!("{name} beside {filling}");
            assert!(value(&evaluation.loss).is_finite(), "{what}");
            assert!(values(&gradient).iter().all(|value| value.is_finite()), "{what}: {gradient}");
            assert!(values(&gradient.i((0, 1))).iter().all(|value| *value == 0.0), "{what}");
            assert!(values(&gradient.i((0, 2))).iter().all(|value| *value != 0.0), "{what}");
        }
    }
    Ok(())
}

#[test]
fn what_is_not_finite_and_masked_spoils_no_network_that_is_trained() -> Result<()> {
    let _guard = seeded(4);
    let setting = setting()?;
    let weight = Tensor::from(0.4).set_requires_grad(true);
    let learned = || {
        let network = |x: &Tensor, _: &Tensor, c: &Condition| {
            (x * &weight + x.mean_dim([1i64].as_slice(), true, None) + &c[0]).tanh()
        };
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network)
    };
    let judge = |x: &Tensor, t: &Tensor, c: &Condition| critic(&(x * &weight), t, c);
    let map = FlowMap::new(|x: &Tensor, _: &Tensor, _: &Tensor, c: &Condition| {
        (x * &weight + x.mean_dim([1i64].as_slice(), true, None) + &c[0]).tanh()
    });
    let dm = DistributionMatching::new(learned());
    let adm = AdversarialDistributionMatching::new(&dm, flow(0.7), judge);
    let gan = Adversarial::new(RectifiedFlow, judge);
    let flow_map = MeanFlow::new(map, flow(0.7))?.rule(FlowRule::Fraction { share: 0.5 })?;
    for filling in [f64::NAN, f64::INFINITY] {
        let (x, mask) = with_a_hole(filling);
        let batch = setting.batch(&x)?.with_mask(&mask)?;
        for (name, loss) in [
            ("fake score", dm.denoising_loss(&batch)?),
            ("critic", gan.critic_loss(&batch)?),
            ("critic of ADM", adm.critic_loss(&batch)?),
            ("flow map", flow_map.evaluate(&batch)?.loss),
        ] {
            let gradient = value(&gradient(&loss, &weight));
            assert!(value(&loss).is_finite() && gradient.is_finite(), "{name} beside {filling}");
            assert!(gradient != 0.0, "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_masked_batch_is_propagated_from_twice_and_sees_its_samples_change() -> Result<()> {
    let setting = setting()?;
    let (x, mask) = with_a_hole(f64::NAN);
    let batch = setting.batch(&x)?.with_mask(&mask)?;
    let ca = CfgAugmentation::new(Guidance::new(3.0)?);
    let reward = Reward::new(|x: &Tensor, _: &Condition| {
        x.sin().flatten(1, -1).sum_dim_intlist(1, false, None)
    });
    let both = [
        Objective::new(flow(0.7)).with(group().engine("ca", 1.0, &ca)),
        Objective::new(flow(0.7)).with(group().engine_loss("reward", 1.0, &reward)),
    ];
    // Onto one leaf, as where x is cut from the student's graph.
    for objective in &both {
        objective.evaluate_at(&batch, vec![draw()])?.loss.backward();
    }
    let sum = x.grad().copy();
    let alone = both
        .iter()
        .map(|objective| Ok(gradient(&objective.evaluate_at(&batch, vec![draw()])?.loss, &x)));
    let alone = alone.collect::<Result<Vec<_>>>()?;
    assert!(value(&(&alone[0] + &alone[1] - sum).abs().max()) < 1e-15);
    let before = value(&both[1].evaluate_at(&batch, vec![draw()])?.loss);
    tch::no_grad(|| {
        let _ = x.shallow_clone().f_mul_(&Tensor::from(0.5));
    });
    let after = value(&both[1].evaluate_at(&batch, vec![draw()])?.loss);
    assert!((before - after).abs() > 1e-3, "{before} {after}");
    Ok(())
}

#[test]
fn no_term_moves_a_given_frame() -> Result<()> {
    let _guard = seeded(2);
    let setting = setting()?;
    let dm = DistributionMatching::new(flow(0.4));
    let given = Tensor::from_slice(&[false, true, false, true, false, false]).view([2, 3]);
    for (name, group) in terms(&dm)? {
        let x = double(0.3).set_requires_grad(true);
        let batch = setting.batch(&x)?.with_given_frames(&given)?;
        let objective = Objective::new(flow(0.7)).with(group);
        let loss = match objective.evaluate_at(&batch, vec![draw()]) {
            Ok(evaluation) => evaluation.loss,
            Err(error) => {
                assert!(["consistency", "ADM", "GAN"].contains(&name), "{name}: {error}");
                continue;
            }
        };
        let gradient = gradient(&loss, &x);
        for (sample, frame) in [(0, 1), (1, 0)] {
            assert!(
                values(&gradient.i((sample, frame))).iter().all(|value| *value == 0.0),
                "{name}"
            );
        }
        assert!(values(&gradient.i((0, 2))).iter().all(|value| *value != 0.0), "{name}");
    }
    Ok(())
}

#[test]
fn a_score_sees_whole_samples_and_counts_those_that_are_left_out_as_nothing() -> Result<()> {
    let setting = setting()?;
    let x = Tensor::full(SHAPE, 5.0, (Kind::Double, tch::Device::Cpu)).set_requires_grad(true);
    let objective = Objective::new(flow(0.7)).with(group().engine_loss(
        "reward",
        1.0,
        Reward::new(|x: &Tensor, c: &Condition| stillness(x, c) + 2.0),
    ));
    let of = |batch: &Batch<'_>| objective.evaluate_at(batch, vec![draw()]);
    // Were a frame black that is left out, the others would be pulled toward it.
    let given = Tensor::from_slice(&[true, false, false, true, false, false]).view([2, 3]);
    let still = of(&setting.batch(&x)?.with_given_frames(&given)?)?;
    assert_eq!(value(&still.loss), -2.0);
    assert_eq!(value(&gradient(&still.loss, &x).abs().max()), 0.0);
    let one = of(&setting.batch(&x)?.with_mask(&Tensor::from_slice(&[true, false]))?)?;
    assert_eq!(value(&one.loss), -1.0);
    Ok(())
}

#[test]
fn a_term_of_weight_zero_is_off() -> Result<()> {
    let _guard = seeded(3);
    let setting = setting()?;
    let x = double(0.3).set_requires_grad(true);
    let batch = Batch::new(&x, &setting.cond)?.with_null(&setting.null);
    let (ca, gan) =
        (CfgAugmentation::new(Guidance::new(3.0)?), Adversarial::new(RectifiedFlow, critic));
    let nothing = Reward::new(|_: &Tensor, _: &Condition| -> Tensor { unreachable!("it is off") });
    // The batch has no real samples, which the critic's game would need in its relativistic form.
    let gan = gan.gan_loss(decoupled_dmd::GanLoss::Relativistic);
    let alone = Objective::new(flow(0.7)).with(group().engine("ca", 1.0, &ca));
    // Nor has it the student's times, which a group needs that draws above them.
    let above = Group::new(Renoising::new(AboveStudent::FULL));
    let mut both = Objective::new(flow(0.7)).observed().with(
        group()
            .engine("ca", 1.0, &ca)
            .engine_loss("reward", 0.0, &nothing)
            .regularizer("gan", 0.0, &gan),
    );
    let with_another = Objective::new(flow(0.7))
        .with(group().engine("ca", 1.0, &ca))
        .with(above.engine("above", 0.0, &ca));
    let expected = alone.evaluate_at(&batch, vec![draw()])?;
    let found = both.evaluate_at(&batch, vec![draw()])?;
    assert!(found.loss.equal(&expected.loss));
    let another = with_another.evaluate_at(&batch, vec![draw(), draw()])?;
    assert!(another.loss.equal(&expected.loss));
    assert!(gradient(&found.loss, &x).equal(&gradient(&expected.loss, &x)));
    assert_eq!(found.terms.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["ca"]);
    assert_eq!(found.diagnostics.map(|all| all.terms.len()), Some(1));
    // With all of them off there is a loss to propagate still.
    both.set_weight("ca", 0.0)?;
    let off = both.evaluate_at(&batch, vec![draw()])?;
    assert_eq!((value(&off.loss), off.terms.len()), (0.0, 0));
    assert_eq!(value(&gradient(&off.loss, &x).abs().max()), 0.0);
    // Its network can be trained before it is turned on.
    let batch = batch.with_real(&setting.others)?;
    assert_eq!(both.own_losses(&batch)?.len(), 1);
    both.set_weight("gan", 0.5)?;
    assert_eq!(both.evaluate_at(&batch, vec![draw()])?.terms.len(), 1);
    Ok(())
}

#[test]
fn a_term_is_compared_with_every_teacher_that_it_meets() -> Result<()> {
    let setting = setting()?;
    let x = double(0.3).set_requires_grad(true);
    let batch = setting.batch(&x)?;
    let shifted = RectifiedFlow.shifted(Shift::new(3.0)?);
    let dm = DistributionMatching::new(flow(0.4));
    let gan = Adversarial::new(RectifiedFlow, critic);
    let consistency = Consistency::discrete(flow(0.5), 0.2)?;
    let teachers = [flow(0.7), mixing(shifted, 0.7), flow(0.7)];
    for (place, teacher) in teachers.into_iter().enumerate() {
        for (name, group) in [
            ("DM", group().regularizer("term", 1.0, &dm)),
            ("SiD", group().regularizer("term", 1.0, ScoreIdentity::new(&dm, 1.0)?)),
            ("GAN", group().regularizer("term", 1.0, &gan)),
            ("consistency", group().engine("term", 1.0, &consistency)),
        ] {
            let found =
                Objective::new(teacher.clone()).with(group).evaluate_at(&batch, vec![draw()]);
            let Err(Error::Term { source, .. }) = found else {
                assert!(found.is_ok() && place != 1, "{name} at {place}");
                continue;
            };
            assert!(place == 1, "{name} at {place}: {source}");
            assert!(matches!(*source, Error::OutOfRange { what, .. } if what.contains("path")));
        }
    }
    Ok(())
}
