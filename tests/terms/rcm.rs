//! rCM as the recipe of `docs/recipes.md` has it: consistency on noised data, Distribution Matching on rollouts.

use decoupled_dmd::{
    Batch, CfgAugmentation, Condition, Consistency, Denoiser, DistributionMatching, Error,
    FewStepGrid, Group, Guidance, LogitNormal, NoisePath, Normalizer, Objective, Prediction,
    RectifiedFlow, Renoising, Result, Sampler, Shift, Tangent, Transition, Uniform, UpdateRatio,
    Weighting,
};
use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};

use super::common::{gaussian_teacher, seeded, value};
use super::training::{CENTER, FLOAT, VARIANCE, perceptron};

const BATCH: i64 = 128;

/// Pure noise, then the running minimum of noise levels drawn from p_D.
fn random_grid(steps: u64, shift: Shift) -> Result<FewStepGrid> {
    let draws = Tensor::f_rand([steps as i64 - 1], (Kind::Double, Device::Cpu))?;
    let (mut times, mut last) = (vec![0.0], 0.0);
    for time in Vec::<f64>::try_from(draws)?.into_iter().map(|u| shift.of(u)) {
        if time > last {
            times.push(time);
            last = time;
        }
    }
    FewStepGrid::from_shifted(times, Shift::NONE)
}

#[test]
fn training_by_the_recipe_reaches_the_guided_teacher_in_one_two_and_four_steps() -> Result<()> {
    let _guard = seeded(51);
    let stores = [(); 2].map(|()| nn::VarStore::new(Device::Cpu));
    let [mut student_store, mut fake_store] = stores;
    let start = nn::VarStore::new(Device::Cpu);
    let path = RectifiedFlow;
    let model = |store: &nn::VarStore| {
        Denoiser::new(path, Prediction::FlowVelocity, perceptron(&store.root(), 2))
    };
    let (pretrained, student, fake) = (model(&start), model(&student_store), model(&fake_store));
    // The guided teacher of N(center, v) against N(0, v) is the denoiser of N(alpha center, v).
    let (teacher, alpha) = (gaussian_teacher(VARIANCE), 1.5);
    let center = Tensor::from_slice(&CENTER);
    let cond = Condition::from(center.expand([BATCH, 2], false));
    let null = Condition::from(Tensor::zeros([BATCH, 2], FLOAT));
    let noise = || Tensor::randn([BATCH, 2], FLOAT);
    let data = || &center + noise() * VARIANCE.sqrt();

    let mut optimizer = nn::Adam::default().build(&start, 2e-3).map_err(Error::from)?;
    for _ in 0..400 {
        let time = Renoising::new(Uniform::FULL).draw(&path, &data(), None)?;
        optimizer.backward_step(&pretrained.denoising_loss(&data(), &time, &noise(), &cond)?);
    }
    student_store.copy(&start).map_err(Error::from)?;
    fake_store.copy(&start).map_err(Error::from)?;
    let adam = |store, rate| nn::Adam::default().build(store, rate).map_err(Error::from);
    let (mut student_optimizer, mut fake_optimizer) =
        (adam(&student_store, 1e-3)?, adam(&fake_store, 2e-3)?);

    let (guidance, shift) = (Guidance::new(alpha)?, Shift::new(5.0)?);
    let p_g = Renoising::new(LogitNormal::new(-0.7, 1.6)?);
    let p_d = || Renoising::new(Uniform::FULL).shifted(shift);
    let tangent = Tangent::Central { step: 1e-3 };
    let scm = Consistency::continuous(student.clone(), tangent)?.guided(guidance);
    let weight = 100.0 / 2f64.sqrt();
    let consistency =
        Objective::new(teacher.clone()).with(Group::new(p_d()).engine("consistency", weight, scm));
    let dm = DistributionMatching::new(fake).renoising(p_d()).weighting(Weighting::edm(1.0)?);
    let matching = Objective::new(teacher).with(
        Group::new(p_d())
            .normalizer(Normalizer::guided(guidance).floor(1e-5)?)
            .engine("ca", 1.0, CfgAugmentation::new(guidance))
            .regularizer("dm", 1.0, &dm),
    );
    let ratio = UpdateRatio::alternating(5)?;
    for fakes in 1..=1500 {
        let iteration = fakes + fakes / ratio.get();
        let grid = random_grid(iteration % 4 + 1, shift)?;
        let sampler = Sampler::new(&student, grid, Transition::Renoise);
        let last = sampler.grid().steps() - 1;
        let rollout = tch::no_grad(|| sampler.simulate(&noise(), &cond, last))?;
        fake_optimizer.backward_step(&dm.denoising_loss(&Batch::of(&rollout, &cond)?)?);
        if ratio.student_due(fakes) {
            let (real, eps) = (data(), noise());
            let time = p_g.draw(&path, &real, None)?;
            let input = path.renoise(&real, &time, &eps)?;
            let x = student.denoise(&input, &time, &cond)?;
            let offline = Batch::new(&x, &cond)?.with_null(&null);
            let offline = offline.with_student_input(&input, &time)?;
            let rollout = sampler.simulate(&noise(), &cond, last)?;
            let online = Batch::of(&rollout, &cond)?.with_null(&null);
            student_optimizer.zero_grad();
            consistency.evaluate(&offline)?.loss.backward();
            matching.evaluate(&online)?.loss.backward();
            student_optimizer.step();
        }
    }

    let times = [0.01235, 0.06622, 0.14710, 0.39102];
    for steps in [1, 2, 4] {
        let residual = |denoiser: &Denoiser<'_>| -> Result<(f64, f64)> {
            let grid = FewStepGrid::from_shifted(times[..steps].to_vec(), Shift::NONE)?;
            let sampler = Sampler::new(denoiser, grid, Transition::Renoise);
            let x = sampler.sample(&Tensor::randn([4096, 2], FLOAT), &cond)?;
            let (spread, mean) = x.std_mean_dim(0, true, false);
            let offset = (mean - &center * alpha).square().sum(Kind::Double).sqrt();
            Ok((value(&offset), value(&spread.mean(Kind::Double)) - VARIANCE.sqrt()))
        };
        let (before, after) = (residual(&pretrained)?, residual(&student)?);
        println!("{steps} steps: mean and spread off by {before:.3?}, then {after:.3?}");
        assert!(before.0 > 0.35 && before.1 < -0.1, "{steps}: {before:?}");
        assert!(after.0 < 0.25 && after.1.abs() < 0.15, "{steps}: {after:?}");
    }
    Ok(())
}
