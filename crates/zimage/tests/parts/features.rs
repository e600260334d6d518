//! Features of prompts on disk, and conditions made from features of any length.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::Result;
use decoupled_dmd::{PostShift, Shift};
use tch::{Device, Kind, Tensor};
use tch_training::run::Hash;
use tch_training::safetensors::{read_tensors, write_tensors};
use tempfile::tempdir;
use zimage::distil::{Prompts, denoiser};
use zimage::model::padded;
use zimage::text::{FeatureCache, Prompt, TextEncoder, encoder_key, read_prompts};
use zimage::{Config, Role, ZImageTransformer};

use super::common::narrow::narrow;
use super::common::{assert_float64, max_difference, reference, seeded, wave};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

fn model() -> PathBuf {
    reference("text_encoder")
}

fn refusal<T>(result: Result<T>) -> String {
    format!("{:#}", result.err().expect("a refusal"))
}

/// The last is that of the null branch.
const PROMPTS: [&str; 4] = ["A red fox.", "雪", "Snow on the hills.", ""];

fn encode(folder: &Path) -> Result<FeatureCache> {
    FeatureCache::encode(folder, &model(), CPU, &PROMPTS, &mut |_, _| {})
}

/// Entries with the times of their last change.
fn entries(folder: &Path) -> Vec<(PathBuf, SystemTime)> {
    let mut entries: Vec<_> = fs::read_dir(folder)
        .expect("the cache")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .map(|path| (path.clone(), fs::metadata(path).expect("a file").modified().expect("a time")))
        .collect();
    entries.sort();
    entries
}

#[test]
fn features_are_kept_as_the_encoder_made_them() -> Result<()> {
    let folder = tempdir()?;
    let folder = folder.path();
    let mut calls = Vec::new();
    let kind = (Kind::BFloat16, Device::Cpu);
    FeatureCache::encode(folder, &model(), kind, &PROMPTS, &mut |done, of| calls.push((done, of)))?;
    assert_eq!(calls, [(1, 4), (2, 4), (3, 4), (4, 4)]);

    let cache = FeatureCache::open(folder)?;
    let encoder = TextEncoder::load(&model(), Kind::BFloat16, Device::Cpu)?;
    assert_eq!(cache.width(), encoder.width());
    for prompt in PROMPTS {
        let (found, expected) = (cache.get(prompt)?, &encoder.encode(&[prompt])?[0]);
        assert_eq!((found.kind(), found.size()), (Kind::BFloat16, expected.size()));
        assert_eq!(max_difference(&found, expected), 0.0);
    }
    let refusal = refusal(cache.get("A blue fox."));
    assert!(refusal.contains("\"A blue fox.\" is not among the features"), "{refusal}");
    Ok(())
}

#[test]
fn an_interrupted_run_goes_on_and_broken_entries_are_made_anew() -> Result<()> {
    let folder = tempdir()?;
    let cache = encode(folder.path())?;
    let before: Vec<Tensor> =
        PROMPTS[..3].iter().map(|prompt| cache.get(prompt)).collect::<Result<_>>()?;
    let files = entries(folder.path());
    assert_eq!(files.len(), 4);

    // One is missing, one is cut short, one holds no numbers; the fourth is fine.
    fs::remove_file(&files[0].0)?;
    let bytes = fs::read(&files[1].0)?;
    fs::write(&files[1].0, &bytes[..bytes.len() - 7])?;
    let mut tensors = read_tensors(&files[2].0)?;
    let _ = tensors.get_mut("features").expect("features").fill_(f64::NAN);
    write_tensors(&files[2].0, &tensors)?;
    // What a crash in the middle of writing leaves behind.
    fs::write(files[0].0.with_extension("safetensors.partial"), "half")?;
    let broken: Vec<String> = PROMPTS
        .iter()
        .filter_map(|prompt| cache.get(prompt).err())
        .map(|error| format!("{error:#}"))
        .collect();
    assert_eq!(broken.len(), 3, "{broken:?}");
    assert!(broken.iter().any(|text| text.contains("not finite")), "{broken:?}");
    assert!(broken.iter().any(|text| text.contains("is broken; encoding")), "{broken:?}");

    let cache = encode(folder.path())?;
    for (prompt, before) in PROMPTS[..3].iter().zip(before) {
        assert_eq!(max_difference(&cache.get(prompt)?, &before), 0.0);
    }
    assert!(cache.get("").is_ok());
    let after = entries(folder.path());
    assert_eq!(after.len(), 4);
    assert_eq!(after[3], files[3], "the entry that was fine is untouched");
    Ok(())
}

#[test]
fn entries_that_were_mixed_up_are_refused() -> Result<()> {
    let folder = tempdir()?;
    let cache = encode(folder.path())?;
    let files = entries(folder.path());
    for (file, _) in &files[1..] {
        fs::copy(&files[0].0, file)?;
    }
    let refusals = PROMPTS[..3].iter().filter_map(|prompt| cache.get(prompt).err()).count();
    assert!(refusals >= 2, "one file at most is of its own prompt");
    let refusal = refusal(PROMPTS[..3].iter().try_for_each(|prompt| cache.get(prompt).map(drop)));
    assert!(refusal.contains("of another prompt"), "{refusal}");
    Ok(())
}

#[test]
fn another_encoder_does_not_add_to_a_cache() -> Result<()> {
    let cache = tempdir()?;
    let cache = cache.path();
    encode(cache)?;
    let other = (Kind::BFloat16, Device::Cpu);
    let refused = refusal(FeatureCache::encode(cache, &model(), other, &PROMPTS, &mut |_, _| {}));
    assert!(refused.contains("another text encoder"), "{refused}");

    fs::write(cache.join("features.json"), r#"{"format": 9, "encoder": "", "width": 1}"#)?;
    assert!(refusal(FeatureCache::open(cache)).contains("format 9 is not supported"));
    fs::write(cache.join("features.json"), "{")?;
    assert!(refusal(FeatureCache::open(cache)).contains("parsing"));
    let empty = tempdir()?;
    assert!(refusal(FeatureCache::open(empty.path())).contains("features.json"));
    Ok(())
}

#[test]
fn the_key_tells_encoders_apart_but_not_copies() -> Result<()> {
    let copy = tempdir()?;
    let copy = copy.path();
    let weights = copy.join("text_encoder").join("model.safetensors");
    for part in ["text_encoder", "tokenizer"] {
        fs::create_dir_all(copy.join(part))?;
    }
    fs::copy(model().join("text_encoder/config.json"), copy.join("text_encoder/config.json"))?;
    fs::copy(model().join("tokenizer/tokenizer.json"), copy.join("tokenizer/tokenizer.json"))?;
    let key = || encoder_key(copy, Kind::Float);
    assert!(refusal(key()).contains("no safetensors files"));

    // Larger than what is read whole.
    let mut bytes: Vec<u8> =
        (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    fs::write(&weights, &bytes)?;
    let first = key()?;
    fs::write(&weights, &bytes)?;
    assert_eq!(key()?, first, "times do not count");
    assert_ne!(encoder_key(copy, Kind::BFloat16)?, first);
    for place in [0, bytes.len() - 1] {
        bytes[place] ^= 1;
        fs::write(&weights, &bytes)?;
        assert_ne!(key()?, first);
        bytes[place] ^= 1;
    }
    // Another training changes values everywhere.
    let trained: Vec<u8> =
        bytes.iter().enumerate().map(|(i, byte)| byte ^ u8::from(i % 1000 == 0)).collect();
    fs::write(&weights, &trained)?;
    assert_ne!(key()?, first);
    fs::write(&weights, &bytes)?;
    fs::write(copy.join("tokenizer/tokenizer.json"), "{}")?;
    assert_ne!(key()?, first);
    Ok(())
}

/// Published values of the hash: of nothing, and of "a" (without the length that `add` appends).
#[test]
fn the_hash_is_fnv() {
    assert_eq!(Hash::default().hex(), "6c62272e07bb014262b821756295c58d");
    let mut hash = Hash::default();
    hash.add(b"a");
    let mut expected: u128 = 0xd228_cb69_6f1a_8caf_7891_2b70_4e4a_8964;
    for byte in 1u64.to_le_bytes() {
        expected = (expected ^ u128::from(byte)).wrapping_mul((1 << 88) + 0x13b);
    }
    assert_eq!(hash.hex(), format!("{expected:032x}"));
}

#[test]
fn a_file_of_prompts_is_read_line_by_line() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("prompts.txt");
    fs::write(&path, "\u{feff}a fox\r\n\r\n  snow \n\na fox\nein Fuchs 🦊\n \t\nsnow")?;
    let texts = |prompts: Vec<Prompt>| -> Vec<String> {
        assert!(prompts.iter().all(|prompt| prompt.negative.is_none()));
        prompts.into_iter().map(|prompt| prompt.text).collect()
    };
    assert_eq!(texts(read_prompts(&path)?), ["a fox", "snow", "ein Fuchs 🦊"]);

    fs::write(&path, " \n\n")?;
    assert!(refusal(read_prompts(&path)).contains("prompts.txt holds no prompts"));
    fs::write(&path, "")?;
    assert!(refusal(read_prompts(&path)).contains("holds no prompts"));
    fs::write(&path, b"fine\nfine too\nna\xefve\n")?;
    assert!(refusal(read_prompts(&path)).contains("line 3 is not UTF-8"));
    assert!(refusal(read_prompts(&folder.path().join("none.txt"))).contains("none.txt"));
    Ok(())
}

#[test]
fn a_file_of_json_has_negative_prompts() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("prompts.jsonl");
    let lines = [
        r#"{"prompt": " a fox ", "negative": "blurred "}"#,
        "",
        r#"{"prompt": "snow", "seed": 3, "negative": null}"#,
        r#"{"prompt": "a fox", "negative": "blurred"}"#,
        r#"{"prompt": "a fox"}"#,
        r#"{"prompt": "a fox", "negative": ""}"#,
    ];
    fs::write(&path, lines.join("\n"))?;
    let prompt = |text: &str, negative: Option<&str>| Prompt {
        text: text.to_owned(),
        negative: negative.map(str::to_owned),
    };
    let expected = [
        prompt("a fox", Some("blurred")),
        prompt("snow", None),
        prompt("a fox", None),
        prompt("a fox", Some("")),
    ];
    assert_eq!(read_prompts(&path)?, expected);
    for line in ["a fox", r#""a fox""#, r#"{"text": "a fox"}"#, r#"{"prompt": 3}"#] {
        fs::write(&path, format!("{{\"prompt\": \"snow\"}}\n{line}"))?;
        let error = refusal(read_prompts(&path));
        assert!(error.contains("line 2") && error.contains("\"prompt\""), "{error}");
    }
    fs::write(&path, r#"{"prompt": " "}"#)?;
    assert!(refusal(read_prompts(&path)).contains("line 1: its prompt is empty"));
    Ok(())
}

/// Captions whose null captions differ: each batch has one length of either, and every row its own.
#[test]
fn null_captions_are_those_of_their_captions() -> Result<()> {
    let model = transformer()?;
    let null = |length: i64| wave(&[length, 32], 7.0 + length as f64, Kind::Float);
    // Of padded lengths 32, 64 and 32.
    let nulls = [null(8), null(40), null(9)];
    let null_of = vec![0, 2, 2, 1, 0, 1];
    let prompts = mixed(&model)?.with_nulls(&model, &nulls, null_of.clone())?;
    let encoded = |index: usize| model.encode_captions(&[nulls[index].shallow_clone()], Role::BASE);
    for (item, index) in (0..).zip(&null_of) {
        let (_, null) = prompts.conditions(&[item])?;
        assert_float64(&format!("null of {item}"), &null[0], &encoded(*index)?);
    }
    // Captions 0, 2 and 4 are of one length, and so are their null captions.
    let (_, null) = prompts.conditions(&[2, 0, 4])?;
    let expected = Tensor::f_cat(&[encoded(2)?, encoded(0)?, encoded(0)?], 0)?;
    assert_float64("of several", &null[0], &expected);
    // Captions 1 and 5 are of one length, and their null captions are not.
    let error = refusal(prompts.conditions(&[1, 5]));
    assert!(error.contains("null captions too, found [[64, 32], [64, 64]]"), "{error}");
    let batches = prompts.batches(&[0, 1, 2, 3, 4, 5], 8)?;
    assert_eq!(batches, [vec![0, 2, 4], vec![1], vec![5], vec![3]]);

    let refused = |null_of| refusal(mixed(&model).unwrap().with_nulls(&model, &nulls, null_of));
    assert!(refused(vec![0; 5]).contains("6 captions need as many null captions, found 5"));
    assert!(refused(vec![3; 6]).contains("there is no null caption 3, there are 3"));
    Ok(())
}

/// A model without a zero in it, so that captions matter; in float64, so that batches are their items.
fn transformer() -> Result<ZImageTransformer> {
    let config = Config { cap_feat_dim: 32, axes_lens: vec![600, 16, 16], ..narrow() };
    let parameters = (0..)
        .zip(config.parameters())
        .map(|(k, (name, shape))| (name, wave(&shape, f64::from(k), Kind::Double) * 0.3))
        .collect();
    ZImageTransformer::from_parameters(config, parameters)
}

/// Lengths that pad to 32, 64 and 512.
const LENGTHS: [i64; 6] = [9, 40, 12, 512, 32, 33];

fn captions() -> Vec<Tensor> {
    LENGTHS.iter().map(|length| wave(&[*length, 32], *length as f64, Kind::Float)).collect()
}

fn mixed(model: &ZImageTransformer) -> Result<Prompts> {
    let empty = wave(&[8, 32], 0.5, Kind::Float);
    Prompts::from_features(model, captions().into_iter().map(Ok), &empty)
}

#[test]
fn captions_keep_their_own_length() -> Result<()> {
    let model = transformer()?;
    let prompts = mixed(&model)?;
    for (item, caption) in (0..).zip(captions()) {
        let (cond, null) = prompts.conditions(&[item])?;
        let alone = model.encode_captions(&[caption], Role::BASE)?;
        assert_eq!(cond[0].size(), alone.size());
        assert_float64(&format!("caption {item}"), &cond[0], &alone);
        assert_eq!(null[0].size(), [1, 32, 24]);
    }
    let (cond, null) = prompts.conditions(&[5, 1, 5])?;
    assert_eq!((cond[0].size(), null[0].size()), (vec![3, 64, 24], vec![3, 32, 24]));

    assert!(
        refusal(prompts.conditions(&[0, 1]))
            .contains("padded length, and null captions too, found [[32, 32], [64, 32]]")
    );
    assert!(refusal(prompts.conditions(&[])).contains("one padded length"));
    assert!(refusal(prompts.conditions(&[6])).contains("there is no caption 6, there are 6"));
    assert!(refusal(prompts.conditions(&[-1])).contains("there is no caption -1"));
    assert!(refusal(prompts.buckets(&[])).contains("no captions to draw from"));
    let wrong = [Ok(wave(&[3, 32], 0.0, Kind::Float)), Ok(wave(&[3, 31], 0.0, Kind::Float))];
    let empty = wave(&[8, 32], 0.5, Kind::Float);
    let refused = refusal(Prompts::from_features(&model, wrong, &empty));
    assert!(
        refused.contains("captions [0, 1]") && refused.contains("must be [L, 32]"),
        "{refused}"
    );
    let scalar = [Ok(Tensor::from(1.0))];
    assert!(refusal(Prompts::from_features(&model, scalar, &empty)).contains("caption 0 must be"));
    assert!(refusal(Prompts::from_features(&model, [], &empty)).contains("no captions"));
    Ok(())
}

#[test]
fn batches_are_of_one_length_and_every_caption_is_as_likely() -> Result<()> {
    let prompts = mixed(&transformer()?)?;
    let items = [3, 5, 0, 1, 2, 4, 0];
    let length = |item: i64| padded(LENGTHS[item as usize]);
    let batches = prompts.batches(&items, 3)?;
    for batch in &batches {
        assert!(batch.len() <= 3);
        let first = length(items[batch[0] as usize]);
        assert!(batch.iter().all(|position| length(items[*position as usize]) == first));
    }
    let mut positions = batches.concat();
    positions.sort_unstable();
    assert_eq!(positions, [0, 1, 2, 3, 4, 5, 6]);
    assert!(prompts.batches(&items, 0).is_err());

    let _lock = seeded(3);
    let buckets = prompts.buckets(&[0, 1, 2, 3, 4, 5])?;
    let (draws, batch) = (3000, 4);
    let mut counts = [0u32; 6];
    for _ in 0..draws {
        let items = buckets.draw(batch)?;
        assert_eq!(items.len(), batch);
        assert!(items.iter().all(|item| length(*item) == length(items[0])));
        for item in items {
            counts[item as usize] += 1;
        }
    }
    println!("{counts:?} times in {draws} batches of {batch}");
    // 2000 each; the caption that is alone in its bucket comes 4 at a time: a deviation of 82.
    assert!(counts.iter().all(|count| (1650..2350).contains(count)), "{counts:?}");
    Ok(())
}

#[test]
fn guidance_takes_a_null_caption_of_another_length() -> Result<()> {
    let model = transformer()?;
    let (cond, null) = mixed(&model)?.conditions(&[1, 5])?;
    assert_ne!(cond[0].size(), null[0].size());
    let denoiser = denoiser(&model, Shift::NONE);
    let x = wave(&[2, 4, 4, 4], 0.1, Kind::Double);
    let time = PostShift::new(Tensor::from_slice(&[0.3f32, 0.7]))?;
    let (one, two) = denoiser.denoise_pair(&x, &time, &cond, &null)?;
    assert_float64("one", &one, &denoiser.denoise(&x, &time, &cond)?);
    assert_float64("two", &two, &denoiser.denoise(&x, &time, &null)?);
    assert!(max_difference(&one, &two) > 1e-4, "the caption matters");
    Ok(())
}

/// From the files of the encoder to conditions, with no encoder in between.
#[test]
fn prompts_come_from_a_cache() -> Result<()> {
    let folder = tempdir()?;
    encode(folder.path())?;
    let (cache, model) = (FeatureCache::open(folder.path())?, transformer()?);
    let features = PROMPTS[..3].iter().map(|prompt| cache.get(prompt));
    let prompts = Prompts::from_features(&model, features, &cache.get("")?)?;
    let (cond, null) = prompts.conditions(&[1])?;
    let encoder = TextEncoder::load(&self::model(), CPU.0, CPU.1)?;
    let expected = model.encode_captions(&encoder.encode(&["雪"])?, Role::BASE)?;
    assert_float64("the prompt", &cond[0], &expected);
    let expected = model.encode_captions(&encoder.encode(&[""])?, Role::BASE)?;
    assert_float64("the empty prompt", &null[0], &expected);
    Ok(())
}
