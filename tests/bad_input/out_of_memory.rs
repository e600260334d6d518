//! Every function of the library that computes on tensors, with each of its allocations failing in turn: it returns
//! the error of libtorch, and does not panic.

mod failing;
mod setting;

use decoupled_dmd::*;
use tch::{Device, Kind, Tensor, nn};

use super::common::{paths, seeded};
use failing::each_allocation_may_fail as fails;
use setting::{FLOAT, SHAPE, Setting, critic, flow, network, setting};

/// The loss of a term and its gradient, with diagnostics: without a mask and with one.
fn term<'a>(name: &str, s: &'a Setting, add: impl Fn(Group<'a>) -> Group<'a>) {
    for is_masked in [false, true] {
        let objective = Objective::new(flow()).with(add(group())).observed();
        fails(&format!("{name}, masked: {is_masked}"), || {
            let batch = if is_masked { s.batch()? } else { s.plain()? };
            let loss = objective.evaluate_at(&batch, vec![s.draw()])?.loss;
            Ok(Tensor::f_run_backward(&[&loss], &[&s.x], false, false)?)
        });
    }
}

fn group<'a>() -> Group<'a> {
    Group::new(Renoising::new(Uniform::new(0.0, 0.9).unwrap()))
}

#[test]
fn engines_and_normalizers() -> Result<()> {
    let (s, guidance) = (setting(), Guidance::new(3.0)?);
    let interval = guidance.rescaled().within(0.1, 0.5)?;
    for (name, normalizer) in [
        ("off", Normalizer::OFF),
        ("conditional", Normalizer::conditional().epsilon(0.1)?),
        ("guided", Normalizer::guided(interval).floor(0.1)?),
        ("DMD2's", Normalizer::dmd2(guidance)),
        ("FastGen's", Normalizer::fastgen(guidance)),
        ("FastVideo's", Normalizer::fastvideo(guidance)),
    ] {
        term(name, &s, |group| {
            group.normalizer(normalizer).engine("ca", 1.0, CfgAugmentation::new(guidance))
        });
    }
    for (name, engine) in [
        ("discrete", Consistency::discrete(flow(), 0.25)?.normalized(0.1)?),
        ("exact", Consistency::continuous(flow(), Tangent::Exact)?),
        ("ahead", Consistency::continuous(flow(), Tangent::Ahead { step: 0.01 })?),
        ("central", Consistency::continuous(flow(), Tangent::Central { step: 0.01 })?),
    ] {
        if name != "discrete" {
            engine.set_warmup(0.5)?;
        }
        let engine = engine.guided(guidance);
        term(name, &s, |group| group.engine("consistency", 1.0, &engine));
    }
    Ok(())
}

#[test]
fn regularizers_without_a_network() -> Result<()> {
    let s = setting();
    let channels = Tensor::from_slice(&[0.3, 0.5]);
    for (name, term_of) in [
        ("per sample", MeanVariance::per_sample(0.1, 0.8)?),
        ("per channel", MeanVariance::per_channel(&channels, &channels)?),
    ] {
        term(name, &s, |group| group.regularizer("statistics", 1.0, &term_of));
    }
    let gaussian = |bandwidth| Kernel::Gaussian { bandwidth, scales: vec![0.5, 2.0] };
    for kernel in [
        gaussian(Bandwidth::Median),
        gaussian(Bandwidth::Mean),
        gaussian(Bandwidth::Fixed(2.0)),
        Kernel::inverse_multiquadric(),
        Kernel::Energy,
    ] {
        let name = format!("{kernel:?}");
        let mmd = MaximumMeanDiscrepancy::new(kernel)?;
        term(&name, &s, |group| group.regularizer("mmd", 1.0, &mmd));
    }
    let features = |x: &Tensor| -> Result<Vec<Tensor>> { Ok(vec![x.f_sin()?]) };
    let distances = [
        Distance::Squared,
        Distance::pseudo_huber(0.1)?,
        Distance::pseudo_huber_of_samples(0.1)?,
        Distance::Perceptual(Perceptual::new(features, vec![Tensor::from_slice(&[1.0f32, 0.5])])?),
    ];
    for distance in distances {
        let name = format!("{distance:?}");
        let pairs = PairedRegression::new(distance).with_absolute(0.5)?;
        term(&name, &s, |group| group.regularizer("pairs", 1.0, &pairs));
    }
    let reward = Reward::new(|x: &Tensor, _: &Condition| -> Result<Tensor> {
        Ok(x.f_sin()?.f_flatten(1, -1)?.f_mean_dim(&[1i64][..], false, None::<Kind>)?)
    });
    term("reward", &s, |group| group.engine_loss("reward", 1.0, &reward));
    Ok(())
}

#[test]
fn regularizers_with_a_network() -> Result<()> {
    let _guard = seeded(1);
    let s = setting();
    let guidance = Guidance::new(3.0)?;
    let gan = Adversarial::new(RectifiedFlow, critic);
    for divergence in Divergence::ALL {
        let dm = DistributionMatching::new(network(RectifiedFlow, Prediction::Sample))
            .divergence(divergence, |probe: &Probe<'_>| gan.log_ratio(probe));
        term(&format!("{divergence:?}"), &s, |group| group.regularizer("dm", 1.0, &dm));
    }
    let dm = DistributionMatching::new(flow());
    for (name, sid) in [
        ("alpha", ScoreIdentity::new(&dm, 1.2)?),
        ("pseudo-Huber", ScoreIdentity::pseudo_huber(&dm, 0.1)?),
    ] {
        let sid = sid.guided(guidance);
        term(name, &s, |group| group.regularizer("identity", 1.0, &sid));
    }
    let adm = AdversarialDistributionMatching::new(&dm, flow(), critic).guided(guidance);
    term("ADM", &s, |group| group.regularizer("adm", 1.0, &adm));
    fails("critic of ADM", || adm.critic_loss_at(&s.plain()?, &s.time, &s.noise));
    for gan_loss in [GanLoss::NonSaturating, GanLoss::Hinge, GanLoss::Relativistic] {
        let gan = || Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss);
        let name = format!("{gan_loss:?}");
        let generator = gan();
        term(&name, &s, |group| group.regularizer("gan", 1.0, &generator));
        let mut critics = vec![gan().weighted(|t: &Tensor| t.f_square())];
        for penalty in [
            CriticPenalty::R1 { gamma: 0.1 },
            CriticPenalty::ApproximateR1 { weight: 1.0, sigma: 0.1 },
        ] {
            critics.push(gan().penalty(penalty)?);
        }
        if gan_loss != GanLoss::Relativistic {
            critics.push(gan().mismatched(0.3)?.independent());
        }
        for (index, critic) in critics.iter().enumerate() {
            fails(&format!("critic {index} of {name}"), || {
                critic.critic_evaluation(&s.plain()?)?.report()
            });
        }
    }
    Ok(())
}

#[test]
fn losses_of_networks() -> Result<()> {
    let s = setting();
    for prediction in Prediction::ALL {
        for weighting in [Weighting::UNIFORM, Weighting::min_snr(5.0)?, Weighting::edm(0.5)?] {
            let dm = DistributionMatching::new(network(RectifiedFlow, prediction));
            let dm = dm.weighting(weighting);
            fails(&format!("{prediction:?} {weighting:?}"), || {
                dm.denoising_loss_per_sample_at(&s.batch()?, &s.time, &s.noise)
            });
        }
    }
    let velocity = |x: &Tensor, t: &Tensor, r: &Tensor, c: &Condition| -> Result<Tensor> {
        let length = r.f_sub(t)?.f_view([-1, 1, 1, 1])?;
        Ok(x.f_tanh()?.f_mul(&c[0])?.f_mul(&length)?)
    };
    let along = |x: &Tensor, _: (&Tensor, &Tensor), _: &Condition, v: &Tensor| -> Result<_> {
        Ok((x.f_tanh()?, v.f_tanh()?))
    };
    let map = || FlowMap::new(velocity).tangent(along);
    let later = PostShift::new(Tensor::from_slice(&[0.8f32, 0.9]))?;
    for rule in [
        FlowRule::Fraction { share: 0.3 },
        FlowRule::Eulerian(Tangent::Exact),
        FlowRule::Eulerian(Tangent::Ahead { step: 0.01 }),
        FlowRule::Eulerian(Tangent::Central { step: 0.01 }),
        FlowRule::Lagrangian { step: 0.01 },
    ] {
        let loss = MeanFlow::new(map(), flow())?.rule(rule)?.adaptive(1.0, 0.01)?;
        let loss = loss.guided(Guidance::new(2.0)?);
        fails(&format!("{rule:?}"), || loss.evaluate_at(&s.batch()?, &s.noise, &s.time, &later));
    }
    let _guard = seeded(2);
    let loss = MeanFlow::new(map(), flow())?.instantaneous(0.5)?.from_noise();
    fails("drawn times of MeanFlow", || loss.evaluate(&s.plain()?));
    let grid = FewStepGrid::even(2)?;
    fails("samples of a flow map", || map().sample(&s.noise, &s.cond, &grid));
    fails("jump of a flow map", || map().jump(&s.noise, &s.time, &later, &s.cond));
    Ok(())
}

#[test]
fn schedules_and_reports() -> Result<()> {
    let _guard = seeded(3);
    let s = setting();
    let dm = DistributionMatching::new(flow());
    for schedule in Schedule::ALL {
        let objective = schedule.objective(flow(), Guidance::new(3.0)?, &dm).observed();
        fails(&format!("{schedule:?}"), || {
            let evaluation = objective.evaluate(&s.batch()?)?;
            let own = objective.own_losses(&s.batch()?)?;
            let diagnostics = evaluation.diagnostics.as_ref().expect("observed");
            let drift = diagnostics.variance_drift(1.0)?;
            let (ca, dm) = ("ca", "dm");
            let cosine = diagnostics.update_cos(ca, dm)?.map(|cosine| cosine.to_vec());
            let balance = diagnostics.update_balance(ca, dm)?;
            Ok((own, evaluation.report()?, drift, cosine.transpose()?, balance))
        });
    }
    Ok(())
}

#[test]
fn paths_and_conversions() -> Result<()> {
    let s = setting();
    let mut all: Vec<Box<dyn NoisePath>> = paths().into_iter().collect();
    all.push(Box::new(Subinterval::new(RectifiedFlow, 0.5)?));
    for (index, path) in all.iter().enumerate() {
        let name = |what| format!("{what} of path {index}");
        let later = PostShift::new(Tensor::from_slice(&[0.7f32, 0.8]))?;
        let x = &s.real;
        fails(&name("re-noising"), || path.renoise(x, &s.time, &s.noise));
        fails(&name("implied noise"), || path.implied_noise(&s.noise, x, &s.time));
        fails(&name("start"), || path.start(&s.x));
        fails(&name("angle"), || {
            let angle = NoiseAngle::at(&**path, &s.time, 0.5)?;
            Ok((
                angle.cosine(x)?,
                angle.sine(x)?,
                angle.minus(&NoiseAngle::at(&**path, &later, 0.5)?)?,
            ))
        });
        for prediction in Prediction::ALL {
            let denoiser = network(path.as_ref().shifted(Shift::NONE), prediction);
            fails(&format!("{prediction:?} of path {index}"), || {
                let (one, two) = denoiser.predict_pair(x, &s.time, &s.cond, &s.null)?;
                let guided = one.guided(&two, Guidance::new(2.0)?.rescaled().within(0.0, 0.5)?)?;
                Ok((guided.sample()?.shallow_clone(), guided.flow_velocity()?))
            });
        }
    }
    let edm = Edm::default();
    fails("preconditioning", || {
        let of = edm.preconditioning(&s.u, 0.5)?;
        of.apply(&s.real, |x: &Tensor, _: &Tensor| x.f_sin())
    });
    fails("part of a path", || flow().on_subinterval(0.5)?.denoise(&s.real, &s.time, &s.cond));
    Ok(())
}

#[test]
fn times() -> Result<()> {
    let _guard = seeded(4);
    let s = setting();
    let distributions: [(&str, Box<dyn TimeDistribution>); 5] = [
        ("Uniform", Box::new(Uniform::new(0.1, 0.9)?)),
        ("AboveStudent", Box::new(AboveStudent::new(0.1, 0.9)?)),
        ("Power", Box::new(Power::new(0.5)?)),
        ("LogitNormal", Box::new(LogitNormal::new(0.0, 1.0)?)),
        ("LogNormal", Box::new(LogNormal::new(Edm::default(), -1.2, 1.2)?)),
    ];
    for (name, distribution) in distributions {
        let renoising = Renoising::new(distribution);
        let path = RectifiedFlow.shifted(Shift::new(3.0)?);
        fails(name, || renoising.draw(&path, &s.x, Some(&s.student)));
        fails(name, || renoising.at(&path, &s.u, Some(&s.student)));
    }
    fails("one time for all", || PostShift::all(0.3, 4, FLOAT));
    fails("times of a tensor", || PreShift::new(s.u.f_mul(&s.u)?));
    let shift = Shift::new(3.0)?;
    fails("moved times", || {
        let moved = shift.invert(&s.time)?.moved(0.1)?;
        let moved = shift.apply(&moved)?.between(&s.time, 0.3)?;
        moved.at_least(&s.time)?.at_most(&s.time)
    });
    fails("a dynamic grid", || FewStepGrid::dynamic(4));
    Ok(())
}

#[test]
fn rollouts() -> Result<()> {
    let _guard = seeded(5);
    let s = setting();
    let student = flow();
    for transition in [Transition::Ddim, Transition::Renoise] {
        let sampler = Sampler::new(&student, FewStepGrid::even(3)?, transition);
        let sampler = sampler.guided(Guidance::new(2.0)?, &s.null);
        let name = |what: &str| format!("{what} by {transition:?}");
        fails(&name("samples"), || sampler.sample(&s.noise, &s.cond));
        fails(&name("a simulation"), || sampler.simulate(&s.noise, &s.cond, 2));
        fails(&name("a step"), || sampler.draw_step());
        fails(&name("a simulation from real samples"), || {
            sampler.simulate_from_real(&s.real, &s.cond)
        });
        fails(&name("a trajectory"), || {
            let kept = sampler.trajectory(&s.noise, &s.cond)?;
            let steps = kept.draw_steps()?;
            let made = sampler.simulate_on(&kept, &s.cond, &steps)?;
            let off = sampler.simulate_off_trajectory(&made, &s.cond, &s.student)?;
            Ok((off, kept.samples_at(&steps)?, kept.inputs_at(&steps)?))
        });
    }
    Ok(())
}

#[test]
fn the_rest() -> Result<()> {
    let _guard = seeded(6);
    let s = setting();
    let all = Augmentation::new().blit().geometric().colour().cutout(0.5)?;
    fails("a drawn augmentation", || all.draw(&s.x)?.apply(&s.x));
    let numbers = Tensor::full([2, Augmentation::NUMBERS], 0.3, FLOAT);
    fails("a given augmentation", || all.at(&numbers)?.apply(&s.real));
    let target = MeanVariance::per_sample(0.0, 1.0)?.running(0.9, 1)?;
    fails("a running target", || target.update(&s.real));
    for statistics in [Statistics::PerSample, Statistics::PerChannel] {
        fails("measured statistics", || MeanVariance::measured(&s.real, statistics));
    }
    fails("a surrogate", || surrogate(&s.x, &s.x));
    fails("a gradient in x alone", || {
        gradient_only_in("loss", &s.x, |x| Ok(x.f_square()?.f_mean(Kind::Float)?))
    });
    let average = Tensor::zeros(SHAPE, FLOAT);
    fails("a moving average", || move_toward([(&average, &s.x)], 0.1));
    let features = [s.real.shallow_clone(), s.noise.shallow_clone()];
    let embedding = Tensor::ones([2, 3], FLOAT);
    fails("heads of a critic", || {
        let store = nn::VarStore::new(Device::Cpu);
        let heads = CriticHeads::new(&store.root(), &[2, 2], 8)?;
        let heads = heads.pooled_by_attention(&store.root())?.conditioned(&store.root(), 3)?;
        heads.logits_given(&features, &embedding)
    });
    fails("given frames and times per frame", || {
        let given = Tensor::f_from_slice(&[true, false, false, true])?.f_view([2, 2])?;
        let (dm, batch) =
            (DistributionMatching::new(flow()), s.batch()?.with_given_frames(&given)?);
        let group = Group::new(Renoising::new(AboveStudent::FULL).per_chunk(1, 2)?)
            .normalizer(Normalizer::conditional().over_frame());
        let objective = Objective::new(flow()).observed().with(group.regularizer("dm", 1.0, &dm));
        Ok((objective.evaluate(&batch)?, dm.denoising_loss(&batch)?))
    });
    fails("a probe", || {
        let (teacher, batch) = (flow(), s.batch()?);
        let probe = Probe::draw(&teacher, &batch, &Renoising::new(Uniform::FULL))?;
        probe.loss_of(&probe.normalize(probe.teacher_cond()?)?)
    });
    Ok(())
}
