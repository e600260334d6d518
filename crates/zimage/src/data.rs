//! The emoji pictures and their captions.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::weights::{Weights, read_json};

/// Side of a tile in the atlas.
const TILE: i64 = 32;
/// Tiles to a row of the atlas.
const COLUMNS: i64 = 64;

const START: &str = "<start>";
const END: &str = "<end>";

/// One picture's description.
#[derive(Clone, Debug, Deserialize)]
pub struct Item {
    /// The vendor, then what the picture shows.
    pub caption: String,
    pub name: String,
    pub vendor: String,
    pub category: String,
    /// Kept out of training.
    pub held_out: bool,
}

impl Item {
    /// The caption without its first word, the vendor.
    pub fn plain_caption(&self) -> &str {
        self.caption.split_once(' ').map_or("", |(_, rest)| rest)
    }
}

/// Pictures, their descriptions, and the words to describe them with.
#[derive(Debug)]
pub struct EmojiData {
    /// `[N, 3, 32, 32]` in [-1, 1].
    pub images: Tensor,
    pub items: Vec<Item>,
    pub vocabulary: Vocabulary,
}

impl EmojiData {
    /// Reads `emoji.png`, `captions.json` and the vocabulary.
    ///
    /// # Errors
    /// If a file is missing, or the atlas holds fewer tiles than there are captions.
    pub fn load(folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct Captions {
            items: Vec<Item>,
        }
        let Captions { items } = read_json(&folder.join("captions.json"))?;
        let images = read_atlas(&folder.join("emoji.png"), items.len() as i64)?;
        Ok(Self { images, items, vocabulary: Vocabulary::load(folder)? })
    }

    /// Indices of the items to train on, or of those held out.
    pub fn indices(&self, held_out: bool) -> Vec<i64> {
        (0..).zip(&self.items).filter(|(_, i)| i.held_out == held_out).map(|(n, _)| n).collect()
    }
}

/// The first `count` tiles as `[count, 3, 32, 32]` in [-1, 1].
fn read_atlas(path: &Path, count: i64) -> Result<Tensor> {
    let atlas =
        image::open(path).with_context(|| format!("reading {}", path.display()))?.into_rgb8();
    let (width, height) = (i64::from(atlas.width()), i64::from(atlas.height()));
    let rows = height / TILE;
    ensure!(
        width == COLUMNS * TILE && height % TILE == 0 && rows * COLUMNS >= count && count > 0,
        "{}: {width}x{height} pixels do not hold {count} tiles, {COLUMNS} to a row",
        path.display()
    );
    Ok(Tensor::f_from_slice(&atlas.into_raw())?
        .f_reshape([rows, TILE, COLUMNS, TILE, 3])?
        .f_permute([0, 2, 4, 1, 3])?
        .f_reshape([rows * COLUMNS, 3, TILE, TILE])?
        .f_narrow(0, 0, count)?
        .f_to_kind(Kind::Float)?
        .f_div_scalar(127.5)?
        .f_sub_scalar(1.0)?)
}

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
