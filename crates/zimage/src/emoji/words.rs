//! Captions of the emoji pictures as word vectors.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use tch::{Device, Kind, Tensor};
use tch_training::safetensors::Weights;

use crate::distil::Prompts;
use crate::model::ZImageTransformer;

const START: &str = "<start>";
const END: &str = "<end>";

/// Word vectors: the text encoder of the small model.
#[derive(Debug)]
pub struct Vocabulary {
    rows: HashMap<String, i64>,
    /// `[V, F]` in float32.
    vectors: Tensor,
}

impl Vocabulary {
    /// Reads `vocabulary.txt` (a word a line) and `vectors.safetensors` (a row a word).
    ///
    /// # Errors
    /// If a file is missing or the two do not match.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("vocabulary.txt");
        let text =
            fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        let rows: HashMap<String, i64> = text.lines().map(str::to_owned).zip(0..).collect();
        for word in [START, END] {
            ensure!(rows.contains_key(word), "{} lacks {word}", path.display());
        }
        let path = folder.join("vectors.safetensors");
        let vectors = Weights::open_file(&path)?.tensor("vectors", Kind::Float, Device::Cpu)?;
        ensure!(
            vectors.dim() == 2 && vectors.size()[0] == text.lines().count() as i64,
            "{}: {:?} does not fit {} words",
            path.display(),
            vectors.size(),
            rows.len()
        );
        Ok(Self { rows, vectors })
    }

    /// The width of a word vector, F.
    pub fn width(&self) -> i64 {
        self.vectors.size()[1]
    }

    /// `[L, F]`: the start mark, the caption's words, the end mark.
    ///
    /// # Errors
    /// Names a word that is not in the vocabulary, and those nearest to it.
    pub fn encode_caption(&self, caption: &str) -> Result<Tensor> {
        let mut rows = vec![self.rows[START]];
        let caption = caption.to_lowercase();
        for word in caption.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()) {
            match self.rows.get(word) {
                Some(row) => rows.push(*row),
                None => bail!(
                    "the word \"{word}\" is not in the vocabulary; did you mean {}?",
                    self.nearest(word).join(", ")
                ),
            }
        }
        rows.push(self.rows[END]);
        Ok(self.vectors.f_index_select(0, &Tensor::f_from_slice(&rows)?)?)
    }

    /// Encodes captions with the caption side of `model`.
    ///
    /// # Errors
    /// Names a word that is not in the vocabulary.
    pub fn encode_prompts<'a>(
        &self,
        model: &ZImageTransformer,
        captions: impl Iterator<Item = &'a str>,
    ) -> Result<Prompts> {
        let features = captions.map(|caption| self.encode_caption(caption));
        Prompts::from_features(model, features, &self.encode_caption("")?)
    }

    /// The three words that take the fewest edits.
    fn nearest(&self, word: &str) -> Vec<&str> {
        let mut words: Vec<(usize, &str)> = self
            .rows
            .keys()
            .filter(|known| !known.starts_with('<'))
            .map(|known| (edit_distance(word, known), known.as_str()))
            .collect();
        words.sort_unstable();
        words.into_iter().take(3).map(|(_, known)| known).collect()
    }
}

/// Levenshtein distance in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
