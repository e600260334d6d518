//! Pairs of noise and the sample that the teacher's ODE makes of it: data for paired regression.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::{FewStepGrid, Sampler, Shift};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};
use tch_training::Parameters;
use tch_training::files::{read_json, write_json};
use tch_training::run::Hash;
use tch_training::safetensors::{read_tensors, write_tensors};
use tch_training::seed::begin;

use crate::distil::adapter::denoiser;
use crate::distil::prompts::{Buckets, Prompts};
use crate::distil::sampling::Sampling;
use crate::distil::stream::Stream;
use crate::model::ZImageTransformer;

/// Pairs in a file.
const CHUNK: usize = 64;
/// The file that says how the pairs of a folder were made.
const SETTINGS: &str = "pairs.json";

/// How pairs are made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PairSettings {
    /// Indices of the captions, one pair each; an index may occur several times.
    pub items: Vec<i64>,
    /// Size of one sample, `[C, H, W]`.
    pub size: [i64; 3],
    pub sampling: Sampling,
    pub shift: Shift,
    pub seed: u64,
}

/// What the pairs of a folder were made by.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Manifest {
    #[serde(flatten)]
    settings: PairSettings,
    /// Of the teacher's weights and of the encoded captions.
    fingerprint: String,
}

/// Pairs of noise and sample.
#[derive(Debug)]
pub struct Pairs {
    items: Vec<i64>,
    /// `[N, C, H, W]` on the CPU.
    noise: Tensor,
    /// `[N, C, H, W]` on the CPU.
    samples: Tensor,
    /// Positions whose captions have one padded length.
    buckets: Buckets,
}

/// A batch of pairs.
#[derive(Debug)]
pub struct PairBatch {
    /// Indices of the captions.
    pub items: Vec<i64>,
    /// `[B, C, H, W]`, where the teacher is.
    pub noise: Tensor,
    /// The ends of the teacher's ODE, `[B, C, H, W]`.
    pub samples: Tensor,
}

impl Pairs {
    /// Pairs in `folder`, made by `teacher` where they are not there yet. Each file is written whole, so a run
    /// that was stopped goes on after the last one.
    ///
    /// # Errors
    /// If the folder holds pairs of other settings, of another teacher or other captions, a file is broken, or the
    /// teacher fails.
    pub fn make(
        folder: &Path,
        teacher: &ZImageTransformer,
        prompts: &Prompts,
        settings: &PairSettings,
    ) -> Result<Self> {
        let fingerprint = fingerprint(teacher, prompts, &settings.items)?;
        let manifest = Manifest { settings: settings.clone(), fingerprint };
        let file = folder.join(SETTINGS);
        if file.exists() {
            let found: Manifest = read_json(&file)?;
            ensure!(
                found == manifest,
                "{} holds pairs of other settings or of another teacher: remove it, or name another \
                 folder",
                folder.display()
            );
        } else {
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
            write_json(&file, &manifest)?;
        }
        let (mut order, mut noise, mut samples) = (Vec::new(), Vec::new(), Vec::new());
        for (index, positions) in prompts.batches(&settings.items, CHUNK)?.iter().enumerate() {
            let file = folder.join(format!("pairs-{index:05}.safetensors"));
            if !file.exists() {
                let made = generate(teacher, prompts, settings, positions, index as u64)?;
                write_tensors(&file, &made)?;
            }
            let pairs = read(&file, positions.len() as i64, settings.size)?;
            order.extend(positions.iter().map(|position| settings.items[*position as usize]));
            noise.push(pairs.0);
            samples.push(pairs.1);
        }
        ensure!(!order.is_empty(), "there are no captions to make pairs for");
        Ok(Self {
            buckets: Buckets::new(prompts.batches(&order, usize::MAX)?),
            items: order,
            noise: Tensor::f_cat(&noise, 0)?,
            samples: Tensor::f_cat(&samples, 0)?,
        })
    }

    /// Draws `batch` pairs with replacement, whose captions have one padded length, on `device`.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn draw(&self, batch: usize, device: tch::Device) -> Result<PairBatch> {
        let positions = self.buckets.draw(batch)?;
        let index = Tensor::f_from_slice(&positions)?;
        let at = |tensor: &Tensor| -> Result<Tensor> {
            let rows = tensor.f_index_select(0, &index)?;
            // Not waited for: libtorch reads the rows before it returns.
            Ok(rows.f_to_device_(device, rows.f_kind()?, true, false)?)
        };
        Ok(PairBatch {
            items: positions.iter().map(|position| self.items[*position as usize]).collect(),
            noise: at(&self.noise)?,
            samples: at(&self.samples)?,
        })
    }
}

/// Tells teachers and captions apart. Sums of bits as integers are the same in any order, on any machine.
fn fingerprint(teacher: &ZImageTransformer, prompts: &Prompts, items: &[i64]) -> Result<String> {
    let mut hash = Hash::default();
    let mut add = |name: &str, tensor: &Tensor| -> Result<()> {
        let bits = match tensor.f_kind()? {
            Kind::Double => Kind::Int64,
            Kind::Float => Kind::Int,
            _ => Kind::Int16,
        };
        let bits = tensor.f_detach()?.f_contiguous()?.f_view_dtype(bits)?;
        hash.add(name.as_bytes());
        hash.add(&i64::try_from(bits.f_sum(Kind::Int64)?)?.to_le_bytes());
        Ok(())
    };
    for (name, tensor) in teacher.parameters() {
        add(name, tensor)?;
    }
    for item in items {
        add("caption", &prompts.conditions(&[*item])?.0[0])?;
    }
    Ok(hash.hex())
}

/// The pairs at `positions`, which are the file `index`.
fn generate(
    teacher: &ZImageTransformer,
    prompts: &Prompts,
    settings: &PairSettings,
    positions: &[i64],
    index: u64,
) -> Result<Parameters> {
    let items: Vec<i64> =
        positions.iter().map(|position| settings.items[*position as usize]).collect();
    let (cond, null) = prompts.conditions(&items)?;
    begin(settings.seed, Stream::Pairs(index));
    let [channels, height, width] = settings.size;
    let shape = [items.len() as i64, channels, height, width];
    let noise = Tensor::f_randn(shape, (Kind::Float, teacher.device()))?;
    let denoiser = denoiser(teacher, settings.shift);
    let Sampling { steps, guidance, transition } = settings.sampling;
    let sampler = Sampler::new(&denoiser, FewStepGrid::even(steps)?, transition);
    let samples = sampler.guided(guidance, &null).sample(&noise, &cond)?;
    Ok([("noise".to_owned(), noise), ("samples".to_owned(), samples)].into())
}

/// Noise and samples of a file.
fn read(file: &Path, count: i64, [channels, height, width]: [i64; 3]) -> Result<(Tensor, Tensor)> {
    let mut tensors = read_tensors(file)?;
    let mut take = |name: &str| {
        let tensor = tensors.remove(name);
        let found = tensor.as_ref().map(Tensor::size);
        let fits = found.as_deref() == Some(&[count, channels, height, width]);
        tensor.filter(|_| fits).with_context(|| {
            format!(
                "{name} in {} is {found:?}, expected [{count}, {channels}, {height}, {width}]: \
                 remove the file",
                file.display()
            )
        })
    };
    Ok((take("noise")?, take("samples")?))
}
