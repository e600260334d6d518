//! Averaged gradients are those of the whole batch, and ranks that step by them stay equal to the bit.

use tch::nn::{self, OptimizerConfig};
use tch::{Device, Kind, Tensor};
use tch_c10d::{Averaged, Averaging, Error, ProcessGroup, Reduce};

/// What each of several processes checks.
pub fn all(group: &ProcessGroup) {
    whole_batch(group);
    bits(group);
    buckets(group);
    other_types(group);
    clipping(group);
    misfits(group);
    not_finite(group);
}

/// Rows of each rank's part of the batch.
const ROWS: i64 = 8;

/// A network of two layers, whose parameters are all given, and one parameter that it does not use.
struct Network {
    parameters: Vec<Tensor>,
}

impl Network {
    fn new(kind: Kind) -> Self {
        tch::manual_seed(1);
        let sizes: [&[i64]; 5] = [&[5, 16], &[16], &[7], &[16, 3], &[3]];
        let parameter = |size: &&[i64]| {
            // Drawn in one type for all, so that they are the same numbers.
            let numbers = Tensor::randn(*size, (Kind::Float, Device::Cpu)) * 0.5;
            numbers.to_kind(kind).set_requires_grad(true)
        };
        Self { parameters: sizes.iter().map(parameter).collect() }
    }

    fn loss(&self, x: &Tensor) -> Tensor {
        let [first, shift, _unused, second, offset] = self.parameters.as_slice() else { panic!() };
        let x = x.to_kind(first.kind());
        let out = (x.matmul(first) + shift).tanh().matmul(second) + offset;
        (out - x.narrow(1, 0, 3).sin()).square().mean(None)
    }

    /// Computes the gradients anew.
    fn backward(&self, x: &Tensor) {
        for parameter in &self.parameters {
            parameter.shallow_clone().zero_grad();
        }
        self.loss(x).backward();
    }

    fn step(&self, rate: f64) {
        let _guard = tch::no_grad_guard();
        for parameter in self.parameters.iter().filter(|parameter| parameter.grad().defined()) {
            let _ = parameter.shallow_clone().g_sub_(&(parameter.grad() * rate));
        }
    }
}

/// All numbers of some tensors, in double precision.
fn numbers(tensors: impl IntoIterator<Item = Tensor>) -> Tensor {
    let flat = tensors.into_iter().filter(Tensor::defined);
    Tensor::cat(
        &flat.map(|t| t.detach().flatten(0, -1).to_kind(Kind::Double)).collect::<Vec<_>>(),
        0,
    )
}

fn gradients(network: &Network) -> Tensor {
    numbers(network.parameters.iter().map(Tensor::grad))
}

fn parameters(network: &Network) -> Tensor {
    numbers(network.parameters.iter().map(Tensor::shallow_clone))
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    (a - b).norm().double_value(&[])
}

/// The batch of all ranks in update `step`.
fn batch(step: i64, world_size: usize) -> Tensor {
    tch::manual_seed(100 + step);
    Tensor::randn([ROWS * world_size as i64, 5], (Kind::Float, Device::Cpu))
}

fn part(batch: &Tensor, rank: usize) -> Tensor {
    batch.narrow(0, ROWS * rank as i64, ROWS)
}

fn average(group: &ProcessGroup, network: &Network) -> Averaged {
    group.average_gradients(&network.parameters, &Averaging::default()).unwrap()
}

/// Twenty updates of N processes with batch B against one process with batch N B, and against a run in double
/// precision: the processes may be four times as far from the latter as the one process is.
fn whole_batch(group: &ProcessGroup) {
    let world_size = group.world_size();
    let [split, whole, exact] = [Kind::Float, Kind::Float, Kind::Double].map(Network::new);
    let mut worst: f64 = 0.0;
    for step in 0..20 {
        let batch = batch(step, world_size);
        split.backward(&part(&batch, group.rank()));
        let own = gradients(&split);
        let averaged = average(group, &split);
        whole.backward(&batch);
        exact.backward(&batch);
        assert!(!split.parameters[2].grad().defined());
        // The test would prove nothing if the parts had equal gradients.
        let change = distance(&own, &gradients(&split));
        assert!(change > 1e-3 * averaged.norm, "averaging changed {change}");
        if step == 0 {
            // At equal parameters the gradients themselves can be compared.
            let (one, many) = (gradients(&whole), gradients(&split));
            let bound = 4.0 * distance(&one, &gradients(&exact));
            let found = distance(&many, &gradients(&exact));
            assert!(found <= bound, "gradient: {found:e} from float64, bound {bound:e}");
            let norm = many.norm().double_value(&[]);
            assert!((averaged.norm - norm).abs() <= 1e-12 * norm);
        }
        for network in [&split, &whole, &exact] {
            network.step(0.1);
        }
        let bound = 4.0 * distance(&parameters(&whole), &parameters(&exact));
        let found = distance(&parameters(&split), &parameters(&exact));
        worst = worst.max(found / bound);
        assert!(found <= bound, "update {step}: {found:e} from float64, bound {bound:e}");
    }
    println!("worst distance over bound: {worst:.2}");
}

/// Parameters of all ranks are equal to the bit after twenty updates of an adaptive optimizer.
fn bits(group: &ProcessGroup) {
    let store = nn::VarStore::new(Device::Cpu);
    tch::manual_seed(group.rank() as i64);
    let root = store.root();
    let first = nn::linear(&root / "first", 5, 32, Default::default());
    let second = nn::linear(&root / "second", 32, 3, Default::default());
    let parameters = store.trainable_variables();
    let all = || numbers(parameters.iter().map(Tensor::shallow_clone));
    let equal_bits = || {
        let gathered = group.all_gather(&all().to_kind(Kind::Float).view_dtype(Kind::Int)).unwrap();
        (0..group.world_size()).all(|rank| gathered.get(rank as i64) == gathered.get(0))
    };
    assert!(!equal_bits(), "the seeds differ");
    for parameter in &parameters {
        group.broadcast(&mut parameter.shallow_clone(), 0).unwrap();
    }
    assert!(equal_bits());
    let start = all();
    let mut optimizer = nn::AdamW::default().build(&store, 1e-2).unwrap();
    for _ in 0..20 {
        let x = Tensor::randn([ROWS, 5], (Kind::Float, Device::Cpu));
        optimizer.zero_grad();
        let out = x.apply(&first).tanh().apply(&second);
        (out - x.narrow(1, 0, 3)).square().mean(Kind::Float).backward();
        let averaging = Averaging::default().bucket_bytes(256).unwrap().max_norm(0.5).unwrap();
        let _ = group.average_gradients(&parameters, &averaging).unwrap();
        optimizer.step();
    }
    assert!(equal_bits());
    assert!(distance(&start, &all()) > 0.1);
}

/// Buckets are filled from the last parameter on, up to their size; a large gradient goes alone.
fn buckets(group: &ProcessGroup) {
    let network = Network::new(Kind::Float);
    let batch = batch(0, group.world_size());
    // Bytes from the last parameter to the first: 12, 192, (absent), 64, 320. One agreement, and the norm's 8
    // bytes in a call of its own.
    for (bytes, calls) in [(1, 5), (204, 4), (268, 3), (587, 3), (588, 2), (1 << 20, 2)] {
        network.backward(&part(&batch, group.rank()));
        let averaging = Averaging::default().bucket_bytes(bytes).unwrap();
        let found = group.average_gradients(&network.parameters, &averaging).unwrap().statistics;
        assert_eq!((found.calls, found.bytes, found.agreements), (calls, 588 + 8, 1), "{bytes}");
    }
    // Only those of the list.
    network.backward(&part(&batch, group.rank()));
    let before = gradients(&network);
    let _ = group.average_gradients(&network.parameters[3..], &Averaging::default()).unwrap();
    let changed = (before - gradients(&network)).abs().gt(0.0);
    assert!(!bool::try_from(changed.narrow(0, 0, 96).any()).unwrap());
    assert!(bool::try_from(changed.narrow(0, 96, 51).any()).unwrap());
    // No gradients at all.
    let none = group.average_gradients(&network.parameters[2..3], &Averaging::default()).unwrap();
    assert_eq!(none.norm, 0.0);
}

/// Gradients of several types and layouts in one list, with values that are exact in each.
fn other_types(group: &ProcessGroup) {
    let world_size = group.world_size();
    let rank = group.rank() as f64;
    let mean = (world_size - 1) as f64 / 2.0;
    let parameters: Vec<_> =
        [Kind::BFloat16, Kind::Float, Kind::BFloat16, Kind::Double, Kind::Half]
            .map(|kind| Tensor::zeros([3, 2], (kind, Device::Cpu)).set_requires_grad(true))
            .into();
    for parameter in &parameters {
        // A gradient in the layout of its parameter's transpose.
        let factor = Tensor::full([2, 3], rank, (parameter.kind(), Device::Cpu)).transpose(0, 1);
        (parameter * factor).sum(parameter.kind()).backward();
    }
    let averaged = group.average_gradients(&parameters, &Averaging::default()).unwrap();
    // One bucket for each of four types.
    assert_eq!(averaged.statistics.calls, 5);
    for parameter in &parameters {
        let gradient = parameter.grad();
        assert_eq!(gradient.kind(), parameter.kind());
        assert!(gradient.eq(mean).all() == Tensor::from(true), "{gradient:?}");
    }
    assert!((averaged.norm - mean * 30.0_f64.sqrt()).abs() < 1e-12 * averaged.norm);
}

/// The mean is scaled as PyTorch's `clip_grad_norm_` scales it, and only if it is too long.
fn clipping(group: &ProcessGroup) {
    let network = Network::new(Kind::Double);
    let batch = batch(0, group.world_size());
    let run = |averaging: Averaging| {
        network.backward(&part(&batch, group.rank()));
        let averaged = group.average_gradients(&network.parameters, &averaging).unwrap();
        (averaged, gradients(&network))
    };
    let (free, mean) = run(Averaging::default());
    assert!(!free.clipped);
    let (loose, same) = run(Averaging::default().max_norm(2.0 * free.norm).unwrap());
    assert!(!loose.clipped && same == mean);
    let (tight, scaled) = run(Averaging::default().max_norm(0.25 * free.norm).unwrap());
    assert!(tight.clipped && tight.norm == free.norm);
    let expected = mean * (0.25 * free.norm / (free.norm + 1e-6));
    assert!(distance(&scaled, &expected) <= 1e-15 * free.norm);
}

/// Ranks whose gradients do not fit learn which, together, and go on.
fn misfits(group: &ProcessGroup) {
    let last = group.world_size() - 1;
    let is_last = group.rank() == last;
    let others: Vec<_> = (0..last).collect();
    let parameter = |kind| Tensor::ones([2], (kind, Device::Cpu)).set_requires_grad(true);
    let fail = |parameters: &[Tensor], averaging: Averaging| {
        let error = group.average_gradients(parameters, &averaging).unwrap_err();
        assert!(error.leaves_group_usable(), "{error}");
        group.barrier().unwrap();
        error
    };
    let list: Vec<_> = (0..3).map(|_| parameter(Kind::Float)).collect();
    for place in [0, if is_last { 2 } else { 1 }, 1] {
        list[place].sum(Kind::Float).backward();
    }
    match fail(&list, Averaging::default()) {
        Error::GradientAbsent { rank, parameter, present, absent } => {
            assert_eq!(
                (rank, parameter, present, absent),
                (group.rank(), 2, vec![last], others.clone())
            );
        }
        error => panic!("{error:?}"),
    }
    // Untouched: one, or two where it was used twice.
    assert_eq!(list[1].grad().double_value(&[0]), if is_last { 1.0 } else { 2.0 });
    let kind = if is_last { Kind::Double } else { Kind::Float };
    let list = [parameter(Kind::Float), parameter(kind)];
    for parameter in &list {
        parameter.sum(None).backward();
    }
    match fail(&list, Averaging::default()) {
        Error::GradientShape { parameter, other_rank, .. } => {
            assert_eq!((parameter, other_rank), (1, if is_last { 0 } else { last }));
        }
        error => panic!("{error:?}"),
    }
    let count = if is_last { 1 } else { 2 };
    match fail(&list[..count], Averaging::default()) {
        Error::ParameterCount { own, other_rank, other, .. } => {
            assert_eq!((own, other), (count, 3 - count));
            assert_eq!(other_rank, if is_last { 0 } else { last });
        }
        error => panic!("{error:?}"),
    }
    let averaging = Averaging::default().bucket_bytes(if is_last { 8 } else { 9 }).unwrap();
    assert!(matches!(fail(&list[..1], averaging), Error::Disagree { .. }));
}

/// A gradient that is not a number on one rank stops all, who learn which rank it was.
fn not_finite(group: &ProcessGroup) {
    let last = group.world_size() - 1;
    for bad in [f64::NAN, f64::INFINITY] {
        let parameter = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let factor = if group.rank() == last { bad } else { 1.0 };
        (&parameter * factor).sum(Kind::Float).backward();
        let error = group.average_gradients(&[parameter], &Averaging::default()).unwrap_err();
        assert!(error.leaves_group_usable());
        match error {
            Error::NotFinite { rank, ranks } => {
                assert_eq!((rank, ranks), (group.rank(), vec![last]))
            }
            error => panic!("{error:?}"),
        }
    }
    // Each is finite, their sum is not: nobody is to blame. The squares of what is finite may be beyond the
    // type.
    for (size, finite) in [(3e38, false), (1e38 / group.world_size() as f64, true)] {
        let parameter = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        (&parameter * size).sum(Kind::Float).backward();
        match group.average_gradients(&[parameter], &Averaging::default()) {
            Ok(averaged) if finite => {
                assert!((averaged.norm / (size * 3.0_f64.sqrt()) - 1.0).abs() < 1e-6)
            }
            Err(Error::NotFinite { ranks, .. }) if !finite => {
                assert_eq!(ranks, Vec::<usize>::new())
            }
            other => panic!("{other:?}"),
        }
    }
    let mut one = Tensor::from(1.0);
    group.all_reduce(&mut one, Reduce::Mean).unwrap();
    assert_eq!(one.double_value(&[]), 1.0);
}

#[test]
fn one_process_measures_and_clips_too() {
    let group = ProcessGroup::alone();
    let network = Network::new(Kind::Double);
    network.backward(&batch(0, 1));
    let before = gradients(&network);
    let norm = before.norm().double_value(&[]);
    let averaging = Averaging::default().max_norm(norm / 2.0).unwrap();
    let averaged = group.average_gradients(&network.parameters, &averaging).unwrap();
    assert!(averaged.clipped && (averaged.norm - norm).abs() <= 1e-12 * norm);
    assert_eq!(averaged.statistics, group.statistics());
    let expected = before * (norm / 2.0 / (norm + 1e-6));
    assert!(distance(&gradients(&network), &expected) <= 1e-12 * norm);
    let parameter = Tensor::ones([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    (&parameter * f64::NAN).sum(Kind::Float).backward();
    match group.average_gradients(&[parameter], &Averaging::default()) {
        Err(Error::NotFinite { rank: 0, ranks }) => assert_eq!(ranks, [0]),
        other => panic!("{other:?}"),
    }
}

#[test]
fn settings_are_checked() {
    let what = |result| match result {
        Err(Error::Argument { what, .. }) => what,
        other => panic!("{other:?}"),
    };
    assert_eq!(what(Averaging::default().bucket_bytes(0)), "bucket_bytes");
    for bad in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(what(Averaging::default().max_norm(bad)), "max_norm");
    }
    let integers = Tensor::ones([2], (Kind::Float, Device::Cpu));
    let none = ProcessGroup::alone().average_gradients(&[integers], &Averaging::default()).unwrap();
    assert_eq!(none.norm, 0.0);
    let undefined =
        ProcessGroup::alone().average_gradients(&[Tensor::new()], &Averaging::default());
    assert!(matches!(undefined, Err(Error::Layout { .. })));
}
