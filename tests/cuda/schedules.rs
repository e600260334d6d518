//! The paper's schedules, own losses, masks and normalisers.

use decoupled_dmd::{
    AboveStudent, Batch, CfgAugmentation, DistributionMatching, FewStepGrid, Group, Guidance,
    Normalizer, Objective, PreShift, Renoising, Sampler, Schedule, Transition,
};
use tch::Kind;

use crate::setting::{SHAPE, World, compare, drawn, evaluate_at, gradients, on, waits};

#[test]
fn every_schedule() {
    for (schedule, observed) in Schedule::ALL.into_iter().flat_map(|s| [(s, false), (s, true)]) {
        let what = format!("{schedule:?}, observed: {observed}");
        compare(&what, |device| {
            let world = World::new(device);
            let dm = DistributionMatching::new(world.fake.denoiser());
            let guidance = Guidance::new(4.0)?;
            let mut objective = schedule.objective(world.teacher.denoiser(), guidance, &dm);
            if observed {
                objective = objective.observed();
            }
            let student = world.student.denoiser();
            let sampler = Sampler::new(&student, FewStepGrid::even(4)?, Transition::Renoise);
            let made = sampler.simulate(&world.noise, &world.cond, 2)?;
            let batch = Batch::of(&made, &world.cond)?.with_null(&world.null);
            let evaluation = waits(device, &what, 0, || objective.evaluate(&batch))?;
            waits(device, "backward", 0, || evaluation.loss.backward());
            let mut results = gradients(&world.student.vs);
            assert_eq!(results.len(), 4);
            waits(device, "a report", 1, || evaluation.report())?;
            if let Some(diagnostics) = &evaluation.diagnostics {
                results.push(waits(device, "a variance", 0, || diagnostics.mean_variance())?);
                waits(device, "a variance drift", 1, || diagnostics.variance_drift(1.0))?;
                waits(device, "a balance", 1, || diagnostics.update_balance("dm", "ca"))?;
                if let Some(cos) = diagnostics.update_cos("dm", "ca")? {
                    waits(device, "numbers of samples", 1, || cos.to_vec())?;
                }
            }
            results.push(evaluation.loss.detach());
            results.extend(evaluation.terms.into_iter().map(|(_, value)| value));
            let loss = waits(device, "the fake score's loss", 0, || dm.denoising_loss(&batch))?;
            loss.backward();
            results.extend(gradients(&world.fake.vs));
            results.push(loss.detach());
            let mut results = drawn(results);
            let x = world.x();
            let time = PreShift::all(0.25, 3, (Kind::Float, device))?;
            let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
            let batch = batch.with_student_time(&time)?;
            let groups = if schedule == Schedule::CoupledShared { 1 } else { 2 };
            let given = evaluate_at(device, &objective, &batch, groups)?;
            given.loss.backward();
            results.extend([x.grad(), given.loss.detach()]);
            results.extend(given.terms.into_iter().map(|(_, value)| value));
            Ok(results)
        });
    }
}

#[test]
fn masks_and_normalizers() {
    compare("masks and normalizers", |device| {
        let world = World::new(device);
        let mask = on(device, &SHAPE, 0.2).gt(-0.5);
        let guidance = Guidance::new(3.0)?;
        let dm = DistributionMatching::new(world.fake.denoiser());
        let mut results = Vec::new();
        for normalizer in [
            Normalizer::default(),
            Normalizer::OFF,
            Normalizer::guided(guidance).over_batch(),
            Normalizer::fastvideo(guidance),
            Normalizer::fastgen(guidance),
            Normalizer::cdm(),
            Normalizer::decoupled_port(),
            Normalizer::dmd2(guidance).unguarded(),
        ] {
            for is_masked in [false, true] {
                let x = world.x();
                let time = PreShift::all(0.25, 3, (Kind::Float, device))?;
                let batch = Batch::new(&x, &world.cond)?.with_null(&world.null);
                let mut batch = batch.with_student_time(&time)?;
                if is_masked {
                    batch = batch.with_mask(&mask)?;
                }
                let group = Group::new(Renoising::new(AboveStudent::FULL)).normalizer(normalizer);
                let group = group.engine("ca", 1.0, CfgAugmentation::new(guidance));
                let objective = Objective::new(world.teacher.denoiser())
                    .observed()
                    .with(group.regularizer("dm", 1.0, &dm));
                let evaluation = evaluate_at(device, &objective, &batch, 1)?;
                waits(device, "backward", 0, || evaluation.loss.backward());
                results.push(x.grad());
                let own = waits(device, "own losses", 0, || objective.own_losses(&batch))?;
                results.extend(drawn(own.into_iter().map(|(_, loss)| loss.detach()).collect()));
            }
        }
        Ok(results)
    });
}
