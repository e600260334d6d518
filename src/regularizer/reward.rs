//! Reward: the samples climb a differentiable score.

use tch::{Kind, Tensor};

use crate::batch::Condition;
use crate::checks::{check_device, check_size};
use crate::error::Result;
use crate::gradient::gradient_only_in;
use crate::network::IntoOutput;
use crate::numeric::{masked, widen};
use crate::probe::Probe;
use crate::regularizer::Regularizer;

type Score<'a> = dyn Fn(&Tensor, &Condition) -> Result<Tensor> + 'a;

/// Reward: moves the samples to where a frozen, differentiable score is higher.
///
/// ```text
/// loss = - mean_b score(x_b, c_b)
/// ```
/// The score is a closure of the clean samples `[B, ..]` and the condition that returns one number a
/// sample: a preference model, the log-likelihood of a recogniser, or a measure of the picture after a
/// decoder. As an engine it is added with [`Group::engine_loss`](crate::Group::engine_loss).
///
/// | use | score | source |
/// |---|---|---|
/// | reward next to Distribution Matching | an image reward model | DMDR, which ramps its weight |
/// | a control that the teacher has never seen | log q(c given x) of a recogniser | JDM, arXiv 2503.06652, of which only the abstract could be read; the derivation is ours |
///
/// **A new control, as in JDM.** The reverse divergence of the joint law of samples and controls is
/// `E_c KL(p(x given c), q(x)) - E log q(c given x)` up to a constant. So the fake score of Distribution
/// Matching must *see* the control, and the teacher does not: put it into the [`Condition`] as a second
/// tensor that the teacher's closure ignores. A fake score that is blind to the control matches the
/// mixture over all controls; the samples of one control then collapse onto the recogniser's optimum.
///
/// The mean is over samples, where Distribution Matching's is over elements: a weight that balances both
/// for every size of sample is divided by the number of elements of one.
///
/// # Shapes
/// x `[B, ..]` to a scalar in float32 or wider; the score is `[B]`. It sees whole samples, also where a mask leaves a
/// part of one out; a sample that is left out as a whole counts as a score of 0.
///
/// # Forwards
/// Score: one, and its backward to x. **Gradients** end in x: parameters of the score receive none.
///
/// # Processes
/// Nothing is gathered: every sample is looked at alone, if the score does so.
///
/// # Errors
/// [`Error::NoGradient`](crate::Error::NoGradient) if the score has no graph to x;
/// [`Error::Shape`](crate::Error::Shape) and the like unless it is `[B]`; errors of the closure. A
/// clamp of pixels stops the gradient on those that are outside, which should come back: clamp softly.
///
/// # Example
/// ```
/// use decoupled_dmd::{Condition, Reward};
/// # use tch::{Kind, Tensor};
/// let bright = Reward::new(|x: &Tensor, _: &Condition| x.flatten(1, -1).mean_dim(1, false, Kind::Float));
/// ```
pub struct Reward<'a>(Box<Score<'a>>);

impl<'a> Reward<'a> {
    /// With a score of samples under their condition.
    pub fn new<O: IntoOutput<Tensor>>(score: impl Fn(&Tensor, &Condition) -> O + 'a) -> Self {
        Self(Box::new(move |x, cond| score(x, cond).into_result()))
    }
}

impl Regularizer for Reward<'_> {
    fn loss(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let batch = probe.batch();
        gradient_only_in("score", probe.x(), |x| {
            let score = (self.0)(x, batch.cond()).map_err(|error| error.of("score"))?;
            check_size("score", &score, &[batch.batch_size()])?;
            check_device("score", &score, x)?;
            let score = masked(&widen(&score)?, batch.kept_samples()?.as_ref())?;
            probe.observe("score", || Ok(score.shallow_clone()))?;
            Ok(score.f_mean(None::<Kind>)?.f_neg()?)
        })
    }
}

impl std::fmt::Debug for Reward<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reward")
    }
}
