//! A critic and a student, trained in turns.

use decoupled_dmd::{Adversarial, CriticPenalty, Error, GanLoss, RectifiedFlow, Result};
use tch::Device;
use tch::nn::{self, OptimizerConfig};

use super::super::common::seeded;
use super::super::training::{perceptron, train_with_regularizer};

#[test]
fn a_critic_leads_the_samples_to_the_data() -> Result<()> {
    let _guard = seeded(42);
    let cases = [
        (GanLoss::NonSaturating, CriticPenalty::R1 { gamma: 0.1 }),
        (GanLoss::Hinge, CriticPenalty::ApproximateR1 { weight: 500.0, sigma: 0.01 }),
        (GanLoss::Relativistic, CriticPenalty::R1 { gamma: 0.1 }),
    ];
    for (gan_loss, penalty) in cases {
        let store = nn::VarStore::new(Device::Cpu);
        let critic = perceptron(&store.root(), 1);
        let gan = Adversarial::new(RectifiedFlow, critic).gan_loss(gan_loss).penalty(penalty)?;
        let mut optimizer = nn::Adam::default().build(&store, 2e-3).map_err(Error::from)?;
        let (offset, spread) = train_with_regularizer(&gan, (1200, 5e-3), |batch| {
            optimizer.backward_step(&gan.critic_loss(batch)?);
            Ok(())
        })?;
        println!("{gan_loss:?}: mean off by {offset:.3}, spread by {spread:.3}");
        assert!(offset < 0.15 && spread < 0.15, "{gan_loss:?} {offset} {spread}");
    }
    Ok(())
}
