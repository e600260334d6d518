//! The experiments: their arms against the library's schedules, training on a tiny model, statistics,
//! spectra and the report.

#[path = "../../examples/ablation/mod.rs"]
mod ablation;
#[path = "../../crates/zimage/tests/common/mod.rs"]
mod common;
mod made_up_results;
mod stages;
mod statistics;

use std::collections::{BTreeMap, BTreeSet};

use ablation::arm::{Arm, OnData, Regularization, RenoisingTimes};
use ablation::bench::Bench;
use ablation::pairs::{PairSets, PairSource};
use ablation::record::{Reference, RunRecord, reference_path, run_path};
use ablation::results::Field;
use ablation::run::{run, write_reference};
use ablation::training::{ArmTerms, Material, named, training};
use ablation::{experiments, record, report};
use anyhow::Result;
use common::tiny::{prompts, teacher};
use common::{gradient, max_difference, seeded, wave, worse};
use decoupled_dmd::{
    Batch, Condition, DistributionMatching, Draw, Guidance, PreShift, Schedule, Shift,
};
use made_up_results::made_up;
use tch::{Device, Kind, Tensor};
use tch_training::files::read_json;
use tempfile::tempdir;
use zimage::ZImageTransformer;
use zimage::distil::{Prompts, Terms, denoiser};
use zimage::emoji::{Classifier, EmojiData, Judge, mean_variance};

const DM: Regularization = Regularization::DistributionMatching(RenoisingTimes::FULL);

fn material<'a>(
    teacher: &'a ZImageTransformer,
    prompts: &'a Prompts,
    classifier: &'a Classifier,
) -> Result<Material<'a>> {
    Ok(Material {
        classifier,
        pairs: pairs(teacher, prompts)?,
        teacher,
        shift: Shift::new(3.0)?,
        prompts,
        items: vec![0, 1, 2],
        images: wave(&[3, 3, 16, 16], 0.2, Kind::Float),
    })
}

/// Those of the arms, for a smoke test.
fn pairs(teacher: &ZImageTransformer, prompts: &Prompts) -> Result<PairSets> {
    let arm = Arm::new("any", 1).on_data(OnData::AdversarialPairs).quick();
    let settings = |source: PairSource| {
        assert_eq!(source, PairSource::QUICK);
        source.settings(&[0, 1, 2], [3, 16, 16], Shift::new(3.0)?)
    };
    PairSets::make([&arm].into_iter(), tempdir()?.path(), teacher, prompts, settings)
}

fn classifier() -> Result<Classifier> {
    Classifier::init(3, Device::Cpu)
}

type Record = Vec<(String, f64)>;

/// Two updates; the diagnostics of the last and the raw weights of the average.
fn train(arm: &Arm, material: &Material<'_>) -> Result<(Record, Vec<Tensor>)> {
    let mut training = training(arm, 3, material)?;
    while !training.is_warm() {
        training.warm_up()?;
    }
    let _first = training.step(true)?;
    let record = named(training.step(true)?);
    let student = training.student().model.duplicate()?;
    Ok((record, student.named_parameters().into_iter().map(|(_, tensor)| tensor).collect()))
}

#[test]
fn every_arm_trains_and_says_what_its_terms_do() -> Result<()> {
    let _guard = seeded(0);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    let mut seen = BTreeSet::new();
    for arm in experiments::all()?.into_iter().flat_map(|experiment| experiment.arms) {
        let arm = arm.quick();
        if !seen.insert(arm.name.clone()) {
            continue;
        }
        let (record, _) = train(&arm, &material)?;
        let has = |name: &str| record.iter().any(|(n, value)| n == name && value.is_finite());
        assert_eq!(has("ca_loss"), arm.engine.is_some(), "{}: {record:?}", arm.name);
        assert_eq!(has("fake_loss"), arm.has_fake(), "{}", arm.name);
        assert_eq!(has("critic_loss"), arm.has_critic(), "{}", arm.name);
        for term in &arm.regularizers {
            let name = match term {
                Regularization::DistributionMatching(_) => "dm_loss",
                Regularization::MeanVariance { .. }
                | Regularization::ChannelMeanVariance { .. } => "mean_variance_loss",
                Regularization::MaximumMeanDiscrepancy { .. }
                | Regularization::DiscrepancyToPrior { .. } => "mmd_loss",
                Regularization::Adversarial { .. } => "gan_loss",
                Regularization::AdversarialDistributionMatching { .. } => "adm_loss",
                Regularization::Divergence(_) => "dm_loss",
                Regularization::ScoreIdentity { .. } => "sid_loss",
                Regularization::Reward { .. } => "reward_loss",
            };
            assert!(has(name), "{} lacks {name}: {record:?}", arm.name);
        }
        if let (Some(loss), None) = (arm.on_data, arm.first_stage) {
            let name = match loss {
                OnData::Consistency { .. } => "consistency_loss",
                OnData::MeanFlow { .. } => "mean_flow_loss",
                OnData::Regression(_) => "regression_loss",
                OnData::AdversarialPairs => "adp_loss",
            };
            assert!(has(name), "{} lacks {name}: {record:?}", arm.name);
        }
    }
    assert!(seen.len() > 20, "only {} arms", seen.len());
    Ok(())
}

#[test]
fn an_arm_that_is_shared_has_the_same_settings_everywhere() -> Result<()> {
    let mut by_name: BTreeMap<String, Arm> = BTreeMap::new();
    for arm in experiments::all()?.into_iter().flat_map(|experiment| experiment.arms) {
        let first = by_name.entry(arm.name.clone()).or_insert_with(|| arm.clone());
        assert_eq!(*first, arm);
    }
    Ok(())
}

#[test]
fn an_observer_and_a_repetition_leave_the_student_alone() -> Result<()> {
    let _guard = seeded(1);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    let ca = Arm::new("ca", 2).engine(RenoisingTimes::ABOVE_STUDENT).quick();
    let (_, alone) = train(&ca, &material)?;
    let (_, again) = train(&ca, &material)?;
    let (record, observed) = train(&ca.clone().observer(), &material)?;
    assert!(record.iter().any(|(name, _)| name == "fake_loss"));
    let (_, regularized) = train(&ca.regularizer(DM), &material)?;
    let largest = |others: &[Tensor]| {
        alone.iter().zip(others).map(|(a, b)| max_difference(a, b)).fold(0.0, worse)
    };
    assert_eq!(largest(&again), 0.0);
    assert_eq!(largest(&observed), 0.0);
    assert!(largest(&regularized) > 0.0, "the regularizer must matter");
    Ok(())
}

/// The arms of the schedules equal the library's schedules: loss and gradient, for the same draws.
#[test]
fn arms_of_the_schedules_are_the_presets() -> Result<()> {
    let _guard = seeded(2);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    let presets = [
        ("coupled", Schedule::CoupledShared),
        ("full", Schedule::DecoupledFull),
        ("constrained", Schedule::DecoupledConstrained),
        ("hybrid", Schedule::DecoupledHybrid),
    ];
    let experiment = experiments::all()?.remove(0);
    assert_eq!(experiment.arms.len(), presets.len());
    for (arm, (name, schedule)) in experiment.arms.iter().zip(presets) {
        assert_eq!(arm.name, name);
        let training = training(arm, 0, &material)?;
        let fake = training.fake_score().expect("a fake score");
        let dm = DistributionMatching::new(fake.denoiser(&teacher, material.shift));
        let (captions, null) = prompts.conditions(&[0, 1, 2])?;
        let step = Tensor::from_slice(&[0i64, 1, 3]);
        let cond = Condition::from(vec![captions[0].shallow_clone(), step]);
        let x = wave(&[3, 3, 16, 16], 0.4, Kind::Float).set_requires_grad(true);
        let time = PreShift::new(Tensor::from_slice(&[0.0f32, 0.25, 0.75]))?;
        let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_time(&time)?;
        let guidance = Guidance::new(arm.guidance)?;
        let preset = schedule.objective(denoiser(&teacher, material.shift), guidance, &dm);
        let groups = preset.draw(&batch)?.len();
        let terms = ArmTerms::new(arm, 0, &material)?;
        let draws = || -> Vec<Draw> {
            (0..groups)
                .map(|group| Draw {
                    u: Tensor::from_slice(&[0.2f32, 0.5, 0.7]) * (1.0 - 0.1 * group as f64),
                    noise: wave(&[3, 3, 16, 16], 1.3 + group as f64, Kind::Float),
                })
                .collect()
        };
        let ours = terms
            .objective(denoiser(&teacher, material.shift), Some(&dm))?
            .evaluate_at(&batch, draws())?;
        let theirs = preset.evaluate_at(&batch, draws())?;
        assert_eq!(common::value(&ours.loss), common::value(&theirs.loss), "{name}");
        let gradients = [&ours, &theirs].map(|evaluation| gradient(&evaluation.loss, &x));
        assert!(common::value(&gradients[0].abs().max()) > 0.0, "{name}");
        assert_eq!(max_difference(&gradients[0], &gradients[1]), 0.0, "{name}");
    }
    Ok(())
}

#[test]
fn arms_without_terms_or_partner_are_refused() -> Result<()> {
    let _guard = seeded(4);
    let teacher = teacher()?;
    let prompts = prompts(&teacher)?;
    let classifier = classifier()?;
    let material = material(&teacher, &prompts, &classifier)?;
    let error = training(&Arm::new("nothing", 1), 0, &material).err().expect("no term").to_string();
    assert!(error.contains("arm nothing has no term"), "{error}");
    let alone = Arm::new("alone", 1).engine(RenoisingTimes::FULL).coupled().quick();
    let error = format!("{:#}", training(&alone, 0, &material)?.step(true).unwrap_err());
    assert!(error.contains("a coupled arm needs distribution matching"), "{error}");
    Ok(())
}

/// The whole way of a run, on the real pictures with the tiny model.
#[test]
fn a_run_leaves_one_file_and_is_skipped_then() -> Result<()> {
    let _guard = seeded(5);
    let folder = tempdir()?;
    let folder = folder.path();
    let teacher = teacher()?;
    let data = EmojiData::load("assets/emoji".as_ref())?;
    let captions = data.items.iter().map(|item| item.caption.as_str());
    let prompts = data.vocabulary.encode_prompts(&teacher, captions)?;
    let images = data.images.shallow_clone();
    let items = data.indices(false);
    let classifier = classifier()?;
    let material = Material {
        teacher: &teacher,
        shift: Shift::new(3.0)?,
        prompts: &prompts,
        items,
        images,
        classifier: &classifier,
        pairs: PairSets::default(),
    };
    let judge = || -> Result<Judge> {
        let classifier = Classifier::load("assets/classifier".as_ref(), Kind::Float, Device::Cpu)?;
        Judge::new(classifier, &data)
    };
    let bench = Bench::new(judge()?, &material, &data, 6, false)?;
    write_reference(folder, &material, &bench)?;
    let reference: Reference = read_json(&reference_path(folder))?;
    assert_eq!((reference.real.alignment, reference.real.frechet_distance), (1.0, 0.0));
    let arm = Arm::new("ca", 2).engine(RenoisingTimes::ABOVE_STUDENT).observer().quick();
    run(folder, folder, &arm, 0, &material, &bench)?;

    let path = run_path(folder, "ca", 0);
    let record: RunRecord = read_json(&path)?;
    assert_eq!(record.arm, arm);
    assert_eq!(record.captions, 6);
    assert_eq!(record.points.iter().map(|p| p.update).collect::<Vec<_>>(), [0, 1, 2]);
    assert_eq!(record.points[0].measurement.variance, rounded_variance(&bench, &teacher)?);
    assert!(record.points[2].measurement.variance != record.points[0].measurement.variance);
    assert!(record.points.iter().all(|point| point.observations.len() == 3));
    assert!(record.points[0].change_spectrum.is_empty());
    for point in &record.points[1..] {
        assert_eq!(point.change_spectrum.len(), 17);
        assert!(point.change_spectrum.iter().sum::<f64>() > 0.0);
    }
    for picture in ["ca.png", "ca-seen.png"] {
        assert!(folder.join(picture).exists(), "{picture}");
    }

    let before = std::fs::metadata(&path)?.modified()?;
    run(folder, folder, &arm, 0, &material, &bench)?;
    assert_eq!(std::fs::metadata(&path)?.modified()?, before);
    // A result of other settings is refused, and one of other pairs.
    let slower = arm.clone().with(|arm| arm.student_learning_rate *= 2.0);
    let paired = arm.clone().with(|arm| arm.pairs = Some(PairSource::QUICK));
    for other in [slower, paired] {
        let error = run(folder, folder, &other, 0, &material, &bench).unwrap_err().to_string();
        assert!(error.contains("ca-seed0.json was made with other settings"), "{error}");
    }

    // A breakdown is a result, and one of the fake score alone is before the first update.
    let broken = arm.clone().with(|arm| {
        arm.name = "broken".into();
        (arm.fake_learning_rate, arm.fake_warmup) = (1e38, 3);
    });
    run(folder, folder, &broken, 0, &material, &bench)?;
    let record: RunRecord = read_json(&run_path(folder, "broken", 0))?;
    assert_eq!((record.broken_after, record.points.len()), (Some(0), 1));

    // Captions for choosing and captions for reporting do not meet.
    let selection = Bench::new(judge()?, &material, &data, 6, true)?;
    let both: BTreeSet<i64> = bench.items().iter().chain(selection.items()).copied().collect();
    assert_eq!(both.len(), 12);
    let error = write_reference(folder, &material, &selection).unwrap_err().to_string();
    assert!(error.contains("other captions"), "{error}");
    let error = Bench::new(judge()?, &material, &data, data.items.len(), false).err();
    assert!(error.is_some_and(|error| error.to_string().contains("--captions")));
    Ok(())
}

fn rounded_variance(bench: &Bench<'_>, teacher: &ZImageTransformer) -> Result<f64> {
    Ok(record::rounded(mean_variance(&bench.unguided(teacher, 2)?)?))
}

#[test]
fn the_report_takes_its_numbers_from_the_files() -> Result<()> {
    let (folder, results) = made_up()?;
    let document = folder.path().join("document.md");
    let figures = folder.path().join("figures");
    let template = "{{value one fine-power}} {{at one 0 drift}} {{at one 40 frechet@2}} {{seen two 0.5 fake}} a {{value one alignment}} b {{value one drift}} c \
                    {{paired two one alignment}} d {{verdict two one alignment}} e \
                    {{teacher guided frechet}} f {{runs}}\n{{table pair}}{{curves pair}}\
                    {{strips pair}} {{picture one-seen}} \
                    {{when pair}}finished{{end}}{{unless pair}}open{{end}}";
    // What stands before the text is for those who edit it.
    let template = &format!("<!-- a template -->\n{template}");
    report::write(template, &document, &figures, &results)?;
    let text = std::fs::read_to_string(&document)?;
    // The half width is 12.7062 times half the distance of two values.
    for part in [
        "25.0 ± 0.0 -0.69 ± 0.00 0.069 ± 0.079 +1.39 ± 0.00 a 55.0 ± 63.5 b -0.69 ± 0.00 c +11.0 ± 12.7 d not told apart over 2 seeds",
        "e 0.250 f 4 runs of 2 arms; not finished",
        "one (pair: 2 of 3)",
        "| two | 2 | 66.0 ± 76.2 |",
        "| *teacher, 4 steps, unguided* | | 80.0 |",
        "](figures/pair-curves.svg)",
        "*not run* *not run*",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
    assert!(text.starts_with("25.0") && text.ends_with("finished"), "{text}");
    let plot = std::fs::read(figures.join("pair-curves.svg"))?;
    report::write(template, &document, &figures, &results)?;
    assert_eq!(std::fs::read_to_string(&document)?, text);
    assert_eq!(std::fs::read(figures.join("pair-curves.svg"))?, plot);

    for (template, complaint) in [
        ("{{value one speed}}", "field speed: not one of"),
        ("{{value three alignment}}", "there is no arm three"),
        ("{{table nothing}}", "there is no experiment nothing"),
        ("{{at one 0 dm-cos}}", "not a field of one measurement"),
        ("{{at one 0 diversity@2}}", "not a field of one measurement"),
        ("{{at one 0 frechet@3}}", "not measured at these steps"),
        ("{{teacher guided frechet@2}}", "the steps of the teacher come first"),
        ("{{seen one 0.5 student}}", "expected sample, fake or teacher"),
        ("{{nonsense}}", "not a placeholder"),
        ("{{when pair}}", "has no {{end}}"),
        ("{{unless nothing}}{{end}}", "there is no experiment nothing"),
        ("{{value one", "does not end"),
    ] {
        let error = report::write(template, &document, &figures, &results).unwrap_err();
        assert!(format!("{error:#}").contains(complaint), "{template}: {error:#}");
    }
    Ok(())
}

#[test]
fn fields_have_one_name_each() -> Result<()> {
    let names: BTreeSet<&str> = Field::ALL.iter().map(|(name, _)| *name).collect();
    assert_eq!(names.len(), Field::ALL.len());
    for (name, field) in Field::ALL {
        assert_eq!(Field::named(name)?, field);
    }
    Ok(())
}
