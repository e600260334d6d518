//! Every term, with the losses of the networks that it owns.

use decoupled_dmd::{
    Adversarial, AdversarialDistributionMatching, Augmentation, Batch, CfgAugmentation, Condition,
    Consistency, CriticHeads, CriticPenalty, Denoiser, Distance, DistributionMatching, Divergence,
    FewStepGrid, FlowMap, FlowRule, GanLoss, Group, Guidance, Kernel, MaximumMeanDiscrepancy,
    MeanFlow, MeanVariance, NoisePath, Objective, PairedRegression, Perceptual, PostShift,
    Prediction, Probe, RectifiedFlow, Regularizer, Renoising, Result, Reward, ScoreIdentity, Shift,
    Statistics, Tangent, Uniform,
};
use tch::nn;
use tch::{Device, Kind, Tensor};

use crate::device::{compare as compare_within, float32};
use crate::setting::{SHAPE, World, compare, drawn, evaluate_at, fill, gradients, on, path, waits};

/// The gradient in x and the value of a term, alone in an objective, and the values of what it owns.
fn results(
    device: Device,
    world: &World,
    term: impl Regularizer,
    batch: &Batch<'_>,
) -> Result<Vec<Tensor>> {
    let group = Group::new(Renoising::new(Uniform::FULL)).regularizer("term", 0.5, term);
    let objective = Objective::new(world.teacher.denoiser()).with(group);
    let with_draws = waits(device, "a term", 0, || objective.evaluate(batch))?;
    let own = waits(device, "its own loss", 0, || objective.own_losses(batch))?;
    let values = own.into_iter().map(|(_, loss)| loss.detach());
    let mut results = drawn([with_draws.loss.detach()].into_iter().chain(values).collect());
    let given = evaluate_at(device, &objective, batch, 1)?;
    waits(device, "its gradient", 0, || given.loss.backward());
    results.extend([batch.x().grad(), given.loss.detach()]);
    Ok(results)
}

/// A critic that judges the activations of the fake score's network.
struct Critic<'w> {
    world: &'w World,
    heads: CriticHeads,
    vs: nn::VarStore,
}

impl<'w> Critic<'w> {
    fn new(world: &'w World, device: Device) -> Result<Self> {
        let vs = nn::VarStore::new(device);
        let heads = CriticHeads::new(&vs.root(), &[4], 8)?;
        fill(&vs, 0.3);
        Ok(Self { world, heads, vs })
    }

    fn logits(&self, x: &Tensor, t: &Tensor, cond: &Condition) -> Result<Tensor> {
        let cond = Condition::from(cond[0].narrow(0, 0, x.size()[0]));
        self.heads.logits(&[self.world.fake.run(x, t, &cond)])
    }

    fn adversarial(&self) -> Adversarial<'_> {
        let logits = |x: &Tensor, t: &Tensor, c: &Condition| self.logits(x, t, c);
        Adversarial::new(path(), logits)
    }
}

#[test]
fn moments() {
    for statistics in [Statistics::PerSample, Statistics::PerChannel] {
        compare(&format!("mean and variance {statistics:?}"), |device| {
            let world = World::new(device);
            let measured = waits(device, "a measured target", 1, || {
                MeanVariance::measured(&world.real, statistics)?.running(0.9, 0)
            })?;
            waits(device, "a moved target", 1, || measured.update(&world.real))?;
            let channels = |values: &[f32]| Tensor::from_slice(values);
            let given = match statistics {
                Statistics::PerSample => MeanVariance::per_sample(0.1, 0.7)?,
                _ => MeanVariance::per_channel(
                    &channels(&[0.1, 0.2, 0.3, 0.4]),
                    &channels(&[1.1, 1.2, 1.3, 1.4]),
                )?,
            };
            let mut found = Vec::new();
            for term in [&measured, &given] {
                let x = world.x();
                let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
                found.extend(results(device, &world, term, &batch)?);
            }
            Ok(found)
        });
    }
}

#[test]
fn discrepancies() {
    for kernel in [Kernel::gaussian(), Kernel::inverse_multiquadric(), Kernel::Energy] {
        compare(&format!("discrepancy {kernel:?}"), |device| {
            let world = World::new(device);
            let plain = MaximumMeanDiscrepancy::new(kernel.clone())?;
            let pooled = MaximumMeanDiscrepancy::new(kernel.clone())?
                .features(|x: &Tensor| x.f_adaptive_avg_pool2d([2, 2]));
            let independent = MaximumMeanDiscrepancy::new(kernel.clone())?.independence();
            let mut found = Vec::new();
            for (term, draws) in [(plain, false), (pooled, false), (independent, true)] {
                let x = world.x();
                let batch = Batch::new(&x, &world.cond)?.with_real(&world.real)?;
                let results = results(device, &world, term, &batch)?;
                found.extend(if draws { drawn(results) } else { results });
            }
            Ok(found)
        });
    }
}

#[test]
fn adversarial_losses() {
    let penalties = [
        None,
        Some(CriticPenalty::R1 { gamma: 3.0 }),
        Some(CriticPenalty::ApproximateR1 { weight: 10.0, sigma: 0.1 }),
    ];
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        for penalty in penalties {
            // A quotient of small differences: with two threads 7.7e-5 apart.
            let is_quotient = matches!(penalty, Some(CriticPenalty::ApproximateR1 { .. }));
            let tolerance = if is_quotient { 30.0 * float32() } else { float32() };
            let what = format!("adversarial {gan_loss:?} {penalty:?}");
            compare_within(&what, tolerance, |device| -> Result<_> {
                let world = World::new(device);
                let critic = Critic::new(&world, device)?;
                let mut term = critic.adversarial().gan_loss(gan_loss);
                if let Some(penalty) = penalty {
                    term = term.penalty(penalty)?;
                }
                let x = world.x();
                let batch = Batch::new(&x, &world.cond)?.with_real(&world.real)?;
                let turn = waits(device, "a critic", 0, || term.critic_evaluation(&batch))?;
                waits(device, "its gradient", 0, || turn.loss.backward());
                waits(device, "its report", 1, || turn.report())?;
                let mut found = drawn(gradients(&critic.vs));
                found.extend(results(device, &world, &term, &batch)?);
                let augmentation = Augmentation::new().blit().geometric().colour().cutout(0.5)?;
                let term = term.augmented(augmentation);
                let turn = waits(device, "an augmented critic", 0, || term.critic_loss(&batch))?;
                found.extend(drawn(vec![turn.detach()]));
                found.extend(drawn(results(device, &world, &term, &batch)?));
                Ok(found)
            });
        }
    }
}

#[test]
fn matching_by_a_critic() {
    compare("adversarial distribution matching", |device| {
        let world = World::new(device);
        let critic = Critic::new(&world, device)?;
        let dm = DistributionMatching::new(world.fake.denoiser());
        let logits = |x: &Tensor, t: &Tensor, c: &Condition| critic.logits(x, t, c);
        let term = AdversarialDistributionMatching::new(&dm, world.teacher.denoiser(), logits)
            .guided(Guidance::new(2.0)?)
            .renoising(Renoising::new(Uniform::new(0.0, 0.9)?));
        let x = world.x();
        let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
        let (tau, noise) =
            (PostShift::all(0.4, 3, (Kind::Float, device))?, on(device, &SHAPE, 5.0));
        let loss = waits(device, "a critic", 0, || term.critic_loss_at(&batch, &tau, &noise))?;
        loss.backward();
        let mut found = gradients(&critic.vs);
        // Up to the last time from which there is a step.
        let group = Group::new(Renoising::new(Uniform::new(0.0, 0.9)?));
        let objective =
            Objective::new(world.teacher.denoiser()).with(group.regularizer("adm", 1.0, &term));
        let evaluation = evaluate_at(device, &objective, &batch, 1)?;
        evaluation.loss.backward();
        found.extend([x.grad(), evaluation.loss.detach()]);
        Ok(found)
    });
    for divergence in Divergence::ALL {
        compare(&format!("divergence {divergence:?}"), |device| {
            let world = World::new(device);
            let critic = Critic::new(&world, device)?;
            let ratio = critic.adversarial();
            let dm = DistributionMatching::new(world.fake.denoiser())
                .divergence(divergence, |probe: &Probe<'_>| ratio.log_ratio(probe));
            let x = world.x();
            let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
            results(device, &world, dm, &batch)
        });
    }
}

#[test]
fn score_identity() {
    compare("score identity", |device| {
        let world = World::new(device);
        let dm = DistributionMatching::new(world.fake.denoiser());
        let term = ScoreIdentity::new(&dm, 1.2)?.guided(Guidance::new(2.0)?);
        let x = world.x();
        let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
        results(device, &world, term, &batch)
    });
}

#[test]
fn regression_and_reward() {
    type Make = fn(Device) -> Result<Distance<'static>>;
    let distances: [(&str, Make); 5] = [
        ("squared", |_| Ok(Distance::Squared)),
        ("absolute", |_| Ok(Distance::Absolute)),
        ("pseudo-Huber", |_| Distance::pseudo_huber(0.1)),
        ("pseudo-Huber of samples", |_| Distance::pseudo_huber_of_samples(0.1)),
        ("perceptual", |device| {
            let features = |x: &Tensor| vec![x.silu()];
            let weights = vec![Tensor::ones([4], (Kind::Float, device))];
            Ok(Distance::Perceptual(Perceptual::new(features, weights)?))
        }),
    ];
    for (name, distance) in distances {
        compare(&format!("regression, {name}"), |device| {
            let world = World::new(device);
            let x = world.x();
            let batch = Batch::new(&x, &world.cond)?.with_target(&world.real)?;
            let term = PairedRegression::new(distance(device)?);
            let mut found = results(device, &world, &term, &batch)?;
            let augmentation = Augmentation::new().blit().geometric().colour().cutout(0.5)?;
            found.extend(drawn(results(device, &world, term.augmented(augmentation), &batch)?));
            Ok(found)
        });
    }
    compare("reward", |device| {
        let world = World::new(device);
        let score =
            |x: &Tensor, c: &Condition| (x * &c[0]).flatten(1, -1).mean_dim(1, false, Kind::Float);
        let x = world.x();
        let batch = Batch::new(&x, &world.cond)?;
        results(device, &world, Reward::new(score), &batch)
    });
}

#[test]
fn consistency() {
    compare("consistency", |device| {
        let world = World::new(device);
        let student = world.student.denoiser();
        let time = PostShift::all(0.4, 3, (Kind::Float, device))?;
        let mut found = Vec::new();
        for engine in [
            Consistency::discrete(student.clone(), 0.05)?,
            Consistency::continuous(student.clone(), Tangent::Central { step: 1e-2 })?,
            Consistency::continuous(student.clone(), Tangent::Ahead { step: 1e-2 })?,
        ] {
            let engine = engine.guided(Guidance::new(2.0)?);
            engine.set_warmup(0.5)?;
            let x = student.denoise(&world.noise, &time, &world.cond)?;
            let batch = Batch::new(&x, &world.cond)?
                .with_null(&world.null)
                .with_student_input(&world.noise, &time)?;
            let group = Group::new(Renoising::new(Uniform::FULL));
            let objective = Objective::new(world.teacher.denoiser()).with(group.engine(
                "consistency",
                1.0,
                engine,
            ));
            let evaluation = evaluate_at(device, &objective, &batch, 1)?;
            evaluation.loss.backward();
            found.push(evaluation.loss.detach());
        }
        // A quotient of small differences has few digits: the gradients are those of all three together.
        found.extend(gradients(&world.student.vs));
        Ok(found)
    });
}

#[test]
fn flow_maps() {
    for rule in [
        FlowRule::Fraction { share: 0.5 },
        FlowRule::Eulerian(Tangent::Central { step: 1e-2 }),
        FlowRule::Lagrangian { step: 1e-2 },
    ] {
        compare(&format!("mean flow {rule:?}"), |device| {
            let world = World::new(device);
            let shift = Shift::new(3.0)?;
            let network = |x: &Tensor, from: &Tensor, to: &Tensor, c: &Condition| {
                world.student.run(&(x + to.view([-1, 1, 1, 1])), from, c)
            };
            let map = FlowMap::new(network).shifted(shift);
            let teacher = Denoiser::new(
                RectifiedFlow.shifted(shift),
                Prediction::FlowVelocity,
                |x: &Tensor, t: &Tensor, c: &Condition| world.teacher.run(x, t, c),
            );
            let term = MeanFlow::new(map.clone(), teacher)?.rule(rule)?.guided(Guidance::new(2.0)?);
            let real = world.real.shallow_clone();
            let batch = Batch::new(&real, &world.cond)?.with_null(&world.null);
            let with_draws = waits(device, "mean flow", 0, || term.evaluate(&batch))?;
            let [from, to] = [0.2, 0.7].map(|t| PostShift::all(t, 3, (Kind::Float, device)));
            let evaluation = waits(device, "given times", 1, || {
                term.evaluate_at(&batch, &world.noise, &from?, &to?)
            })?;
            evaluation.loss.backward();
            let grid = FewStepGrid::even(2)?;
            let sample = || map.sample(&world.noise, &world.cond, &grid);
            let mut found = vec![waits(device, "a sample", 0, sample)?];
            found.extend(gradients(&world.student.vs));
            found.extend([evaluation.loss.detach(), evaluation.squares]);
            found.extend(drawn(vec![with_draws.loss.detach()]));
            Ok(found)
        });
    }
}

#[test]
fn guidance_alone() {
    compare("CFG augmentation", |device| {
        let world = World::new(device);
        let x = world.x();
        let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
        let group = Group::new(Renoising::new(Uniform::FULL));
        let guidance = Guidance::new(4.0)?.rescaled();
        let objective = Objective::new(world.teacher.denoiser()).with(group.engine(
            "ca",
            1.0,
            CfgAugmentation::new(guidance),
        ));
        let evaluation = evaluate_at(device, &objective, &batch, 1)?;
        evaluation.loss.backward();
        Ok(vec![x.grad(), evaluation.loss.detach()])
    });
}
