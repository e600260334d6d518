//! The memory of a training, predicted before it is started.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Result, ensure};
use tch::Kind;
use tch_training::lora::LoraSettings;

use crate::model::config::{Config, is_caption_side};
use crate::model::grid::padded;
use crate::model::quantization::{Storage, is_quantized};

/// Bytes of a float32 number.
const SINGLE: u64 = 4;
/// Bytes of the scale of a row in 8 bits.
const SCALE: u64 = 2;

/// Tokens of one call, of all samples together, that no machine has room for.
const MOST_TOKENS: i64 = 1 << 26;

/// A training of student and fake score against a frozen teacher.
#[derive(Clone, Debug)]
pub struct TrainingSetup<'a> {
    pub config: &'a Config,
    /// Rows and columns of the latents: an eighth of the picture's, where there is an autoencoder.
    pub size: (i64, i64),
    /// Tokens of the longest caption, at least 1.
    pub caption: i64,
    /// Samples of one call, at least 1.
    pub batch: i64,
    /// The dtype of the forward pass, and of the frozen weights.
    pub kind: Kind,
    /// How the weights of the base are kept.
    pub storage: Storage,
    /// Adapters over one base, or else a float32 copy of the model for each of the two, all of it trained
    /// but the caption side.
    pub lora: Option<&'a LoraSettings>,
    /// The adapter of the fake score, where it is not like the student's.
    pub fake_lora: Option<&'a LoraSettings>,
    /// Whether blocks keep their inputs alone.
    pub checkpointing: bool,
    /// Whether captions are encoded in the call that is trained, and not beforehand.
    pub encodes_captions: bool,
    /// Whether a moving average of the student is kept.
    pub ema: bool,
}

/// What one thing takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    pub name: &'static str,
    pub bytes: u64,
}

/// Predicted memory by part, in bytes. Weights, gradients and moments are exact; activations follow from
/// what the blocks keep with fused attention; the workspace is an estimate of what lives within a block.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    pub parts: Vec<Part>,
    /// Bytes of the gradients of student and fake score.
    pub gradients: [u64; 2],
}

impl MemoryPlan {
    /// The prediction for a training.
    ///
    /// # Errors
    /// If the config or the adapter's settings are not valid, or a number is out of range.
    pub fn new(setup: &TrainingSetup<'_>) -> Result<Self> {
        let activations = Activations::new(setup)?;
        let width = setup.width();
        let counts = |keep: &dyn Fn(&str) -> bool| -> u64 {
            let parameters = setup.config.parameters();
            let kept = parameters.iter().filter(|(name, _)| keep(name));
            kept.map(|(_, shape)| shape.iter().product::<i64>() as u64).sum()
        };
        let all = counts(&|_| true);
        let weights = |adapter: Option<&LoraSettings>| -> Result<(u64, u64)> {
            Ok(match adapter {
                Some(settings) => {
                    let count = pairs(setup.config, settings)?;
                    (count, count)
                }
                None => (all, counts(&|name| setup.encodes_captions || !is_caption_side(name))),
            })
        };
        let (student, trained_student) = weights(setup.lora)?;
        let (fake, trained_fake) = weights(setup.fake_lora.or(setup.lora))?;
        let trained = trained_student + trained_fake;
        // The float32 master of the call under way in the dtype of the pass; the pairs' casts belong to the
        // activations.
        let cast = if setup.lora.is_none() && width != SINGLE { all * width } else { 0 };
        let base = match setup.storage {
            Storage::Full => all * width,
            Storage::Int8 => {
                let rows = |(name, shape): &(String, Vec<i64>)| {
                    if is_quantized(name) { shape[0] as u64 } else { 0 }
                };
                let rows: u64 = setup.config.parameters().iter().map(rows).sum();
                let whole = counts(&|name| !is_quantized(name));
                all - whole + rows * SCALE + whole * width
            }
        };
        let part = |name, bytes| Part { name, bytes };
        let parts = vec![
            part("base weights", base),
            part("student weights", student * SINGLE),
            part("fake score weights", fake * SINGLE),
            part("cast of the weights in use", cast),
            part("gradients", trained * SINGLE),
            part("AdamW moments", trained * 2 * SINGLE),
            part("moving average", if setup.ema { student * SINGLE } else { 0 }),
            // Student and fake score are never in a graph together.
            part("activations of one gradient call", activations.kept()),
            part("weights made of 8 bits", activations.dequantized()),
            part("one block computed again", activations.recomputed()),
            part("workspace of one block", activations.workspace()),
        ];
        let gradients = [trained_student, trained_fake].map(|trained| trained * SINGLE);
        Ok(Self { parts, gradients })
    }

    /// The sum of all parts. What the driver and the allocator keep for themselves comes on top: two to
    /// three gigabytes on a GPU.
    pub fn total(&self) -> u64 {
        self.parts.iter().map(|part| part.bytes).sum()
    }
}

impl fmt::Display for MemoryPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row =
            |name: &str, bytes: u64| writeln!(f, "{name:<34}{:>10.3} GB", bytes as f64 / 1e9);
        for part in self.parts.iter().filter(|part| part.bytes > 0) {
            row(part.name, part.bytes)?;
        }
        row("total", self.total())
    }
}

impl TrainingSetup<'_> {
    /// Bytes of a number in the dtype of the pass.
    fn width(&self) -> u64 {
        match self.kind {
            Kind::Double => 8,
            Kind::Float => SINGLE,
            _ => 2,
        }
    }

    /// Tokens of image and caption, padding included.
    fn tokens(&self) -> Result<(u64, u64)> {
        let patch = self.config.patch_size();
        let (height, width) = self.size;
        ensure!(
            height > 0 && width > 0 && height % patch == 0 && width % patch == 0,
            "latents of {height} x {width} are not made of patches of {patch} x {patch}"
        );
        ensure!(self.caption > 0, "a caption must have at least 1 token, found {}", self.caption);
        ensure!(self.batch > 0, "batch must be at least 1, found {}", self.batch);
        let (rows, columns) = (height / patch, width / patch);
        // Bounded by what positions the model knows, so that nothing below overflows.
        for (axis, needed) in [self.caption, rows, columns].into_iter().enumerate() {
            let most = self.config.axes_lens[axis];
            ensure!(needed <= most, "axis {axis} has {most} positions, but {needed} are needed");
        }
        let (needed, most) = (padded(self.caption) + 2, self.config.axes_lens[0]);
        ensure!(needed <= most, "axis 0 has {most} positions, but {needed} are needed");
        let (image, caption) = (padded(rows * columns), padded(self.caption));
        ensure!(
            (image + caption).checked_mul(self.batch).is_some_and(|tokens| tokens <= MOST_TOKENS),
            "{} samples of {} tokens at once are more than the {MOST_TOKENS} tokens that are planned for",
            self.batch,
            image + caption
        );
        Ok((image as u64, caption as u64))
    }
}

/// Numbers in the pairs of an adapter.
fn pairs(config: &Config, settings: &LoraSettings) -> Result<u64> {
    let modules = settings.adapted(&config.linears())?;
    Ok(modules.iter().map(|(_, [rows, columns])| (settings.rank * (rows + columns)) as u64).sum())
}

/// One block in one call: its name, tokens in the batch, and whether time modulates it.
struct Call {
    name: String,
    tokens: u64,
    modulated: bool,
}

/// What autograd keeps of one call.
struct Activations<'a> {
    setup: &'a TrainingSetup<'a>,
    calls: Vec<Call>,
    /// Image tokens in the batch.
    image: u64,
    /// Layers that have a pair.
    adapted: BTreeSet<String>,
}

impl<'a> Activations<'a> {
    fn new(setup: &'a TrainingSetup<'a>) -> Result<Self> {
        setup.config.validate()?;
        let (image, caption) = setup.tokens()?;
        let modules =
            setup.lora.map(|settings| settings.adapted(&setup.config.linears())).transpose()?;
        let refiners = setup.config.n_refiner_layers;
        let captions = if setup.encodes_captions { refiners } else { 0 };
        let stacks = [
            ("noise_refiner", refiners, image, true),
            ("context_refiner", captions, caption, false),
            ("layers", setup.config.n_layers, image + caption, true),
        ];
        let calls = stacks.into_iter().flat_map(|(stack, count, tokens, modulated)| {
            let tokens = tokens * setup.batch as u64;
            (0..count).map(move |i| Call { name: format!("{stack}.{i}"), tokens, modulated })
        });
        Ok(Self {
            setup,
            calls: calls.collect(),
            image: image * setup.batch as u64,
            adapted: modules.into_iter().flatten().map(|(name, _)| name).collect(),
        })
    }

    /// Bytes from the end of the forward pass to the backward pass.
    fn kept(&self) -> u64 {
        let (dim, width) = (self.setup.config.dim as u64, self.setup.width());
        let stream = |call: &Call| call.tokens * dim * width;
        // The final norm keeps the last output.
        let last = self.calls.last().map_or(0, stream) + self.outside_blocks();
        if !self.setup.checkpointing {
            return last + self.calls.iter().map(|call| self.block(call)).sum::<u64>();
        }
        // The outputs of the refiners are kept as well as their copies in the joint stream.
        let ends = self
            .calls
            .iter()
            .filter(|call| call.name.ends_with("refiner.0"))
            .map(stream)
            .sum::<u64>();
        last + ends + self.calls.iter().map(stream).sum::<u64>()
    }

    /// Bytes that the layers before and after the blocks keep where they are trained.
    fn outside_blocks(&self) -> u64 {
        let config = self.setup.config;
        let key = config.patch_key();
        let is_trained = |name: &str| self.setup.lora.is_none() || self.adapted.contains(name);
        let last = format!("all_final_layer.{key}");
        let inputs = [
            (is_trained(&format!("all_x_embedder.{key}")), config.patch_dim()),
            // The final norm's output, which the scale multiplies, and their product.
            (is_trained(&format!("{last}.adaLN_modulation.1")) || self.time_moves(), config.dim),
            (is_trained(&format!("{last}.linear")), config.dim),
        ];
        let per_token: i64 = inputs.iter().filter(|(kept, _)| *kept).map(|(_, size)| size).sum();
        self.image * per_token as u64 * self.setup.width()
    }

    /// Whether the time embedding carries a gradient.
    fn time_moves(&self) -> bool {
        self.setup.lora.is_none() || self.adapted.iter().any(|name| name.starts_with("t_embedder"))
    }

    /// Bytes of the largest block while its gradient is computed, where it was not kept.
    fn recomputed(&self) -> u64 {
        let blocks = self.calls.iter().map(|call| self.block(call));
        if self.setup.checkpointing { blocks.max().unwrap_or(0) } else { 0 }
    }

    /// Bytes of the weights that are made of those in 8 bits and live together: a backward pass needs them again,
    /// those of one block with checkpointing, else all; otherwise the largest.
    fn dequantized(&self) -> u64 {
        if self.setup.storage == Storage::Full {
            return 0;
        }
        let parameters = self.setup.config.parameters();
        let of = |block: &str| -> u64 {
            let own = |name: &str| name.starts_with(&format!("{block}.")) && is_quantized(name);
            let sizes = parameters.iter().filter(|(name, _)| own(name));
            sizes.map(|(_, shape)| shape.iter().product::<i64>() as u64).sum()
        };
        let blocks = self.calls.iter().map(|call| of(&call.name));
        let numbers =
            if self.setup.checkpointing { blocks.max().unwrap_or(0) } else { blocks.sum() };
        numbers * self.setup.width()
    }

    /// Gate, its activation, the up-projection and their product, and a few streams: the most that lives at
    /// once within a block besides what is kept.
    fn workspace(&self) -> u64 {
        let config = self.setup.config;
        let per_token = 4 * (config.feed_forward_dim() + config.dim) as u64 * self.setup.width();
        self.calls.iter().map(|call| call.tokens * per_token).max().unwrap_or(0)
    }

    /// Bytes that autograd keeps of one block.
    fn block(&self, call: &Call) -> u64 {
        let config = self.setup.config;
        let (dim, hidden) = (config.dim as u64, config.feed_forward_dim() as u64);
        let (heads, width) = (config.n_heads as u64, self.setup.width());
        let wide = width.max(SINGLE);
        let is_adapted = |part: &str| self.adapted.contains(&format!("{}.{part}", call.name));
        let full = self.setup.lora.is_none();

        // Inputs of the six norms in float32, their statistics and attention's; queries, keys, values and
        // output of attention; gate, its activation and the up-projection.
        let norms = 6 * dim * wide + (8 + 5 * heads) * wide;
        let mut per_token = norms + (4 * dim + 3 * hidden) * width;
        if width >= SINGLE {
            // What each norm multiplies its input by.
            per_token += 6 * dim * width;
        } else {
            if full {
                // Each norm before its weight.
                per_token += 6 * dim * width;
            }
            if call.modulated && (self.time_moves() || is_adapted("adaLN_modulation.0")) {
                // What scales and gates multiply.
                per_token += 4 * dim * width;
            }
        }

        // The inputs of the linear layers; the output of attention is kept anyway. Each group shares one.
        let groups: [(&[&str], u64, u64); 4] = [
            (&["attention.to_q", "attention.to_k", "attention.to_v"], dim, dim),
            (&["attention.to_out.0"], dim, 0),
            (&["feed_forward.w1", "feed_forward.w3"], dim, dim),
            (&["feed_forward.w2"], hidden, hidden),
        ];
        let mut once = 0;
        for (parts, input, extra) in groups {
            let count = parts.iter().filter(|part| is_adapted(part)).count() as u64;
            match self.setup.lora {
                None => per_token += extra * width,
                // With dropout every layer has an input and a mask of its own.
                Some(lora) if lora.dropout > 0.0 => per_token += count * input * (width + 1),
                Some(_) if count > 0 => per_token += extra * width,
                Some(_) => {}
            }
            if let Some(lora) = self.setup.lora {
                let rank = lora.rank as u64;
                per_token += count * rank * width;
                // Their outputs are as wide as the stream or the hidden layer, whichever the input is not.
                let output = if parts[0].starts_with("feed") { dim + hidden - input } else { dim };
                let cast = if width == SINGLE { 0 } else { rank * (input + output) * width };
                once += count * cast;
            }
        }
        call.tokens * per_token + once + 4 * dim * width * self.setup.batch as u64
    }
}
