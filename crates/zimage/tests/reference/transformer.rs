//! Batches of unequal items through the Z-Image transformer, against diffusers.

use std::path::PathBuf;

use anyhow::{Context, Result};
use tch::{Device, Kind, Tensor};
use tch_training::safetensors::read_tensors;
use tch_training::{Parameters, Tape};
use zimage::{Config, Role, ZImageTransformer};

use super::common::{FLOAT64, assert_float32, assert_float64, reference, relative, value, wave};

fn folder() -> PathBuf {
    reference("transformer")
}

/// The parameters of `residues` in scripts/reference/zimage.py.
fn computed_model() -> Result<ZImageTransformer> {
    let config = Config::load(&folder().join("computed/config.json"))?;
    let parameters = config
        .parameters()
        .into_iter()
        .zip(0i64..)
        .map(|((name, shape), k)| {
            let count = shape.iter().product::<i64>();
            let scattered = |i: i64| ((i * i + 7 * i + 13 * k) % 1009) as f64 / 300.0 - 1.68;
            let values: Vec<f64> = (0..count).map(scattered).collect();
            let values = Tensor::from_slice(&values).reshape(&shape);
            let value: Tensor = if name.ends_with("pad_token") {
                values * 0.5
            } else if name.ends_with("bias") {
                values * 0.1
            } else if let [_, columns] = shape[..] {
                values / (columns as f64).sqrt()
            } else {
                values * 0.1 + 1.0
            };
            (name, value.to_kind(Kind::Float))
        })
        .collect();
    ZImageTransformer::from_parameters(config, parameters)
}

/// The folder that diffusers wrote in bfloat16, in float32.
fn sharded_model() -> Result<ZImageTransformer> {
    ZImageTransformer::load(&folder().join("sharded"), Kind::Float, Device::Cpu)
}

/// Inputs and outputs of diffusers.
struct Case {
    tensors: Parameters,
    name: String,
}

impl Case {
    fn new(file: &str, name: &str) -> Result<Self> {
        let tensors = read_tensors(&folder().join(format!("{file}.safetensors")))?;
        Ok(Self { tensors, name: name.into() })
    }

    fn one(&self, part: &str) -> Result<Tensor> {
        let name = format!("{}/{part}", self.name);
        Ok(self.tensors.get(&name).with_context(|| format!("no tensor {name}"))?.shallow_clone())
    }

    /// `part/0`, `part/1`, and so on.
    fn all(&self, part: &str) -> Result<Vec<Tensor>> {
        let count = self.one("t")?.size()[0];
        (0..count).map(|item| self.one(&format!("{part}/{item}"))).collect()
    }
}

/// Root of the mean square error over that of the values.
fn relative_mean(found: &[Tensor], expected: &[Tensor]) -> f64 {
    let sums = |tensors: Vec<Tensor>| {
        tensors.iter().map(|t| value(&t.square().sum(Kind::Double))).sum::<f64>()
    };
    let errors = found.iter().zip(expected).map(|(f, e)| f.to_kind(Kind::Float) - e).collect();
    (sums(errors) / sums(expected.iter().map(Tensor::shallow_clone).collect())).sqrt()
}

/// Outputs and gradients in a role that changes nothing: the plain one, or one with a tape.
fn assert_case(
    model: &ZImageTransformer,
    file: &str,
    name: &str,
    tape: Option<&Tape>,
) -> Result<()> {
    let case = Case::new(file, name)?;
    let role = tape.map_or(Role::BASE, |tape| Role::BASE.checkpointed(tape));
    model.set_requires_grad(true)?;
    let leaf = |tensor: Tensor| tensor.set_requires_grad(true);
    let latents: Vec<Tensor> = case.all("latents")?.into_iter().map(leaf).collect();
    let captions: Vec<Tensor> = case.all("captions")?.into_iter().map(leaf).collect();
    let outputs = model.forward_items(&latents, &case.one("t")?, &captions, role)?;
    assert_eq!(outputs.len(), latents.len());
    for (item, output) in outputs.iter().enumerate() {
        assert_float32(output, &case.tensors, &format!("{name}/output/{item}"));
    }

    let cotangents = case.all("cotangent")?;
    let terms: Vec<Tensor> =
        outputs.iter().zip(&cotangents).map(|(o, c)| (o * c).sum(Kind::Float)).collect();
    let loss = Tensor::stack(&terms, 0).sum(Kind::Float);
    match tape {
        None => loss.backward(),
        Some(tape) => tape.backward(&loss)?,
    }
    let mut compared = 0;
    let prefix = format!("{name}/gradient/");
    for key in case.tensors.keys().filter(|key| !key.ends_with(":distance")) {
        let Some(part) = key.strip_prefix(&prefix) else { continue };
        let index = |leaves: &[Tensor], item: &str| {
            Ok::<_, anyhow::Error>(leaves[item.parse::<usize>()?].grad())
        };
        let gradient = match part.split_once('/') {
            Some(("latents", item)) => index(&latents, item)?,
            Some(("captions", item)) => index(&captions, item)?,
            Some(("parameters", parameter)) => model.parameters()[parameter].grad(),
            _ => anyhow::bail!("{key} is no gradient"),
        };
        assert_float32(&gradient, &case.tensors, key);
        compared += 1;
    }
    assert!(compared >= 2 * latents.len());
    Ok(())
}

/// Sizes, caption lengths and frame counts all differ, and cross multiples of 32.
#[test]
fn unequal_items_and_their_gradients_equal_diffusers() -> Result<()> {
    assert_case(&computed_model()?, "computed", "unequal", None)
}

/// Blocks that run again in the backward pass must see the same masks.
#[test]
fn unequal_items_through_a_tape_equal_diffusers() -> Result<()> {
    assert_case(&computed_model()?, "computed", "unequal", Some(&Tape::default()))
}

/// Masks before the streams join, none after.
#[test]
fn lengths_that_differ_in_the_refiners_alone() -> Result<()> {
    assert_case(&computed_model()?, "computed", "crossed", None)
}

#[test]
fn frames_of_equal_items_need_no_mask() -> Result<()> {
    assert_case(&computed_model()?, "computed", "frames", None)
}

#[test]
fn a_sharded_folder_of_diffusers_computes_the_same() -> Result<()> {
    let model = sharded_model()?;
    let config = model.config();
    assert_eq!((config.dim, config.patch_size(), config.siglip_feat_dim), (24, 4, None));
    assert_case(&model, "sharded", "unequal", None)
}

/// In bfloat16 both implementations round at each step; neither may be far from the float32 value.
#[test]
fn bfloat16_is_as_close_to_float32_as_diffusers_is() -> Result<()> {
    let _guard = tch::no_grad_guard();
    for (file, model) in [("computed", computed_model()?), ("sharded", sharded_model()?)] {
        let case = Case::new(file, "unequal")?;
        let model = model.cast(Kind::BFloat16)?;
        let rough = model.forward_items(
            &case.all("latents")?,
            &case.one("t")?,
            &case.all("captions")?,
            Role::BASE,
        )?;
        let exact = case.all("output")?;
        let ours = relative_mean(&rough, &exact);
        let theirs = relative_mean(&case.all("bfloat16")?, &exact);
        println!("{file}: bfloat16 is off by {ours:.4}, that of diffusers by {theirs:.4}");
        assert!(ours < 1.25 * theirs && theirs < 0.05, "{ours} against {theirs}");
    }
    Ok(())
}

/// Every item of a batch against its own batch of one; returns the outputs. Inputs are taken in the type of
/// the model.
fn assert_items_alone(
    model: &ZImageTransformer,
    latents: &[Tensor],
    t: &Tensor,
    captions: &[Tensor],
    tolerance: f64,
) -> Result<Vec<Tensor>> {
    let latents: Vec<_> = latents.iter().map(|latent| latent.to_kind(model.kind())).collect();
    let together = model.forward_items(&latents, t, captions, Role::BASE)?;
    for (item, output) in together.iter().enumerate() {
        let range = item..item + 1;
        let t = t.narrow(0, item as i64, 1);
        let (latents, captions) = (&latents[range.clone()], &captions[range]);
        let alone = model.forward_items(latents, &t, captions, Role::BASE)?;
        let error = relative(&format!("item {item}"), &alone[0], output);
        println!("item {item} in {:?}: {error:.1e}", model.kind());
        assert!(error < tolerance, "item {item}: {error}");
    }
    Ok(together)
}

/// An item must not see its neighbours, nor the rows that make the batch rectangular.
#[test]
fn items_of_a_batch_equal_their_own_batches() -> Result<()> {
    let _guard = tch::no_grad_guard();
    let case = Case::new("computed", "unequal")?;
    let (latents, captions, t) = (case.all("latents")?, case.all("captions")?, case.one("t")?);
    let model = computed_model()?.cast(Kind::Double)?;
    let together = assert_items_alone(&model, &latents, &t, &captions, FLOAT64)?;
    // Images of one size take the way of `forward` too.
    let still = latents[0].squeeze_dim(1).unsqueeze(0).to_kind(Kind::Double);
    let single = model.forward(&still, &t.narrow(0, 0, 1), &captions[..1], Role::BASE)?;
    assert_float64("forward", &single.squeeze_dim(0), &together[0].squeeze_dim(1));
    Ok(())
}

/// Above 512 tokens attention takes libtorch's fused kernel, with the same mask.
#[test]
fn long_sequences_equal_their_own_batches() -> Result<()> {
    let _guard = tch::no_grad_guard();
    let model = computed_model()?;
    let config = Config { axes_lens: vec![96, 32, 32], ..model.config().clone() };
    let parameters = model.named_parameters().into_iter().collect();
    let model = ZImageTransformer::from_parameters(config, parameters)?;
    let latents = [[4, 1, 50, 48], [4, 1, 6, 8]].map(|shape| wave(&shape, 0.4, Kind::Float));
    let captions = [[40, 20], [5, 20]].map(|shape| wave(&shape, 1.3, Kind::Float));
    let t = Tensor::from_slice(&[0.3f32, 0.8]);
    assert_items_alone(&model.cast(Kind::Double)?, &latents, &t, &captions, FLOAT64)?;
    assert_items_alone(&model.cast(Kind::BFloat16)?, &latents, &t, &captions, 0.05)?;
    Ok(())
}

#[test]
fn items_that_do_not_fit_are_refused() -> Result<()> {
    let model = computed_model()?;
    let zeros = |shape: &[i64]| Tensor::zeros(shape, (Kind::Float, Device::Cpu));
    let (latent, caption) = (zeros(&[4, 1, 4, 4]), zeros(&[3, 20]));
    let t = |count: i64| zeros(&[count]);
    let good = [latent.shallow_clone(), latent.shallow_clone()];
    let two = [caption.shallow_clone(), caption.shallow_clone()];
    let with = |bad: &[i64]| [latent.shallow_clone(), zeros(bad)];
    let said = |bad: &[i64]| [caption.shallow_clone(), zeros(bad)];
    let cases: [(&[Tensor], Tensor, &[Tensor], &str); 13] = [
        (&[], t(0), &[], "at least one caption"),
        (&good, t(2), &two[..1], "2 latents need as many captions, found 1"),
        (&good, t(1), &two, "2 latents need as many times, found [1]"),
        (&good, zeros(&[2, 1]), &two, "2 latents need as many times, found [2, 1]"),
        (&with(&[3, 1, 4, 4]), t(2), &two, "item 1: a latent must be [4, frames, H, W]"),
        (&with(&[4, 1, 5, 4]), t(2), &two, "multiples of 2, found [4, 1, 5, 4]"),
        (&with(&[4, 4, 4]), t(2), &two, "item 1: a latent must be"),
        (&with(&[4, 0, 4, 4]), t(2), &two, "item 1: a latent must be"),
        (&with(&[4, 1, 4, 34]), t(2), &two, "axis 2 needs 17 positions but axes_lens allows 16"),
        (&with(&[4, 128, 2, 2]), t(2), &two, "axis 0 needs 161 positions but"),
        (&good, t(2), &said(&[0, 20]), "caption 1 must be [L, 20] with L > 0, found [0, 20]"),
        (&good, t(2), &said(&[3, 21]), "caption 1 must be [L, 20]"),
        (&good, t(2), &said(&[20]), "caption 1 must be [L, 20]"),
    ];
    for (latents, t, captions, expected) in cases {
        let error = model.forward_items(latents, &t, captions, Role::BASE).expect_err(expected);
        assert!(format!("{error:#}").contains(expected), "{error:#} does not say {expected}");
    }
    Ok(())
}
