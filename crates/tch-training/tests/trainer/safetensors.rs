//! Checkpoints: whole, sharded, broken and malicious ones.

use std::fs;
use std::path::Path;

use proptest::prelude::*;
use serde_json::json;
use tch::{Device, Kind, Tensor};
use tch_training::Parameters;
use tch_training::safetensors::Weights;
use tch_training::safetensors::write_tensors;
use tempfile::tempdir;

use super::common::{Result, chain, wave};

const STEM: &str = "diffusion_pytorch_model";

/// A safetensors file of a header as it stands, and some bytes.
fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

fn some_tensors() -> Parameters {
    [
        ("a.weight", wave(&[3, 5], 0.1, Kind::Float)),
        ("b.weight", wave(&[4], 0.2, Kind::BFloat16)),
        ("c.weight", wave(&[2, 1, 3], 0.3, Kind::Half)),
        ("step", Tensor::from(7i64)),
    ]
    .map(|(name, tensor)| (name.to_owned(), tensor))
    .into()
}

fn shapes(weights: &Weights) -> Vec<(String, Vec<i64>)> {
    weights.shapes().map(|(name, shape)| (name.to_owned(), shape.to_vec())).collect()
}

fn error<T>(result: tch_training::Result<T>) -> String {
    result.err().map_or_else(|| "no error".into(), |error| chain(&error))
}

#[test]
fn every_source_kind_loads_as_every_target_kind() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    let tensors = some_tensors();
    write_tensors(&path, &tensors)?;
    let weights = Weights::open(folder.path(), "model")?;
    assert_eq!(weights.all()?, tensors);
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16, Kind::Double] {
        let mut calls = Vec::new();
        let loaded = weights.load(&shapes(&weights), kind, Device::Cpu, &mut |done, total| {
            calls.push((done, total));
        })?;
        for (name, tensor) in &tensors {
            assert_eq!(loaded[name].kind(), kind);
            assert_eq!(loaded[name], tensor.to_kind(kind), "{name} as {kind:?}");
        }
        assert_eq!(calls, [(60, 88), (68, 88), (80, 88), (88, 88)]);
    }
    Ok(())
}

#[test]
fn data_that_is_not_aligned_is_read_all_the_same() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    let values = [1.5f32, -2.25, 1e-30];
    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    for padding in 0..4 {
        let header = json!({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}});
        fs::write(&path, file_of(&format!("{header}{}", " ".repeat(padding)), &bytes))?;
        let x = Weights::open_file(&path)?.tensor("x", Kind::Float, Device::Cpu)?;
        assert_eq!(Vec::<f32>::try_from(&x)?, values);
    }
    Ok(())
}

#[test]
fn disagreement_with_the_model_names_every_tensor() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    write_tensors(&path, &some_tensors())?;
    let weights = Weights::open_file(&path)?;
    let mut expected = shapes(&weights);
    expected[0].1 = vec![5, 3];
    expected[1].0 = "other".into();
    let mut calls = 0;
    let text = error(weights.load(&expected, Kind::Float, Device::Cpu, &mut |_, _| calls += 1));
    for part in [
        "model.safetensors",
        "a.weight has shape [3, 5], expected [5, 3]",
        "other is missing",
        "b.weight is unexpected",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert_eq!(calls, 0);
    let text = error(weights.tensor("other", Kind::Float, Device::Cpu));
    assert!(text.contains("tensor other is missing in"), "{text}");
    Ok(())
}

/// Two shards, and an index that the caller may spoil.
fn write_shards(folder: &Path, weight_map: &serde_json::Value) -> Result<()> {
    let mut one = some_tensors();
    let two = one.split_off("c.weight");
    write_tensors(&folder.join("one.safetensors"), &one)?;
    write_tensors(&folder.join("two.safetensors"), &two)?;
    let index = json!({"metadata": {"total_size": 88}, "weight_map": weight_map});
    Ok(fs::write(folder.join(format!("{STEM}.safetensors.index.json")), index.to_string())?)
}

#[test]
fn shards_are_read_as_one_and_must_agree_with_the_index() -> Result<()> {
    let folder = tempdir()?;
    let folder = folder.path();
    let text = error(Weights::open(folder, STEM));
    assert!(text.contains("neither") && text.contains("index.json"), "{text}");

    let (one, two) = ("one.safetensors", "two.safetensors");
    let good = json!({"a.weight": one, "b.weight": one, "c.weight": two, "step": two});
    write_shards(folder, &good)?;
    assert_eq!(Weights::open(folder, STEM)?.all()?, some_tensors());

    let other = folder.join("elsewhere.safetensors");
    fs::copy(folder.join(two), &other)?;
    let cases = [
        (json!({"a.weight": one, "b.weight": one, "c.weight": two}), "put tensor step into"),
        (json!({"a.weight": one, "b.weight": two, "c.weight": two, "step": two}), "b.weight"),
        (json!({"a.weight": one, "b.weight": one, "d": one}), "puts tensor d into one.safe"),
        (json!({"a.weight": one, "b.weight": one, "c.weight": "three.safetensors"}), "three.safe"),
        (json!({"a.weight": other}), "not the name of a file"),
        (json!({"a.weight": "../one.safetensors"}), "not the name of a file"),
        (json!({"a.weight": "./one.safetensors"}), "not the name of a file"),
        (json!({"a.weight": ".."}), "not the name of a file"),
        (json!({"a.weight": ""}), "not the name of a file"),
        (json!({"a.weight": "."}), "not the name of a file"),
        (json!({"a.weight": 3}), "parsing"),
        (json!([]), "parsing"),
    ];
    for (weight_map, expected) in cases {
        write_shards(folder, &weight_map)?;
        let text = error(Weights::open(folder, STEM));
        assert!(text.contains(expected) && text.contains("index.json"), "{weight_map}: {text}");
    }
    Ok(())
}

#[test]
fn hostile_files_are_refused_with_one_error() -> Result<()> {
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    let tensor = |dtype: &str, shape: serde_json::Value, offsets: [u64; 2]| json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
    let file = |header: serde_json::Value| file_of(&header.to_string(), &[0; 16]);
    let huge = u64::MAX;
    let wide = 1u64 << 61;
    let overflowing: serde_json::Map<String, serde_json::Value> = (0..9u64)
        .map(|i| {
            let begin = i.saturating_mul(wide);
            (format!("t{i}"), tensor("U8", json!([wide]), [begin, begin.saturating_add(wide)]))
        })
        .collect();
    let mut long_prefix = u64::MAX.to_le_bytes().to_vec();
    long_prefix.extend([b'{'; 16]);
    let mut wrapping_prefix = (u64::MAX - 7).to_le_bytes().to_vec();
    wrapping_prefix.extend([b'{'; 16]);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "too few"),
        (vec![1, 2, 3], "too few"),
        (long_prefix, "the header should have 18446744073709551615 bytes"),
        (wrapping_prefix, "the header should have"),
        (file_of("", &[]), "the header is not valid"),
        (file_of("[]", &[]), "the header is not valid"),
        (file_of("\u{0}", &[]), "the header is not valid"),
        (file_of(&"[".repeat(1_000_000), &[]), "the header is not valid"),
        (file_of(&"{\"a\":".repeat(1_000_000), &[]), "the header is not valid"),
        (file_of(&"{\"__metadata__\":".repeat(100_000), &[]), "the header is not valid"),
        (file(json!({})), "describes 0 bytes of tensors, but the file has 16"),
        (file(json!({"t": tensor("F32", json!([4]), [0, huge])})), "describes 184467440737095516"),
        (file(json!({"t": tensor("F32", json!([4]), [16, 0])})), "describes 0 bytes"),
        (
            file(json!({"t": tensor("F32", json!([3]), [0, 16])})),
            "shape [3] of F32 does not fit 16",
        ),
        (file(json!({"t": tensor("F32", json!([-4]), [0, 16])})), "the header is not valid"),
        (file(json!({"t": tensor("F32", json!([4.5]), [0, 16])})), "the header is not valid"),
        (file(json!({"t": tensor("F32", json!([1e15]), [0, 16])})), "the header is not valid"),
        (file(json!({"t": tensor("F32", json!([huge, huge]), [0, 16])})), "does not fit 16 bytes"),
        (file(json!({"t": tensor("F32", json!([wide, 8]), [0, 16])})), "does not fit 16 bytes"),
        (
            file(json!({
                "s": tensor("F32", json!([0, wide, wide]), [0, 0]),
                "t": tensor("F32", json!([4]), [0, 16]),
            })),
            "tensor s: shape",
        ),
        (file(json!({"t": tensor("F4", json!([4]), [0, 16])})), "dtype F4 is not supported"),
        (file(json!({"t": tensor("F8_E4M3", json!([16]), [0, 16])})), "F8_E4M3 is not supported"),
        (
            file(json!({
                "s": tensor("F32", json!([3]), [0, 12]),
                "t": tensor("F32", json!([2]), [8, 16]),
            })),
            "tensor t lies at bytes 8..16, but should begin at 12",
        ),
        (
            file(json!({
                "s": tensor("F32", json!([1]), [0, 4]),
                "t": tensor("F32", json!([2]), [8, 16]),
            })),
            "tensor t lies at bytes 8..16, but should begin at 4",
        ),
        (file(json!(overflowing)), "bytes of tensors, but the file has 16"),
    ];
    for (bytes, expected) in cases {
        fs::write(&path, &bytes)?;
        let text = error(Weights::open_file(&path));
        let start = String::from_utf8_lossy(&bytes[..bytes.len().min(60)]).into_owned();
        assert!(text.contains(expected) && text.contains("model.safetensors"), "{start}: {text}");
        assert!(text.len() < 1000, "{start}: {} characters of error", text.len());
    }
    fs::remove_dir_all(&folder)?;
    let text = error(Weights::open_file(&path));
    assert!(text.contains("opening") && text.contains("model.safetensors"), "{text}");
    Ok(())
}

/// Anonymous memory of this process in bytes; pages of mapped files do not count.
#[cfg(target_os = "linux")]
fn anonymous_memory() -> i64 {
    let status = fs::read_to_string("/proc/self/status").expect("the status of the process");
    let line = status.lines().find(|line| line.starts_with("RssAnon")).expect("a line RssAnon");
    let kib: i64 = line.split_whitespace().nth(1).expect("a number").parse().expect("a number");
    kib * 1024
}

/// Reading as it was before took one copy for the file and one for the tensors.
#[cfg(target_os = "linux")]
#[test]
fn a_large_file_is_not_copied_twice() -> Result<()> {
    // Other tests of this file allocate a few megabytes at most meanwhile.
    const COUNT: i64 = 16;
    const BYTES: i64 = 64 << 20;
    let folder = tempdir()?;
    let path = folder.path().join("model.safetensors");
    let tensors: Parameters = (0..COUNT)
        .map(|i| {
            let options = (Kind::Float, Device::Cpu);
            (format!("t{i}"), Tensor::full([BYTES / COUNT / 4], i as f64, options))
        })
        .collect();
    write_tensors(&path, &tensors)?;
    drop(tensors);

    let weights = Weights::open_file(&path)?;
    let expected = shapes(&weights);
    // The smaller first: memory that the allocator keeps would hide the growth of the second.
    for (kind, held) in [(Kind::BFloat16, BYTES / 2), (Kind::Float, BYTES)] {
        let before = anonymous_memory();
        let mut peak = 0;
        let loaded = weights.load(&expected, kind, Device::Cpu, &mut |_, _| {
            peak = peak.max(anonymous_memory() - before);
        })?;
        let bytes =
            loaded.values().map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum::<usize>();
        assert_eq!(bytes as i64, held);
        assert!(peak < held * 13 / 10, "{kind:?}: {peak} bytes for {held} of tensors");
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    /// A damaged file gives an error, or tensors of the shapes that it states.
    #[test]
    fn damaged_files_never_panic(
        flips in prop::collection::vec((0usize..100_000, 0u8..8), 0..4),
        cut in prop::option::of(0usize..100_000),
        in_header in any::<bool>(),
    ) {
        let folder = tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        write_tensors(&path, &some_tensors()).unwrap();
        let whole = fs::read(&path).unwrap();
        let header = u64::from_le_bytes(*whole.first_chunk().unwrap()) as usize + 8;
        let mut bytes = whole.clone();
        for (place, bit) in &flips {
            let end = if in_header { header } else { bytes.len() };
            bytes[place % end] ^= 1 << bit;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut % bytes.len());
        }
        fs::write(&path, &bytes).unwrap();
        match Weights::open_file(&path).and_then(|weights| {
            let tensors = weights.all()?;
            for (name, shape) in weights.shapes() {
                assert_eq!(tensors[name].size(), shape);
            }
            Ok(())
        }) {
            Ok(()) => prop_assert!(cut.is_none(), "a file cut short was read"),
            Err(error) => {
                prop_assert!(bytes != whole, "{error}");
                prop_assert!(chain(&error).contains("model.safetensors"), "{error}");
            }
        }
    }
}
