//! Network forwards of one step, counted.

use std::rc::Rc;

use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Error, GanLoss,
    Group, Guidance, Normalizer, Objective, PostShift, PreShift, Prediction, Probe, RectifiedFlow,
    Renoising, Result, Schedule, Shift, Uniform,
};
use tch::{Device, Kind, Tensor};

use super::common::{
    Calls, counting_teacher, gaussian_denoiser, gaussian_teacher, seeded, value, wave,
};

fn inputs() -> (Tensor, Condition, Condition) {
    let x = wave(&[2, 3, 4, 4], 0.0, Kind::Float).set_requires_grad(true);
    let condition = |phase| wave(&[2, 3, 4, 4], phase, Kind::Float).into();
    (x, condition(1.0), condition(2.0))
}

/// Teacher and fake forwards of one evaluation.
fn forwards(schedule: Schedule, alpha: f64) -> Result<(usize, usize)> {
    let _guard = seeded(3);
    let (x, cond, null) = inputs();
    let time = PreShift::all(0.25, 2, (Kind::Float, Device::Cpu))?;
    let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
    let (teacher, fake) = (Calls::default(), Calls::default());
    let dm = DistributionMatching::new(counting_teacher(&fake, 0.8));
    let teacher_net = counting_teacher(&teacher, 0.5);
    let objective =
        schedule.objective_with_shifts(teacher_net, Guidance::new(alpha)?, &dm, Shift::new(3.0)?);
    let evaluation = objective.evaluate(&batch)?;
    assert!(value(&evaluation.loss).is_finite());
    Ok((teacher.count(), fake.count()))
}

#[test]
fn coupled_costs_two_teacher_forwards_and_decoupled_three() -> Result<()> {
    assert_eq!(forwards(Schedule::CoupledShared, 4.0)?, (2, 1));
    assert_eq!(forwards(Schedule::DecoupledFull, 4.0)?, (3, 1));
    assert_eq!(forwards(Schedule::DecoupledConstrained, 4.0)?, (3, 1));
    assert_eq!(forwards(Schedule::DecoupledHybrid, 4.0)?, (3, 1));
    Ok(())
}

#[test]
fn neutral_guidance_costs_one() -> Result<()> {
    assert_eq!(forwards(Schedule::CoupledShared, 1.0)?, (1, 1));
    assert_eq!(forwards(Schedule::DecoupledHybrid, 1.0)?, (1, 1));
    Ok(())
}

#[test]
fn neutral_guidance_gives_an_exactly_zero_term_and_needs_no_null_condition() -> Result<()> {
    let _guard = seeded(4);
    let (x, cond, _) = inputs();
    let calls = Calls::default();
    let objective = Objective::new(counting_teacher(&calls, 0.5)).with(
        Group::new(Renoising::new(Uniform::FULL)).engine(
            "ca",
            1.0,
            CfgAugmentation::new(Guidance::NEUTRAL),
        ),
    );
    let evaluation = objective.evaluate(&Batch::new(&x, &cond)?)?;
    evaluation.loss.backward();
    assert_eq!(value(&x.grad().abs().max()).to_bits(), 0.0f64.to_bits());
    assert_eq!(calls.count(), 0);
    Ok(())
}

#[test]
fn a_paired_teacher_answers_both_conditions_in_one_forward() -> Result<()> {
    let (x, cond, null) = inputs();
    let calls = Calls::default();
    let evaluate = |teacher| -> Result<f64> {
        let _guard = seeded(5);
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let guidance = Guidance::new(4.0)?;
        let objective = Schedule::CoupledShared.objective(teacher, guidance, &dm);
        let evaluation = objective.evaluate(&Batch::new(&x, &cond)?.with_null(&null))?;
        Ok(value(&evaluation.loss))
    };
    let single = |x: &Tensor, t: &Tensor, c: &Condition| {
        calls.record(t);
        gaussian_denoiser(x, t, &c[0], 0.5)
    };
    let plain = evaluate(Denoiser::new(RectifiedFlow, Prediction::Sample, single))?;
    assert_eq!(calls.count(), 2);
    let teacher = Denoiser::new(RectifiedFlow, Prediction::Sample, single).paired(
        |x: &Tensor, t: &Tensor, one: &Condition, two: &Condition| {
            *calls.paired.borrow_mut() += 1;
            (gaussian_denoiser(x, t, &one[0], 0.5), gaussian_denoiser(x, t, &two[0], 0.5))
        },
    );
    approx::assert_relative_eq!(evaluate(teacher)?, plain);
    assert_eq!((calls.count(), *calls.paired.borrow()), (2, 1));
    Ok(())
}

#[test]
fn a_trainer_may_own_its_terms_and_an_objective_of_them() -> Result<()> {
    let _guard = seeded(6);
    let (x, cond, null) = inputs();
    let dm = Rc::new(DistributionMatching::new(gaussian_teacher(0.8)));
    let ca = Rc::new(CfgAugmentation::new(Guidance::new(4.0)?));
    let path = Rc::new(RectifiedFlow);
    let teacher =
        Denoiser::new(path, Prediction::Sample, |x: &Tensor, _: &Tensor, c: &Condition| {
            x * 0.5 + &c[0]
        });
    let group = Group::new(Renoising::new(Rc::new(Uniform::FULL)));
    let group = group.engine("ca", 1.0, Rc::clone(&ca)).regularizer("dm", 1.0, Rc::clone(&dm));
    // Nothing is borrowed, so that one struct can hold all of it.
    let owned: (Rc<DistributionMatching<'static>>, Objective<'static>) =
        (dm, Objective::new(teacher).with(group));
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    let evaluation = owned.1.evaluate(&batch)?;
    assert!(value(&evaluation.loss).is_finite());
    assert_eq!(owned.1.own_losses(&batch)?.len(), 1);
    assert!(value(&owned.0.denoising_loss(&batch)?).is_finite());
    Ok(())
}

#[test]
fn a_guided_normaliser_asks_for_both_conditions_at_once() -> Result<()> {
    let (x, cond, null) = inputs();
    let calls = Calls::default();
    let evaluate = |paired: bool, normalizer| -> Result<f64> {
        let _guard = seeded(5);
        let mut teacher = counting_teacher(&calls, 0.5);
        if paired {
            teacher = teacher.paired(|x: &Tensor, t: &Tensor, one: &Condition, two: &Condition| {
                *calls.paired.borrow_mut() += 1;
                (gaussian_denoiser(x, t, &one[0], 0.5), gaussian_denoiser(x, t, &two[0], 0.5))
            });
        }
        // Distribution matching comes first, and needs one condition alone.
        let dm = DistributionMatching::new(gaussian_teacher(0.8));
        let group = Group::new(Renoising::new(Uniform::FULL)).normalizer(normalizer);
        let objective = Objective::new(teacher).with(group.regularizer("dm", 1.0, dm));
        Ok(value(&objective.evaluate(&Batch::new(&x, &cond)?.with_null(&null))?.loss))
    };
    let guided = Normalizer::dmd2(Guidance::new(4.0)?);
    let plain = evaluate(false, guided)?;
    assert_eq!((calls.count(), *calls.paired.borrow()), (2, 0));
    approx::assert_relative_eq!(evaluate(true, guided)?, plain);
    assert_eq!((calls.count(), *calls.paired.borrow()), (2, 1));
    // Others need no more than the term.
    evaluate(true, Normalizer::conditional())?;
    assert_eq!((calls.count(), *calls.paired.borrow()), (3, 1));
    Ok(())
}

#[test]
fn a_known_prediction_is_not_asked_for_again() -> Result<()> {
    let (x, cond, null) = inputs();
    let calls = Calls::default();
    let teacher = counting_teacher(&calls, 0.5).paired(
        |x: &Tensor, _: &Tensor, _: &Condition, _: &Condition| {
            *calls.paired.borrow_mut() += 1;
            (x.shallow_clone(), x.shallow_clone())
        },
    );
    let batch = Batch::new(&x, &cond)?.with_null(&null);
    let half = PostShift::all(0.5, batch.batch_size(), (x.kind(), x.device()))?;
    let probe = Probe::at(&teacher, &batch, half, x.zeros_like())?;
    let known = probe.teacher_cond()?.shallow_clone();
    for _ in 0..2 {
        let (found, _) = probe.teacher_pair()?;
        assert!(found.equal(&known));
    }
    // The null branch alone was missing.
    assert_eq!((calls.count(), *calls.paired.borrow()), (2, 0));
    Ok(())
}

#[test]
fn observing_costs_no_forward_and_changes_no_loss() -> Result<()> {
    let (x, cond, null) = inputs();
    let real = wave(&x.size(), 4.0, Kind::Float);
    let evaluate = |schedule: Schedule, observed: bool| -> Result<_> {
        let _guard = seeded(6);
        let [teacher, fake, critic] = [(); 3].map(|()| Calls::default());
        let dm = DistributionMatching::new(counting_teacher(&fake, 0.8));
        let gan = Adversarial::new(RectifiedFlow, |x: &Tensor, t: &Tensor, _: &Condition| {
            critic.record(t);
            x.flatten(1, -1).sum_dim_intlist(&[1i64][..], true, None)
        });
        let gan = gan.gan_loss(GanLoss::Relativistic);
        let guidance = Guidance::new(4.0)?;
        let mut objective = schedule
            .objective(counting_teacher(&teacher, 0.5), guidance, &dm)
            .with(Group::new(Renoising::new(Uniform::FULL)).regularizer("gan", 0.1, &gan));
        if observed {
            objective = objective.observed();
        }
        let time = PreShift::all(0.25, 2, (Kind::Float, Device::Cpu))?;
        let batch =
            Batch::new(&x, &cond)?.with_null(&null).with_real(&real)?.with_student_time(&time)?;
        let evaluation = objective.evaluate(&batch)?;
        let report = evaluation.diagnostics.map(|all| all.report()).transpose()?;
        let calls = [&teacher, &fake, &critic].map(Calls::count);
        Ok((value(&evaluation.loss), calls, report.unwrap_or_default()))
    };
    for (schedule, teacher) in Schedule::ALL.into_iter().zip([2, 3, 3, 3]) {
        let (plain, plain_calls, nothing) = evaluate(schedule, false)?;
        let (loss, calls, report) = evaluate(schedule, true)?;
        assert!(nothing.is_empty());
        assert_eq!(plain, loss);
        assert_eq!((plain_calls, calls), ([teacher, 1, 2], [teacher, 1, 2]), "{schedule:?}");
        for name in
            ["dm_rel_gap", "dm_cos", "dm_update_rms", "ca_update_rms", "dm_to_ca", "gan_logit"]
        {
            assert!(report.iter().any(|(n, v)| n == name && v.is_finite()), "{name}");
        }
    }
    Ok(())
}

#[test]
fn a_failing_term_is_named() -> Result<()> {
    let _guard = seeded(7);
    let (x, cond, _) = inputs();
    let dm = DistributionMatching::new(gaussian_teacher(0.8));
    let objective =
        Schedule::DecoupledHybrid.objective(gaussian_teacher(0.5), Guidance::new(4.0)?, &dm);
    let missing_time = objective.evaluate(&Batch::new(&x, &cond)?).unwrap_err();
    assert!(matches!(missing_time, Error::Missing { what: "student time", .. }));
    let time = PreShift::all(0.0, 2, (Kind::Float, Device::Cpu))?;
    let error = objective.evaluate(&Batch::new(&x, &cond)?.with_student_time(&time)?).unwrap_err();
    let Error::Term { name, source } = error else { panic!("{error}") };
    assert_eq!(name, "ca");
    assert!(matches!(
        *source,
        Error::Missing { what: "null condition", setter: "Batch::with_null" }
    ));
    Ok(())
}
