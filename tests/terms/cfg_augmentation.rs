//! CFG Augmentation: its direction, and that it has no fixed point.

use decoupled_dmd::{CfgAugmentation, Engine, Guidance, Normalizer, PostShift, Probe, Result};
use tch::{Kind, Tensor};

use super::common::paper::{ALPHA, TEACHER_VARIANCE, mean_abs, setting};
use super::common::{gaussian_teacher, max_difference};

#[test]
fn equation_6_ca_is_the_guidance_direction_times_alpha_minus_one() -> Result<()> {
    let s = setting(Kind::Double);
    let teacher = gaussian_teacher(TEACHER_VARIANCE);
    let batch = s.batch();
    let [_, cond, null, _] = s.predictions();
    for (normalizer, scale) in [
        (Normalizer::OFF, Tensor::from(1.0)),
        (Normalizer::conditional().floor(1e-8)?, mean_abs(&(&s.x - &cond))),
        (Normalizer::conditional().floor(1e3)?, Tensor::from(1e3)),
    ] {
        let tau = PostShift::new(s.u.shallow_clone())?;
        let probe = Probe::at(&teacher, &batch, tau, s.noise.shallow_clone())?;
        let probe = probe.normalizer(normalizer);
        let direction = CfgAugmentation::new(Guidance::new(ALPHA)?).direction(&probe)?;
        let expected = (ALPHA - 1.0) * (&cond - &null) / scale;
        assert!(max_difference(&direction, &expected) < 1e-14, "{normalizer:?}");
        // A custom engine scales the same difference, which stays unchanged.
        let difference = (ALPHA - 1.0) * (&cond - &null);
        let kept = difference.copy();
        assert!(max_difference(&probe.normalize(&difference)?, &expected) < 1e-14);
        assert!(difference.equal(&kept));
    }
    Ok(())
}

mod training {
    use decoupled_dmd::{Group, Objective, Renoising, Schedule, Uniform};

    use super::super::training::train_with_exact_fake;
    use super::*;

    #[test]
    fn cfg_augmentation_has_no_fixed_point_and_distribution_matching_gives_it_one() -> Result<()> {
        let guidance = Guidance::new(2.0)?;
        let alone = train_with_exact_fake(|teacher, _| {
            Ok(Objective::new(teacher).with(Group::new(Renoising::new(Uniform::FULL)).engine(
                "ca",
                1.0,
                CfgAugmentation::new(guidance),
            )))
        })?;
        // The engine alone walks away from the null, past the centre of the condition, and never stops.
        let offsets: Vec<f64> = alone.iter().map(|(offset, _)| *offset).collect();
        assert!(offsets.windows(2).skip(3).all(|pair| pair[1] > pair[0] + 0.01), "{offsets:?}");

        for schedule in Schedule::ALL {
            let shielded =
                train_with_exact_fake(|teacher, dm| Ok(schedule.objective(teacher, guidance, dm)))?;
            let (offset, spread) = shielded[shielded.len() - 1];
            let (earlier, _) = shielded[shielded.len() - 5];
            assert!((offset - earlier).abs() < 0.05, "{schedule:?} {shielded:?}");
            assert!(offset < 0.8 * offsets[offsets.len() - 1], "{schedule:?} {offset} {offsets:?}");
            assert!((0.3..0.8).contains(&spread), "{schedule:?} {spread}");
        }
        Ok(())
    }
}
