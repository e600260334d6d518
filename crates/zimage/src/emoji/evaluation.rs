//! Teacher and student side by side, on the same captions and noise.

use anyhow::{Result, ensure};
use decoupled_dmd::{Condition, FewStepGrid, Sampler, Shift};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::distil::{Network, Prompts, Sampling, denoiser};
use crate::emoji::pictures::EmojiData;
use crate::emoji::scores::{Judge, Scores};

/// Seed of the noise that every generator starts from.
const NOISE_SEED: i64 = 20_251_127;
/// Seed of the noise between steps, where a transition draws some: the same for a run that was resumed.
const STEP_NOISE_SEED: i64 = NOISE_SEED + 1;
/// Seed of the first of the noises that diversity is measured with.
const DIVERSITY_SEED: i64 = NOISE_SEED + 1000;
/// Samples of a caption that diversity is measured on.
const SAMPLES_A_CAPTION: i64 = 4;
/// Samples generated at once.
const CHUNK: usize = 64;

/// One generator's figures.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    pub name: String,
    #[serde(flatten)]
    pub run: Sampling,
    pub evaluations_per_image: usize,
    /// Against the real pictures, and the variance against the guided teacher's.
    #[serde(flatten)]
    pub scores: Scores,
}

/// Captions to compare generators on.
pub struct Evaluator<'a> {
    judge: Judge,
    prompts: &'a Prompts,
    shift: Shift,
    items: Vec<i64>,
    noise: Tensor,
}

impl<'a> Evaluator<'a> {
    /// Compares on `count` captions at even distances among all, those held out of training included, the first
    /// of them that at `offset`.
    ///
    /// # Errors
    /// If the last one is behind the end.
    pub fn new(
        judge: Judge,
        prompts: &'a Prompts,
        data: &EmojiData,
        shift: Shift,
        count: usize,
        offset: usize,
    ) -> Result<Self> {
        let (all, count) = (data.items.len(), count.min(data.items.len()));
        let items: Vec<i64> = (0..count).map(|i| (offset + i * all / count) as i64).collect();
        ensure!(
            items.last().is_none_or(|last| *last < all as i64),
            "{count} captions from {offset} on do not fit among {all}"
        );
        tch::manual_seed(NOISE_SEED);
        let (_, channels, height, width) = data.images.size4()?;
        let shape = [items.len() as i64, channels, height, width];
        let noise = Tensor::f_randn(shape, (Kind::Float, Device::Cpu))?;
        Ok(Self { judge, prompts, shift, items, noise })
    }

    /// Indices of the captions.
    pub fn items(&self) -> &[i64] {
        &self.items
    }

    /// Samples `[N, C, H, W]` on the CPU, one a caption.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn generate<'n>(&self, network: impl Into<Network<'n>>, run: Sampling) -> Result<Tensor> {
        let network = network.into();
        let denoiser = denoiser(network, self.shift);
        let grid = FewStepGrid::even(run.steps)?;
        self.generate_by(network.model.device(), |noise, cond, null| {
            let sampler =
                Sampler::new(&denoiser, grid.clone(), run.transition).guided(run.guidance, null);
            Ok(sampler.sample(noise, cond)?)
        })
    }

    /// Samples `[N, C, H, W]` on the CPU, one a caption, each batch made on `device` from noise, the captions'
    /// condition and the null condition.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn generate_by(
        &self,
        device: Device,
        sample: impl Fn(&Tensor, &Condition, &Condition) -> Result<Tensor>,
    ) -> Result<Tensor> {
        self.generate_from(&self.items, &self.noise, STEP_NOISE_SEED, device, &sample)
    }

    /// How different the samples of one caption are, as [`Judge::diversity`] has it: four from each of `count`
    /// captions, made as by [`Self::generate_by`].
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn diversity_by(
        &self,
        count: usize,
        device: Device,
        sample: impl Fn(&Tensor, &Condition, &Condition) -> Result<Tensor>,
    ) -> Result<f64> {
        let stride = (self.items.len() / count.max(1)).max(1);
        let items: Vec<i64> = self.items.iter().copied().step_by(stride).take(count).collect();
        let mut shape = self.noise.size();
        shape[0] = items.len() as i64;
        let rounds = (0..SAMPLES_A_CAPTION).map(|round| {
            tch::manual_seed(DIVERSITY_SEED + round);
            let noise = Tensor::f_randn(&shape[..], (Kind::Float, Device::Cpu))?;
            // Between steps too, samples of one caption have noise of their own.
            let step_noise = DIVERSITY_SEED + SAMPLES_A_CAPTION + round;
            self.generate_from(&items, &noise, step_noise, device, &sample)
        });
        let rounds = rounds.collect::<Result<Vec<_>>>()?;
        self.judge.diversity(&Tensor::f_stack(&rounds, 0)?)
    }

    fn generate_from(
        &self,
        items: &[i64],
        noise: &Tensor,
        step_noise_seed: i64,
        device: Device,
        sample: &impl Fn(&Tensor, &Condition, &Condition) -> Result<Tensor>,
    ) -> Result<Tensor> {
        tch::manual_seed(step_noise_seed);
        let (mut samples, mut order) = (Vec::new(), Vec::new());
        for positions in self.prompts.batches(items, CHUNK)? {
            let items: Vec<i64> =
                positions.iter().map(|position| items[*position as usize]).collect();
            let (cond, null) = self.prompts.conditions(&items)?;
            let noise = noise.f_index_select(0, &Tensor::f_from_slice(&positions)?)?;
            let sample = sample(&noise.f_to_device(device)?, &cond, &null)?;
            samples.push(sample.f_to_device(Device::Cpu)?);
            order.extend(positions);
        }
        // Batches go by length; the samples are put back in the order of the captions.
        let order = Tensor::f_from_slice(&order)?.f_argsort(0, false)?;
        Ok(Tensor::f_cat(&samples, 0)?.f_index_select(0, &order)?)
    }

    /// The figures of samples made by `run`; `reference` are those of the guided teacher.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn row(
        &self,
        name: &str,
        run: Sampling,
        samples: &Tensor,
        reference: &Tensor,
    ) -> Result<Row> {
        Ok(Row {
            name: name.to_owned(),
            run,
            evaluations_per_image: run.evaluations(),
            scores: self.judge.scores(samples, &self.items, reference)?,
        })
    }
}
