//! Terms that give the draws of objective and fake score, and terms that train without a rollout.

use std::cell::RefCell;

use anyhow::Result;
use decoupled_dmd::{
    CfgAugmentation, Denoiser, DistributionMatching, Draw, Group, Guidance, NoisePath, Objective,
    PreShift, RectifiedFlow, Renoising, Shift, Steps, Uniform,
};
use tch::{Kind, Tensor};
use zimage::ZImageTransformer;
use zimage::distil::{
    Captions, Distillation, Networks, Preset, Readings, Recipe, Record, Rollout, Terms,
};

use super::common::tiny::{prompts, teacher};
use super::common::{max_difference, seeded, worse};

/// Of one sample.
const SIZE: [i64; 3] = [3, 16, 16];
const STEPS: usize = 2;
const FAKE_UPDATES: u64 = 2;
const FAKE_WARMUP: u64 = 3;

/// Where the draws come from.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Draws {
    /// Nowhere: what terms do that know nothing of draws.
    Default,
    /// The numbers that the objective and the fake score would have drawn.
    Same,
    /// The second half of each segment of the rollout, with the noise that the prediction implies.
    Segments,
}

/// CA and distribution matching in as many groups as they have draws, and what the terms were asked for.
#[derive(Debug)]
struct Drawing {
    draws: Draws,
    groups: usize,
    drawn: RefCell<u64>,
    trained: Vec<(u64, bool)>,
    /// Updates without a rollout.
    on_data: u64,
}

impl Drawing {
    fn new(draws: Draws) -> Self {
        Self { draws, groups: 1, drawn: RefCell::new(0), trained: Vec::new(), on_data: 0 }
    }
}

fn shift() -> Shift {
    Shift::new(3.0).unwrap()
}

impl Terms for Drawing {
    fn objective<'o>(
        &'o self,
        teacher: Denoiser<'o>,
        dm: Option<&'o DistributionMatching<'o>>,
    ) -> Result<Objective<'o>> {
        let group = || Group::new(Renoising::new(Uniform::FULL));
        let ca = group().engine("ca", 1.0, CfgAugmentation::new(Guidance::new(3.0)?));
        let dm = dm.expect("a fake score");
        let objective = Objective::new(teacher);
        Ok(match self.groups {
            1 => objective.with(ca.regularizer("dm", 1.0, dm)),
            _ => objective.with(ca).with(group().regularizer("dm", 1.0, dm)),
        })
    }

    fn draw(&self, rollout: &Rollout<'_>, steps: &Steps) -> Result<Option<Draw>> {
        *self.drawn.borrow_mut() += 1;
        let x = rollout.trajectory.samples_at(steps)?;
        let options = (Kind::Float, x.device());
        match self.draws {
            Draws::Default => Ok(None),
            Draws::Same => {
                let u = Tensor::f_rand([x.size()[0]], options)?;
                Ok(Some(Draw { u, noise: x.f_randn_like()? }))
            }
            Draws::Segments => {
                let (input, start) = rollout.trajectory.inputs_at(steps)?;
                let path = RectifiedFlow.shifted(shift());
                let noise = path.implied_noise(&input, &x, &shift().apply(&start)?)?;
                let late = Tensor::f_rand([x.size()[0]], options)?.f_mul_scalar(0.2)?;
                let u = start.tensor().f_add(&late.f_add_scalar(0.25)?)?;
                Ok(Some(Draw { u, noise }))
            }
        }
    }

    fn rollout_steps(&self, update: u64, most: usize) -> Option<usize> {
        (update >= self.on_data).then_some(most)
    }

    fn more_losses(
        &self,
        _update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Vec<(Tensor, Readings)>> {
        if rollout.is_some() {
            return Ok(Vec::new());
        }
        let count = captions.items.len() as i64;
        let [channels, height, width] = SIZE;
        let noise =
            Tensor::f_ones([count, channels, height, width], (Kind::Float, tch::Device::Cpu))?;
        let time = shift().apply(&PreShift::all(0.0, count, (Kind::Float, tch::Device::Cpu))?)?;
        let x = networks.student.denoise(&noise, &time, &captions.cond)?;
        Ok(vec![(x.f_square()?.f_mean(Kind::Float)?, Readings::default())])
    }

    fn train(
        &mut self,
        update: u64,
        networks: &Networks<'_>,
        captions: &Captions,
        rollout: Option<&Rollout<'_>>,
    ) -> Result<Readings> {
        assert!(networks.dm.is_some() && !captions.items.is_empty());
        self.trained.push((update, rollout.is_some()));
        Ok(Readings::default())
    }
}

fn recipe() -> Recipe {
    let mut recipe = Preset::Embedded.recipe(shift()).unwrap();
    (recipe.steps, recipe.updates, recipe.batch) = (STEPS, 3, 4);
    (recipe.fake_updates, recipe.fake_warmup, recipe.warmup) = (FAKE_UPDATES, FAKE_WARMUP, 1);
    (recipe.student.learning_rate, recipe.fake.learning_rate) = (1e-3, 1e-3);
    recipe
}

type Training<'a> = Distillation<'a, Drawing>;

fn updates(training: &mut Training<'_>, count: u64) -> Result<Vec<Record>> {
    let mut update = || {
        while !training.is_warm() {
            training.warm_up()?;
        }
        training.step(true)
    };
    (0..count).map(|_| update()).collect()
}

fn trained(terms: Drawing, teacher: &ZImageTransformer) -> Result<(Vec<Record>, Vec<Tensor>, u64)> {
    let prompts = prompts(teacher)?;
    let mut training =
        Distillation::with_terms(recipe(), teacher, &prompts, &[0, 1, 2], SIZE, terms)?;
    let records = updates(&mut training, 3)?;
    let drawn = *training.terms().drawn.borrow();
    let state = training.state().into_values().map(|tensor| tensor.copy()).collect();
    Ok((records, state, drawn))
}

fn largest_difference(one: &[Tensor], other: &[Tensor]) -> f64 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| max_difference(a, b)).fold(0.0, worse)
}

#[test]
fn given_draws_that_are_the_defaults_change_nothing() -> Result<()> {
    let _guard = seeded(0);
    let teacher = teacher()?;
    let (records, state, asked) = trained(Drawing::new(Draws::Default), &teacher)?;
    // Of the student and of the fake score, once an update each.
    assert_eq!(asked, 3 * (1 + FAKE_UPDATES) + FAKE_WARMUP);
    let (same_records, same, same_asked) = trained(Drawing::new(Draws::Same), &teacher)?;
    assert_eq!((&records, asked), (&same_records, same_asked));
    assert_eq!(largest_difference(&state, &same), 0.0);
    let (other_records, other, _) = trained(Drawing::new(Draws::Segments), &teacher)?;
    assert_ne!(records, other_records);
    assert!(largest_difference(&state, &other) > 1e-4, "the draws must matter");
    Ok(())
}

#[test]
fn a_training_with_given_draws_goes_on_to_the_same_student() -> Result<()> {
    let _guard = seeded(1);
    let teacher = teacher()?;
    let (records, whole, _) = trained(Drawing::new(Draws::Segments), &teacher)?;
    let prompts = prompts(&teacher)?;
    let new = || -> Result<Training<'_>> {
        let terms = Drawing::new(Draws::Segments);
        Distillation::with_terms(recipe(), &teacher, &prompts, &[0, 1, 2], SIZE, terms)
    };
    let mut first = new()?;
    assert_eq!(updates(&mut first, 1)?, records[..1]);
    let mut second = new()?;
    second.load_state(&first.state())?;
    assert_eq!(updates(&mut second, 2)?, records[1..]);
    let state: Vec<Tensor> = second.state().into_values().collect();
    assert_eq!(largest_difference(&state, &whole), 0.0);
    Ok(())
}

#[test]
fn one_draw_for_several_groups_is_refused() -> Result<()> {
    let _guard = seeded(2);
    let teacher = teacher()?;
    let terms = || Drawing { groups: 2, ..Drawing::new(Draws::Same) };
    let error = trained(terms(), &teacher).expect_err("a refusal");
    assert!(format!("{error:#}").contains("number of draws"), "{error:#}");
    let plain = Drawing { groups: 2, ..Drawing::new(Draws::Default) };
    assert!(trained(plain, &teacher).is_ok());
    Ok(())
}

#[test]
fn terms_are_trained_in_updates_without_a_rollout_too() -> Result<()> {
    let _guard = seeded(3);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let terms = Drawing { on_data: 2, ..Drawing::new(Draws::Default) };
    let mut training =
        Distillation::with_terms(recipe(), &teacher, &prompts, &[0, 1, 2], SIZE, terms)?;
    let records = updates(&mut training, 3)?;
    assert_eq!(training.terms().trained, [(0, false), (1, false), (2, true)]);
    let has_fake = |record: &Record| record.iter().any(|(name, _)| name == "fake");
    assert_eq!(records.iter().map(has_fake).collect::<Vec<_>>(), [false, false, true]);
    Ok(())
}
