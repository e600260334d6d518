//! Named tensors on disk: one safetensors file, or several with an index.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use crate::files::{read_json, write_atomically};
use crate::mapping::Mapping;
use crate::parameters::{Parameters, check_shapes};
use crate::safetensors::{Entry, entries};

/// Tensors by name, read one at a time. Opening reads the headers alone, and a tensor that has been read
/// leaves nothing behind but itself: the model is never in memory twice.
#[derive(Debug)]
pub struct Weights {
    /// What errors call the whole.
    source: PathBuf,
    files: Vec<Mapping>,
    /// Index of the file, and place in it.
    tensors: BTreeMap<String, (usize, Entry)>,
}

/// `{stem}.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Name of a tensor to name of its file.
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens `{stem}.safetensors` of a folder or, where there is none, `{stem}.safetensors.index.json`
    /// and the files that it names. The stem is "diffusion_pytorch_model" or "model".
    ///
    /// # Errors
    /// If there is neither, a file is broken (cut short, or with tensors that do not fit in it), or the
    /// index names files outside the folder or does not agree with the files.
    pub fn open(folder: &Path, stem: &str) -> Result<Self> {
        let file = folder.join(format!("{stem}.safetensors"));
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        if file.exists() {
            Self::open_file(&file)
        } else if index.exists() {
            Self::open_sharded(folder, &index)
        } else {
            bail!("there is neither {} nor {}", file.display(), index.display())
        }
    }

    /// Opens a single file.
    ///
    /// # Errors
    /// If the file cannot be opened or is broken.
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = Mapping::open(path)?;
        let tensors =
            entries(file.bytes()).with_context(|| format!("reading {}", path.display()))?;
        let tensors = tensors.into_iter().map(|(name, entry)| (name, (0, entry))).collect();
        Ok(Self { source: path.into(), files: vec![file], tensors })
    }

    fn open_sharded(folder: &Path, path: &Path) -> Result<Self> {
        let Index { weight_map } = read_json(path)?;
        let mut weights = Self { source: path.into(), files: Vec::new(), tensors: BTreeMap::new() };
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            ensure!(
                is_file_name(shard),
                "{} names \"{shard}\", which is not the name of a file beside it",
                path.display()
            );
            let listed = |name: &str| weight_map.get(name) == Some(shard);
            Self::open_file(&folder.join(shard))
                .and_then(|file| weights.add(file, listed))
                .with_context(|| format!("{shard}, which {} names", path.display()))?;
        }
        for (name, shard) in &weight_map {
            ensure!(
                weights.tensors.contains_key(name),
                "{} puts tensor {name} into {shard}, which lacks it",
                path.display()
            );
        }
        Ok(weights)
    }

    /// Takes over the tensors of a shard, each of which must be `listed` in the index.
    fn add(&mut self, shard: Self, listed: impl Fn(&str) -> bool) -> Result<()> {
        let offset = self.files.len();
        self.files.extend(shard.files);
        for (name, (file, entry)) in shard.tensors {
            ensure!(listed(&name), "the index does not put tensor {name} into this file");
            self.tensors.insert(name, (offset + file, entry));
        }
        Ok(())
    }

    /// Name and shape of every tensor, sorted by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[i64])> {
        self.tensors.iter().map(|(name, (_, entry))| (name.as_str(), entry.shape.as_slice()))
    }

    /// One tensor, cast and moved. Reads its own bytes only.
    ///
    /// # Errors
    /// If there is no tensor of that name, or libtorch cannot allocate it.
    pub fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let (file, entry) = self
            .tensors
            .get(name)
            .with_context(|| format!("tensor {name} is missing in {}", self.source.display()))?;
        let file = &self.files[*file];
        let tensor = file
            .copy_tensor(entry, kind, device)
            .with_context(|| format!("reading tensor {name} of {}", self.source.display()))?;
        file.release(entry.bytes.clone());
        Ok(tensor)
    }

    /// All tensors in the dtypes that they are stored in, on the CPU.
    ///
    /// # Errors
    /// If libtorch cannot allocate them.
    pub fn all(&self) -> Result<Parameters> {
        self.tensors
            .iter()
            .map(|(name, (_, entry))| {
                Ok((name.clone(), self.tensor(name, entry.kind, Device::Cpu)?))
            })
            .collect()
    }

    /// Compares names and shapes with those of `expected`.
    ///
    /// # Errors
    /// Names every tensor that is missing, unexpected or mis-shaped.
    pub fn check(&self, expected: &[(String, Vec<i64>)]) -> Result<()> {
        check_shapes(expected, self.shapes()).with_context(|| self.source.display().to_string())
    }

    /// All tensors, which must be those of `expected` (names and shapes). `progress` is called after each
    /// with the bytes of the file read so far, and in all.
    ///
    /// # Errors
    /// Before anything is read, names every tensor that is missing, unexpected or mis-shaped. Also if
    /// libtorch cannot allocate them.
    pub fn load(
        &self,
        expected: &[(String, Vec<i64>)],
        kind: Kind,
        device: Device,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Parameters> {
        self.check(expected)?;
        let size = |entry: &Entry| entry.bytes.len() as u64;
        let total = self.tensors.values().map(|(_, entry)| size(entry)).sum();
        let mut done = 0;
        self.tensors
            .iter()
            .map(|(name, (_, entry))| {
                let tensor = self.tensor(name, kind, device)?;
                done += size(entry);
                progress(done, total);
                Ok((name.clone(), tensor))
            })
            .collect()
    }
}

/// Whether a path is a plain name, so that it cannot lead out of a folder.
fn is_file_name(path: &str) -> bool {
    let mut components = Path::new(path).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == path)
}

/// All tensors of a safetensors file by name, in the dtypes of the file.
///
/// # Errors
/// If the file cannot be read or is not a safetensors file.
pub fn read_tensors(path: &Path) -> Result<Parameters> {
    Weights::open_file(path)?.all()
}

/// Writes named tensors as a safetensors file; a crash leaves the old file or the new one.
///
/// # Errors
/// If the file cannot be written.
pub fn write_tensors(path: &Path, tensors: &Parameters) -> Result<()> {
    let list = tensors
        .iter()
        .map(|(name, tensor)| Ok((name, tensor.f_detach()?.f_contiguous()?)))
        .collect::<Result<Vec<_>>>()?;
    write_atomically(path, |temporary| Ok(Tensor::write_safetensors(&list, temporary)?))
}
