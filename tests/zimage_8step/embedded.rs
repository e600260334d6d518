//! The options of the program, and what it refuses before it begins to train the embedded model.

use anyhow::Result;
use clap::Parser;
use decoupled_dmd::Shift;
use tempfile::tempdir;
use zimage::distil::Preset;

use super::common::reference;
use super::options::Options;
use super::run;

#[test]
fn bad_options_are_refused_by_name() -> Result<()> {
    let parse = |arguments: &[&str]| {
        Options::try_parse_from(std::iter::once("zimage_8step").chain(arguments.iter().copied()))
    };
    for (arguments, complaint) in [
        (&["--schedule", "coupled"][..], "expected one of"),
        (&["--transition", "euler"], "expected"),
        (&["--guidance", "0.5"], "guidance scale alpha"),
        (&["--device", "gpu"], "expected auto, cpu, cuda or cuda:N"),
        (&["--updates", "many"], "invalid digit"),
        (&["--nonsense"], "unexpected argument"),
        // What would not be looked at.
        (&["--sample", "x", "--plan"], "--plan"),
        (&["--sample", "x", "--updates", "3"], "--updates"),
        (&["--sample", "x", "--save-every", "3"], "--save-every"),
    ] {
        let error = parse(arguments).unwrap_err().to_string();
        assert!(error.contains(complaint), "{arguments:?}: {error}");
    }
    let shift = Shift::new(3.0)?;
    for (arguments, complaint) in [
        (["--batch", "0"], "--batch"),
        (["--steps", "0"], "--steps"),
        (["--student-lr", "-1"], "--student-lr"),
        (["--fake-lr", "NaN"], "--fake-lr"),
        (["--ema", "1"], "--ema"),
    ] {
        let joined = format!("{}={}", arguments[0], arguments[1]);
        let error = parse(&[&joined])?.recipe(Preset::Embedded, shift).unwrap_err().to_string();
        assert!(error.contains(complaint), "{arguments:?}: {error}");
    }
    assert_eq!(parse(&[])?.recipe(Preset::Embedded, shift)?.steps, 8);

    let coupled = parse(&["--schedule", "coupled-shared", "--dm-shift", "2"])?;
    let error = coupled.recipe(Preset::Embedded, shift).unwrap_err().to_string();
    assert!(error.contains("--dm-shift is for schedules"), "{error}");
    for option in ["--float32", "--tensors", "--size=64"] {
        let error = parse(&["--sample=x", option])?.refuse_released().unwrap_err().to_string();
        assert!(error.contains("is for released checkpoints"), "{option}: {error}");
    }
    Ok(())
}

#[test]
fn the_demonstration_looks_at_everything_before_it_begins() -> Result<()> {
    let place = tempdir()?;
    let out = place.path().join("out");
    let options = |arguments: &[&str]| -> Result<Options> {
        let mut options =
            Options::try_parse_from([&["zimage_8step", "--device", "cpu"], arguments].concat())?;
        options.out.clone_from(&out);
        Ok(options)
    };
    // A transformer and a scheduler, as of a released folder that is not complete.
    let folder = |name: &str| reference(name).display().to_string();
    let incomplete = &*folder("pipeline");
    for (arguments, complaint) in [
        (&["--prompts", "1"][..], "at least 2 captions are needed to compare on, found 1"),
        (&["--rank", "4", "--targets", "to_x"], "\"to_x\" matches no linear layer"),
        (&["--rank", "4", "--targets", "cap_embedder.1"], "caption side alone"),
        (&["--rank", "4", "--alpha", "0"], "alpha must be positive, found 0"),
        (&["--rank", "4", "--dropout", "2"], "dropout must be in [0, 1), found 2"),
        (&["--checkpoint", incomplete], "A released one needs its text_encoder/ and vae/"),
        (&["--merge"], "--merge is for released checkpoints"),
        (&["--features", "x"], "--features is for released checkpoints"),
    ] {
        let error = run(&options(arguments)?).unwrap_err().to_string();
        assert!(error.contains(complaint), "{arguments:?}: {error}");
        assert!(!out.exists(), "{arguments:?}");
    }
    for (student, complaint) in [
        (&*folder("lora"), "name that with --checkpoint"),
        (incomplete, "it is not a model of pixels and word vectors"),
    ] {
        let options = options(&["--sample", "pizza", "--student", student])?;
        let error = run(&options).unwrap_err().to_string();
        assert!(error.contains(complaint), "{student}: {error}");
    }
    Ok(())
}
