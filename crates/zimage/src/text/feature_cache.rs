//! Caption features on disk, so that a training needs no text encoder in memory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::files::{create_folder, read_json, write_json};
use tch_training::parameters::is_finite;
use tch_training::run::{Hash, Lock};
use tch_training::safetensors::{read_tensors, write_tensors};

use crate::progress::progress_bar;
use crate::text::encoder::TextEncoder;
use crate::text::encoder_key::encoder_key;
use crate::text::tokenizer::{MAX_TOKENS, frame};

/// Says what a cache folder holds.
const MANIFEST: &str = "features.json";
/// Counts up when entries are laid out or made in another way.
const FORMAT: u32 = 1;

/// What all entries of a cache have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    /// The encoder's key, which covers its dtype.
    encoder: String,
    /// The width F of the features.
    width: i64,
}

/// A folder with the features of prompts, one file each, all made by the encoder that `features.json`
/// names. A file is named after that encoder and the prompt in its frame, and repeats the latter, so
/// that neither a mix-up of files nor of encoders goes unnoticed. Files appear whole or not at all.
#[derive(Debug)]
pub struct FeatureCache {
    folder: PathBuf,
    manifest: Manifest,
}

impl FeatureCache {
    /// Opens a cache to read from. The encoder is not needed.
    ///
    /// # Errors
    /// If there is no cache in the folder, or one of another format.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let manifest: Manifest = read_json(&path)?;
        ensure!(
            manifest.format == FORMAT,
            "{}: format {} is not supported, {FORMAT} is: encode the prompts anew",
            path.display(),
            manifest.format
        );
        Ok(Self { folder: folder.into(), manifest })
    }

    /// Adds to the cache in `folder`, which is made where there is none, the features of `prompts`, by the text
    /// encoder of the diffusers folder `model` in `kind`. Entries that are there already stay, so that an interrupted run goes on where it was; broken ones are made
    /// anew. The encoder is loaded only if something is to be made. Runs may share a folder: one encodes at a
    /// time, and the others wait for it.
    ///
    /// `progress` is told after each prompt how many are done, and of how many.
    ///
    /// # Errors
    /// If the folder holds features of another encoder, or something cannot be read, made or written.
    pub fn encode(
        folder: &Path,
        model: &Path,
        (kind, device): (Kind, Device),
        prompts: &[&str],
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self> {
        let key = encoder_key(model, kind)?;
        create_folder(folder)?;
        let _lock = match Lock::take(folder) {
            Err(tch_training::Error::Locked { .. }) => {
                eprintln!("Waiting for another run, which encodes prompts in {}", folder.display());
                Lock::wait(folder)
            }
            lock => lock,
        }?;
        let mut encoder = None;
        let cache = if folder.join(MANIFEST).exists() {
            let cache = Self::open(folder)?;
            ensure!(
                cache.manifest.encoder == key,
                "{} holds features of another text encoder than that of {} in {kind:?}: choose another \
                 folder, or delete it",
                folder.display(),
                model.display()
            );
            cache
        } else {
            let encoder = encoder.insert(TextEncoder::load(model, kind, device)?);
            Self::create(folder, Manifest { format: FORMAT, encoder: key, width: encoder.width() })?
        };
        for (done, prompt) in (1..).zip(prompts) {
            if cache.get(prompt).is_err() {
                let encoder = match &mut encoder {
                    Some(encoder) => encoder,
                    none => none.insert(TextEncoder::load(model, kind, device)?),
                };
                cache.put(prompt, &encoder.encode(&[prompt])?[0])?;
            }
            progress(done, prompts.len());
        }
        Ok(cache)
    }

    /// [`Self::encode`] that shows its progress.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn encode_observed(
        folder: &Path,
        model: &Path,
        place: (Kind, Device),
        prompts: &[&str],
    ) -> Result<Self> {
        let length = prompts.len() as u64;
        let bar = progress_bar(Some(length), "{pos}/{len} prompts encoded, {eta} left")?;
        let cache = Self::encode(folder, model, place, prompts, &mut |done, _| {
            bar.set_position(done as u64);
        })?;
        bar.finish_and_clear();
        Ok(cache)
    }

    fn create(folder: &Path, manifest: Manifest) -> Result<Self> {
        write_json(&folder.join(MANIFEST), &manifest)?;
        Ok(Self { folder: folder.into(), manifest })
    }

    /// Features `[L, F]` of a prompt on the CPU; "" is the unconditional one.
    ///
    /// # Errors
    /// If the prompt has not been encoded, or its file is broken.
    pub fn get(&self, prompt: &str) -> Result<Tensor> {
        let path = self.path(prompt);
        ensure!(
            path.exists(),
            "the prompt {prompt:?} is not among the features in {}: encode it first",
            self.folder.display()
        );
        self.read(&path, prompt).with_context(|| {
            format!("{} is broken; encoding its prompt again repairs it", path.display())
        })
    }

    /// The width F of the features.
    pub fn width(&self) -> i64 {
        self.manifest.width
    }

    fn path(&self, prompt: &str) -> PathBuf {
        let mut hash = Hash::default();
        hash.add(self.manifest.encoder.as_bytes());
        hash.add(frame(prompt).as_bytes());
        self.folder.join(hash.hex()).with_extension("safetensors")
    }

    fn put(&self, prompt: &str, features: &Tensor) -> Result<()> {
        let text = Tensor::f_from_slice(frame(prompt).as_bytes())?;
        let tensors = Parameters::from([
            ("features".to_owned(), features.f_to_device(Device::Cpu)?),
            ("prompt".to_owned(), text),
        ]);
        Ok(write_tensors(&self.path(prompt), &tensors)?)
    }

    fn read(&self, path: &Path, prompt: &str) -> Result<Tensor> {
        let mut tensors = read_tensors(path)?;
        let text = tensors.remove("prompt").context("it has no tensor prompt")?;
        ensure!(
            text.f_kind()? == Kind::Uint8 && text.dim() == 1,
            "its prompt must be bytes, found {:?} {:?}",
            text.f_kind()?,
            text.size()
        );
        ensure!(Vec::<u8>::try_from(&text)? == frame(prompt).as_bytes(), "it is of another prompt");
        let features = tensors.remove("features").context("it has no tensor features")?;
        let width = self.manifest.width;
        ensure!(
            matches!(features.size()[..], [length, found]
                if found == width && (1..=MAX_TOKENS as i64).contains(&length)),
            "its features must be [1..={MAX_TOKENS}, {width}], found {:?}",
            features.size()
        );
        ensure!(features.is_floating_point(), "its features are {:?}", features.f_kind()?);
        ensure!(is_finite(&features)?, "its features are not finite");
        Ok(features)
    }
}
