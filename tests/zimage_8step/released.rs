//! Training and sampling of a whole small pipeline folder, as from the command line.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use decoupled_dmd::Shift;
use tch::{Device, Kind, Tensor};
use tch_c10d::Launch;
use tch_training::Parameters;
use tch_training::lora::LoraSettings;
use tch_training::safetensors::{read_tensors, write_tensors};
use zimage::Config;
use zimage::distil::{
    ADAPTER, PictureSize, Preset, Recipe, RoleWeights, SavedRecipe, save_student,
};
use zimage::model::Checkpoint;

use super::commands;
use super::common::small_pipeline::{SIDE, Workplace, copy};
use super::common::{bound_of, max_difference, reference, relative, seeded};
use super::options::Options;
use super::{command_line, parsed, run};

/// Arguments for [`process`], one a line.
const ARGUMENTS: &str = "ZIMAGE_RELEASED_ARGUMENTS";
/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(60);
const UPDATES: &str = "4";
const TRAINING: [&str; 22] = [
    "--float32",
    "--merge",
    "--rank",
    "2",
    "--alpha",
    "3",
    "--updates",
    UPDATES,
    "--batch",
    "2",
    "--fake-warmup",
    "2",
    "--fake-updates",
    "1",
    // Enough to see a student of few updates.
    "--student-lr",
    "0.02",
    "--warmup",
    "1",
    "--ema",
    "0",
    "--save-every",
    "1",
];

fn arguments(place: &Workplace, more: &[&str]) -> Vec<String> {
    let prompts = place.0.path().join("prompts.txt").display().to_string();
    // Of options that are given twice, clap wants one.
    let plain = [&TRAINING[..], &["--prompt-file", &prompts]].concat();
    let mut training = Vec::new();
    let mut rest = plain.iter().peekable();
    while let Some(option) = rest.next() {
        let value = rest.next_if(|next| !next.starts_with("--"));
        if !more.contains(option) {
            training.extend([Some(option), value].into_iter().flatten());
        }
    }
    command_line(place, &[&training[..], more].concat())
}

/// What a training in `place` is told.
pub fn training_options(place: &Workplace, more: &[&str]) -> Result<Options> {
    use clap::Parser as _;
    Ok(Options::try_parse_from(arguments(place, more))?)
}

/// Not a test: the process that the tests below start, which trains.
#[test]
#[ignore = "started by the other tests, with arguments in the environment"]
fn process() -> Result<()> {
    use clap::Parser as _;

    let arguments = std::env::var(ARGUMENTS).context("no arguments")?;
    let _guard = seeded(0);
    tch::set_num_threads(1);
    let options = Options::try_parse_from(arguments.lines())?;
    let code = commands::run(&options, &Launch::from_env()?)?;
    ensure!(code == ExitCode::SUCCESS, "{code:?}");
    Ok(())
}

/// A process that trains in `place`.
pub fn training(place: &Workplace, more: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args(["--exact", "released::process", "--ignored", "--nocapture"])
        .env(ARGUMENTS, arguments(place, more).join("\n"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    Ok(command)
}

pub fn train(place: &Workplace, more: &[&str]) -> Result<()> {
    let output = training(place, more)?.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Waits until a process has made a file, or has ended.
pub fn wait_for(process: &mut Child, path: &Path) -> Result<()> {
    let start = Instant::now();
    while !path.exists() && process.try_wait()?.is_none() {
        ensure!(start.elapsed() < PATIENCE, "no {} in {PATIENCE:?}", path.display());
        sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Pictures of "A red fox" by a student, as `--tensors` stores them.
pub fn images(place: &Workplace, more: &[&str]) -> Result<Tensor> {
    let sampling = ["--sample", "A red fox", "--count", "2", "--float32", "--tensors"];
    let mut options = parsed(place, &[&sampling[..], more].concat())?;
    if more.is_empty() {
        // The student's own is known.
        options.size = None;
    }
    let _guard = seeded(1);
    ensure!(run(&options)? == ExitCode::SUCCESS);
    let mut stored = read_tensors(&place.out().join("sample.safetensors"))?;
    ensure!(Vec::<u8>::try_from(&stored["prompt"])? == b"A red fox");
    ensure!(stored["noise"].size() == [2, 4, SIDE / 2, SIDE / 2]);
    stored.remove("images").context("no images")
}

/// The first picture of a file, `top` pixels below its edge.
pub fn first_picture(path: &Path, top: u32) -> Result<Vec<u8>> {
    let picture = image::open(path)?.to_rgb8();
    let side = SIDE as u32;
    Ok(image::imageops::crop_imm(&picture, 0, top, side, side).to_image().into_raw())
}

pub fn student(place: &Workplace) -> Result<Parameters> {
    Ok(read_tensors(&place.out().join("student").join(ADAPTER))?)
}

#[test]
fn a_killed_training_ends_in_the_same_student_whose_files_draw_what_it_drew() -> Result<()> {
    let place = Workplace::new()?;
    train(&place, &["--evaluate-every", "2"])?;
    let found = student(&place)?;

    // The keys that diffusers and ComfyUI look for, a pair for each layer of the preset.
    let config = Config::load(&place.model().join("transformer/config.json"))?;
    let targets = ["to_q", "to_k", "to_v", "w1", "w2", "w3"].map(str::to_owned).to_vec();
    let settings = LoraSettings { rank: 2, alpha: 3.0, targets, dropout: 0.0 };
    let modules = settings.adapted(&config.linears())?;
    assert_eq!(modules.len(), 24);
    assert_eq!(found.len(), 2 * modules.len());
    for (module, [rows, columns]) in modules {
        let of = |half: &str| &found[&format!("transformer.{module}.{half}.weight")];
        assert_eq!(of("lora_A").size(), [2, columns], "{module}");
        assert_eq!(of("lora_B").size(), [rows, 2], "{module}");
        assert_eq!(of("lora_B").kind(), Kind::Float, "{module}");
        // The caption side is computed once, and not trained.
        let is_trained = !module.starts_with("context_refiner");
        assert_eq!(of("lora_B").abs().max().double_value(&[]) > 0.0, is_trained, "{module}");
    }
    for name in ["samples.png", "curves.svg", "metrics.jsonl", "report.json", "preview-000002.png"]
    {
        assert!(place.out().join(name).exists(), "{name}");
    }
    assert!(place.out().join("state").exists(), "there is nothing to go on from");
    // Students on the way are there too, and others.
    let earlier = read_tensors(&place.out().join("student-000002").join(ADAPTER))?;
    assert!(earlier.keys().eq(found.keys()) && earlier != found);
    assert!(read_tensors(&place.out().join("student-000004").join(ADAPTER))? == found);

    // Read back, the adapter draws what the student in memory drew at the last update.
    let adapted = images(&place, &[])?;
    let drawn = first_picture(&place.out().join("sample.png"), 0)?;
    // Under the heading. The preview was drawn in a batch of another size: a value may lie on the other side
    // of a step of the 255.
    let preview = first_picture(&place.out().join("preview-000004.png"), 16)?;
    assert_eq!(drawn.len(), preview.len());
    let apart = drawn.iter().zip(&preview).map(|(one, other)| one.abs_diff(*other)).max();
    assert!(apart <= Some(1), "{apart:?} steps");
    // And so does the merged transformer, but for rounding: as the pictures of the untrained model.
    let merged = place.0.path().join("merged");
    for part in ["transformer", "scheduler"] {
        copy(&place.out().join("student").join(part), &merged.join(part))?;
    }
    let whole = images(&place, &["--student", &merged.display().to_string()])?;
    let reference = read_tensors(&reference("pipeline/expected.safetensors"))?;
    let (error, bound) = (relative("merged", &whole, &adapted), bound_of(&reference, "unguided"));
    println!("merged against adapter: {error:.1e} of {bound:.1e}");
    assert!(error <= bound, "{error:.1e}");
    // An adapter that does nothing would have passed.
    let zero: Parameters = found.iter().map(|(n, t)| (n.clone(), t.zeros_like())).collect();
    let none = place.0.path().join("none");
    fs::create_dir_all(&none)?;
    write_tensors(&none.join(ADAPTER), &zero)?;
    let base = images(&place, &["--student", &none.display().to_string()])?;
    let moved = max_difference(&base, &adapted);
    println!("the student moves the images by {moved:.3}");
    assert!(moved > 1e-2, "{moved:.1e}");

    let other = Workplace::new()?;
    let mut kills = 0;
    for number in 1..=3 {
        let mut child = training(&other, &[])?.stderr(Stdio::null()).spawn()?;
        wait_for(&mut child, &other.out().join(format!("state/{number:06}")))?;
        child.kill()?;
        kills += u32::from(!child.wait()?.success());
    }
    assert!(kills > 1, "only {kills} processes were killed");
    assert!(!other.out().join("student").exists(), "nothing was left to go on with");
    let refused = training(&other, &["--size", "16"])?.output()?;
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success()
            && message.contains("sizes is [\"24x24\"] there and [\"16x16\"] here"),
        "{message}"
    );
    train(&other, &[])?;
    assert_eq!(student(&other)?, found);
    Ok(())
}

#[test]
fn a_student_leaves_nothing_of_an_earlier_one() -> Result<()> {
    let place = Workplace::new()?;
    let _guard = seeded(3);
    let checkpoint = Checkpoint::open(&place.model())?;
    let teacher = checkpoint.load(Kind::Float, Device::Cpu)?;
    let recipe = parsed(&place, &["--rank", "2"])?.recipe(Preset::ZImage8Step, teacher.shift)?;
    let made = SavedRecipe { recipe, size: Some(PictureSize::square(SIDE)), teacher: None };
    let folder = place.out();
    let adapter = RoleWeights::new(&teacher.transformer, made.recipe.adapter.as_ref())?;
    let copy = RoleWeights::new(&teacher.transformer, None)?;
    let parts = ["transformer", "scheduler", "model_index.json", ADAPTER, "comfyui"];
    let there = || parts.map(|part| folder.join(part).exists());
    for (weights, merged, expected) in [
        (&adapter, Some(&checkpoint), [true, true, true, true, false]),
        (&adapter, None, [false, false, false, true, false]),
        (&copy, None, [true, true, true, false, false]),
    ] {
        // What an export has made of the earlier one.
        fs::create_dir_all(folder.join("comfyui/loras"))?;
        save_student(&folder, &teacher, weights, merged, &made)?;
        assert_eq!(there(), expected);
    }
    Ok(())
}

/// The recipe of a training with these options.
pub fn recipe(options: &Options) -> Result<Recipe> {
    options.recipe(Preset::ZImage8Step, Shift::new(6.0)?)
}

/// The message of an error, with all its causes.
pub fn message<T>(result: Result<T>, what: &str) -> String {
    match result {
        Ok(_) => panic!("{what} was accepted"),
        Err(error) => format!("{error:#}"),
    }
}

#[test]
fn what_is_wrong_is_named() -> Result<()> {
    let place = Workplace::new()?;
    let prompts = place.0.path().join("prompts.txt").display().to_string();
    let missing = place.0.path().join("missing.txt").display().to_string();
    let file = ["--prompt-file", prompts.as_str()];
    let training: [(&[&str], &str); 12] = [
        (&[], "--prompt-file"),
        (&["--prompt-file", &missing], "missing.txt"),
        (
            &[&file[..], &["--size", "10"]].concat(),
            "size must be a positive multiple of 4, found 10",
        ),
        (&[&file[..], &["--size", "260"]].concat(), "size must be at most 256"),
        (&[&file[..], &["--rank", "0"]].concat(), "trained in float32"),
        (&[&file[..], &["--targets", "to_x"]].concat(), "\"to_x\" matches no linear layer"),
        (&[&file[..], &["--targets", "cap_embedder.1"]].concat(), "caption side alone"),
        (&[&file[..], &["--alpha", "0"]].concat(), "alpha must be positive, found 0"),
        (
            &[&file[..], &["--rank", "0", "--float32", "--alpha", "1"]].concat(),
            "--alpha, --targets, --dropout and --fake-rank are about adapters",
        ),
        (&[&file[..], &["--dropout", "1.5"]].concat(), "dropout must be in [0, 1), found 1.5"),
        (&[&file[..], &["--batch", "0"]].concat(), "--batch must be from 1 to 100000000, found 0"),
        (&[&file[..], &["--prompts", "5"]].concat(), "--prompts is for the embedded model"),
    ];
    for (arguments, expected) in training {
        let result = run(&parsed(&place, arguments)?);
        let message = message(result, expected);
        assert!(message.contains(expected), "{arguments:?}: {message}");
        // Found before any work.
        assert!(!place.out().join("features").exists(), "{arguments:?}");
    }

    let sampling = |student: Option<&Path>| {
        let student = student.map(|path| path.display().to_string());
        let more = student.iter().flat_map(|student| ["--student", student]).collect::<Vec<_>>();
        let options = parsed(&place, &[&["--sample", "A cat", "--float32"], &more[..]].concat())?;
        let _guard = seeded(2);
        run(&options)
    };
    assert!(message(sampling(None), "no student").contains("there is no student in"));
    let student = place.0.path().join("another");
    fs::create_dir_all(&student)?;
    assert!(message(sampling(Some(&student)), "an empty student").contains("is no student"));
    // That of a model of the same shape: it is taken as it is, then cut short, then reshaped.
    let adapter = student.join(ADAPTER);
    let source = reference("lora").join(ADAPTER);
    fs::copy(&source, &adapter)?;
    sampling(Some(&student))?;
    let bytes = fs::read(&source)?;
    fs::write(&adapter, &bytes[..bytes.len() / 2])?;
    let broken = message(sampling(Some(&student)), "half a file");
    assert!(broken.contains("reading the adapter") && broken.contains(ADAPTER), "{broken}");
    let mut tensors = read_tensors(&source)?;
    let name = "transformer.layers.0.attention.to_q.lora_A.weight";
    let narrow = tensors[name].narrow(1, 0, 8).contiguous();
    let _ = tensors.insert(name.to_owned(), narrow);
    write_tensors(&adapter, &tensors)?;
    let reshaped = message(sampling(Some(&student)), "a pair of another model");
    assert!(reshaped.contains("layers.0.attention.to_q"), "{reshaped}");

    let config = place.model().join("transformer/config.json");
    let shape = fs::read_to_string(&config)?;
    fs::write(&config, shape.replace("\"n_layers\": 2", "\"n_layers\": 3"))?;
    let fewer = message(run(&parsed(&place, &file)?), "a layer too few");
    assert!(fewer.contains("layers.2.attention.to_q.weight is missing"), "{fewer}");
    assert!(!place.out().join("features").exists());
    fs::write(&config, shape)?;

    let decoder = place.model().join("vae/diffusion_pytorch_model.safetensors");
    fs::remove_file(&decoder)?;
    let missing = message(run(&parsed(&place, &file)?), "half an autoencoder");
    assert!(missing.contains(&decoder.display().to_string()), "{missing}");
    copy(&reference("autoencoder/four_levels/vae"), &place.model().join("vae"))?;
    let channels = message(run(&parsed(&place, &file)?), "another autoencoder");
    assert!(channels.contains("has 3 channels and the transformer 4"), "{channels}");
    Ok(())
}

#[test]
fn the_plan_needs_the_config_of_the_transformer_alone() -> Result<()> {
    let place = Workplace::new()?;
    for part in ["text_encoder", "tokenizer", "vae", "scheduler"] {
        fs::remove_dir_all(place.model().join(part))?;
    }
    let options = parsed(&place, &["--plan", "--size", "64"])?;
    let error = message(run(&options), "the plan of a small model");
    assert!(error.contains("released models") && error.contains("--checkpoint"), "{error}");
    let config = place.model().join("transformer/config.json");
    let shape = fs::read_to_string(&config)?;
    fs::write(&config, shape.replace("\"in_channels\": 4", "\"in_channels\": 16"))?;
    run(&options)?;
    let other = parsed(&place, &["--plan", "--size", "64", "--prompts", "5"])?;
    assert!(message(run(&other), "--prompts").contains("--prompts is for the embedded model"));
    let error = message(run(&parsed(&place, &["--plan"])?), "a size for another autoencoder");
    assert!(error.contains("multiple of 16, found 24"), "{error}");
    Ok(())
}
