//! Tensors by name in one file, or in several with an index.

use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::format::{Entry, FormatError, parse};
use super::mapping::Mapping;
use crate::error::{Error, Result};
use crate::files::read_json;
use crate::parameters::{Parameters, check_shapes};

/// Tensors on disk by name, read one at a time. Opening reads the headers alone, and a tensor that has been
/// read leaves nothing behind but itself: a model is never in memory twice.
///
/// The files must not be cut short or rewritten while they are in use; replacing them as a whole, as
/// [`write_tensors`](super::write_tensors) does, is no danger.
#[derive(Debug)]
pub struct Weights {
    /// What errors call the whole.
    source: PathBuf,
    files: Vec<Mapping>,
    /// Index of the file, and place in it.
    tensors: BTreeMap<String, (usize, Entry)>,
    metadata: Value,
}

/// `{stem}.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    /// Name of a tensor to name of its file.
    weight_map: BTreeMap<String, String>,
}

impl Weights {
    /// Opens `{stem}.safetensors` of a folder or, where there is none, `{stem}.safetensors.index.json`
    /// and the files that it names. The stem is "model" in folders of transformers and
    /// "diffusion_pytorch_model" in those of diffusers.
    ///
    /// # Errors
    /// [`Error::NoFile`] if there is neither, [`Error::Safetensors`] if a file is broken (cut short, or with
    /// tensors that do not fit in it), or the index names files outside the folder or does not agree with
    /// the files; [`Error::File`] and [`Error::Json`] if one cannot be read. Of a file that an index names,
    /// the error is the cause of an [`Error::In`].
    pub fn open(folder: &Path, stem: &str) -> Result<Self> {
        let file = folder.join(format!("{stem}.safetensors"));
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        if file.exists() {
            Self::open_file(&file)
        } else if index.exists() {
            Self::open_sharded(folder, &index)
        } else {
            Err(Error::NoFile { paths: [file, index] })
        }
    }

    /// Opens a single file.
    ///
    /// # Errors
    /// [`Error::File`] if the file cannot be opened, [`Error::Safetensors`] if it is broken.
    pub fn open_file(path: &Path) -> Result<Self> {
        let file = Mapping::open(path)?;
        let contents = parse(file.bytes()).map_err(|fault| file.broken(fault))?;
        let tensors =
            contents.tensors.into_iter().map(|(name, entry)| (name, (0, entry))).collect();
        Ok(Self { source: path.into(), files: vec![file], tensors, metadata: contents.metadata })
    }

    fn open_sharded(folder: &Path, path: &Path) -> Result<Self> {
        let Index { weight_map } = read_json(path)?;
        let broken = |source| Error::Safetensors { path: path.into(), source };
        let mut weights = Self {
            source: path.into(),
            files: Vec::new(),
            tensors: BTreeMap::new(),
            metadata: Value::Null,
        };
        let mut shards: Vec<&String> = weight_map.values().collect();
        shards.sort_unstable();
        shards.dedup();
        for shard in shards {
            if !is_file_name(shard) {
                return Err(broken(FormatError::ShardName { shard: shard.clone() }));
            }
            let file = Self::open_file(&folder.join(shard)).map_err(|error| {
                error.inside(format!("{shard}, which {} names", path.display()))
            })?;
            let not_listed = |name: &&String| weight_map.get(*name) != Some(shard);
            if let Some(tensor) = file.tensors.keys().find(not_listed) {
                let (tensor, shard) = (tensor.clone(), shard.clone());
                return Err(broken(FormatError::NotListed { tensor, shard }));
            }
            weights.add(file);
        }
        let is_lacking = |(name, _): &(&String, _)| !weights.tensors.contains_key(*name);
        if let Some((tensor, shard)) = weight_map.iter().find(is_lacking) {
            let (tensor, shard) = (tensor.clone(), shard.clone());
            return Err(broken(FormatError::Lacking { tensor, shard }));
        }
        Ok(weights)
    }

    /// Takes over the tensors of a shard.
    fn add(&mut self, shard: Self) {
        let offset = self.files.len();
        self.files.extend(shard.files);
        let moved = |(name, (file, entry))| (name, (offset + file, entry));
        self.tensors.extend(shard.tensors.into_iter().map(moved));
    }

    /// Name and shape of every tensor, sorted by name.
    pub fn shapes(&self) -> impl Iterator<Item = (&str, &[i64])> {
        self.tensors.iter().map(|(name, (_, entry))| (name.as_str(), entry.shape.as_slice()))
    }

    /// A text that the file carries beside its tensors; none where it does not, or where there are several
    /// files.
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)?.as_str()
    }

    /// One tensor, cast and moved. Reads its own bytes only.
    ///
    /// # Errors
    /// [`Error::NoTensor`] if there is none of that name, [`Error::In`] with the cause if it cannot be
    /// allocated.
    pub fn tensor(&self, name: &str, kind: Kind, device: Device) -> Result<Tensor> {
        let (file, entry) = self.tensors.get(name).ok_or_else(|| Error::NoTensor {
            name: name.to_owned(),
            place: self.source.display().to_string(),
        })?;
        let file = &self.files[*file];
        let tensor = file.copy_tensor(entry, kind, device).map_err(|error| {
            error.inside(format!("reading tensor {name} of {}", self.source.display()))
        })?;
        file.release(entry.bytes.clone());
        Ok(tensor)
    }

    /// All tensors in the dtypes that they are stored in, on the CPU.
    ///
    /// # Errors
    /// As [`Self::tensor`].
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
    /// [`Error::Tensors`] with every tensor that is missing, unexpected or mis-shaped.
    pub fn check(&self, expected: &[(String, Vec<i64>)]) -> Result<()> {
        check_shapes(self.source.display(), expected, self.shapes())
    }

    /// All tensors, which must be those of `expected` (names and shapes). `progress` is called after each
    /// with the bytes of the file read so far, and in all.
    ///
    /// # Errors
    /// As [`Self::check`], before anything is read; as [`Self::tensor`].
    pub fn load(
        &self,
        expected: &[(String, Vec<i64>)],
        kind: Kind,
        device: Device,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Parameters> {
        self.load_converted(expected, kind, device, progress, |name, tensor| Ok([(name, tensor)]))
    }

    /// [`Self::load`] with what `convert` makes of each tensor in its place: a model that is kept in fewer bits than
    /// its files are never in memory whole.
    ///
    /// # Errors
    /// As [`Self::load`], and those of `convert`.
    pub fn load_converted<C: IntoIterator<Item = (String, Tensor)>>(
        &self,
        expected: &[(String, Vec<i64>)],
        kind: Kind,
        device: Device,
        progress: &mut dyn FnMut(u64, u64),
        convert: impl Fn(String, Tensor) -> Result<C>,
    ) -> Result<Parameters> {
        self.check(expected)?;
        let size = |entry: &Entry| entry.bytes.len() as u64;
        let total = self.tensors.values().map(|(_, entry)| size(entry)).sum();
        let mut done = 0;
        let mut parameters = Parameters::new();
        for (name, (_, entry)) in &self.tensors {
            parameters.extend(convert(name.clone(), self.tensor(name, kind, device)?)?);
            done += size(entry);
            progress(done, total);
        }
        Ok(parameters)
    }
}

/// Whether a path is a plain name, so that it cannot lead out of a folder.
fn is_file_name(path: &str) -> bool {
    let mut components = Path::new(path).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == path)
}
