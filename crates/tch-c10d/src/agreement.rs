//! Whether all ranks are about to do the same thing, asked before they do it.
//!
//! Collectives of different sizes that meet would hang, mix up data or end the process inside Gloo. So each
//! operation begins with a row of sixteen numbers of each rank, which rank 0 collects and compares. All
//! ranks get rank 0's row and that of the first rank that differs: all go on together, or none does. The
//! exchange has messages to and from rank 0 only and no data of the tensors; it is a barrier by itself.

use tch::{Device, Kind, TchError, Tensor};

use crate::ffi::{self, Failure};
use crate::{Error, Operation, Reduce};

/// Numbers in a row.
const WIDTH: usize = 16;
/// Numbers in a verdict: what and who differs, and two rows.
const VERDICT_WIDTH: i64 = 2 + 2 * WIDTH as i64;
/// Dimensions of which a row has the sizes; further ones are in the digest alone.
const DIMENSIONS: usize = WIDTH - FIRST_DIMENSION;
const FIRST_DIMENSION: usize = 7;

/// The element types that can be exchanged; a place in this list stands for its type on the wire.
pub(crate) const KINDS: [Kind; 9] = [
    Kind::Float,
    Kind::Double,
    Kind::BFloat16,
    Kind::Half,
    Kind::Int64,
    Kind::Int,
    Kind::Int8,
    Kind::Uint8,
    Kind::Bool,
];

/// One rank's side of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Call([i64; WIDTH]);

/// The calls of rank 0 and of the first rank that differs.
#[derive(Debug)]
pub(crate) struct Difference {
    first: Call,
    rank: usize,
    other: Call,
}

impl Call {
    /// An operation without a tensor.
    pub(crate) fn new(operation: Operation) -> Self {
        let mut row = [0; WIDTH];
        let number = Operation::ALL.iter().position(|other| *other == operation);
        row[1] = number.map_or(-1, |number| number as i64);
        row[3] = -1;
        Self(row)
    }

    /// An operation on a tensor of a kind that is in [`KINDS`], which NCCL carries, or else Gloo.
    pub(crate) fn on(operation: Operation, tensor: &Tensor, kind: Kind, by_nccl: bool) -> Self {
        let mut call = Self::new(operation);
        call.0[3] =
            KINDS.iter().position(|other| *other == kind).map_or(-1, |number| number as i64);
        call.0[4] = i64::from(by_nccl);
        let size = tensor.size();
        call.0[5] = size.len() as i64;
        call.0[6] = digest(size.iter().copied());
        for (place, length) in call.0[FIRST_DIMENSION..].iter_mut().zip(size) {
            *place = length;
        }
        call
    }

    /// With how tensors are reduced.
    pub(crate) fn reducing(mut self, reduce: Reduce) -> Self {
        self.0[2] = match reduce {
            Reduce::Sum => 0,
            Reduce::Mean => 1,
        };
        self
    }

    /// With the rank whose tensor is sent.
    pub(crate) fn sent_by(mut self, root: usize) -> Self {
        self.0[2] = root as i64;
        self
    }

    /// With a number of parameters, the size of a bucket and a digest of the gradients.
    pub(crate) fn averaging(mut self, parameters: usize, bucket_bytes: usize, digest: i64) -> Self {
        self.0[2] = bucket_bytes as i64;
        self.0[5] = parameters as i64;
        self.0[6] = digest;
        self
    }

    /// With its place among the operations of the group.
    pub(crate) fn numbered(mut self, sequence: u64) -> Self {
        self.0[0] = sequence as i64;
        self
    }

    fn row(&self) -> &[i64] {
        &self.0
    }

    fn operation(&self) -> Option<Operation> {
        usize::try_from(self.0[1]).ok().and_then(|number| Operation::ALL.get(number)).copied()
    }

    fn from_row(row: &[i64]) -> Option<Self> {
        row.try_into().ok().map(Self)
    }

    fn without_digest(&self) -> Self {
        let mut call = self.clone();
        call.0[6] = 0;
        call
    }

    fn fits_but_for_parameters(&self, other: &Self) -> bool {
        let place = |call: &Self| (call.0[0], call.0[1], call.0[2]);
        self.operation() == Some(Operation::AverageGradients)
            && place(self) == place(other)
            && self.parameters() != other.parameters()
    }

    fn parameters(&self) -> usize {
        usize::try_from(self.0[5]).unwrap_or_default()
    }

    /// The call in words: `all_reduce(sum) of Float [2, 3], the 7th operation`.
    fn words(&self) -> String {
        let [sequence, _, detail, kind, by_nccl, dimensions, ..] = self.0;
        let Some(operation) = self.operation() else { return "an unknown operation".into() };
        let mut words = operation.to_string();
        match operation {
            Operation::AllReduce => words += if detail == 0 { "(sum)" } else { "(mean)" },
            Operation::Broadcast => words += &format!("(root {detail})"),
            Operation::AverageGradients => {
                words += &format!(" of {dimensions} parameters in buckets of {detail} bytes");
            }
            _ => {}
        }
        if let Some(kind) = usize::try_from(kind).ok().and_then(|kind| KINDS.get(kind)) {
            let count = usize::try_from(dimensions).unwrap_or_default();
            let shown = &self.0[FIRST_DIMENSION..][..count.min(DIMENSIONS)];
            words += &format!(" of {kind:?} {shown:?}");
            if count > DIMENSIONS {
                words += &format!(" and {} further dimensions", count - DIMENSIONS);
            }
            if by_nccl == 1 {
                words += " by NCCL";
            }
        }
        words + &format!(", operation {sequence} of the group")
    }
}

/// Exchanges the calls of all ranks.
pub(crate) fn exchange(
    group: &ffi::Group,
    call: &Call,
    rank: usize,
    world_size: usize,
) -> Result<Outcome, Failure> {
    let row = Tensor::f_from_slice(call.row()).map_err(refused)?;
    let options = (Kind::Int64, Device::Cpu);
    let mut decided = if rank == 0 {
        let mut rows =
            Tensor::f_zeros([world_size as i64, WIDTH as i64], options).map_err(refused)?;
        group.gather(Some(&mut rows), &row)?;
        let rows = rows.f_flatten(0, 1).and_then(Vec::<i64>::try_from).map_err(refused)?;
        Tensor::f_from_slice(&verdict(&rows)).map_err(refused)?
    } else {
        group.gather(None, &row)?;
        Tensor::f_zeros([VERDICT_WIDTH], options).map_err(refused)?
    };
    group.broadcast(&mut decided, 0)?;
    let decided = Vec::<i64>::try_from(&decided).map_err(refused)?;
    outcome(&decided)
        .ok_or_else(|| Failure { timed_out: false, reason: "rank 0 sent no verdict".into() })
}

fn refused(error: TchError) -> Failure {
    let reason = error.to_string().lines().next().unwrap_or_default().to_owned();
    Failure { timed_out: false, reason }
}

/// On rank 0: the numbers that tell all ranks whether they agree, from the rows of all ranks.
///
/// A rank that differs in more than the digest is named before one that differs in the digest alone.
pub(crate) fn verdict(rows: &[i64]) -> Vec<i64> {
    let rows: Vec<Call> = rows.chunks_exact(WIDTH).filter_map(Call::from_row).collect();
    let Some(first) = rows.first() else { return Vec::new() };
    let differs = |same: fn(&Call) -> Call| rows.iter().position(|row| same(row) != same(first));
    let (code, rank) = match (differs(Call::without_digest), differs(Call::clone)) {
        (None, None) => (AGREED, 0),
        (None, Some(rank)) if first.operation() == Some(Operation::AverageGradients) => {
            (GRADIENTS_DIFFER, rank)
        }
        (Some(rank), _) | (None, Some(rank)) => (DIFFER, rank),
    };
    let other = rows.get(rank).unwrap_or(first);
    [&[code, rank as i64], first.row(), other.row()].concat()
}

const AGREED: i64 = 0;
const DIFFER: i64 = 1;
/// All ranks average the gradients of equally many parameters, but the gradients do not fit.
const GRADIENTS_DIFFER: i64 = 2;

/// What all ranks know after the exchange.
#[derive(Debug)]
pub(crate) enum Outcome {
    Agreed,
    Differ(Box<Difference>),
    /// The list of gradients has another digest on some rank: all ranks go on to compare the lists.
    GradientsDiffer,
}

/// On every rank: what the verdict says; nothing if it is none.
pub(crate) fn outcome(verdict: &[i64]) -> Option<Outcome> {
    let (&[code, rank], rows) = verdict.split_first_chunk()?;
    let (first, other) = rows.split_at_checked(WIDTH)?;
    let (first, other) = (Call::from_row(first)?, Call::from_row(other)?);
    match code {
        AGREED => Some(Outcome::Agreed),
        GRADIENTS_DIFFER => Some(Outcome::GradientsDiffer),
        _ => {
            let rank = usize::try_from(rank).ok()?;
            Some(Outcome::Differ(Box::new(Difference { first, rank, other })))
        }
    }
}

impl Difference {
    /// The error of a rank whose own call is `own`.
    pub(crate) fn into_error(self, rank: usize, operation: Operation, own: &Call) -> Error {
        let (other_rank, other) =
            if *own == self.first { (self.rank, self.other) } else { (0, self.first) };
        if own.fits_but_for_parameters(&other) {
            let (own, other) = (own.parameters(), other.parameters());
            return Error::ParameterCount { rank, own, other_rank, other };
        }
        Error::Disagree { rank, operation, own: own.words(), other_rank, other: other.words() }
    }
}

/// FNV-1a over the bytes of some numbers.
pub(crate) fn digest(numbers: impl IntoIterator<Item = i64>) -> i64 {
    let bytes = numbers.into_iter().flat_map(i64::to_le_bytes);
    bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    }) as i64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(calls: &[&Call]) -> Vec<i64> {
        calls.iter().flat_map(|call| call.row().to_vec()).collect()
    }

    fn decide(calls: &[&Call]) -> Outcome {
        let verdict = verdict(&rows(calls));
        assert_eq!(verdict.len() as i64, VERDICT_WIDTH);
        outcome(&verdict).unwrap()
    }

    fn sum(size: &[i64]) -> Call {
        let tensor = Tensor::zeros(size, (Kind::Float, Device::Cpu));
        Call::on(Operation::AllReduce, &tensor, Kind::Float, false)
            .reducing(Reduce::Sum)
            .numbered(7)
    }

    #[test]
    fn equal_rows_agree() {
        let call = sum(&[2, 3]);
        assert!(matches!(decide(&[&call, &call, &call]), Outcome::Agreed));
        assert!(matches!(decide(&[&call]), Outcome::Agreed));
    }

    #[test]
    fn both_calls_are_named_on_every_rank() {
        let (usual, other) = (sum(&[2, 3]), sum(&[3, 2]));
        let error = |rank, own: &Call| match decide(&[&usual, &usual, &other]) {
            Outcome::Differ(difference) => difference.into_error(rank, Operation::AllReduce, own),
            outcome => panic!("{outcome:?}"),
        };
        let words = |shape| format!("all_reduce(sum) of Float {shape}, operation 7 of the group");
        for (rank, own, its_own, seen, its_call) in [
            (0, &usual, "[2, 3]", 2, "[3, 2]"),
            (1, &usual, "[2, 3]", 2, "[3, 2]"),
            (2, &other, "[3, 2]", 0, "[2, 3]"),
        ] {
            match error(rank, own) {
                Error::Disagree {
                    rank: found,
                    operation: Operation::AllReduce,
                    own,
                    other_rank,
                    other,
                } => {
                    assert_eq!(
                        (found, own, other_rank, other),
                        (rank, words(its_own), seen, words(its_call))
                    );
                }
                error => panic!("{error:?}"),
            }
        }
    }

    #[test]
    fn every_part_of_a_call_counts() {
        let usual = sum(&[4]);
        let tensor = |kind| Tensor::zeros([4], (kind, Device::Cpu));
        let double = Call::on(Operation::AllReduce, &tensor(Kind::Double), Kind::Double, false);
        let gather = Call::on(Operation::AllGather, &tensor(Kind::Float), Kind::Float, false);
        for other in [
            usual.clone().numbered(8),
            usual.clone().reducing(Reduce::Mean),
            double.numbered(7),
            gather.numbered(7),
            Call::new(Operation::Barrier).numbered(7),
            Call::on(Operation::AllReduce, &tensor(Kind::Float), Kind::Float, true).numbered(7),
            sum(&[2, 2]),
            sum(&[4, 1]),
            sum(&[4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ] {
            assert!(matches!(decide(&[&usual, &other]), Outcome::Differ(_)), "{other:?}");
        }
    }

    #[test]
    fn gradients_that_differ_in_the_digest_alone_are_compared_further() {
        let call = |count, bytes, digest| {
            Call::new(Operation::AverageGradients).averaging(count, bytes, digest).numbered(1)
        };
        let usual = call(3, 100, 5);
        assert!(matches!(decide(&[&usual, &usual, &call(3, 100, 6)]), Outcome::GradientsDiffer));
        // Not while any rank does something else: the lists would have different lengths.
        let barrier = Call::new(Operation::Barrier).numbered(1);
        match decide(&[&usual, &call(3, 100, 6), &barrier]) {
            Outcome::Differ(difference) => assert_eq!(difference.rank, 2),
            outcome => panic!("{outcome:?}"),
        }
        match decide(&[&usual, &call(4, 100, 6)]) {
            Outcome::Differ(difference) => {
                match difference.into_error(0, Operation::AverageGradients, &usual) {
                    Error::ParameterCount { own: 3, other_rank: 1, other: 4, .. } => {}
                    error => panic!("{error:?}"),
                }
            }
            outcome => panic!("{outcome:?}"),
        }
        match decide(&[&usual, &call(3, 200, 5)]) {
            Outcome::Differ(difference) => {
                let error = difference.into_error(0, Operation::AverageGradients, &usual);
                assert!(matches!(error, Error::Disagree { .. }), "{error:?}");
            }
            outcome => panic!("{outcome:?}"),
        }
    }

    #[test]
    fn the_digest_is_the_published_hash() {
        // FNV-1a, 64 bits: of no bytes, and of eight zero bytes (computed from its definition in Python).
        assert_eq!(digest([]) as u64, 0xcbf2_9ce4_8422_2325);
        assert_eq!(digest([0]) as u64, 0xa8c7_f832_281a_39c5);
    }
}
