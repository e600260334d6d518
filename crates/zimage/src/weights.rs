//! Named tensors on disk: one safetensors file, or several with an index.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::blocks::Parameters;
use super::mapping::Mapping;
use super::safetensors::{Entry, entries};

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

/// A JSON file as a value of a type.
///
/// # Errors
/// If the file cannot be read or parsed.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("parsing {}", path.display()))
}

/// Compares names and shapes, each name once.
///
/// # Errors
/// Names every tensor that is missing, unexpected or mis-shaped.
pub fn check_shapes<'a, S: AsRef<[i64]>>(
    expected: &[(String, Vec<i64>)],
    found: impl Iterator<Item = (&'a str, S)>,
) -> Result<()> {
    let mut found: BTreeMap<&str, S> = found.collect();
    let mut faults = Vec::new();
    for (name, shape) in expected {
        match found.remove(name.as_str()) {
            None => faults.push(format!("{name} is missing")),
            Some(size) if size.as_ref() != shape => {
                faults.push(format!("{name} has shape {:?}, expected {shape:?}", size.as_ref()))
            }
            Some(_) => {}
        }
    }
    faults.extend(found.keys().map(|name| format!("{name} is unexpected")));
    ensure!(faults.is_empty(), "tensors do not fit the model: {}", faults.join("; "));
    Ok(())
}
