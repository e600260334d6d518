//! Trains the small Z-Image model on the emoji pictures by flow matching: the teacher of the
//! distillation examples.
//!
//! ```sh
//! cargo run --release --example train_teacher -- --out teacher-run --steps 12000 --bf16
//! ```
//! An interrupted run goes on from its last state in `--out`, with the same numbers.

#[path = "train_teacher/options.rs"]
mod options;

use std::fs;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use decoupled_dmd::{Condition, FewStepGrid, Guidance, Sampler, Shift, Transition};
use options::Options;
use tch::{Device, Kind, Tensor};
use tch_training::ema::update_average;
use tch_training::files::{create_folder, read_json};
use tch_training::parameters::{prefixed, restore};
use tch_training::run::{INTERRUPTED, Interrupt, Lock, Progress, StateFolder, fingerprint};
use tch_training::seed::begin;
use tch_training::{AdamW, AdamWSettings, Parameters};
use zimage::device::set_threads;
use zimage::distil::{SHIFT, denoiser, flow_matching_loss};
use zimage::emoji::EmojiData;
use zimage::failure::{described, is_other_run};
use zimage::model::Pipeline;
use zimage::picture::write_grid;
use zimage::{Config, Role, ZImageTransformer};

/// Steps between two progress lines.
const REPORT_EVERY: u64 = 50;
/// Steps between two checkpoints.
const SAVE_EVERY: u64 = 200;
/// Captions of a preview.
const PREVIEWS: usize = 48;
/// Chance that an item is shown with the empty caption, which guidance needs.
const EMPTY_CAPTION: f64 = 0.1;
/// Chance that an item is shown without its vendor's name.
const PLAIN_CAPTION: f64 = 0.1;

const DOUBLE: (Kind, Device) = (Kind::Double, Device::Cpu);

/// Streams of random numbers; stored results depend on their numbers.
enum Stream {
    /// All that is drawn at a step.
    Step(u64),
    /// The initial weights.
    Weights,
    /// Noise and times of the losses that a preview prints.
    PreviewLoss,
    /// The noise that pictures of a preview start from.
    PreviewNoise,
}

impl From<Stream> for u64 {
    fn from(stream: Stream) -> Self {
        match stream {
            Stream::Step(step) => step,
            Stream::Weights => u64::MAX - 1,
            Stream::PreviewLoss => u64::MAX - 2,
            Stream::PreviewNoise => u64::MAX - 3,
        }
    }
}

fn main() -> ExitCode {
    work().unwrap_or_else(|error| {
        eprintln!("error: {}", described(&error));
        if is_other_run(&error) {
            eprintln!("Use its options, another --out, or --fresh, which forgets it");
        }
        ExitCode::FAILURE
    })
}

fn work() -> Result<ExitCode> {
    let arguments = Options::parse();
    ensure!(arguments.batch > 0, "--batch must be positive");
    ensure!(
        (0.0..=1.0).contains(&arguments.wrong_captions),
        "--wrong-captions must be in [0, 1], found {}",
        arguments.wrong_captions
    );
    ensure!(
        arguments.from.is_none() || arguments.config.is_none(),
        "--from brings its own config: leave --config out"
    );
    ensure!(arguments.measure != Some(0), "--measure must be at least 1 step");
    set_threads(Some(arguments.threads))?;
    let config = match &arguments.config {
        Some(path) => read_json(path)?,
        None => Config::embedded(),
    };
    let data = EmojiData::load(&arguments.data)?;
    let mut trainer = Trainer::new(&arguments, config, &data)?;
    if let Some(steps) = arguments.measure {
        trainer.measure(steps)?;
        return Ok(ExitCode::SUCCESS);
    }
    create_folder(&arguments.out)?;
    let _lock = Lock::take(&arguments.out)?;
    let mut states = open_states(&arguments, trainer.model.config())?;
    trainer.resume(&states)?;
    if !trainer.run(&mut states)? {
        println!(
            "Stopped after step {} of {}; the same command goes on from there",
            trainer.step, arguments.steps
        );
        return Ok(ExitCode::from(INTERRUPTED));
    }
    states.remove()?;
    Ok(ExitCode::SUCCESS)
}

struct Trainer<'a> {
    arguments: &'a Options,
    data: &'a EmojiData,
    /// Features of every item's caption, with and without the vendor's name.
    captions: Vec<[Tensor; 2]>,
    empty: Tensor,
    train: Vec<i64>,
    model: ZImageTransformer,
    average: ZImageTransformer,
    optimizer: AdamW,
    step: u64,
}

impl<'a> Trainer<'a> {
    fn new(arguments: &'a Options, config: Config, data: &'a EmojiData) -> Result<Self> {
        begin(arguments.seed, Stream::Weights);
        let model = match &arguments.from {
            Some(folder) => Pipeline::load(folder, Kind::Float, Device::Cpu)?.transformer,
            None => ZImageTransformer::init(config, Device::Cpu)?,
        };
        model.set_requires_grad(true)?;
        let settings = AdamWSettings {
            betas: (0.9, 0.99),
            weight_decay: arguments.weight_decay,
            max_gradient_norm: Some(1.0),
            ..AdamWSettings::default()
        };
        let encode = |caption: &str| data.vocabulary.encode_caption(caption);
        let captions = data
            .items
            .iter()
            .map(|item| Ok([encode(&item.caption)?, encode(item.plain_caption())?]))
            .collect::<Result<_>>()?;
        let count: usize = model.parameters().values().map(Tensor::numel).sum();
        let train = data.indices(false);
        ensure!(!train.is_empty(), "every item is held out");
        println!("{count} parameters, {} pictures to train on", train.len());
        Ok(Self {
            empty: encode("")?,
            captions,
            train,
            average: model.duplicate()?,
            optimizer: AdamW::new(model.named_parameters(), settings)?,
            model,
            step: 0,
            arguments,
            data,
        })
    }

    /// As many items to train on as a batch has, at random.
    fn draw_items(&self) -> Result<Vec<i64>> {
        let options = (Kind::Int64, Device::Cpu);
        let picks = Tensor::f_randint(self.train.len() as i64, [self.arguments.batch], options)?;
        let picks = Vec::<i64>::try_from(&picks)?;
        Ok(picks.into_iter().map(|pick| self.train[pick as usize]).collect())
    }

    /// Pictures `[B, 3, 32, 32]` and their captions, some of them dropped, shortened or exchanged.
    fn draw_batch(&self) -> Result<(Tensor, Vec<Tensor>)> {
        let batch = self.arguments.batch;
        let items = self.draw_items()?;
        let others = self.draw_items()?;
        let chances = Vec::<f64>::try_from(Tensor::f_rand([2, batch], DOUBLE)?.f_flatten(0, 1)?)?;
        let (shortened, exchanged) = chances.split_at(batch as usize);
        let captions = (0..batch as usize)
            .map(|i| {
                let is_wrong = exchanged[i] < self.arguments.wrong_captions;
                let item = if is_wrong { others[i] } else { items[i] };
                let [full, plain] = &self.captions[item as usize];
                let chance = shortened[i];
                if chance < EMPTY_CAPTION {
                    &self.empty
                } else if chance < EMPTY_CAPTION + PLAIN_CAPTION {
                    plain
                } else {
                    full
                }
                .shallow_clone()
            })
            .collect();
        Ok((self.data.images.f_index_select(0, &Tensor::f_from_slice(&items)?)?, captions))
    }

    /// One optimizer step; returns loss and gradient norm as scalar tensors.
    fn train_step(&mut self) -> Result<(Tensor, Tensor)> {
        begin(self.arguments.seed, Stream::Step(self.step));
        self.optimizer.settings.learning_rate = self.arguments.learning_rate(self.step);
        let (images, captions) = self.draw_batch()?;
        let loss = if self.arguments.bf16 {
            flow_matching_loss(&self.model.cast(Kind::BFloat16)?, &images, &captions)?
        } else {
            flow_matching_loss(&self.model, &images, &captions)?
        };
        self.optimizer.zero_grad()?;
        loss.f_backward()?;
        let norm = self.optimizer.step()?;
        self.step += 1;
        let average = self.average.named_parameters();
        update_average(&average, &self.model.named_parameters(), self.arguments.ema, self.step)?;
        Ok((loss.f_detach()?, norm))
    }

    fn measure(&mut self, steps: u64) -> Result<()> {
        for _ in 0..3 {
            let _ = self.train_step()?;
        }
        let start = Instant::now();
        for _ in 0..steps {
            let _ = self.train_step()?;
        }
        println!("{:.3} s/step", start.elapsed().as_secs_f64() / steps as f64);
        Ok(())
    }

    /// Runs the steps that are left; whether none was left out because the user stopped it.
    fn run(&mut self, states: &mut StateFolder) -> Result<bool> {
        let interrupt = Interrupt::install("Saving after this step; Ctrl-C again leaves at once")?;
        let (mut start, mut since) = (Instant::now(), self.step);
        let mut sums = [0.0, 0.0];
        while self.step < self.arguments.steps {
            let (loss, norm) = self.train_step()?;
            for (sum, value) in sums.iter_mut().zip([loss, norm]) {
                *sum += f64::try_from(&value)?;
            }
            for (what, sum) in ["the loss", "the gradient"].into_iter().zip(sums) {
                ensure!(sum.is_finite(), "{what} is not finite at step {}", self.step);
            }
            if self.step.is_multiple_of(REPORT_EVERY) {
                let count = (self.step - since) as f64;
                let pace = start.elapsed().as_secs_f64() / count;
                println!(
                    "step {}  loss {:.4}  gradient {:.3}  lr {:.2e}  {pace:.3} s/step  {:.0} min left",
                    self.step,
                    sums[0] / count,
                    sums[1] / count,
                    self.optimizer.settings.learning_rate,
                    (self.arguments.steps - self.step) as f64 * pace / 60.0
                );
                (start, since, sums) = (Instant::now(), self.step, [0.0, 0.0]);
            }
            let is_last = self.step == self.arguments.steps;
            let stop = interrupt.is_requested();
            if is_last || stop || self.step.is_multiple_of(SAVE_EVERY) {
                self.save(states)?;
            }
            if stop && !is_last {
                return Ok(false);
            }
            let preview = self.arguments.preview;
            if preview > 0 && (is_last || self.step.is_multiple_of(preview)) {
                self.preview()?;
                (start, since, sums) = (Instant::now(), self.step, [0.0, 0.0]);
            }
        }
        Ok(true)
    }

    /// The averaged model, in the dtype of the forward pass.
    fn averaged(&self) -> Result<ZImageTransformer> {
        self.average.cast(self.arguments.kind())
    }

    /// Prints the averaged model's loss on items trained on and held out, and draws a fixed choice of
    /// captions: picture, unguided sample, guided sample.
    fn preview(&self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        let model = self.averaged()?;
        let held_out = self.data.indices(true);
        for (name, indices) in [("trained on", &self.train), ("held out", &held_out)] {
            let count = indices.len().min(256);
            let mut total = 0.0;
            begin(self.arguments.seed, Stream::PreviewLoss);
            let spread: Vec<i64> = (0..count).map(|i| indices[i * indices.len() / count]).collect();
            for chunk in spread.chunks(64) {
                let images = self.data.images.f_index_select(0, &Tensor::f_from_slice(chunk)?)?;
                let loss = flow_matching_loss(&model, &images, &self.full_captions(chunk))?;
                total += f64::try_from(&loss)? * chunk.len() as f64;
            }
            if count > 0 {
                println!("step {}  loss on pictures {name} {:.4}", self.step, total / count as f64);
            }
        }

        let held_out_share = held_out.len().min(PREVIEWS / 4);
        let trained = PREVIEWS - held_out_share;
        let mut picks: Vec<i64> =
            (0..trained).map(|i| self.train[i * self.train.len() / trained]).collect();
        picks.extend((0..held_out_share).map(|i| held_out[i * held_out.len() / held_out_share]));
        let captions =
            Condition::from(model.encode_captions(&self.full_captions(&picks), Role::BASE)?);
        let empty = model.encode_captions(std::slice::from_ref(&self.empty), Role::BASE)?;
        let null = Condition::from(empty.f_expand([picks.len() as i64, -1, -1], false)?);
        let real = self.data.images.f_index_select(0, &Tensor::f_from_slice(&picks)?)?;
        begin(self.arguments.seed, Stream::PreviewNoise);
        let noise = real.f_randn_like()?;
        let denoiser = denoiser(&model, Shift::new(SHIFT)?);
        let grid = FewStepGrid::even(30)?;
        let mut columns = vec![real];
        for guidance in [1.0, 3.0] {
            let sampler = Sampler::new(&denoiser, grid.clone(), Transition::Ddim)
                .guided(Guidance::new(guidance)?, &null);
            columns.push(sampler.sample(&noise, &captions)?);
        }
        let grid = Tensor::f_stack(&columns, 1)?.f_flatten(0, 1)?;
        write_grid(
            &self.arguments.out.join(format!("preview-{:06}.png", self.step)),
            &grid,
            12,
            2,
        )?;
        let list: Vec<&str> =
            picks.iter().map(|pick| self.data.items[*pick as usize].caption.as_str()).collect();
        Ok(fs::write(self.arguments.out.join("preview.txt"), list.join("\n") + "\n")?)
    }

    fn full_captions(&self, items: &[i64]) -> Vec<Tensor> {
        items.iter().map(|item| self.captions[*item as usize][0].shallow_clone()).collect()
    }

    /// Everything that training changes; storage is shared, but for the count of steps.
    fn state(&self) -> Parameters {
        let parameters = |model: &ZImageTransformer| model.named_parameters().into_iter().collect();
        prefixed("weights", parameters(&self.model))
            .chain(prefixed("average", parameters(&self.average)))
            .chain(prefixed("adamw", self.optimizer.state()))
            .chain([("step".to_owned(), Tensor::from(self.step as i64))])
            .collect()
    }

    /// Writes the averaged model as a diffusers folder, and everything needed to go on.
    fn save(&self, states: &mut StateFolder) -> Result<()> {
        // The model first: a run that goes on from the state of the last step does not write it again.
        Pipeline { transformer: self.average.duplicate()?, shift: Shift::new(SHIFT)? }
            .save(&self.arguments.out.join("teacher"))?;
        Ok(states.save(&self.state(), Progress::default())?)
    }

    fn resume(&mut self, states: &StateFolder) -> Result<()> {
        let Some((state, _)) = states.load()? else { return Ok(()) };
        let step = state.get("step").context("the training state has no step")?;
        let step = u64::try_from(i64::try_from(step)?)?;
        restore(&self.state(), &state)?;
        self.step = step;
        println!("Going on from step {}; --fresh starts anew", self.step);
        Ok(())
    }
}

/// The folder of the run's state; finds an unfinished run of the same recipe and data.
fn open_states(arguments: &Options, config: &Config) -> Result<StateFolder> {
    let identity = serde_json::json!({
        "recipe": arguments,
        "config": config,
        "data": {
            "captions and pictures": fingerprint(&arguments.data)?,
            "initial weights": arguments.from.as_deref().map(fingerprint).transpose()?,
        },
    });
    let folder = arguments.out.join("state");
    Ok(if arguments.fresh {
        StateFolder::open_fresh(&folder, &identity)?
    } else {
        StateFolder::open(&folder, &identity)?
    })
}
