//! Files from strangers: thousands of changed copies of each kind of file are read or refused, without a panic, without
//! an end of memory, and in bounded time.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Result;
use tch::{Device, Kind};
use tch_training::run::StateFolder;
use tch_training::safetensors::Weights;
use tempfile::tempdir;
use zimage::Config;
use zimage::distil::write_curves;
use zimage::emoji::EmojiData;
use zimage::text::Qwen3Encoder;

use super::common::readers::{Reader, readers};
use super::common::small_pipeline::copy as copy_folder;
use super::common::{reference, seeded};

/// Changed copies of each file, unless this variable says how many.
const COPIES: u64 = 400;
const COPIES_VARIABLE: &str = "HOSTILE_COPIES";
/// Much longer than one copy takes.
const PATIENCE: Duration = Duration::from_secs(20);

/// SplitMix64, so that every run changes the same bytes.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }
}

/// A few bytes flipped, cut off, doubled, or replaced by what parsers stumble over.
fn changed(original: &[u8], random: &mut Random) -> Vec<u8> {
    const STRANGE: [&[u8]; 14] = [
        b"16777216",
        b"-1",
        b"1e400",
        b"18446744073709551615",
        b"0",
        b"null",
        b"[",
        b"{\"a\":",
        b"\"",
        b"[[[[[[[[[[[[[[[[",
        b"\\ud800",
        b"\xff\xfe",
        b"../../etc/passwd",
        b"NaN",
    ];
    let mut bytes = original.to_vec();
    for _ in 0..=random.below(3) {
        let at = random.below(bytes.len());
        match random.below(5) {
            0 => bytes.truncate(at),
            1 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            2 => {
                let end = (at + random.below(40)).min(bytes.len());
                bytes.drain(at..end);
            }
            3 => {
                let end = (at + random.below(64)).min(bytes.len());
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let strange = STRANGE[random.below(STRANGE.len())];
                let end = (at + random.below(8)).min(bytes.len());
                bytes.splice(at..end, strange.iter().copied());
            }
        }
    }
    bytes
}

/// Reads changed copies of a file in place of it, and counts those that are taken.
fn attack(name: &str, path: &Path, read: impl Fn() -> Result<()>) -> Result<()> {
    let original = fs::read(path)?;
    read()?;
    let copies = std::env::var(COPIES_VARIABLE).map_or(Ok(COPIES), |text| text.parse())?;
    let (mut random, mut taken) = (Random(name.len() as u64), 0);
    for copy in 0..copies {
        let bytes = changed(&original, &mut random);
        fs::write(path, &bytes)?;
        let start = Instant::now();
        match catch_unwind(AssertUnwindSafe(&read)) {
            Ok(result) => taken += u64::from(result.is_ok()),
            Err(_) => {
                let kept = std::env::temp_dir().join(format!("hostile-{name}-{copy}"));
                fs::write(&kept, bytes)?;
                panic!("{name}, copy {copy}: a panic; the file is {}", kept.display());
            }
        }
        assert!(start.elapsed() < PATIENCE, "{name}, copy {copy}: {:?}", start.elapsed());
    }
    fs::write(path, original)?;
    println!("{name}: {copies} changed copies, {taken} of them taken");
    // What refuses all would be no reader.
    assert!(taken < copies, "{name}: nothing was refused");
    Ok(())
}

/// A copy of a file of the references in a folder of its own.
fn copy(folder: &Path, source: &str) -> Result<std::path::PathBuf> {
    let source = reference(source);
    let path = folder.join(source.file_name().expect("a file"));
    fs::copy(&source, &path)?;
    Ok(path)
}

#[test]
fn changed_copies_of_every_file_are_read_or_refused() -> Result<()> {
    let _guard = seeded(0);
    let folder = tempdir()?;
    for Reader { name, path, read } in readers(folder.path(), &reference(""))? {
        if name == "tokenizer" {
            // The tokenizers library panics on some of these, which the reader catches; nobody need see it.
            std::panic::set_hook(Box::new(|_| ()));
        }
        let attacked = attack(name, &path, read);
        drop(std::panic::take_hook());
        attacked?;
    }
    Ok(())
}

#[test]
fn a_header_of_millions_of_axes_is_refused_while_it_is_read() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    let axes = "1,".repeat(2_000_000);
    let header =
        format!("{{\"a\":{{\"dtype\":\"F32\",\"shape\":[{axes}1],\"data_offsets\":[0,4]}}}}");
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 4]].concat();
    fs::write(&path, file)?;
    let error = format!("{:#}", anyhow::Error::from(Weights::open_file(&path).expect_err("axes")));
    assert!(error.contains("at most 64 axes"), "{error}");
    Ok(())
}

#[test]
fn a_small_file_of_a_huge_picture_is_refused_before_it_is_decoded() -> Result<()> {
    let folder = tempdir()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../assets/emoji");
    copy_folder(&source, folder.path())?;
    let picture = image::GrayImage::new(2048, 8000);
    picture.save(folder.path().join("emoji.png"))?;
    let error = format!("{:#}", EmojiData::load(folder.path()).expect_err("a huge picture"));
    assert!(error.contains("2048x8000 pixels are not 918 tiles"), "{error}");
    Ok(())
}

#[cfg(unix)]
#[test]
fn a_pipe_is_no_file() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    assert!(std::process::Command::new("mkfifo").arg(&path).status()?.success());
    let error =
        format!("{:#}", anyhow::Error::from(Weights::open_file(&path).expect_err("a pipe")));
    assert!(error.contains("not a regular file"), "{error}");
    Ok(())
}

#[test]
fn layers_by_the_million_are_refused_before_they_are_listed() -> Result<()> {
    let folder = tempdir()?;
    let folder = folder.path();
    copy_folder(&reference("text_encoder/text_encoder"), folder)?;
    let with = |path: &Path, name: &str| -> Result<()> {
        let mut config: serde_json::Value = serde_json::from_str(&fs::read_to_string(path)?)?;
        config[name] = 65_536.into();
        config.as_object_mut().expect("an object").remove("layer_types");
        Ok(fs::write(path, config.to_string())?)
    };
    let path = folder.join("config.json");
    with(&path, "num_hidden_layers")?;
    let error = Qwen3Encoder::load(folder, Kind::Float, Device::Cpu).expect_err("layers");
    assert!(format!("{error:#}").contains("num_hidden_layers must be at most 1024"), "{error:#}");
    let path = copy(folder, "pipeline/transformer/config.json")?;
    with(&path, "n_layers")?;
    let error = Config::load(&path).expect_err("layers");
    assert!(format!("{error:#}").contains("n_layers must be in 0..=1024"), "{error:#}");
    Ok(())
}

#[test]
fn folders_of_others_beside_the_states_stay() -> Result<()> {
    let folder = tempdir()?;
    let states = folder.path().join("state");
    for name in ["7", "+5", "0000008"] {
        fs::create_dir_all(states.join(name))?;
    }
    fs::write(states.join("x.partial"), "")?;
    fs::write(states.join("000009"), "")?;
    let identity = serde_json::json!({});
    for open in [StateFolder::open, StateFolder::open_fresh] {
        assert!(!open(&states, &identity)?.is_unfinished());
    }
    assert_eq!(fs::read_dir(&states)?.count(), 5);
    Ok(())
}

#[test]
fn numbers_beyond_float32_are_no_points_of_a_curve() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("curves.svg");
    let point = |update, value: f64| (update, vec![("ca".to_owned(), value)]);
    write_curves(&path, &[point(1, 1e308), point(2, -1e308), point(3, 1.0), point(4, 2.0)])?;
    assert!(fs::read_to_string(&path)?.contains("</svg>"));
    Ok(())
}
