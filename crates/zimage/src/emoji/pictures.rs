//! The emoji pictures and their captions.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use decoupled_dmd::arithmetic::Arithmetic as _;
use serde::Deserialize;
use tch::{Kind, Tensor};
use tch_training::files::read_json;

use crate::emoji::words::Vocabulary;

/// Side of a tile in the atlas.
const TILE: i64 = 32;
/// Tiles to a row of the atlas.
const COLUMNS: i64 = 64;

/// One picture's description.
#[derive(Clone, Debug, Deserialize)]
pub struct Item {
    /// The vendor, then what the picture shows.
    pub caption: String,
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
    let reading = || format!("reading {}", path.display());
    // Before a pixel is decoded: a small file may hold a huge picture.
    let (width, height) = image::image_dimensions(path).with_context(reading)?;
    let (width, height) = (i64::from(width), i64::from(height));
    let rows = (count + COLUMNS - 1) / COLUMNS;
    ensure!(
        width == COLUMNS * TILE && height == rows * TILE && count > 0,
        "{}: {width}x{height} pixels are not {count} tiles, {COLUMNS} to a row",
        path.display()
    );
    let atlas = image::open(path).with_context(reading)?.into_rgb8();
    Ok(Tensor::f_from_slice(&atlas.into_raw())?
        .f_reshape([rows, TILE, COLUMNS, TILE, 3])?
        .f_permute([0, 2, 4, 1, 3])?
        .f_reshape([rows * COLUMNS, 3, TILE, TILE])?
        .f_narrow(0, 0, count)?
        .f_to_kind(Kind::Float)?
        .over(127.5)?
        .minus(1.0)?)
}
