//! Teacher and student side by side, on the same captions and noise.

use anyhow::{Result, ensure};
use decoupled_dmd::{FewStepGrid, Sampler, Shift};
use serde::Serialize;
use tch::{Kind, Tensor};

use crate::distil::{Network, Prompts, Sampling, denoiser};
use crate::emoji::pictures::EmojiData;
use crate::emoji::scores::{Judge, Scores};

/// Seed of the noise that every generator starts from.
const NOISE_SEED: i64 = 20_251_127;
/// Seed of the noise between steps, where a transition draws some: the same for a run that was resumed.
const STEP_NOISE_SEED: i64 = NOISE_SEED + 1;
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
        let noise = Tensor::f_randn(shape, (Kind::Float, tch::Device::Cpu))?;
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
        let device = network.model.device();
        let denoiser = denoiser(network, self.shift);
        let grid = FewStepGrid::even(run.steps)?;
        tch::manual_seed(STEP_NOISE_SEED);
        let (mut samples, mut order) = (Vec::new(), Vec::new());
        for positions in self.prompts.batches(&self.items, CHUNK)? {
            let items: Vec<i64> =
                positions.iter().map(|position| self.items[*position as usize]).collect();
            let (cond, null) = self.prompts.conditions(&items)?;
            let noise = self.noise.f_index_select(0, &Tensor::f_from_slice(&positions)?)?;
            let sampler =
                Sampler::new(&denoiser, grid.clone(), run.transition).guided(run.guidance, &null);
            let sample = sampler.sample(&noise.f_to_device(device)?, &cond)?;
            samples.push(sample.f_to_device(tch::Device::Cpu)?);
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
