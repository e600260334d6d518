//! Captions encoded once: what networks that share a frozen caption side are conditioned on.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use decoupled_dmd::Condition;
use tch::{Device, Kind, Tensor};

use crate::distil::weights::Network;
use crate::model::padded;

/// Most tokens that go through the caption side at once.
const TOKENS: i64 = 8192;

/// Encoded captions, and encoded null captions: the empty one, or negative ones.
///
/// Each caption keeps its own padded length. A batch is of one length, and so are its null captions: with unequal
/// ones it would need a mask, which the fast attention kernels do not take, and padding more than the model does
/// would change its output. [`Buckets`] and [`Prompts::batches`] make such batches.
#[derive(Debug)]
pub struct Prompts {
    /// `[L_i, D]` each. On the CPU, as thousands of captions of a large model are gigabytes.
    captions: Vec<Tensor>,
    /// `[1, L_i, D]` each, where conditions are wanted.
    nulls: Vec<Tensor>,
    /// The null caption of each caption, by its index; the first for all where there is one.
    null_of: Option<Vec<usize>>,
    /// Where conditions are wanted.
    device: Device,
}

impl Prompts {
    /// Encodes the features `[L_i, F]` of captions, and those of the empty one, with the caption side
    /// of `network`. Features are taken one after the other and dropped soon.
    ///
    /// # Errors
    /// If there are no captions, or features do not fit the model.
    pub fn from_features<'n>(
        network: impl Into<Network<'n>>,
        features: impl IntoIterator<Item = Result<Tensor>>,
        empty: &Tensor,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let network = network.into();
        let mut captions = Vec::new();
        let mut waiting: BTreeMap<i64, Vec<(usize, Tensor)>> = BTreeMap::new();
        for (index, features) in features.into_iter().enumerate() {
            let features = features?;
            let size = features.size();
            ensure!(
                size.len() == 2 && size[0] > 0,
                "the features of caption {index} must be [L, F] with L > 0, found {size:?}"
            );
            let length = padded(size[0]);
            captions.push(None);
            let group = waiting.entry(length).or_default();
            group.push((index, features));
            if group.len() as i64 >= TOKENS / length {
                encode_group(network, group, &mut captions)?;
            }
        }
        for group in waiting.values_mut().filter(|group| !group.is_empty()) {
            encode_group(network, group, &mut captions)?;
        }
        ensure!(!captions.is_empty(), "there are no captions");
        Ok(Self {
            captions: captions.into_iter().collect::<Option<_>>().context("a caption was lost")?,
            nulls: vec![encode_null(network, empty)?],
            null_of: None,
            device: network.model.device(),
        })
    }

    /// The same captions with null captions of their own, made of `nulls`, the features `[L_i, F]` of each;
    /// `null_of` has the index of each caption's.
    ///
    /// # Errors
    /// If features do not fit the model, there are not as many indices as captions, or one is out of range.
    pub fn with_nulls<'n>(
        self,
        network: impl Into<Network<'n>>,
        nulls: &[Tensor],
        null_of: Vec<usize>,
    ) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let network = network.into();
        ensure!(
            null_of.len() == self.captions.len(),
            "{} captions need as many null captions, found {}",
            self.captions.len(),
            null_of.len()
        );
        if let Some(index) = null_of.iter().find(|index| **index >= nulls.len()) {
            bail!("there is no null caption {index}, there are {}", nulls.len());
        }
        let encode = |null| encode_null(network, null);
        Ok(Self {
            nulls: nulls.iter().map(encode).collect::<Result<_>>()?,
            null_of: Some(null_of),
            ..self
        })
    }

    /// The conditions of the captions at `items`, which must be of one padded length, and the null condition of
    /// each, which are of one length too, that may be another.
    ///
    /// # Errors
    /// If there are no items, an index is out of range, or lengths differ.
    pub fn conditions(&self, items: &[i64]) -> Result<(Condition, Condition)> {
        let lengths = self.positions(items)?;
        ensure!(
            lengths.len() == 1,
            "a batch needs captions of one padded length, and null captions too, found {:?}",
            lengths.keys()
        );
        let captions: Vec<&Tensor> =
            items.iter().map(|item| self.caption(*item)).collect::<Result<_>>()?;
        let captions = Tensor::f_stack(&captions, 0)?;
        // Not waited for: libtorch reads the captions before it returns.
        let captions = captions.f_to_device_(self.device, captions.f_kind()?, true, false)?;
        let nulls: Vec<&Tensor> =
            items.iter().map(|item| self.null(*item)).collect::<Result<_>>()?;
        let is_one = nulls.windows(2).all(|pair| std::ptr::eq(pair[0], pair[1]));
        let null = if is_one {
            nulls[0].f_expand([items.len() as i64, -1, -1], false)?
        } else {
            Tensor::f_cat(&nulls, 0)?
        };
        Ok((captions.into(), null.into()))
    }

    /// Positions in `items`, in groups of at most `size` whose captions have one padded length. Every
    /// position occurs once.
    ///
    /// # Errors
    /// If an item is out of range.
    pub fn batches(&self, items: &[i64], size: usize) -> Result<Vec<Vec<i64>>> {
        ensure!(size > 0, "a batch needs at least one caption");
        let groups = self.positions(items)?;
        Ok(groups.values().flat_map(|group| group.chunks(size)).map(<[_]>::to_vec).collect())
    }

    /// The captions `items` as a set to draw batches from.
    ///
    /// # Errors
    /// If there are no items, or one is out of range.
    pub fn buckets(&self, items: &[i64]) -> Result<Buckets> {
        ensure!(!items.is_empty(), "there are no captions to draw from");
        let groups = self.positions(items)?;
        let items_at =
            |group: &Vec<i64>| group.iter().map(|position| items[*position as usize]).collect();
        Ok(Buckets(groups.values().map(items_at).collect()))
    }

    /// Positions in `items` by the padded length of their captions and of the null captions.
    fn positions(&self, items: &[i64]) -> Result<BTreeMap<[i64; 2], Vec<i64>>> {
        let mut groups: BTreeMap<_, Vec<i64>> = BTreeMap::new();
        for (position, item) in (0..).zip(items) {
            let lengths = [self.caption(*item)?.size()[0], self.null(*item)?.size()[1]];
            groups.entry(lengths).or_default().push(position);
        }
        Ok(groups)
    }

    /// The null caption of a caption, `[1, L, D]`.
    fn null(&self, item: i64) -> Result<&Tensor> {
        let of = |of: &Vec<usize>| usize::try_from(item).ok().and_then(|i| of.get(i).copied());
        let index = self.null_of.as_ref().map_or(Some(0), of);
        index.and_then(|index| self.nulls.get(index)).with_context(|| {
            format!("there is no caption {item}, there are {}", self.captions.len())
        })
    }

    fn caption(&self, item: i64) -> Result<&Tensor> {
        usize::try_from(item).ok().and_then(|item| self.captions.get(item)).with_context(|| {
            format!("there is no caption {item}, there are {}", self.captions.len())
        })
    }
}

/// A null caption by its features `[L, F]`, as `[1, L, D]`.
fn encode_null(network: Network<'_>, features: &Tensor) -> Result<Tensor> {
    network
        .model
        .encode_captions(std::slice::from_ref(features), network.role)
        .context("the features of the empty or a negative caption")
}

/// Encodes captions of one padded length and puts them where they belong.
fn encode_group(
    network: Network<'_>,
    group: &mut Vec<(usize, Tensor)>,
    captions: &mut [Option<Tensor>],
) -> Result<()> {
    let (places, features): (Vec<usize>, Vec<Tensor>) = group.drain(..).unzip();
    let encoded = network
        .model
        .encode_captions(&features, network.role)
        .with_context(|| format!("the features of captions {places:?}"))?
        .f_to_device(Device::Cpu)?;
    for (place, row) in places.into_iter().zip(encoded.f_unbind(0)?) {
        captions[place] = Some(row);
    }
    Ok(())
}

/// Captions in groups of one padded length each.
#[derive(Debug)]
pub struct Buckets(Vec<Vec<i64>>);

impl Buckets {
    /// Of groups that are at hand.
    pub(super) fn new(groups: Vec<Vec<i64>>) -> Self {
        Self(groups)
    }

    /// Draws `batch` captions with replacement, all from one bucket. Buckets are drawn by their size,
    /// so that each caption is as likely as any other; only within a batch are lengths alike.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn draw(&self, batch: usize) -> Result<Vec<i64>> {
        let bucket = self.draw_bucket()?;
        let picks = draw(bucket.len(), batch)?;
        Ok(picks.into_iter().map(|pick| bucket[pick]).collect())
    }

    fn draw_bucket(&self) -> Result<&[i64]> {
        // A single bucket takes no draw, so that runs on captions of one length stay what they were.
        if let [bucket] = &self.0[..] {
            return Ok(bucket);
        }
        let mut pick = draw(self.0.iter().map(Vec::len).sum(), 1)?[0];
        for bucket in &self.0 {
            if pick < bucket.len() {
                return Ok(bucket);
            }
            pick -= bucket.len();
        }
        unreachable!("the pick is below the sum of the sizes")
    }
}

/// `count` numbers below `bound`.
fn draw(bound: usize, count: usize) -> Result<Vec<usize>> {
    let picks = Tensor::f_randint(bound as i64, [count as i64], (Kind::Int64, Device::Cpu))?;
    Ok(Vec::<i64>::try_from(&picks)?.into_iter().map(|pick| pick as usize).collect())
}
