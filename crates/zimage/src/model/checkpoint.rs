//! A checkpoint: a diffusers folder that has been looked at once.

use std::path::{Path, PathBuf};

use anyhow::Result;
use decoupled_dmd::Shift;
use tch::{Device, Kind};
use tch_training::run::{Hash, fingerprint};

use crate::model::config::Config;
use crate::model::files::{check_weights, read_weights};
use crate::model::pipeline::{Pipeline, read_shift};
use crate::progress::progress_bar;

/// Folders of a checkpoint that a run reads.
const PARTS: [&str; 5] = ["scheduler", "text_encoder", "tokenizer", "transformer", "vae"];

/// A diffusers folder with the shape of its transformer and the shift of its scheduler, both read and checked.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    folder: PathBuf,
    config: Config,
    shift: Shift,
}

impl Checkpoint {
    /// Reads `scheduler/scheduler_config.json` and `transformer/config.json` of a folder; no weights.
    ///
    /// # Errors
    /// If a file cannot be read, or asks for what is not supported.
    pub fn open(folder: &Path) -> Result<Self> {
        let shift = read_shift(folder)?;
        Ok(Self { folder: folder.to_owned(), config: read_config(folder)?, shift })
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

    /// Looks for what [`Self::load`] would refuse; reads the headers of the weights alone.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn check(&self) -> Result<()> {
        check_weights(&self.folder, &self.config)
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
        let transformer = read_weights(&self.folder, config, kind, device, progress)?;
        Ok(Pipeline { transformer, shift: self.shift })
    }

    /// [`fingerprint`] of the parts of a model that the folder has: what else lies in it, a run of ours
    /// for instance, is not the model.
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
}

/// The shape of the transformer of a folder.
///
/// # Errors
/// If the file cannot be read, or is of a model that is not supported.
pub fn read_config(folder: &Path) -> Result<Config> {
    Config::load(&folder.join("transformer/config.json"))
}
