//! Seeds: every function that draws repeats under one seed, and draws differently under another.

use decoupled_dmd::{
    AboveStudent, Adversarial, Augmentation, Batch, Condition, CriticPenalty, Denoiser, Distance,
    DistributionMatching, Draw, Edm, FewStepGrid, Group, Guidance, LogNormal, LogitNormal,
    Objective, PairedRegression, Power, PreShift, Prediction, Probe, RectifiedFlow, Renoising,
    Result, Sampler, Schedule, Shift, Steps, TimeDistribution, Transition, Uniform,
};
use tch::{Kind, Tensor};

use super::common::{gaussian_teacher, seeded, values, wave};

/// The numbers of each tensor that `compute` gives under a seed.
fn under(seed: i64, compute: &dyn Fn() -> Result<Vec<Tensor>>) -> Vec<Vec<f64>> {
    let _guard = seeded(seed);
    compute().unwrap().iter().map(values).collect()
}

/// Each tensor is drawn.
fn draws(what: &str, compute: impl Fn() -> Result<Vec<Tensor>>) {
    let (first, again, other) = (under(3, &compute), under(3, &compute), under(4, &compute));
    assert_eq!(first, again, "{what} does not repeat");
    for (first, other) in first.iter().zip(&other) {
        assert!(first.iter().all(|number| number.is_finite()), "{what}");
        assert_ne!(first, other, "{what} does not draw");
    }
}

fn draws_nothing(what: &str, compute: impl Fn() -> Result<Vec<Tensor>>) {
    assert_eq!(under(3, &compute), under(4, &compute), "{what} draws");
}

struct Setting {
    x: Tensor,
    real: Tensor,
    cond: Condition,
    null: Condition,
    time: PreShift,
}

fn setting() -> Setting {
    let float = |phase| wave(&[4, 6], phase, Kind::Float);
    Setting {
        x: float(0.1),
        real: float(4.0),
        cond: float(1.0).into(),
        null: float(2.0).into(),
        time: PreShift::new(Tensor::from_slice(&[0.0f32, 0.25, 0.5, 0.75])).unwrap(),
    }
}

impl Setting {
    fn batch(&self) -> Result<Batch<'_>> {
        Batch::new(&self.x, &self.cond)?
            .with_null(&self.null)
            .with_real(&self.real)?
            .with_student_time(&self.time)
    }
}

#[test]
fn losses_of_the_student() -> Result<()> {
    let s = setting();
    for schedule in Schedule::ALL {
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let guidance = Guidance::new(4.0)?;
        let objective = schedule.objective(gaussian_teacher(0.5), guidance, &dm);
        draws(&format!("{schedule:?}"), || Ok(vec![objective.evaluate(&s.batch()?)?.loss]));
        // All that is random is drawn beforehand.
        draws("draws", || {
            let drawn = objective.draw(&s.batch()?)?.into_iter();
            Ok(drawn.flat_map(|draw| [draw.u, draw.noise]).collect())
        });
        let given = || Draw { u: s.time.tensor().copy(), noise: s.real.copy() };
        let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
        draws_nothing("an evaluation at draws", || {
            let drawn = (0..groups).map(|_| given()).collect();
            Ok(vec![objective.evaluate_at(&s.batch()?, drawn)?.loss])
        });
    }
    draws("a probe", || {
        let (teacher, batch) = (gaussian_teacher(0.5), s.batch()?);
        let probe = Probe::draw(&teacher, &batch, &Renoising::new(Uniform::FULL))?;
        Ok(vec![probe.tau().tensor().shallow_clone(), probe.noise().shallow_clone()])
    });
    Ok(())
}

#[test]
fn losses_of_networks() -> Result<()> {
    let s = setting();
    let dm = DistributionMatching::new(gaussian_teacher(0.8));
    draws("the denoising loss", || Ok(vec![dm.denoising_loss(&s.batch()?)?]));
    let critic = |x: &Tensor, t: &Tensor, _: &Condition| (x + t.unsqueeze(1)).sin();
    let gan = || Adversarial::new(RectifiedFlow, critic);
    draws("the loss of the critic", || Ok(vec![gan().critic_loss(&s.batch()?)?]));
    for penalty in [
        CriticPenalty::R1 { gamma: 0.1 },
        CriticPenalty::ApproximateR1 { weight: 100.0, sigma: 0.01 },
    ] {
        let gan = gan().penalty(penalty)?;
        draws(&format!("{penalty:?}"), || Ok(vec![gan.critic_loss(&s.batch()?)?]));
        draws("the penalty alone", || Ok(vec![gan.penalty_loss(&s.batch()?, penalty)?]));
    }
    let gan = gan().independent();
    draws("the draws of the critic", || {
        let drawn = gan.draw(&s.batch()?)?;
        let (time, noise) = drawn.real.expect("independent");
        let times = [drawn.time.tensor().copy(), time.tensor().copy()];
        Ok([times, [drawn.noise, noise]].into_iter().flatten().collect())
    });
    let drawn = {
        let _guard = seeded(5);
        gan.draw(&s.batch()?)?
    };
    draws_nothing("the critic at draws", || {
        Ok(vec![gan.critic_evaluation_with(&s.batch()?, &drawn)?.loss])
    });
    let objective = Objective::new(gaussian_teacher(0.5)).with(
        Group::new(Renoising::new(Uniform::FULL))
            .regularizer("dm", 1.0, &dm)
            .regularizer("gan", 1.0, &gan),
    );
    draws("own losses", || {
        Ok(objective.own_losses(&s.batch()?)?.into_iter().map(|(_, loss)| loss).collect())
    });
    Ok(())
}

#[test]
fn augmentations() -> Result<()> {
    let (x, y) = (wave(&[2, 3, 8, 8], 0.3, Kind::Float), wave(&[2, 3, 8, 8], 1.9, Kind::Float));
    let all = Augmentation::new().blit().geometric().colour().cutout(0.5)?;
    draws("an augmentation", || Ok(vec![all.draw(&x)?.apply(&x)?]));
    let regression = PairedRegression::new(Distance::Squared).augmented(all);
    draws("a regression", || Ok(vec![regression.between(&x, &y)?]));
    let draw = {
        let _guard = seeded(5);
        all.draw(&x)?
    };
    draws_nothing("a regression at a draw", || Ok(vec![regression.between_at(&x, &y, &draw)?]));
    let plain = PairedRegression::new(Distance::Squared);
    draws_nothing("a plain regression", || Ok(vec![plain.between(&x, &y)?]));
    Ok(())
}

#[test]
fn times() -> Result<()> {
    let s = setting();
    let samplers: [(&str, &dyn TimeDistribution); 7] = [
        ("cubic", &Power::new(3.0)?),
        ("uniform", &Uniform::FULL),
        ("clipped", &Uniform::new(0.02, 0.98)?),
        ("above the student", &AboveStudent::FULL),
        ("logit-normal", &LogitNormal::new(0.3, 0.8)?),
        ("log-normal", &LogNormal::default()),
        ("narrow log-normal", &LogNormal::new(Edm::default(), 0.5, 0.3)?),
    ];
    for (what, sampler) in samplers {
        for shift in [Shift::NONE, Shift::new(3.0)?] {
            let renoising = Renoising::new(sampler).shifted(shift);
            draws(what, || {
                Ok(vec![renoising.draw(&RectifiedFlow, &s.x, Some(&s.time))?.tensor().copy()])
            });
        }
        let u = Tensor::from_slice(&[0.1f32, 0.3, 0.6, 0.9]);
        draws_nothing(what, || Ok(vec![sampler.times(&u, Some(&s.time))?.tensor().copy()]));
    }
    Ok(())
}

#[test]
fn rollouts() -> Result<()> {
    let (s, noise) = (setting(), wave(&[4, 6], 5.0, Kind::Float));
    let student = gaussian_teacher(0.5);
    for transition in [Transition::Renoise, Transition::Ddim] {
        let grid = FewStepGrid::even(4)?.shifted(Shift::new(3.0)?);
        let sampler = Sampler::new(&student, grid, transition);
        let sample = || Ok(vec![sampler.sample(&noise, &s.cond)?]);
        let simulate = || Ok(vec![sampler.simulate(&noise, &s.cond, 2)?.x]);
        let trajectory = || {
            let kept = sampler.trajectory(&noise, &s.cond)?;
            let steps = Steps::new(Tensor::from_slice(&[0i64, 1, 2, 3]))?;
            Ok(vec![kept.samples_at(&steps)?])
        };
        // Euler steps start from noise and need no more of it.
        type Rollout<'a> = (&'a str, &'a dyn Fn() -> Result<Vec<Tensor>>);
        let rollouts: [Rollout<'_>; 3] =
            [("a sample", &sample), ("a simulation", &simulate), ("a trajectory", &trajectory)];
        for (what, rollout) in rollouts {
            match transition {
                Transition::Renoise => draws(what, rollout),
                Transition::Ddim => draws_nothing(what, rollout),
            }
        }
        // The first step has no transition behind it.
        draws_nothing("the first step", || Ok(vec![sampler.simulate(&noise, &s.cond, 0)?.x]));
        draws("a step from real samples", || {
            let made = sampler.simulate_from_real(&s.real, &s.cond)?;
            Ok(vec![made.x, made.student_time.tensor().shallow_clone()])
        });
        // On a grid of one step, noise is all that is drawn.
        let network = |x: &Tensor, _: &Tensor, _: &Condition| x * 0.5;
        let blind = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
        let single = Sampler::new(&blind, FewStepGrid::even(1)?, transition);
        draws("noise on real samples", || Ok(vec![single.simulate_from_real(&s.real, &s.cond)?.x]));
        draws("steps of the grid", || {
            let step = |_| Ok(sampler.draw_step()? as i64);
            Ok(vec![Tensor::from_slice(&(0..20).map(step).collect::<Result<Vec<_>>>()?)])
        });
        draws("steps of a trajectory", || {
            let many = wave(&[12, 6], 5.0, Kind::Float);
            let cond = Condition::from(many.shallow_clone());
            Ok(vec![sampler.trajectory(&many, &cond)?.draw_steps()?.tensor().shallow_clone()])
        });
    }
    Ok(())
}

#[test]
fn grids() {
    draws("a dynamic grid", || {
        let grid = |_| FewStepGrid::dynamic(28);
        let grids: Vec<_> = (0..5).map(grid).collect::<Result<_>>()?;
        // The number of times, and the times.
        let steps: Vec<_> = grids.iter().map(|grid| grid.steps() as i64).collect();
        let inner = grids.iter().find_map(|grid| grid.times().get(1).copied());
        Ok(vec![Tensor::from_slice(&steps), Tensor::from(inner.expect("five grids of one step"))])
    });
    draws_nothing("an even grid", || Ok(vec![Tensor::from_slice(FewStepGrid::even(8)?.times())]));
}
