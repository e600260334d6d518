//! Which gradients travel together, and whether all ranks put the same ones together.

use tch::{Device, Kind, TchError, Tensor};

use crate::Error;
use crate::agreement::{KINDS, digest};

/// The fingerprint of a gradient that is not there.
pub(super) const ABSENT: i64 = 0;

/// A number that tells gradients of different type or shape apart, never [`ABSENT`].
pub(super) fn fingerprint(gradient: &Tensor, by_nccl: bool) -> i64 {
    let kind =
        KINDS.iter().position(|kind| *kind == gradient.kind()).map_or(-1, |kind| kind as i64);
    digest([kind, i64::from(by_nccl)].into_iter().chain(gradient.size())) | 1
}

/// Which gradient is the first that does not fit, and how: from the fingerprints of `count` gradients and the
/// numbers of their buckets, of all ranks.
pub(super) fn misfit(rank: usize, count: usize, lists: &[i64]) -> Error {
    let column = |place: usize| lists.iter().skip(place).step_by(2 * count).copied();
    let ranks = |place, wanted: &dyn Fn(i64) -> bool| -> Vec<usize> {
        column(place)
            .enumerate()
            .filter(|(_, entry)| wanted(*entry))
            .map(|(rank, _)| rank)
            .collect()
    };
    // An absent gradient, or one of another type, moves others to other buckets: it comes first.
    for parameter in 0..count {
        let absent = ranks(parameter, &|print| print == ABSENT);
        let present = ranks(parameter, &|print| print != ABSENT);
        if !absent.is_empty() && !present.is_empty() {
            return Error::GradientAbsent { rank, parameter, present, absent };
        }
    }
    let other = |place: usize| {
        let own = column(place).nth(rank);
        let other_rank = ranks(place, &|entry| Some(entry) != own).first().copied();
        other_rank.map(|other_rank| (place % count, other_rank))
    };
    let (parameter, other_rank) = (0..2 * count).find_map(other).unwrap_or_default();
    Error::GradientShape { rank, parameter, other_rank }
}

/// Places of gradients, from the last to the first, in lists of one type and device and of at most `bytes`.
pub(super) fn buckets(gradients: &[Option<Tensor>], bytes: usize) -> Vec<Vec<usize>> {
    struct Open {
        kind: Kind,
        device: Device,
        bytes: usize,
        places: Vec<usize>,
    }
    let mut open: Vec<Open> = Vec::new();
    let mut full = Vec::new();
    for (place, gradient) in gradients.iter().enumerate().rev() {
        let Some(gradient) = gradient.as_ref().filter(|gradient| gradient.numel() > 0) else {
            continue;
        };
        let (kind, device) = (gradient.kind(), gradient.device());
        let size = gradient.numel() * kind.elt_size_in_bytes();
        match open.iter_mut().find(|bucket| bucket.kind == kind && bucket.device == device) {
            Some(bucket) if bucket.bytes + size <= bytes => {
                bucket.bytes += size;
                bucket.places.push(place);
            }
            Some(bucket) => {
                full.push(std::mem::replace(&mut bucket.places, vec![place]));
                bucket.bytes = size;
            }
            None => open.push(Open { kind, device, bytes: size, places: vec![place] }),
        }
    }
    full.extend(open.into_iter().map(|bucket| bucket.places));
    full
}

/// One tensor of all elements; the gradient itself where it is the only one and contiguous.
pub(super) fn flatten(bucket: &[&Tensor]) -> Result<Tensor, TchError> {
    match bucket {
        [gradient] => gradient.f_reshape([-1]),
        _ => {
            let flat = bucket.iter().map(|gradient| gradient.f_reshape([-1]));
            Tensor::f_cat(&flat.collect::<Result<Vec<_>, _>>()?, 0)
        }
    }
}

/// Writes the elements back into the gradients.
pub(super) fn unflatten(flat: &Tensor, bucket: &[&Tensor]) -> Result<(), TchError> {
    let mut start = 0;
    for gradient in bucket {
        let length = gradient.numel() as i64;
        let part = flat.f_narrow(0, start, length)?.f_view(gradient.size().as_slice())?;
        if part.data_ptr() != gradient.data_ptr() {
            gradient.shallow_clone().f_copy_(&part)?;
        }
        start += length;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gradient(size: &[i64], kind: Kind) -> Option<Tensor> {
        Some(Tensor::zeros(size, (kind, Device::Cpu)))
    }

    #[test]
    fn buckets_are_filled_from_the_last_parameter() {
        let (float, half) = (Kind::Float, Kind::BFloat16);
        let gradients = [
            gradient(&[2], float),
            gradient(&[3], half),
            None,
            gradient(&[4], float),
            gradient(&[0], float),
            gradient(&[5], half),
            gradient(&[6], float),
        ];
        // Bytes: 8, 6, -, 16, 0, 10, 24.
        assert_eq!(buckets(&gradients, 1), [vec![6], vec![5], vec![3], vec![0], vec![1]]);
        assert_eq!(buckets(&gradients, 16), [vec![6], vec![3], vec![0], vec![5, 1]]);
        assert_eq!(buckets(&gradients, 40), [vec![6, 3], vec![0], vec![5, 1]]);
        assert_eq!(buckets(&gradients, 48), [vec![6, 3, 0], vec![5, 1]]);
        assert_eq!(buckets(&[None], 48), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn misfits_name_absent_gradients_first() {
        let (a, b) = (3, 5);
        let found = |lists: &[[i64; 6]]| misfit(1, 3, &lists.concat());
        let usual = [a, a, a, 0, 0, 0];
        match found(&[usual, [a, b, ABSENT, 0, 1, -1], usual]) {
            Error::GradientAbsent { rank: 1, parameter: 2, present, absent } => {
                assert_eq!((present, absent), (vec![0, 2], vec![1]));
            }
            error => panic!("{error:?}"),
        }
        match found(&[usual, usual, [a, b, a, 1, 0, 0]]) {
            Error::GradientShape { rank: 1, parameter: 1, other_rank: 2 } => {}
            error => panic!("{error:?}"),
        }
        // Equal gradients in other buckets: on other devices.
        match found(&[[a, a, a, 0, 0, 1], usual, usual]) {
            Error::GradientShape { rank: 1, parameter: 2, other_rank: 0 } => {}
            error => panic!("{error:?}"),
        }
    }

    #[test]
    fn fingerprints_tell_type_shape_and_carrier() {
        let print = |size: &[i64], kind, by_nccl| {
            fingerprint(&Tensor::zeros(size, (kind, Device::Cpu)), by_nccl)
        };
        let usual = print(&[2, 3], Kind::Float, false);
        assert_eq!(usual, print(&[2, 3], Kind::Float, false));
        for other in [
            ABSENT,
            print(&[3, 2], Kind::Float, false),
            print(&[6], Kind::Float, false),
            print(&[2, 3], Kind::Double, false),
            print(&[2, 3], Kind::Float, true),
        ] {
            assert_ne!(usual, other);
        }
    }
}
