//! Every reader of files that may come from strangers, each with a file that it takes.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use tch::{Device, Kind};
use tch_training::lora::Lora;
use tch_training::run::{Log, StateFolder};
use tch_training::safetensors::{Weights, write_tensors};
use zimage::Config;
use zimage::autoencoder::AutoencoderConfig;
use zimage::distil::{Preset, SavedRecipe};
use zimage::model::{ADAPTER_NAMES, Checkpoint};
use zimage::text::{FeatureCache, PromptTokenizer, Qwen3Encoder, read_prompts};

/// What reads a file.
type Read = Box<dyn Fn() -> Result<()>>;

/// A file, and what reads it.
pub struct Reader {
    pub name: &'static str,
    pub path: PathBuf,
    pub read: Read,
}

/// All of them, with files under `folder` that are made of those of the references.
pub fn readers(folder: &Path, references: &Path) -> Result<Vec<Reader>> {
    let copy = |source: &str| -> Result<PathBuf> {
        let to = folder.join(source);
        copy_all(&references.join(source), &to)?;
        Ok(to)
    };
    let write = |name: &str, text: &str| -> Result<PathBuf> {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().expect("a folder"))?;
        fs::write(&path, text)?;
        Ok(path)
    };
    let mut readers = Vec::new();
    let mut add = |name, path: &Path, read: Read| {
        readers.push(Reader { name, path: path.to_owned(), read });
    };

    let pipeline = folder.join("pipeline");
    let transformer = copy("pipeline/transformer")?.join("config.json");
    let config = Config::load(&transformer)?;
    let path = transformer.clone();
    add("transformer config", &transformer, Box::new(move || Config::load(&path).map(drop)));
    let scheduler = copy("pipeline/scheduler")?.join("scheduler_config.json");
    add("scheduler", &scheduler, Box::new(move || Checkpoint::open(&pipeline).map(drop)));
    let encoder = copy("text_encoder/text_encoder")?;
    let path = encoder.join("config.json");
    let read = move || Qwen3Encoder::load(&encoder, Kind::Float, Device::Cpu).map(drop);
    add("text encoder config", &path, Box::new(read));
    let vae = copy("autoencoder/two_levels/vae/config.json")?;
    let path = vae.clone();
    add("autoencoder config", &vae, Box::new(move || AutoencoderConfig::load(&path).map(drop)));
    let sharded = copy("transformer/sharded/transformer")?;
    let path = sharded.join("diffusion_pytorch_model.safetensors.index.json");
    let read = move || Ok(Weights::open(&sharded, "diffusion_pytorch_model").map(drop)?);
    add("index of shards", &path, Box::new(read));

    let recipe = Preset::Embedded.recipe(decoupled_dmd::Shift::new(3.0)?)?;
    let path = write("student/recipe.json", &serde_json::to_string_pretty(&recipe)?)?;
    let student = folder.join("student");
    add("recipe", &path, Box::new(move || SavedRecipe::read(&student).map(drop)));
    let identity = serde_json::json!({ "seed": 0 });
    let state = serde_json::json!({
        "version": 2, "identity": identity, "progress": { "seconds": 1.5, "log_bytes": 10 }
    });
    let path = write("state/000001/state.json", &state.to_string())?;
    let states = folder.join("state");
    let read = move || Ok(StateFolder::open(&states, &identity).map(drop)?);
    add("state", &path, Box::new(read));
    let path = write("metrics.jsonl", "{\"update\": 1, \"ca\": 0.5}\n{\"update\": 2}\n")?;
    let log = path.clone();
    let read = move || match Log::open(&log, fs::metadata(&log)?.len())? {
        (_, Ok(_)) => Ok(()),
        (_, Err(lost)) => Err(lost.into()),
    };
    add("metrics", &path, Box::new(read));

    let adapter = copy("lora/pytorch_lora_weights.safetensors")?;
    let (path, layers) = (adapter.clone(), config.linears());
    let read = move || Ok(Lora::load(&path, &layers, ADAPTER_NAMES, Device::Cpu).map(drop)?);
    add("adapter", &adapter, Box::new(read));
    let weights = folder.join("weights.safetensors");
    fs::copy(&adapter, &weights)?;
    let path = weights.clone();
    let read = move || Ok(Weights::open_file(&path).and_then(|weights| weights.all()).map(drop)?);
    add("weights", &weights, Box::new(read));
    let tensors = Weights::open_file(&adapter)?.all()?.into_iter();
    let of_peft = |name: String| name.replace("transformer.", "base_model.model.");
    let tensors = tensors.map(|(name, tensor)| (of_peft(name), tensor)).collect();
    let settings =
        write("peft/adapter_config.json", r#"{"r": 3, "lora_alpha": 8, "use_dora": false}"#)?;
    let path = settings.with_file_name("adapter_model.safetensors");
    write_tensors(&path, &tensors)?;
    let layers = config.linears();
    let read = move || Ok(Lora::load(&path, &layers, ADAPTER_NAMES, Device::Cpu).map(drop)?);
    add("settings of an adapter", &settings, Box::new(read));

    let tokenizer = copy("text_encoder/tokenizer/tokenizer.json")?;
    let path = tokenizer.clone();
    let read = move || PromptTokenizer::load(&path, 1 << 20).map(drop);
    add("tokenizer", &tokenizer, Box::new(read));
    for (name, file, text) in [
        ("prompts", "prompts.txt", "A red fox\nA cat\n\u{feff}Ein Käse\n"),
        (
            "prompts in JSON",
            "prompts.jsonl",
            "{\"prompt\": \"A cat\", \"negative\": \"a dog\"}\n{\"prompt\": \"b\"}",
        ),
    ] {
        let path = write(file, text)?;
        let file = path.clone();
        add(name, &path, Box::new(move || read_prompts(&file).map(drop)));
    }
    let path = write("features/features.json", r#"{"format": 1, "encoder": "abc", "width": 64}"#)?;
    let features = folder.join("features");
    add("manifest of features", &path, Box::new(move || FeatureCache::open(&features).map(drop)));
    Ok(readers)
}

/// Copies a file, or a folder with all in it.
fn copy_all(from: &Path, to: &Path) -> Result<()> {
    if from.is_dir() {
        for entry in fs::read_dir(from)? {
            let entry = entry?;
            copy_all(&entry.path(), &to.join(entry.file_name()))?;
        }
        return Ok(());
    }
    fs::create_dir_all(to.parent().expect("a folder"))?;
    fs::copy(from, to)?;
    Ok(())
}
