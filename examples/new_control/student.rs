//! A one-step student that sees a control, and its training.

use anyhow::{Result, ensure};
use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, FewStepGrid, Group, NoisePath, Objective,
    Prediction, RectifiedFlow, Renoising, Reward, Sampler, Shift, Transition, Uniform,
};
use tch::{Device, Kind, Tensor};
use tch_training::AdamW;
use tch_training::ema::update_average;
use tch_training::parameters::is_finite;
use tch_training::seed::begin;
use zimage::ZImageTransformer;
use zimage::distil::{Network, RoleWeights, Stream, denoiser, embedded_optimizer};

/// Side of the control.
const SIDE: i64 = 2;
/// Makes the few numbers that bring the control in learn faster than the weights that they start beside.
const MIX_SCALE: f64 = 10.0;
/// Standard deviation of the recogniser.
const DEVIATION: f64 = 0.1;
/// Weight of its log-likelihood, lambda, which acts as a guidance scale of the control.
const LIKELIHOOD: f64 = 2.0;
/// Of the pictures.
const PICTURE_SIDE: i64 = 32;
const STUDENT_RATE: f64 = 1e-4;
const FAKE_RATE: f64 = 4e-4;
const BATCH: i64 = 16;
const FAKE_UPDATES: usize = 3;
const FAKE_WARMUP: usize = 12;
const WARMUP: u64 = 8;
const EMA: f64 = 0.9;
const CHUNK: i64 = 64;

/// What the networks of a training see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arm {
    /// The student does not see the control.
    WithoutControl,
    /// Student and fake score see it: the joint law of pictures and controls is matched.
    Joint,
    /// The student sees it, the fake score does not: the law of the pictures over all controls is matched.
    Marginal,
}

impl Arm {
    pub const ALL: [Self; 3] = [Self::WithoutControl, Self::Joint, Self::Marginal];

    pub fn name(self) -> &'static str {
        match self {
            Self::WithoutControl => "without-control",
            Self::Joint => "joint",
            Self::Marginal => "marginal",
        }
    }
}

/// What all students share.
pub struct Material<'a> {
    pub teacher: &'a ZImageTransformer,
    pub shift: Shift,
    /// The empty caption, encoded, `[1, L, D]`.
    pub empty: Tensor,
}

impl Material<'_> {
    /// The empty caption, and controls.
    fn condition(&self, controls: &Tensor) -> Result<Condition> {
        let empty = self.empty.f_expand([controls.size()[0], -1, -1], false)?;
        Ok(Condition::from(vec![empty, controls.shallow_clone()]))
    }
}

/// Pictures averaged to 2x2.
pub fn thumbnails(images: &Tensor) -> Result<Tensor> {
    Ok(images.f_adaptive_avg_pool2d([SIDE, SIDE])?)
}

/// Controls at the size of a picture.
pub fn enlarged(controls: &Tensor) -> Result<Tensor> {
    Ok(controls.f_upsample_nearest2d([PICTURE_SIDE, PICTURE_SIDE], None, None)?)
}

/// Root mean square difference between the averages of samples and the controls.
pub fn control_error(samples: &Tensor, controls: &Tensor) -> Result<f64> {
    let error = thumbnails(samples)?.f_sub(controls)?;
    Ok(f64::try_from(error.f_square()?.f_mean(Kind::Double)?)?.sqrt())
}

/// The weights of a role, and the `[3, 3]` that brings the control in, where it sees one.
struct Weights {
    role: RoleWeights,
    mix: Option<Tensor>,
}

impl Weights {
    /// Equal to the teacher, whatever the control.
    fn new(material: &Material<'_>, sees: bool) -> Result<Self> {
        let options = (Kind::Float, material.teacher.device());
        let mix = sees.then(|| Tensor::f_zeros([3, 3], options)).transpose()?;
        Ok(Self { role: RoleWeights::new(material.teacher, None)?, mix })
    }

    fn duplicate(&self) -> Result<Self> {
        let copy = |mix: &Tensor| Ok::<_, anyhow::Error>(mix.f_detach()?.copy());
        Ok(Self { role: self.role.duplicate()?, mix: self.mix.as_ref().map(copy).transpose()? })
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let mix = self.mix.as_ref().map(|mix| ("control".to_owned(), mix.shallow_clone()));
        self.role.parameters().into_iter().chain(mix).collect()
    }

    /// The enlarged control, its colours mixed, is added to the noised picture.
    fn denoiser<'a>(&'a self, material: &Material<'a>) -> Denoiser<'a> {
        let Network { model, role } = self.role.network(material.teacher);
        let Some(mix) = &self.mix else {
            return denoiser(Network { model, role }, material.shift);
        };
        Denoiser::new(
            RectifiedFlow.shifted(material.shift),
            Prediction::FlowVelocity,
            move |x: &Tensor, t: &Tensor, c: &Condition| -> Result<Tensor> {
                let kernel = mix.f_mul_scalar(MIX_SCALE)?.f_view([3, 3, 1, 1])?;
                let control = enlarged(&c[1])?.f_conv2d(&kernel, None::<Tensor>, 1, 0, 1, 1)?;
                // The model's output is x0 - eps.
                Ok(model.forward_encoded(&x.f_add(&control)?, t, &c[0], role)?.f_neg()?)
            },
        )
    }
}

/// Weights under training.
struct Trained {
    weights: Weights,
    optimizer: AdamW,
}

impl Trained {
    fn new(weights: Weights, learning_rate: f64) -> Result<Self> {
        let parameters = weights.parameters().into_iter();
        let trainable = parameters.map(|(name, tensor)| (name, tensor.set_requires_grad(true)));
        let optimizer = AdamW::new(trainable.collect(), embedded_optimizer(learning_rate))?;
        Ok(Self { weights, optimizer })
    }

    fn descend(&mut self, loss: &Tensor) -> Result<()> {
        self.optimizer.zero_grad()?;
        loss.f_backward()?;
        let norm = self.optimizer.step()?;
        ensure!(is_finite(&norm)?, "the gradient is not finite");
        Ok(())
    }

    /// Updates of a fake score on samples of the student.
    fn match_samples(
        &mut self,
        material: &Material<'_>,
        samples: &Tensor,
        cond: &Condition,
        updates: usize,
    ) -> Result<()> {
        for _ in 0..updates {
            let loss = DistributionMatching::new(self.weights.denoiser(material))
                .denoising_loss(&Batch::new(samples, cond)?)?;
            self.descend(&loss)?;
        }
        Ok(())
    }
}

/// A trained student: the moving average of its weights.
pub struct Student<'a> {
    material: &'a Material<'a>,
    weights: Weights,
}

impl<'a> Student<'a> {
    /// Trains a student of one step on `controls` `[N, 3, 2, 2]`.
    pub fn train(
        material: &'a Material<'a>,
        arm: Arm,
        seed: u64,
        controls: &Tensor,
        updates: u64,
    ) -> Result<Self> {
        let new = |rate, sees| Trained::new(Weights::new(material, sees)?, rate);
        let mut student = new(STUDENT_RATE, arm != Arm::WithoutControl)?;
        let mut fake = new(FAKE_RATE, arm == Arm::Joint)?;
        let controls = controls.f_to_device(material.teacher.device())?;
        let average = student.weights.duplicate()?;
        for update in 0..updates {
            begin(seed, Stream::Update(update));
            let warm = (update + 1) as f64 / WARMUP as f64;
            student.optimizer.settings.learning_rate = STUDENT_RATE * warm.min(1.0);
            let options = (Kind::Int64, controls.device());
            let picks = Tensor::f_randint(controls.size()[0], [BATCH], options)?;
            let cond = material.condition(&controls.f_index_select(0, &picks)?)?;
            let size = [BATCH, 3, PICTURE_SIDE, PICTURE_SIDE];
            let noise = Tensor::f_randn(size, (Kind::Float, material.teacher.device()))?;
            if update == 0 {
                let samples =
                    one_step(&student.weights.denoiser(material))?.sample(&noise, &cond)?;
                fake.match_samples(material, &samples, &cond, FAKE_WARMUP)?;
            }
            let (loss, samples) = {
                let dm = DistributionMatching::new(fake.weights.denoiser(material));
                let objective = objective(material, &dm, arm)?;
                let made =
                    one_step(&student.weights.denoiser(material))?.simulate(&noise, &cond, 0)?;
                let batch = Batch::of(&made, &cond)?;
                (objective.evaluate(&batch)?.loss, made.x.f_detach()?)
            };
            student.descend(&loss)?;
            fake.match_samples(material, &samples, &cond, FAKE_UPDATES)?;
            update_average(&average.parameters(), &student.weights.parameters(), EMA, update + 1)?;
        }
        Ok(Self { material, weights: average })
    }

    /// Pictures on the CPU for controls, from noise `[B, 3, 32, 32]`.
    pub fn sample(&self, noise: &Tensor, controls: &Tensor) -> Result<Tensor> {
        let network = self.weights.denoiser(self.material);
        let device = self.material.teacher.device();
        let parts = noise.f_split(CHUNK, 0)?.into_iter().zip(controls.f_split(CHUNK, 0)?);
        let sample = |(noise, controls): (Tensor, Tensor)| {
            let (noise, controls) = (noise.f_to_device(device)?, controls.f_to_device(device)?);
            let samples =
                one_step(&network)?.sample(&noise, &self.material.condition(&controls)?)?;
            Ok(samples.f_to_device(Device::Cpu)?)
        };
        Ok(Tensor::f_cat(&parts.map(sample).collect::<Result<Vec<_>>>()?, 0)?)
    }
}

fn one_step<'d>(network: &'d Denoiser<'d>) -> Result<Sampler<'d>> {
    Ok(Sampler::new(network, FewStepGrid::even(1)?, Transition::Ddim))
}

/// Distribution matching, and the control by the recogniser.
fn objective<'o>(
    material: &Material<'o>,
    dm: &'o DistributionMatching<'o>,
    arm: Arm,
) -> Result<Objective<'o>> {
    let teacher = denoiser(material.teacher, material.shift);
    let mut group = Group::new(Renoising::new(Uniform::FULL)).regularizer("dm", 1.0, dm);
    if arm != Arm::WithoutControl {
        // The mean over samples against a mean over all their numbers.
        let weight = LIKELIHOOD / (3 * PICTURE_SIDE * PICTURE_SIDE) as f64;
        group = group.engine_loss("control", weight, Reward::new(log_likelihood));
    }
    Ok(Objective::new(teacher).with(group))
}

/// log q(c given x) of the recogniser, up to a constant, `[B]`.
fn log_likelihood(x: &Tensor, cond: &Condition) -> Result<Tensor> {
    let error = thumbnails(x)?.f_sub(&cond[1])?.f_div_scalar(DEVIATION)?;
    let squares = error.f_square()?.f_flatten(1, -1)?;
    Ok(squares.f_sum_dim_intlist(&[1i64][..], false, None::<Kind>)?.f_mul_scalar(-0.5)?)
}
