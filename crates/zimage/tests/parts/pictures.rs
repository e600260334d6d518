//! The picture set: atlas order, captions, and unknown words.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::safetensors::write_tensors;
use tempfile::{TempDir, tempdir};
use zimage::emoji::EmojiData;

/// A picture set of two tiles: the first red, the second blue but for one white corner pixel.
fn write_set() -> Result<TempDir> {
    let folder = tempdir()?;
    let mut atlas = image::RgbImage::new(64 * 32, 32);
    for y in 0..32 {
        for x in 0..32 {
            atlas.put_pixel(x, y, image::Rgb([255, 0, 0]));
            atlas.put_pixel(32 + x, y, image::Rgb([0, 0, 255]));
        }
    }
    atlas.put_pixel(63, 0, image::Rgb([255, 255, 255]));
    atlas.save(folder.path().join("emoji.png"))?;
    let item = |caption: &str, held_out: bool| serde_json::json!({"caption": caption, "held_out": held_out});
    let items = [item("google red square", false), item("twitter blue square", true)];
    std::fs::write(
        folder.path().join("captions.json"),
        serde_json::json!({"tile": 32, "items": items}).to_string(),
    )?;
    let words = ["<start>", "<end>", "google", "twitter", "red", "blue", "square"];
    std::fs::write(folder.path().join("vocabulary.txt"), words.join("\n") + "\n")?;
    let rows = Tensor::arange(words.len() as i64, (Kind::Half, Device::Cpu));
    let vectors = rows.unsqueeze(1).expand([-1, 4], false).contiguous();
    write_tensors(
        &folder.path().join("vectors.safetensors"),
        &[("vectors".to_owned(), vectors)].into_iter().collect(),
    )?;
    Ok(folder)
}

#[test]
fn tiles_and_items_line_up() -> Result<()> {
    let folder = write_set()?;
    let data = EmojiData::load(folder.path())?;
    assert_eq!(data.images.size(), [2, 3, 32, 32]);
    let pixel = |n: i64, y: i64, x: i64| -> Result<Vec<f32>> {
        Ok(Vec::try_from(data.images.select(0, n).select(1, y).select(1, x).contiguous())?)
    };
    assert_eq!(pixel(0, 31, 31)?, [1.0, -1.0, -1.0]);
    assert_eq!(pixel(1, 31, 31)?, [-1.0, -1.0, 1.0]);
    assert_eq!(pixel(1, 0, 31)?, [1.0, 1.0, 1.0]);
    assert_eq!(data.indices(false), [0]);
    assert_eq!(data.indices(true), [1]);
    assert_eq!(data.items[1].plain_caption(), "blue square");
    Ok(())
}

#[test]
fn captions_become_rows_between_marks() -> Result<()> {
    let folder = write_set()?;
    let vocabulary = EmojiData::load(folder.path())?.vocabulary;
    let rows = |caption: &str| -> Result<Vec<f32>> {
        let features = vocabulary.encode_caption(caption)?;
        assert_eq!(features.size()[1], 4);
        Ok(Vec::try_from(features.select(1, 0).contiguous())?)
    };
    assert_eq!(rows("Google: red-SQUARE!")?, [0.0, 2.0, 4.0, 6.0, 1.0]);
    assert_eq!(rows("")?, [0.0, 1.0]);
    let error = rows("google bleu square").expect_err("an unknown word").to_string();
    assert!(error.contains("\"bleu\"") && error.contains("blue"), "{error}");
    Ok(())
}
