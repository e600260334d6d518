//! The state of a run on disk: written so that a crash at any moment leaves one that can be loaded.
//!
//! A state is a numbered folder. It is written under another name, flushed to the disk, and renamed;
//! only then is its predecessor removed. The highest number counts, everything else is a leftover.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::files::{sync_folder, write_json};
use crate::parameters::Parameters;
use crate::weights::{read_tensors, write_tensors};

/// Layout of the folder; another number is refused.
const VERSION: u32 = 2;
const TENSORS: &str = "tensors.safetensors";
const DESCRIPTION: &str = "state.json";
/// End of the names of folders that are being written or removed.
const PARTIAL: &str = "partial";

/// What a run has come to, beside its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Time spent on training, in all sessions.
    pub seconds: f64,
    /// Length of the run's log when it was saved.
    pub log_bytes: u64,
}

/// `state.json`.
#[derive(Serialize, Deserialize)]
struct Description {
    version: u32,
    identity: Value,
    progress: Progress,
}

/// The folder that holds the states of one run.
#[derive(Debug)]
pub struct StateFolder {
    folder: PathBuf,
    /// What the run is: its recipe and its data.
    identity: Value,
    /// Number of the newest state.
    newest: Option<u64>,
}

impl StateFolder {
    /// Opens `folder` for the run that `identity` describes, which is its recipe and whatever else
    /// decides its numbers. Removes what a crash has left, and with `fresh` any state there is.
    ///
    /// # Errors
    /// If the state is that of another run: says in what they differ. If the folder cannot be read.
    pub fn open(folder: &Path, identity: &impl Serialize, fresh: bool) -> Result<Self> {
        // Through text, as the saved one, since a number need not come back from there to the last bit.
        let identity = serde_json::from_str(&serde_json::to_string(identity)?)?;
        let mut states = Self { folder: folder.to_owned(), identity, newest: None };
        states.clean().with_context(|| format!("cleaning {}", folder.display()))?;
        if fresh {
            states.remove()?;
        }
        states.describe()?;
        Ok(states)
    }

    /// Whether there is a state to go on from.
    pub fn is_unfinished(&self) -> bool {
        self.newest.is_some()
    }

    /// The state to go on from.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn load(&self) -> Result<Option<(Parameters, Progress)>> {
        let (Some(number), Some(description)) = (self.newest, self.describe()?) else {
            return Ok(None);
        };
        Ok(Some((read_tensors(&self.path(number).join(TENSORS))?, description.progress)))
    }

    /// Writes a state and removes its predecessor.
    ///
    /// # Errors
    /// If it cannot be written; its predecessor is still there then.
    pub fn save(&mut self, tensors: &Parameters, progress: Progress) -> Result<()> {
        let number = self.newest.map_or(1, |newest| newest + 1);
        let path = self.path(number);
        let partial = path.with_extension(PARTIAL);
        let description =
            Description { version: VERSION, identity: self.identity.clone(), progress };
        let write = || -> Result<()> {
            fs::create_dir_all(&partial)?;
            write_json(&partial.join(DESCRIPTION), &description)?;
            write_tensors(&partial.join(TENSORS), tensors)?;
            fs::rename(&partial, &path)?;
            sync_folder(&self.folder)
        };
        write().with_context(|| format!("saving the training state to {}", path.display()))?;
        let before = self.newest.replace(number);
        before.map_or(Ok(()), |before| self.discard(before))
    }

    /// Removes every state: the run is finished, or starts anew.
    ///
    /// # Errors
    /// If the folder cannot be removed.
    pub fn remove(&mut self) -> Result<()> {
        if let Some(number) = self.newest.take() {
            self.discard(number)?;
            // Stays where somebody else keeps something in it.
            let _ = fs::remove_dir(&self.folder);
        }
        Ok(())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.join(format!("{number:06}"))
    }

    /// Finds the newest state and removes what else a crash may have left.
    fn clean(&mut self) -> Result<()> {
        if !self.folder.exists() {
            return Ok(());
        }
        let mut numbers: Vec<u64> = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.extension().is_some_and(|extension| extension == PARTIAL) {
                fs::remove_dir_all(&path)?;
            } else if let Ok(number) = name.parse() {
                numbers.push(number);
            }
        }
        numbers.sort_unstable();
        self.newest = numbers.pop();
        numbers.into_iter().try_for_each(|number| self.discard(number))
    }

    /// Removes a state; interrupted at it, leaves nothing that looks like one.
    fn discard(&self, number: u64) -> Result<()> {
        let path = self.path(number);
        let partial = path.with_extension(PARTIAL);
        fs::rename(&path, &partial)
            .and_then(|()| fs::remove_dir_all(&partial))
            .with_context(|| format!("removing {}", path.display()))
    }

    /// Reads the description of the newest state and checks that it is one of this run.
    fn describe(&self) -> Result<Option<Description>> {
        let Some(number) = self.newest else { return Ok(None) };
        let path = self.path(number).join(DESCRIPTION);
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let parsing = || format!("parsing {}", path.display());
        let any: Value = serde_json::from_str(&text).with_context(parsing)?;
        ensure!(
            any["version"] == VERSION,
            "{}: version must be {VERSION}, found {}",
            path.display(),
            any["version"]
        );
        let description: Description = serde_json::from_value(any).with_context(parsing)?;
        let mut differences = Vec::new();
        compare("", &description.identity, &self.identity, &mut differences);
        if !differences.is_empty() {
            bail!(
                "the unfinished run in {} is another one: {}. Use its options, another --out, or \
                 --fresh, which forgets it",
                self.folder.display(),
                differences.join("; ")
            );
        }
        Ok(Some(description))
    }
}

/// Lists where two values differ.
fn compare(name: &str, there: &Value, here: &Value, differences: &mut Vec<String>) {
    if let (Value::Object(left), Value::Object(right)) = (there, here) {
        let only_here = right.keys().filter(|key| !left.contains_key(*key));
        for key in left.keys().chain(only_here) {
            let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            compare(&name, &there[key], &here[key], differences);
        }
    } else if there != here {
        differences.push(format!("{name} is {there} there and {here} here"));
    }
}
