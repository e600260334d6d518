//! The loop of the README.

use decoupled_dmd::{
    Batch, Condition, DistributionMatching, FewStepGrid, Guidance, Sampler, Schedule, Transition,
    move_toward,
};
use tch::nn::{self, OptimizerConfig};
use tch::{Kind, Tensor};

use crate::setting::{World, compare, drawn, parameters, waits};

#[test]
fn the_loop_of_the_readme_never_waits() {
    compare("the loop of the README", |device| {
        let mut world = World::new(device);
        world.teacher.vs.freeze();
        let options = (Kind::Float, device);
        let student = world.student.denoiser();
        let dm = DistributionMatching::new(world.fake.denoiser());
        let guidance = Guidance::new(4.0)?;
        let objective =
            Schedule::DecoupledHybrid.objective(world.teacher.denoiser(), guidance, &dm);
        let sampler = Sampler::new(&student, FewStepGrid::even(8)?, Transition::Ddim);
        let mut student_optimizer = nn::AdamW::default().build(&world.student.vs, 1e-3)?;
        let mut fake_optimizer = nn::AdamW::default().build(&world.fake.vs, 1e-3)?;
        let [cond, null] =
            [1.0, 0.0].map(|value| Condition::from(Tensor::full([1], value, options)));
        waits(device, "ten steps", 0, || {
            for step in 0..10 {
                let noise = Tensor::randn([2, 4, 6, 6], options);
                let made = sampler.simulate(&noise, &cond, sampler.draw_step()?)?;
                let batch = Batch::of(&made, &cond)?.with_null(&null);
                fake_optimizer.backward_step(&dm.denoising_loss(&batch)?);
                if step % 5 == 0 {
                    student_optimizer.backward_step(&objective.evaluate(&batch)?.loss);
                }
            }
            let (fake, student) = (world.fake.vs.variables(), world.student.vs.variables());
            let pairs = fake.iter().map(|(name, tensor)| (tensor, &student[name]));
            move_toward(pairs, 0.9)
        })?;
        Ok(drawn([&world.student.vs, &world.fake.vs].into_iter().flat_map(parameters).collect()))
    });
}
