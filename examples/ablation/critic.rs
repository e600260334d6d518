//! A critic as strong as the fake score: a copy of the teacher with a readout for each patch.

use anyhow::{Result, ensure};
use decoupled_dmd::Condition;
use tch::{Kind, Tensor};

use tch_training::AdamWSettings;
use zimage::ZImageTransformer;
use zimage::distil::{Network, RoleTrainer};

/// The network and its readout.
#[derive(Debug)]
pub struct Critic {
    pub trainer: RoleTrainer,
    /// `[1, C, p, p]`: what is looked for in the network's output at each patch.
    readout: Tensor,
}

impl Critic {
    /// A copy of `teacher` whose readout is drawn from libtorch's global generator.
    ///
    /// # Errors
    /// If libtorch cannot allocate it.
    pub fn new(teacher: &ZImageTransformer, settings: AdamWSettings) -> Result<Self> {
        let (channels, patch) = (teacher.config().in_channels, teacher.config().patch_size());
        let deviation = ((channels * patch * patch) as f64).sqrt().recip();
        let options = (Kind::Float, teacher.device());
        let readout =
            Tensor::f_randn([1, channels, patch, patch], options)?.f_mul_scalar(deviation)?;
        let trainer = RoleTrainer::new(teacher, None, settings, Some(("readout", &readout)))?;
        Ok(Self { trainer, readout })
    }

    /// One logit a patch, `[B, P]`, of noised images `[B, C, H, W]` at times `[B]`; `base` is the
    /// teacher that it is a copy of.
    ///
    /// # Errors
    /// If the condition holds no captions, or shapes do not fit.
    pub fn logits(
        &self,
        base: &ZImageTransformer,
        x: &Tensor,
        t: &Tensor,
        condition: &Condition,
    ) -> Result<Tensor> {
        ensure!(!condition.is_empty(), "expected encoded captions");
        let Network { model, role } = self.trainer.weights.network(base);
        let output = model.forward_encoded(x, t, &condition[0], role)?;
        let patch = model.config().patch_size();
        let logits = output.f_conv2d(&self.readout, None::<&Tensor>, patch, 0, 1, 1)?;
        Ok(logits.f_flatten(1, -1)?)
    }
}
