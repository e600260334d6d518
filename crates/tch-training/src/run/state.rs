//! The state of a run on disk: written so that a crash at any moment leaves one that can be loaded.
//!
//! A state is a numbered folder. It is written under another name, flushed to the disk, and renamed;
//! only then is its predecessor removed. The highest number counts, everything else is a leftover.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use tch::Tensor;
//! use tch_training::Parameters;
//! use tch_training::run::{Progress, StateFolder};
//!
//! # let folder = tempfile::tempdir()?;
//! let settings = serde_json::json!({ "learning_rate": 1e-4, "seed": 0 });
//! let mut states = StateFolder::open(&folder.path().join("state"), &settings)?;
//! assert!(states.load()?.is_none());
//! // Weights, moments, averages, counts: all that training changes.
//! let tensors = Parameters::from([("step".to_owned(), Tensor::from(200i64))]);
//! states.save(&tensors, Progress { seconds: 12.0, log_bytes: 0 })?;
//!
//! // The next process. With other settings it would be refused, and told in what they differ.
//! let states = StateFolder::open(&folder.path().join("state"), &settings)?;
//! let (tensors, _progress) = states.load()?.expect("a state");
//! assert_eq!(tensors["step"].int64_value(&[]), 200);
//! # Ok(())
//! # }
//! ```

use std::path::{Path, PathBuf};
use std::{fs, io};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Difference, Error, Result};
use crate::files::{create_folder, parse, read_text, sync_folder, write_json};
use crate::parameters::Parameters;
use crate::safetensors::{read_tensors, write_tensors};

/// Layout of the folder; another number is refused.
const VERSION: u32 = 2;
const TENSORS: &str = "tensors.safetensors";
const DESCRIPTION: &str = "state.json";
/// End of the names of folders that are being written or removed.
const PARTIAL: &str = "partial";

/// How far a run is, beside its tensors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Seconds spent on training, in all sessions.
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
    /// What decides the numbers of the run: its settings and its data.
    identity: Value,
    /// Number of the newest state.
    newest: Option<u64>,
}

impl StateFolder {
    /// Opens `folder` for the run that `identity` describes: its settings, and whatever else decides its
    /// numbers. Removes what a crash has left.
    ///
    /// # Errors
    /// [`Error::OtherRun`] if the state is that of another run, with all in which they differ;
    /// [`Error::Version`] if it has another layout; [`Error::File`] and [`Error::Json`] if it cannot be read.
    pub fn open(folder: &Path, identity: &impl Serialize) -> Result<Self> {
        let states = Self::cleaned(folder, identity)?;
        states.describe()?;
        Ok(states)
    }

    /// Opens `folder` for a run that starts anew: as [`Self::open`], but any state there is removed unseen.
    ///
    /// # Errors
    /// [`Error::File`] if a state cannot be removed.
    pub fn open_fresh(folder: &Path, identity: &impl Serialize) -> Result<Self> {
        let mut states = Self::cleaned(folder, identity)?;
        states.remove()?;
        Ok(states)
    }

    fn cleaned(folder: &Path, identity: &impl Serialize) -> Result<Self> {
        // Through text, as the saved one, since a number need not come back from there to the last bit.
        let identity =
            serde_json::to_string(identity).and_then(|text| serde_json::from_str(&text)).map_err(
                |source| Error::Json { place: "the identity of the run".to_owned(), source },
            )?;
        let mut states = Self { folder: folder.to_owned(), identity, newest: None };
        let (numbers, leftovers) = states.list().map_err(Error::file("reading", folder))?;
        for path in leftovers {
            fs::remove_dir_all(&path).map_err(Error::file("removing", &path))?;
        }
        states.newest = numbers.iter().max().copied();
        for number in numbers.into_iter().filter(|number| Some(*number) != states.newest) {
            states.discard(number)?;
        }
        Ok(states)
    }

    /// Whether there is a state to go on from.
    pub fn is_unfinished(&self) -> bool {
        self.newest.is_some()
    }

    /// The state to go on from, if there is one.
    ///
    /// # Errors
    /// As [`Self::open`] and [`read_tensors`].
    pub fn load(&self) -> Result<Option<(Parameters, Progress)>> {
        let (Some(number), Some(description)) = (self.newest, self.describe()?) else {
            return Ok(None);
        };
        Ok(Some((read_tensors(&self.path(number).join(TENSORS))?, description.progress)))
    }

    /// Writes a state and removes its predecessor.
    ///
    /// # Errors
    /// [`Error::In`] with the cause if it cannot be written; its predecessor is still there then.
    pub fn save(&mut self, tensors: &Parameters, progress: Progress) -> Result<()> {
        let number = self.newest.map_or(1, |newest| newest + 1);
        let path = self.path(number);
        self.write(&path, tensors, progress)
            .map_err(|error| error.inside(format!("saving the state to {}", path.display())))?;
        let before = self.newest.replace(number);
        before.map_or(Ok(()), |before| self.discard(before))
    }

    fn write(&self, path: &Path, tensors: &Parameters, progress: Progress) -> Result<()> {
        let partial = path.with_extension(PARTIAL);
        let description =
            Description { version: VERSION, identity: self.identity.clone(), progress };
        create_folder(&partial)?;
        write_json(&partial.join(DESCRIPTION), &description)?;
        write_tensors(&partial.join(TENSORS), tensors)?;
        fs::rename(&partial, path).map_err(Error::file("renaming to", path))?;
        sync_folder(&self.folder)
    }

    /// Removes every state: the run is finished.
    ///
    /// # Errors
    /// [`Error::File`] if a state cannot be removed.
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

    /// Numbers of the states there are, and folders that were being written or removed.
    fn list(&self) -> io::Result<(Vec<u64>, Vec<PathBuf>)> {
        let (mut numbers, mut leftovers) = (Vec::new(), Vec::new());
        if !self.folder.exists() {
            return Ok((numbers, leftovers));
        }
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            // What is not named as a state is somebody else's.
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let number = stem.parse().ok().filter(|number| *number < u64::MAX);
            let Some(number) = number else { continue };
            let own = self.path(number);
            if path == own.with_extension(PARTIAL) && path.is_dir() {
                leftovers.push(path);
            } else if path == own && path.is_dir() {
                numbers.push(number);
            }
        }
        Ok((numbers, leftovers))
    }

    /// Removes a state; interrupted at it, leaves nothing that looks like one.
    fn discard(&self, number: u64) -> Result<()> {
        let path = self.path(number);
        let partial = path.with_extension(PARTIAL);
        fs::rename(&path, &partial)
            .and_then(|()| fs::remove_dir_all(&partial))
            .map_err(Error::file("removing", &path))
    }

    /// Reads the description of the newest state and checks that it is one of this run.
    fn describe(&self) -> Result<Option<Description>> {
        let Some(number) = self.newest else { return Ok(None) };
        let path = self.path(number).join(DESCRIPTION);
        let text = read_text(&path)?;
        let any: Value = parse(&text, &path)?;
        if any["version"] != VERSION {
            let found = any["version"].to_string();
            return Err(Error::Version { path, expected: VERSION, found });
        }
        let description: Description = parse(&text, &path)?;
        let mut differences = Vec::new();
        compare("", &description.identity, &self.identity, &mut differences);
        if !differences.is_empty() {
            return Err(Error::OtherRun { folder: self.folder.clone(), differences });
        }
        Ok(Some(description))
    }
}

/// Lists where two values differ.
fn compare(name: &str, there: &Value, here: &Value, differences: &mut Vec<Difference>) {
    if let (Value::Object(left), Value::Object(right)) = (there, here) {
        let only_here = right.keys().filter(|key| !left.contains_key(*key));
        for key in left.keys().chain(only_here) {
            let name = if name.is_empty() { key.clone() } else { format!("{name}.{key}") };
            compare(&name, &there[key], &here[key], differences);
        }
    } else if there != here {
        let (there, here) = (there.clone(), here.clone());
        differences.push(Difference { name: name.to_owned(), there, here });
    }
}
