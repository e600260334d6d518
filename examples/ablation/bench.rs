//! What is measured on a student: scores, contrast, spectrum, and what an observing fake score sees.

use anyhow::{Result, ensure};
use decoupled_dmd::{
    Condition, Denoiser, FewStepGrid, FlowMap, Guidance, PostShift, RectifiedFlow, Sampler,
    Transition,
};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use zimage::ZImageTransformer;
use zimage::distil::{FakeScore, Sampling, denoiser};
use zimage::emoji::{EmojiData, Evaluator, Judge, mean_variance};

use super::training::{Material, Training};

/// Captions whose samples are drawn in the strips.
pub const PICTURED: usize = 5;
/// Captions that diversity is measured on.
const DIVERSE: usize = 32;
/// Samples that an observer looks at.
const OBSERVED: usize = 32;
/// Times at which it looks, as the networks see them.
const OBSERVER_TIMES: [f64; 3] = [0.2, 0.5, 0.8];
/// Seed of the noise that it adds.
const OBSERVER_SEED: i64 = 20_251_128;

/// Scores of one set of samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measurement {
    /// Share of samples nearest to the picture asked for, in the classifier's features.
    pub alignment: f64,
    /// The same by pixels at 16x16.
    pub alignment_at_16: f64,
    /// Between features of the samples and of the pictures asked for.
    pub frechet_distance: f64,
    /// Mean over the samples of the variance of one.
    pub variance: f64,
    pub saturation: f64,
}

/// Variances, as in [`Measurement`], of samples and of what two networks make of them when re-noised.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Observation {
    pub time: f64,
    pub sample: f64,
    pub fake: f64,
    pub teacher: f64,
}

/// Captions and noise on which all students are measured.
pub struct Bench<'a> {
    evaluator: Evaluator<'a>,
    is_selection: bool,
}

impl<'a> Bench<'a> {
    /// On `count` captions at even distances: those that results are reported on, or others for
    /// choosing hyper-parameters.
    ///
    /// # Errors
    /// If there are too few captions for two such sets.
    pub fn new(
        judge: Judge,
        material: &Material<'a>,
        data: &EmojiData,
        count: usize,
        selection: bool,
    ) -> Result<Self> {
        let distance = data.items.len() / count.max(1);
        ensure!(
            distance >= 2 && count >= 2,
            "--captions must be from 2 to half of all, not {count}"
        );
        let offset = if selection { 0 } else { distance / 2 };
        let evaluator =
            Evaluator::new(judge, material.prompts, data, material.shift, count, offset)?;
        Ok(Self { evaluator, is_selection: selection })
    }

    /// Indices of the captions measured on.
    pub fn items(&self) -> &[i64] {
        self.evaluator.items()
    }

    /// Whether the captions are those for choosing hyper-parameters.
    pub fn is_selection(&self) -> bool {
        self.is_selection
    }

    /// How many captions are measured on.
    pub fn captions(&self) -> usize {
        self.evaluator.items().len()
    }

    /// Samples of the student of a training in so many steps, one a caption.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn samples(&self, training: &Training<'_>, steps: usize) -> Result<Tensor> {
        let student = Sampled::new(training, steps)?;
        self.evaluator.generate_by(student.device, |noise, cond, _| student.sample(noise, cond))
    }

    /// How different the student's samples of one caption are.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn diversity(&self, training: &Training<'_>, steps: usize) -> Result<f64> {
        let student = Sampled::new(training, steps)?;
        let sample = |noise: &Tensor, cond: &Condition, _: &Condition| student.sample(noise, cond);
        self.evaluator.diversity_by(DIVERSE, student.device, sample)
    }

    /// The same of the guided teacher.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn teacher_diversity(
        &self,
        material: &Material<'_>,
        steps: usize,
        guidance: Guidance,
    ) -> Result<f64> {
        let teacher = denoiser(material.teacher, material.shift);
        let grid = FewStepGrid::even(steps)?;
        self.evaluator.diversity_by(DIVERSE, material.teacher.device(), |noise, cond, null| {
            let sampler = Sampler::new(&teacher, grid.clone(), Transition::Ddim);
            Ok(sampler.guided(guidance, null).sample(noise, cond)?)
        })
    }

    /// Samples of a teacher without guidance.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn unguided(&self, teacher: &ZImageTransformer, steps: usize) -> Result<Tensor> {
        self.guided(teacher, steps, Guidance::NEUTRAL)
    }

    /// Samples of a guided teacher.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn guided(
        &self,
        teacher: &ZImageTransformer,
        steps: usize,
        guidance: Guidance,
    ) -> Result<Tensor> {
        self.evaluator.generate(teacher, Sampling { steps, guidance, transition: Transition::Ddim })
    }

    /// Scores of samples.
    ///
    /// # Errors
    /// If a sample is not finite.
    pub fn measure(&self, samples: &Tensor) -> Result<Measurement> {
        let run = Sampling { steps: 1, guidance: Guidance::NEUTRAL, transition: Transition::Ddim };
        let scores = self.evaluator.row("", run, samples, samples)?.scores;
        Ok(Measurement {
            alignment: scores.alignment,
            alignment_at_16: scores.alignment_at_16,
            frechet_distance: scores.frechet_distance,
            variance: mean_variance(samples)?,
            saturation: scores.saturation,
        })
    }

    /// The real pictures of the captions, `[N, C, H, W]`.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn real(&self, material: &Material<'_>) -> Result<Tensor> {
        Ok(material.pictures(self.evaluator.items())?.f_to_device(tch::Device::Cpu)?)
    }

    /// Positions, at even distances, of the samples that are drawn.
    pub fn pictured(&self) -> Vec<i64> {
        let (count, shown) = (self.captions(), PICTURED.min(self.captions()));
        (0..shown).map(|index| (index * count / shown) as i64).collect()
    }

    /// What the fake score and the teacher make of re-noised `samples`; beside the numbers, the
    /// pictures `[3, PICTURED, C, H, W]` of sample, fake score and teacher at the second time.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn observe(
        &self,
        material: &Material<'_>,
        fake: &FakeScore,
        samples: &Tensor,
        last_step: usize,
    ) -> Result<(Vec<Observation>, Tensor)> {
        let _guard = tch::no_grad_guard();
        let count = OBSERVED.min(self.captions());
        let stride = self.captions() / count;
        let positions: Vec<i64> = (0..count).map(|index| (index * stride) as i64).collect();
        let device = material.teacher.device();
        let x =
            samples.f_index_select(0, &Tensor::f_from_slice(&positions)?)?.f_to_device(device)?;
        let items: Vec<i64> =
            positions.iter().map(|position| self.evaluator.items()[*position as usize]).collect();
        let (cond, _) = material.prompts.conditions(&items)?;
        let step = Tensor::f_full([count as i64], last_step as i64, (Kind::Int64, device))?;
        let fake_cond = Condition::from(vec![cond[0].shallow_clone(), step]);
        tch::manual_seed(OBSERVER_SEED);
        let noise = x.f_randn_like()?;
        let (teacher, fake) = (
            denoiser(material.teacher, material.shift),
            fake.denoiser(material.teacher, material.shift),
        );
        let mut observations = Vec::new();
        let mut pictures = None;
        for (index, time) in OBSERVER_TIMES.into_iter().enumerate() {
            let at = PostShift::all(time, count as i64, (Kind::Float, device))?;
            let noised = decoupled_dmd::NoisePath::renoise(&RectifiedFlow, &x, &at, &noise)?;
            let of_teacher = teacher.denoise(&noised, &at, &cond)?;
            let of_fake = fake.denoise(&noised, &at, &fake_cond)?;
            observations.push(Observation {
                time,
                sample: mean_variance(&x)?,
                fake: mean_variance(&of_fake)?,
                teacher: mean_variance(&of_teacher)?,
            });
            if index == 1 {
                let shown = PICTURED.min(count) as i64;
                let first = |images: &Tensor| images.f_narrow(0, 0, shown);
                let rows = [first(&x)?, first(&of_fake)?, first(&of_teacher)?];
                pictures = Some(Tensor::f_stack(&rows, 0)?);
            }
        }
        Ok((observations, pictures.unwrap_or_else(|| x.shallow_clone())))
    }
}

/// The student of a training as it is sampled: by jumps of its flow map, or along its grid.
struct Sampled<'t> {
    student: Denoiser<'t>,
    flow_map: Option<FlowMap<'t>>,
    grid: FewStepGrid,
    transition: Transition,
    device: tch::Device,
}

impl<'t> Sampled<'t> {
    fn new(training: &'t Training<'_>, steps: usize) -> Result<Self> {
        let (weights, teacher) = (training.student_weights(), training.teacher());
        let (recipe, arm) = (training.recipe(), training.terms().arm());
        let flow_map = weights.flow_map(teacher, recipe.shift).filter(|_| arm.jumps());
        Ok(Self {
            student: weights.denoiser(teacher, recipe.shift),
            flow_map,
            grid: FewStepGrid::even(steps)?,
            transition: arm.transition,
            device: teacher.device(),
        })
    }

    fn sample(&self, noise: &Tensor, cond: &Condition) -> Result<Tensor> {
        Ok(match &self.flow_map {
            Some(map) => map.sample(noise, cond, &self.grid)?,
            None => Sampler::new(&self.student, self.grid.clone(), self.transition)
                .sample(noise, cond)?,
        })
    }
}

/// The power spectrum of images `[N, C, H, H]`: mean squared amplitude of the waves of r periods to
/// an image, rounded, for r = 0, .., H / 2. Rings sum over all directions, so that the rings of
/// an image add up to its mean square, but for the corners beyond H / 2.
///
/// # Errors
/// If images are not square.
pub fn radial_spectrum(images: &Tensor) -> Result<Vec<f64>> {
    let (_, _, height, width) = images.size4()?;
    ensure!(height == width && height > 1, "expected square images, found {height}x{width}");
    let power = images
        .f_to_kind(Kind::Double)?
        .f_fft_fft2(None::<&[i64]>, &[-2i64, -1][..], "forward")?
        .f_abs()?
        .f_square()?
        .f_mean_dim(&[0i64, 1][..], false, None)?;
    let index = Tensor::f_arange(height, (Kind::Double, images.device()))?;
    // The frequencies of the transform: 0, 1, .., -2, -1.
    let frequency = index.f_minimum(&index.f_neg()?.f_add_scalar(height)?)?.f_square()?;
    let radius =
        frequency.f_unsqueeze(0)?.f_add(&frequency.f_unsqueeze(1)?)?.f_sqrt()?.f_round()?;
    (0..=height / 2)
        .map(|ring| {
            let inside = radius.f_eq(ring)?.f_to_kind(Kind::Double)?;
            Ok(f64::try_from(power.f_mul(&inside)?.f_sum(None)?)?)
        })
        .collect()
}
