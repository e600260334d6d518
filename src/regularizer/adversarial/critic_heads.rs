//! Critic heads: small trainable layers that turn the features of a frozen network into a critic.

use tch::{Kind, Tensor, nn};

use crate::arithmetic::Arithmetic;
use crate::checks::{check_device, check_samples, check_size};
use crate::error::{Error, Result};
use crate::numeric::batch_size;
use crate::value::checked;

/// One head for each level of features: a ready-made top for the critic of
/// [`Adversarial`](crate::Adversarial) over a frozen trunk.
///
/// ```text
/// logit = mean over positions of  w . SiLU(GroupNorm(W h + b)) + c
/// ```
/// with h the C features at one position of a level. The logits stay apart, `[B, K]`, so that each
/// head meets the loss alone: summing heads before a hinge would let one cover for another. Positions
/// are averaged before the loss, so a level counts the same at every resolution.
///
/// In spirit LADD (Sauer et al. 2024), whose heads are larger and see the condition. Here time and condition
/// reach the heads through the trunk, and by [`conditioned`](Self::conditioned) through an embedding too.
///
/// # Example
/// A critic on the features of the teacher:
/// ```
/// # use decoupled_dmd::{Adversarial, Condition, CriticHeads, RectifiedFlow, Result, Shift};
/// # use tch::{Device, Tensor, nn};
/// # struct Teacher; impl Teacher { fn features(&self, x: &Tensor, _: &Tensor, _: &Condition) -> Vec<Tensor> { vec![x.repeat([1, 16]), x.repeat([1, 32])] } }
/// # let teacher = Teacher;
/// let store = nn::VarStore::new(Device::Cpu);
/// let heads = CriticHeads::new(&store.root(), &[16, 32], 64)?;
/// let critic = |x: &Tensor, t: &Tensor, cond: &Condition| -> Result<Tensor> {
///     heads.logits(&teacher.features(x, t, cond))
/// };
/// let gan = Adversarial::new(RectifiedFlow, critic);
/// # let x = Tensor::randn([2, 1], (tch::Kind::Float, Device::Cpu));
/// # assert_eq!(heads.logits(&teacher.features(&x, &x, &Condition::none()))?.size(), [2, 2]);
/// # Ok::<(), decoupled_dmd::Error>(())
/// ```
#[derive(Debug)]
pub struct CriticHeads {
    heads: Vec<Head>,
    groups: i64,
}

#[derive(Debug)]
struct Head {
    channels: i64,
    mix: Tensor,
    bias: Tensor,
    scale: Tensor,
    offset: Tensor,
    read: Tensor,
    constant: Tensor,
    attention: Option<Attention>,
    /// From an embedding to the hidden channels, `[width, E]`.
    projection: Option<Tensor>,
}

/// The query of a pooling by attention, and the map from features to keys.
#[derive(Debug)]
struct Attention {
    query: Tensor,
    keys: Tensor,
}

impl CriticHeads {
    /// Heads of `width` hidden channels for levels of `channels` each, their parameters under `path`
    /// as `0.mix`, `0.bias`, .. (initialised with libtorch's global generator). 256 is a common width.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless there is a level and all sizes are positive; [`Error::Torch`] if a
    /// parameter cannot be created.
    pub fn new(path: &nn::Path, channels: &[i64], width: i64) -> Result<Self> {
        checked("number of feature levels", "at least 1", 0.0, !channels.is_empty())?;
        checked("width of the heads", "at least 1", width as f64, width > 0)?;
        let bound = 1.0 / (width as f64).sqrt();
        let mut heads = Vec::new();
        for (level, &channels) in channels.iter().enumerate() {
            checked("channels of a feature level", "at least 1", channels as f64, channels > 0)?;
            let path = path.sub(level.to_string());
            heads.push(Head {
                channels,
                mix: path.f_kaiming_uniform("mix", &[width, channels, 1])?,
                bias: path.f_zeros("bias", &[width])?,
                scale: path.f_ones("scale", &[width])?,
                offset: path.f_zeros("offset", &[width])?,
                read: path.f_uniform("read", &[1, width, 1], -bound, bound)?,
                constant: path.f_zeros("constant", &[1])?,
                attention: None,
                projection: None,
            });
        }
        // At least 8 channels a group: a group of one channel at one position is always zero.
        let fits = |groups: &i64| width.checked_rem(groups.saturating_mul(8)) == Some(0);
        let groups = [32, 16, 8, 4, 2].into_iter().find(fits).unwrap_or(1);
        Ok(Self { heads, groups })
    }

    /// Pools the positions of each level by attention in place of their plain mean, so that a head may weight
    /// the few positions that give a sample away. The parameters are `0.query`, `0.keys`, .. under `path`.
    ///
    /// ```text
    /// logit = sum over positions of  weight x logit there,    weight = softmax(<query, keys h> / sqrt(width))
    /// ```
    /// The query is zero at first: the weights are equal and the pooling is the plain mean. This form is
    /// ours. Hierarchical Distillation (arXiv 2511.08930) has an adaptive weighting of tokens in its
    /// discriminator, whose formula could not be found.
    ///
    /// # Errors
    /// [`Error::Torch`] if a parameter cannot be created.
    pub fn pooled_by_attention(mut self, path: &nn::Path) -> Result<Self> {
        for (level, head) in self.heads.iter_mut().enumerate() {
            let path = path.sub(level.to_string());
            let width = head.bias.size().first().copied().unwrap_or(1);
            head.attention = Some(Attention {
                query: path.f_zeros("query", &[1, width, 1])?,
                keys: path.f_kaiming_uniform("keys", &[width, head.channels, 1])?,
            });
        }
        Ok(self)
    }

    /// Lets the heads see an embedding of `embedding` numbers a sample, such as the pooled text or the noise
    /// level: [`logits_given`](Self::logits_given) takes it. The parameters are `0.project`, .. under `path`.
    ///
    /// ```text
    /// logit = logit without it + <project e, pooled SiLU(GroupNorm(W h + b))> / sqrt(width)
    /// ```
    /// The projection form of Miyato & Koyama (arXiv 1802.05637); the division by the root of the width is
    /// ours. Whether LADD's heads have this form could not be verified. `project` is zero at first: the
    /// logits are those without it.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless `embedding` is positive; [`Error::Torch`] if a parameter cannot be created.
    pub fn conditioned(mut self, path: &nn::Path, embedding: i64) -> Result<Self> {
        checked("size of the embedding", "at least 1", embedding as f64, embedding > 0)?;
        for (level, head) in self.heads.iter_mut().enumerate() {
            let path = path.sub(level.to_string());
            head.projection = Some(path.f_zeros("project", &[batch_size(&head.bias), embedding])?);
        }
        Ok(self)
    }

    /// Logits `[B, K]` for K levels of features, each `[B, C]` or `[B, C, ..]`; tokens `[B, T, C]`
    /// must be transposed. Features are converted to the type of the parameters.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] unless there are as many levels as heads; [`Error::Shape`] or [`Error::Kind`]
    /// unless each level has the channels of its head, and as many samples as the others;
    /// [`Error::Missing`] if the heads are [`conditioned`](Self::conditioned).
    pub fn logits(&self, features: &[Tensor]) -> Result<Tensor> {
        self.read(features, None)
    }

    /// [`logits`](Self::logits) of [`conditioned`](Self::conditioned) heads, given an embedding `[B, E]` of
    /// each sample.
    ///
    /// # Errors
    /// As [`logits`](Self::logits); [`Error::Missing`] unless the heads are conditioned; [`Error::Shape`],
    /// [`Error::Kind`] or [`Error::Device`] if the embedding does not fit features and heads.
    pub fn logits_given(&self, features: &[Tensor], embedding: &Tensor) -> Result<Tensor> {
        self.read(features, Some(embedding))
    }

    fn read(&self, features: &[Tensor], embedding: Option<&Tensor>) -> Result<Tensor> {
        let levels = features.len();
        let fits = levels == self.heads.len();
        checked("number of feature levels", "the number of heads", levels as f64, fits)?;
        let logits: Result<Vec<_>> = self
            .heads
            .iter()
            .zip(features)
            .map(|(head, level)| head.logit(level, embedding, self.groups))
            .collect();
        let logits = logits?;
        let batch = logits.first().map(Tensor::size).unwrap_or_default();
        for level in &logits {
            check_size("samples of a feature level", level, &batch)?;
        }
        Ok(Tensor::f_cat(&logits, 1)?)
    }
}

impl Head {
    /// `[B, 1]`.
    fn logit(&self, features: &Tensor, embedding: Option<&Tensor>, groups: i64) -> Result<Tensor> {
        check_samples("features of the critic", features, 2)?;
        let features = features.f_unsqueeze(-1)?.f_flatten(2, -1)?;
        let mut expected = features.size();
        if let Some(channels) = expected.get_mut(1) {
            *channels = self.channels;
        }
        check_size("features of the critic", &features, &expected)?;
        let pointwise =
            |x: &Tensor, weight: &Tensor, bias: &Tensor| x.f_conv1d(weight, Some(bias), 1, 0, 1, 1);
        let features = features.f_to_kind(self.mix.f_kind()?)?;
        let hidden = pointwise(&features, &self.mix, &self.bias)?
            .f_group_norm(groups, Some(&self.scale), Some(&self.offset), 1e-5, true)?
            .f_silu()?;
        let mut logits = pointwise(&hidden, &self.read, &self.constant)?;
        if let Some(read) = self.projected(embedding, &features)? {
            let width = read.size().get(1).copied().unwrap_or(1) as f64;
            let given = hidden.f_mul(&read)?.f_sum_dim_intlist(&[1i64][..], true, None::<Kind>)?;
            logits = logits.f_add(&given.over(width.sqrt())?)?;
        }
        let Some(Attention { query, keys }) = &self.attention else {
            return Ok(logits.f_mean_dim(&[2i64][..], false, None::<Kind>)?);
        };
        let keys = features.f_conv1d(keys, None::<&Tensor>, 1, 0, 1, 1)?;
        let width = query.numel() as f64;
        let scores = keys.f_mul(query)?.f_sum_dim_intlist(&[1i64][..], true, None::<Kind>)?;
        let weights = scores.over(width.sqrt())?.f_softmax(2, None::<Kind>)?;
        Ok(logits.f_mul(&weights)?.f_sum_dim_intlist(&[2i64][..], false, None::<Kind>)?)
    }

    /// What the embedding adds to the reading of each hidden channel, `[B, width, 1]`.
    fn projected(&self, embedding: Option<&Tensor>, features: &Tensor) -> Result<Option<Tensor>> {
        const WHAT: &str = "embedding of the critic";
        match (&self.projection, embedding) {
            (None, None) => Ok(None),
            (Some(_), None) => {
                Err(Error::Missing { what: WHAT, setter: "CriticHeads::logits_given" })
            }
            (None, Some(_)) => Err(Error::Missing {
                what: "projection of the embedding",
                setter: "CriticHeads::conditioned",
            }),
            (Some(projection), Some(embedding)) => {
                let numbers = projection.size().get(1).copied().unwrap_or(1);
                check_size(WHAT, embedding, &[batch_size(features), numbers])?;
                check_device(WHAT, embedding, features)?;
                let embedding = embedding.f_to_kind(projection.f_kind()?)?;
                Ok(Some(embedding.f_linear(projection, None::<&Tensor>)?.f_unsqueeze(-1)?))
            }
        }
    }
}
