//! Each operation on each element type gives the numbers that it should, and refuses what it cannot do.

use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tch_c10d::{Error, Operation, ProcessGroup, Reduce, Statistics};

#[test]
fn one_process() {
    let group = ProcessGroup::alone();
    operations(&group);
    refusals(&group);
    assert_eq!(group.statistics(), Statistics::default());
}

/// What each of several processes checks.
pub fn all(group: &ProcessGroup) {
    operations(group);
    refusals(group);
    disagreements(group);
    barrier(group);
    statistics(group);
}

const FLOATS: [Kind; 4] = [Kind::Float, Kind::Double, Kind::Half, Kind::BFloat16];
const INTEGERS: [Kind; 4] = [Kind::Int64, Kind::Int, Kind::Int8, Kind::Uint8];

/// Whole numbers that differ by rank, small enough to be exact in every type: `10 rank + place`.
fn numbers(rank: usize, kind: Kind) -> Tensor {
    let numbers: Vec<f64> = (0..6).map(|place| (10 * rank + place) as f64).collect();
    Tensor::from_slice(&numbers).reshape([2, 3]).to_kind(kind)
}

fn list(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

/// The sum over all ranks of [`numbers`], by itself.
fn sums(world_size: usize) -> Vec<f64> {
    let of_tens: usize = (0..world_size).map(|rank| 10 * rank).sum();
    (0..6).map(|place| (of_tens + world_size * place) as f64).collect()
}

fn operations(group: &ProcessGroup) {
    let (rank, world_size) = (group.rank(), group.world_size());
    for kind in FLOATS.into_iter().chain(INTEGERS) {
        let mut tensor = numbers(rank, kind);
        let place = tensor.data_ptr();
        group.all_reduce(&mut tensor, Reduce::Sum).unwrap();
        assert_eq!(list(&tensor), sums(world_size), "sum of {kind:?}");
        assert_eq!((tensor.kind(), tensor.size(), tensor.data_ptr()), (kind, vec![2, 3], place));

        let root = world_size - 1;
        let mut tensor = numbers(rank, kind);
        group.broadcast(&mut tensor, root).unwrap();
        assert_eq!(list(&tensor), list(&numbers(root, kind)), "broadcast of {kind:?}");

        let tensor = numbers(rank, kind);
        let gathered = group.all_gather(&tensor).unwrap();
        assert_eq!((gathered.kind(), gathered.size()), (kind, vec![world_size as i64, 2, 3]));
        for other in 0..world_size {
            assert_eq!(
                list(&gathered.get(other as i64)),
                list(&numbers(other, kind)),
                "gather of {kind:?}"
            );
        }
        assert_ne!(gathered.data_ptr(), tensor.data_ptr());
    }
    for kind in FLOATS {
        let mut tensor = numbers(rank, kind);
        group.all_reduce(&mut tensor, Reduce::Mean).unwrap();
        let means: Vec<_> = sums(world_size).iter().map(|sum| sum / world_size as f64).collect();
        assert_eq!(list(&tensor), means, "mean of {kind:?}");
    }
    layouts(group);

    let mut odd = Tensor::from(rank % 2 == 1);
    let gathered = group.all_gather(&odd).unwrap();
    let expected: Vec<_> = (0..world_size).map(|rank| (rank % 2) as f64).collect();
    assert_eq!((gathered.kind(), list(&gathered)), (Kind::Bool, expected));
    group.broadcast(&mut odd, 0).unwrap();
    assert_eq!(list(&odd), [0.0]);

    // A parameter may be sent, though it requires gradients; no graph comes of it.
    let mut parameter = numbers(rank, Kind::Float).set_requires_grad(true);
    group.broadcast(&mut parameter, 0).unwrap();
    assert_eq!(list(&parameter), list(&numbers(0, Kind::Float)));
    assert!(parameter.requires_grad() && parameter.is_leaf());
    assert!(!group.all_gather(&(&parameter * 2.0)).unwrap().requires_grad());
}

/// Tensors with gaps or in another order are changed in place, and nothing beside them.
fn layouts(group: &ProcessGroup) {
    let (rank, world_size) = (group.rank(), group.world_size());
    let mut turned = numbers(rank, Kind::Float).transpose(0, 1);
    group.all_reduce(&mut turned, Reduce::Sum).unwrap();
    assert_eq!(list(&turned.transpose(0, 1)), sums(world_size));
    assert!(!turned.is_contiguous());

    let whole = numbers(rank, Kind::Float);
    group.all_reduce(&mut whole.narrow(1, 1, 1), Reduce::Sum).unwrap();
    let (own, sum) = (list(&numbers(rank, Kind::Float)), sums(world_size));
    assert_eq!(list(&whole), [own[0], sum[1], own[2], own[3], sum[4], own[5]]);
    let gathered = group.all_gather(&whole.narrow(1, 0, 1)).unwrap();
    assert_eq!(list(&gathered.get(0)), [0.0, 3.0]);

    let mut empty = Tensor::zeros([0, 3], (Kind::Float, Device::Cpu));
    group.all_reduce(&mut empty, Reduce::Mean).unwrap();
    assert_eq!(group.all_gather(&empty).unwrap().size(), [world_size as i64, 0, 3]);
    let mut number = Tensor::from(1.0_f32);
    group.all_reduce(&mut number, Reduce::Sum).unwrap();
    assert_eq!(number.double_value(&[]), world_size as f64);
}

/// What a rank finds wrong by itself it refuses before it says anything to the others.
fn refusals(group: &ProcessGroup) {
    let rank = group.rank();
    let zeros = |kind| Tensor::zeros([2, 2], (kind, Device::Cpu));
    let refused = |result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(error.leaves_group_usable(), "{error}");
        error
    };
    for (kind, reduce) in [
        (Kind::Bool, Reduce::Sum),
        (Kind::ComplexFloat, Reduce::Sum),
        (Kind::Int16, Reduce::Sum),
        (Kind::Int64, Reduce::Mean),
    ] {
        match refused(group.all_reduce(&mut zeros(kind), reduce)) {
            Error::Kind { rank: on, operation: Operation::AllReduce, found, .. } => {
                assert_eq!((on, found), (rank, kind));
            }
            error => panic!("{error:?}"),
        }
    }
    let mut expanded = zeros(Kind::Float).narrow(0, 0, 1).expand([3, 2], true);
    let error = refused(group.broadcast(&mut expanded, 0));
    assert!(matches!(error, Error::Layout { operation: Operation::Broadcast, .. }), "{error:?}");
    let sparse = zeros(Kind::Float).to_sparse(None, None::<&[i64]>, None);
    let error = refused(group.all_gather(&sparse).map(drop));
    assert!(matches!(error, Error::Layout { operation: Operation::AllGather, .. }), "{error:?}");
    let error = refused(group.all_reduce(&mut Tensor::new(), Reduce::Sum));
    assert!(matches!(error, Error::Layout { found: "is undefined", .. }), "{error:?}");
    let mut loss = zeros(Kind::Float).set_requires_grad(true).sum(Kind::Float);
    let error = refused(group.all_reduce(&mut loss, Reduce::Sum));
    assert!(matches!(error, Error::Graph { operation: Operation::AllReduce, .. }), "{error:?}");
    let error = refused(group.broadcast(&mut zeros(Kind::Float), group.world_size()));
    assert!(matches!(error, Error::Argument { what: "root", .. }), "{error:?}");
    // Nothing was exchanged: the group goes on.
    assert_eq!(list(&group.all_gather(&Tensor::from(1.0)).unwrap()), vec![1.0; group.world_size()]);
}

/// Calls that do not fit together fail on all ranks, and leave them in step.
fn disagreements(group: &ProcessGroup) {
    let (rank, last) = (group.rank(), group.world_size() - 1);
    let is_last = rank == last;
    let zeros = |size: &[i64], kind| Tensor::zeros(size, (kind, Device::Cpu));
    let check = |what: &str, result: Result<(), Error>| {
        let error = result.unwrap_err();
        assert!(error.leaves_group_usable(), "{error}");
        match error {
            Error::Disagree { rank: on, other_rank, own, other, .. } => {
                assert_eq!((on, other_rank), (rank, if is_last { 0 } else { last }), "{what}");
                assert_ne!(own, other, "{what}");
            }
            error => panic!("{what}: {error:?}"),
        }
        group.barrier().unwrap();
    };
    let length = if is_last { 5 } else { 4 };
    check("length", group.all_reduce(&mut zeros(&[length], Kind::Float), Reduce::Sum));
    check("length", group.broadcast(&mut zeros(&[length], Kind::Float), 0));
    check("length", group.all_gather(&zeros(&[length], Kind::Float)).map(drop));
    let size: &[i64] = if is_last { &[4, 1] } else { &[2, 2] };
    check("shape", group.all_reduce(&mut zeros(size, Kind::Float), Reduce::Sum));
    let kind = if is_last { Kind::Double } else { Kind::Float };
    check("kind", group.all_reduce(&mut zeros(&[4], kind), Reduce::Sum));
    let reduce = if is_last { Reduce::Mean } else { Reduce::Sum };
    check("reduction", group.all_reduce(&mut zeros(&[4], Kind::Float), reduce));
    let root = usize::from(is_last);
    check("root", group.broadcast(&mut zeros(&[4], Kind::Float), root));
    let different =
        if is_last { group.barrier() } else { group.broadcast(&mut zeros(&[4], Kind::Float), 0) };
    check("operation", different);
}

/// Nobody leaves a barrier before the last has come.
fn barrier(group: &ProcessGroup) {
    let pause = Duration::from_millis(300);
    group.barrier().unwrap();
    let start = Instant::now();
    if group.rank() == group.world_size() - 1 {
        std::thread::sleep(pause);
    }
    group.barrier().unwrap();
    // The ranks left the first barrier at nearly the same time.
    assert!(start.elapsed() > pause / 2, "{:?}", start.elapsed());
}

fn statistics(group: &ProcessGroup) {
    let before = group.statistics();
    let mut tensor = Tensor::zeros([100], (Kind::BFloat16, Device::Cpu));
    group.all_reduce(&mut tensor, Reduce::Mean).unwrap();
    let _ = group.all_gather(&Tensor::from(1_i64)).unwrap();
    group.barrier().unwrap();
    let now = group.statistics().since(before);
    assert_eq!((now.calls, now.bytes, now.agreements), (2, 208, 3));
    assert!(now.time > Duration::ZERO);
}
