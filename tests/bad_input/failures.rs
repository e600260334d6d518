//! Closures that fail.

use decoupled_dmd::{
    Adversarial, Batch, CfgAugmentation, Condition, Denoiser, DistributionMatching, Group,
    Guidance, Objective, Prediction, RectifiedFlow, Renoising, Result, Uniform,
};
use tch::Tensor;

use super::common::seeded;
use super::samples;

/// Who failed, and why, in a line each.
#[test]
fn the_network_that_failed_is_named() -> Result<()> {
    let _guard = seeded(1);
    let (x, cond) = (samples(), Condition::none());
    let real = x.detach();
    let batch = Batch::new(&x, &cond)?.with_null(&cond).with_real(&real)?;
    let network = |fails: bool| {
        let network = move |x: &Tensor, _: &Tensor, _: &Condition| {
            if fails { x.f_view([-7]) } else { x.f_tanh() }
        };
        Denoiser::new(RectifiedFlow, Prediction::Sample, network)
    };
    let chain = |teacher: bool, add: &dyn Fn(Group<'static>) -> Group<'static>| {
        let group = add(Group::new(Renoising::new(Uniform::FULL)));
        let error = Objective::new(network(teacher)).with(group).evaluate(&batch).unwrap_err();
        format!("{:#}", anyhow::Error::from(error))
    };
    let guidance = Guidance::new(2.0)?;
    for (who, found) in [
        ("teacher", chain(true, &|group| group.engine("t", 1.0, CfgAugmentation::new(guidance)))),
        (
            "fake score",
            chain(false, &|group| {
                group.regularizer("t", 1.0, DistributionMatching::new(network(true)))
            }),
        ),
        (
            "critic",
            chain(false, &|group| {
                let critic = |x: &Tensor, _: &Tensor, _: &Condition| x.f_view([-7]);
                group.regularizer("t", 1.0, Adversarial::new(RectifiedFlow, critic))
            }),
        ),
    ] {
        assert_eq!(
            found,
            format!(
                "term \"t\" failed: the {who} failed: libtorch: Internal torch error: invalid shape dimension -7 at index 0 of shape [-7]"
            )
        );
    }
    Ok(())
}
