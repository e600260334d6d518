//! A student as ComfyUI's files, by the table of names that `scripts/reference/comfyui.py` has taken from ComfyUI.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use clap::Parser;
use tch_training::safetensors::read_tensors;
use zimage::distil::ADAPTER;

use super::common::reference;
use super::common::small_pipeline::{Workplace, copy};
use super::options::Options;
use super::released::message;
use super::run;

/// Each parameter, its name in ComfyUI, and the rows there: the first and their number.
const TABLE: &str = include_str!("../../crates/zimage/tests/reference/comfyui.tsv");

fn options(place: &Workplace, more: &[&str]) -> Result<Options> {
    let student = place.out().display().to_string();
    let arguments = ["zimage_8step", "--export", "comfyui", "--student", &student];
    Ok(Options::try_parse_from([&arguments, more].concat())?)
}

#[test]
fn every_weight_is_where_comfyui_looks_for_it() -> Result<()> {
    let place = Workplace::new()?;
    let student = place.out();
    copy(&reference("pipeline/transformer"), &student.join("transformer"))?;
    fs::copy(reference("lora").join(ADAPTER), student.join(ADAPTER))?;
    // What an earlier export has left.
    fs::create_dir_all(student.join("comfyui/loras"))?;
    fs::write(student.join("comfyui/loras/old.safetensors"), "")?;
    run(&options(&place, &[])?)?;

    let file = "zimage_student.safetensors";
    let found = read_tensors(&student.join("comfyui/diffusion_models").join(file))?;
    let whole = student.join("transformer/diffusion_pytorch_model.safetensors");
    let parameters = read_tensors(&whole)?;
    let mut rows: BTreeMap<&str, i64> = BTreeMap::new();
    for line in TABLE.lines() {
        let [name, key, start, count] = line.split('\t').collect::<Vec<_>>()[..] else {
            panic!("{line}")
        };
        let (start, count) = (start.parse()?, count.parse::<i64>()?);
        assert_eq!(found[key].narrow(0, start, count), parameters[name], "{name}");
        *rows.entry(key).or_default() += count;
    }
    assert_eq!(TABLE.lines().count(), parameters.len());
    assert!(found.iter().map(|(key, tensor)| (key.as_str(), tensor.size()[0])).eq(rows));

    let adapter = read_tensors(&student.join(ADAPTER))?;
    let lora = read_tensors(&student.join("comfyui/loras").join(file))?;
    assert_eq!(fs::read_dir(student.join("comfyui/loras"))?.count(), 1);
    assert_eq!(lora.len(), adapter.len());
    for (name, tensor) in &lora {
        let layer = name.strip_prefix("diffusion_model.").context("no prefix")?;
        assert_eq!(adapter[&format!("transformer.{layer}")], *tensor, "{name}");
    }
    Ok(())
}

#[test]
fn what_comfyui_has_no_place_for_is_refused() -> Result<()> {
    let place = Workplace::new()?;
    let error = message(run(&options(&place, &[])?), "no student");
    assert!(error.contains("there is no student in"), "{error}");
    fs::create_dir_all(place.out())?;
    let error = message(run(&options(&place, &[])?), "an empty student");
    assert!(error.contains("is no student: it holds neither"), "{error}");
    copy(&reference("pipeline/transformer"), &place.out().join("transformer"))?;
    let config = place.out().join("transformer/config.json");
    let mut settings: serde_json::Value = serde_json::from_str(&fs::read_to_string(&config)?)?;
    settings["all_patch_size"] = serde_json::json!([4]);
    fs::write(&config, settings.to_string())?;
    // An earlier export outlives one that fails.
    let earlier = place.out().join("comfyui/loras/old.safetensors");
    fs::create_dir_all(place.out().join("comfyui/loras"))?;
    fs::write(&earlier, "")?;
    let error = message(run(&options(&place, &[])?), "another patch size");
    assert!(error.contains("patch size 2, found [4]"), "{error}");
    assert!(earlier.exists() && !place.out().join("comfyui.partial").exists());

    for (more, complaint) in
        [(&["--updates", "3"][..], "--updates"), (&["--sample", "x"], "--sample")]
    {
        let error = message(options(&place, more).map(|_| ()), complaint);
        assert!(error.contains(complaint), "{error}");
    }
    let other = Options::try_parse_from(["zimage_8step", "--export", "webui"]);
    assert!(other.unwrap_err().to_string().contains("comfyui"));
    Ok(())
}
