//! A checkpoint: a diffusers folder that has been looked at once.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use decoupled_dmd::Shift;
use tch::{Device, Kind};
use tch_training::lora::Lora;
use tch_training::run::{Hash, fingerprint};

use crate::model::config::Config;
use crate::model::files::{ADAPTER_NAMES, check_weights, read_weights};
use crate::model::pipeline::{Pipeline, read_shift};
use crate::model::quantization::Storage;
use crate::progress::progress_bar;

/// Folders of a checkpoint that a run reads.
const PARTS: [&str; 5] = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"];

/// A diffusers folder with the shape of its transformer and the shift of its scheduler, both read and checked; and
/// how its transformer is loaded, as it is or finetuned, whole or in 8 bits.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Config,
    shift: Shift,
    adapter: Option<AdapterFile>,
    storage: Storage,
}

/// An adapter that finetunes a model.
#[derive(Clone, Debug)]
struct AdapterFile {
    path: PathBuf,
    strength: f64,
}

impl Checkpoint {
    /// Reads `scheduler/scheduler_config.json` and `transformer/config.json` of a folder; no weights.
    ///
    /// # Errors
    /// If a file cannot be read, or asks for what is not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let shift = read_shift(folder)?;
        let (folder, config) = (folder.to_owned(), read_config(folder)?);
        Ok(Self { folder, config, shift, adapter: None, storage: Storage::default() })
    }

    /// The same, finetuned by the adapter of a file, in the names of diffusers, ComfyUI, kohya or peft
    /// ([`ADAPTER_NAMES`]); its update is `strength` times as large. The adapter stays apart from the weights
    /// ([`ZImageTransformer::with_adapter`](super::ZImageTransformer::with_adapter)).
    ///
    /// # Errors
    /// If the strength is not a number other than zero. The file is read by [`Self::check`] and [`Self::load`], which
    /// refuse an update that is zero or beyond float32.
    pub fn with_adapter(self, path: &Path, strength: f64) -> Result<Self> {
        let is_strength = strength.is_finite() && strength != 0.0;
        ensure!(is_strength, "the strength of {} is {strength}", path.display());
        Ok(Self { adapter: Some(AdapterFile { path: path.to_owned(), strength }), ..self })
    }

    /// The same, with the weights of the transformer kept as `storage` says.
    #[must_use]
    pub fn stored(self, storage: Storage) -> Self {
        Self { storage, ..self }
    }

    /// The folder alone: as it is, and whole.
    #[must_use]
    pub fn plain(&self) -> Self {
        Self { adapter: None, storage: Storage::Full, ..self.clone() }
    }

    /// How the weights of the transformer are kept.
    pub fn storage(&self) -> Storage {
        self.storage
    }

    /// What is said of the model behind its folder: the adapter that finetunes it.
    pub fn described_finetuning(&self) -> String {
        self.adapter.as_ref().map_or(String::new(), |AdapterFile { path, strength }| {
            format!(", finetuned by {} at strength {strength:?}", path.display())
        })
    }

    /// Whether a folder is a whole pipeline, with a text encoder and an autoencoder of its own. One of them
    /// is enough, so that an incomplete folder is not taken for a small model.
    pub fn is_released(folder: &Path) -> bool {
        ["text_encoder", "vae"].iter().any(|part| folder.join(part).exists())
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The shape of the transformer.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The shift of the scheduler.
    pub fn shift(&self) -> Shift {
        self.shift
    }

    /// Looks for what [`Self::load`] would refuse; reads the headers of the weights, and the adapter.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn check(&self) -> Result<()> {
        check_weights(&self.folder, &self.config)?;
        self.read_adapter().map(drop)
    }

    /// The adapter, at its strength.
    fn read_adapter(&self) -> Result<Option<Lora>> {
        let read = |AdapterFile { path, strength }: &AdapterFile| {
            let lora = Lora::load(path, &self.config.linears(), ADAPTER_NAMES, Device::Cpu)?;
            let lora = lora.frozen(*strength, Kind::Float, Device::Cpu)?;
            let bound = lora.bound()?;
            let path = path.display();
            ensure!(
                bound < f64::from(f32::MAX),
                "{path}: at strength {strength:?} its update is beyond what float32 holds"
            );
            ensure!(
                bound >= f64::from(f32::MIN_POSITIVE),
                "{path}: at strength {strength:?} it changes nothing"
            );
            Ok(lora)
        };
        self.adapter.as_ref().map(read).transpose()
    }

    /// The transformer, in the dtype and on the device asked for, and the shift.
    ///
    /// # Errors
    /// If a file cannot be read, or parameters are missing, unexpected or mis-shaped.
    pub fn load(&self, kind: Kind, device: Device) -> Result<Pipeline> {
        self.load_with(kind, device, &mut |_, _| {})
    }

    /// [`Self::load`] that shows its progress on standard error, as a large model takes a while.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn load_observed(&self, kind: Kind, device: Device) -> Result<Pipeline> {
        let bar = progress_bar(None, "{bytes}/{total_bytes} of weights, {eta} left")?;
        let pipeline = self.load_with(kind, device, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        })?;
        bar.finish_and_clear();
        Ok(pipeline)
    }

    fn load_with(
        &self,
        kind: Kind,
        device: Device,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Pipeline> {
        let config = self.config.clone();
        let place = (kind, device);
        let mut transformer = read_weights(&self.folder, config, self.storage, place, progress)?;
        if let Some(lora) = self.read_adapter()? {
            transformer = transformer.with_adapter(&lora)?;
        }
        Ok(Pipeline { transformer, shift: self.shift })
    }

    /// [`fingerprint`] of the parts of a model that the folder has, without an adapter: what else lies in it, a run
    /// of ours for instance, is not the model.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = Hash::default();
        for part in PARTS {
            let path = self.folder.join(part);
            if path.exists() {
                hash.add(format!("{part} {}", fingerprint(&path)?).as_bytes());
            }
        }
        Ok(hash.hex())
    }

    /// [`fingerprint`] of the file of the adapter, and of [`Lora::settings_file`], with its strength.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn fingerprint_of_adapter(&self) -> Result<Option<String>> {
        let of = |AdapterFile { path, strength }: &AdapterFile| {
            let settings = Lora::settings_file(path)?;
            let settings = settings.map(|path| fingerprint(&path)).transpose()?;
            let settings = settings.map_or(String::new(), |hash| format!(" with settings {hash}"));
            Ok(format!("{}{settings} at strength {strength}", fingerprint(path)?))
        };
        self.adapter.as_ref().map(of).transpose()
    }
}

/// The shape of the transformer of a folder.
///
/// # Errors
/// If the file cannot be read, or is of a model that is not supported.
pub fn read_config(folder: &Path) -> Result<Config> {
    Config::load(&folder.join("transformer/config.json"))
}
