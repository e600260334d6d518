//! Networks that regularizers own: their losses, and the times at which they are trained.

use std::cell::RefCell;

use super::common::{gaussian_teacher, seeded, value, values, wave};
use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Error, Group,
    Guidance, NoisePath, Objective, Prediction, Probe, RectifiedFlow, Regularizer, Renoising,
    Result, Shift, Uniform, regularizer_fn,
};
use tch::{Kind, Tensor};

const SHAPE: [i64; 2] = [5, 3];

/// A fake score and a critic, each of one parameter.
struct Networks {
    fake: Tensor,
    critic: Tensor,
}

fn networks() -> Networks {
    let parameter = |shape: &[i64]| wave(shape, 0.9, Kind::Double).set_requires_grad(true);
    Networks { fake: parameter(&[3]), critic: parameter(&[3, 1]) }
}

impl Networks {
    fn fake_score(&self) -> Denoiser<'_> {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| x * &self.fake;
        Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, network)
    }

    fn adversarial(&self) -> Adversarial<'_> {
        let network = |x: &Tensor, _: &Tensor, _: &Condition| x.matmul(&self.critic);
        Adversarial::new(RectifiedFlow, network)
    }
}

#[test]
fn own_losses_are_those_of_the_regularizers_under_their_names() -> Result<()> {
    let nets = networks();
    let (x, cond) = (wave(&SHAPE, 0.3, Kind::Double), Condition::none());
    let x = x.set_requires_grad(true);
    let real = wave(&SHAPE, 1.7, Kind::Double);
    let batch = Batch::new(&x, &cond)?.with_real(&real)?;
    let dm = DistributionMatching::new(nets.fake_score());
    let gan = nets.adversarial();
    let boxed: Box<dyn Regularizer> = Box::new(nets.adversarial());
    let objective = Objective::new(gaussian_teacher(0.5))
        .with(
            Group::new(Renoising::new(Uniform::FULL))
                .engine("ca", 1.0, CfgAugmentation::new(Guidance::new(2.0)?))
                .regularizer("dm", 0.5, &dm),
        )
        .with(
            Group::new(Renoising::new(Uniform::FULL))
                .regularizer("plain", 1.0, regularizer_fn(|p| Ok(p.x().f_mean(None::<Kind>)?)))
                .regularizer("gan", 0.1, boxed),
        );

    let _generator = seeded(11);
    let found = objective.own_losses(&batch)?;
    tch::manual_seed(11);
    let expected = [("dm", dm.denoising_loss(&batch)?), ("gan", gan.critic_loss(&batch)?)];
    assert_eq!(found.len(), expected.len());
    for ((name, loss), (expected_name, expected)) in found.iter().zip(&expected) {
        assert_eq!(name, expected_name);
        // The weight of a term is for the student alone.
        assert_eq!(value(loss), value(expected), "{name}");
        loss.backward();
    }
    assert!(nets.fake.grad().defined() && nets.critic.grad().defined());
    assert!(!x.grad().defined());
    Ok(())
}

#[test]
fn a_network_that_cannot_be_trained_is_named() -> Result<()> {
    let _guard = seeded(12);
    let nets = networks();
    let (x, cond) = (wave(&SHAPE, 0.3, Kind::Double), Condition::none());
    let objective = Objective::new(gaussian_teacher(0.5)).with(
        Group::new(Renoising::new(Uniform::FULL)).regularizer("gan", 1.0, nets.adversarial()),
    );
    let error = objective.own_losses(&Batch::new(&x, &cond)?).unwrap_err();
    let Error::Term { name, source } = error else { panic!("{error}") };
    assert_eq!(name, "gan");
    assert!(matches!(*source, Error::Missing { what: "real samples", setter: "Batch::with_real" }));
    Ok(())
}

/// A regularizer whose own loss is given.
struct Owning(Tensor);

impl Regularizer for Owning {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        Ok(probe.x().f_mean(None::<Kind>)?)
    }
    fn own_loss(&self, _: &Batch<'_>) -> Result<Option<Tensor>> {
        Ok(Some(self.0.shallow_clone()))
    }
}

#[test]
fn an_own_loss_is_a_floating_point_scalar() -> Result<()> {
    let (x, cond) = (wave(&SHAPE, 0.3, Kind::Double), Condition::none());
    let own = |loss: Tensor| {
        let group = Group::new(Renoising::new(Uniform::FULL));
        let objective =
            Objective::new(gaussian_teacher(0.5)).with(group.regularizer("odd", 1.0, Owning(loss)));
        objective.own_losses(&Batch::new(&x, &cond)?)
    };
    let refused = |loss: Tensor| match own(loss).unwrap_err() {
        Error::Term { name, source } if name == "odd" => *source,
        other => panic!("{other}"),
    };
    assert_eq!(own(Tensor::from(0.5))?.len(), 1);
    let error = refused(Tensor::from_slice(&[0.5, 0.5]));
    assert!(matches!(error, Error::Shape { what: "loss", .. }));
    assert!(matches!(refused(Tensor::from(1i64)), Error::Kind { what: "loss", .. }));
    Ok(())
}

#[test]
fn networks_are_trained_at_the_times_asked_for() -> Result<()> {
    let seen = RefCell::new(Vec::new());
    let network = |x: &Tensor, t: &Tensor, _: &Condition| {
        seen.borrow_mut().extend(values(t));
        x.shallow_clone()
    };
    let (x, cond) = (wave(&[200, 1], 0.3, Kind::Double), Condition::none());
    let batch = Batch::new(&x, &cond)?.with_real(&x)?;
    let shift = Shift::new(3.0)?;
    let narrow =
        || -> Result<_> { Ok(Renoising::new(Uniform::new(0.4, 0.6)?).shifted(Shift::NONE)) };

    let path = RectifiedFlow.shifted(shift);
    let fake = || Denoiser::new(path, Prediction::FlowVelocity, network);
    let fake_loss = |dm: DistributionMatching<'_>| dm.denoising_loss(&batch);
    let critic = || Adversarial::new(path, network);
    let critic_loss = |gan: Adversarial<'_>| gan.critic_loss(&batch);
    type Train<'a> = &'a dyn Fn(Option<Renoising<'static>>) -> Result<Tensor>;
    let trained: [Train<'_>; 2] = [
        &|times| {
            let dm = DistributionMatching::new(fake());
            fake_loss(match times {
                Some(times) => dm.renoising(times),
                None => dm,
            })
        },
        &|times| {
            critic_loss(match times {
                Some(times) => critic().renoising(times),
                None => critic(),
            })
        },
    ];
    let _generator = seeded(5);
    for train in trained {
        // U(0, 1) after a shift by 3: the median is 1/4, and 2/5 of the times are above a third.
        seen.borrow_mut().clear();
        let _loss = train(None)?;
        let times = seen.take();
        let share =
            |above: f64| times.iter().filter(|&&t| t > above).count() as f64 / times.len() as f64;
        assert!((share(0.25) - 0.5).abs() < 0.12 && (share(1.0 / 3.0) - 0.4).abs() < 0.12);

        let _loss = train(Some(narrow()?))?;
        let times = seen.take();
        assert!(times.len() >= 200 && times.iter().all(|t| (0.4..=0.6).contains(t)));
    }
    Ok(())
}
