//! The continuous consistency term and a loss of a flow map, written a second time over the public interface, give
//! the bits of the shipped ones with as many forwards.

use std::cell::Cell;

use decoupled_dmd::{
    Batch, Condition, Consistency, Denoiser, Draw, Engine, Error, FlowMap, Group, Guidance,
    MeanFlow, NoiseAngle, NoisePath, Objective, PostShift, Prediction, Probe, RectifiedFlow,
    Renoising, Result, Tangent, TrigFlow, Uniform, check_same_path,
};
use tch::{Kind, Tensor, no_grad_guard};

use super::common::{values, wave};

const SHAPE: [i64; 3] = [4, 3, 2];
const STEP: f64 = 1e-3;
const KAPPA: f64 = 0.1;
const DATA_STD: f64 = 0.5;

/// One number a sample as a factor of `[B, ..]`.
fn column(numbers: &Tensor, like: &Tensor) -> Result<Tensor> {
    Ok(numbers.f_to_kind(like.f_kind()?)?.f_view([-1, 1, 1])?)
}

/// sCM by a user, by central differences.
struct OwnConsistency<'a> {
    student: Denoiser<'a>,
    guidance: Guidance,
}

impl Engine for OwnConsistency<'_> {
    fn direction(&self, probe: &Probe<'_>) -> Result<Tensor> {
        let (batch, path) = (probe.batch(), probe.teacher().path());
        let (input, time) = batch.student_input()?;
        check_same_path(self.student.path(), path)?;
        NoiseAngle::check_changes(path, STEP)?;
        NoiseAngle::check_clean_end(path, time)?;
        let guided = probe.teacher().predict_guided(input, time, batch, self.guidance)?;
        let clean = guided.into_sample()?;
        let noise = path.implied_noise(input, &clean, time)?;
        let at = |to: &PostShift| -> Result<Tensor> {
            let neighbour = path.renoise(&clean, to, &noise)?;
            self.student.predict(&neighbour, to, batch.cond())?.into_sample()
        };
        let (to, from) = (time.moved(STEP)?, time.moved(-STEP)?);
        let (ahead, behind) = (at(&to)?, at(&from)?);
        let angle = |time: &PostShift| NoiseAngle::at(path, time, DATA_STD);
        let change = column(&angle(&to)?.minus(&angle(&from)?)?, &ahead)?;
        let slope = ahead.f_sub(&behind)?.f_div(&change)?;
        let (cosine, sine) = (angle(time)?.cosine(&ahead)?, angle(time)?.sine(&ahead)?);
        let direction = slope.f_mul(&cosine.f_mul_scalar(-1.0)?)?;
        let rms = probe.masked_mean(&direction.f_square()?)?.f_sqrt()?;
        let divisor = sine.f_mul_scalar(DATA_STD)?;
        let divisor = divisor.f_mul(&column(&rms.f_add_scalar(KAPPA)?, &ahead)?)?;
        probe.masked(&direction.f_div(&divisor)?)
    }
}

fn teacher<'a>(path: &'a dyn NoisePath, forwards: &'a Cell<usize>) -> Denoiser<'a> {
    Denoiser::new(path, Prediction::Sample, |x: &Tensor, t: &Tensor, c: &Condition| {
        forwards.set(forwards.get() + 1);
        let t = t.to_kind(x.kind()).view([-1, 1, 1]);
        (x * 0.7).sin() * (t + 0.5) + c[0].to_kind(x.kind())
    })
}

/// Bits of the loss and of the gradient in x, and forwards of teacher and student.
type Found = (Vec<u64>, Vec<u64>, [usize; 2]);

fn bits(tensor: &Tensor) -> Vec<u64> {
    values(&tensor.detach()).into_iter().map(f64::to_bits).collect()
}

fn found(path: &dyn NoisePath, kind: Kind, is_masked: bool, is_own: bool) -> Result<Found> {
    let forwards = [(); 2].map(|()| Cell::new(0));
    let student =
        Denoiser::new(path, Prediction::FlowVelocity, |x: &Tensor, t: &Tensor, _: &Condition| {
            forwards[1].set(forwards[1].get() + 1);
            (x * 1.1 + t.to_kind(x.kind()).view([-1, 1, 1])).cos()
        });
    let x = wave(&SHAPE, 0.4, kind).set_requires_grad(true);
    let (cond, null): (Condition, Condition) =
        (wave(&SHAPE, 1.0, kind).into(), wave(&SHAPE, 2.0, kind).into());
    let time = PostShift::new(Tensor::from_slice(&[0.1, 0.4, 0.7, 0.9]))?;
    let (input, mask) = (wave(&SHAPE, 0.9, kind), Tensor::from_slice(&[true, false, true, true]));
    let batch = Batch::new(&x, &cond)?.with_null(&null).with_student_input(&input, &time)?;
    let batch = if is_masked { batch.with_mask(&mask)? } else { batch };
    let guidance = Guidance::new(2.0)?;
    let group = Group::new(Renoising::new(Uniform::FULL));
    let group = if is_own {
        group.engine("scm", 1.0, OwnConsistency { student, guidance })
    } else {
        let shipped = Consistency::continuous(student, Tangent::Central { step: STEP })?;
        group.engine("scm", 1.0, shipped.guided(guidance).normalized(KAPPA)?.data_std(DATA_STD)?)
    };
    let objective = Objective::new(teacher(path, &forwards[0])).with(group);
    let draw = Draw { u: Tensor::from_slice(&[0.5f32; 4]), noise: wave(&SHAPE, 5.0, kind) };
    let loss = objective.evaluate_at(&batch, vec![draw])?.loss;
    loss.backward();
    Ok((bits(&loss), bits(&x.grad()), forwards.each_ref().map(Cell::get)))
}

#[test]
fn a_users_consistency_equals_the_shipped_one_bit_for_bit() -> Result<()> {
    let paths: [&dyn NoisePath; 2] = [&RectifiedFlow, &TrigFlow];
    for path in paths {
        for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
            for is_masked in [false, true] {
                let shipped = found(path, kind, is_masked, false)?;
                assert_eq!(found(path, kind, is_masked, true)?, shipped, "{kind:?} {is_masked}");
                // The comparison is of something.
                assert!(shipped.1.iter().any(|&bits| f64::from_bits(bits).abs() > 0.0));
                assert_eq!(shipped.2, [2, 2]);
            }
        }
    }
    Ok(())
}

/// MeanFlow's loss by a user, by central differences.
fn own_mean_flow(
    map: &FlowMap<'_>,
    teacher: &Denoiser<'_>,
    batch: &Batch<'_>,
    noise: &Tensor,
    (from, to): (&PostShift, &PostShift),
) -> Result<Tensor> {
    let (path, cond) = (teacher.path(), batch.cond());
    let input = path.renoise(&batch.x().f_detach()?, from, noise)?;
    let velocity = map.velocity(&input, from, to, cond)?;
    let target = {
        let _no_grad = no_grad_guard();
        teacher.prediction().check_velocity(path, from)?;
        let guided = teacher.predict_guided(&input, from, batch, Guidance::NEUTRAL)?;
        let v = guided.flow_velocity()?;
        let length =
            |from: &PostShift, to: &PostShift| column(&to.tensor().f_sub(from.tensor())?, &input);
        let (later, earlier) = (from.moved(STEP)?.at_most(to)?, from.moved(-STEP)?);
        let along = |at: &PostShift| -> Result<Tensor> {
            let point = input.f_sub(&v.f_mul(&length(from, at)?)?)?;
            map.velocity(&point, at, to, cond)
        };
        let slope = along(&later)?.f_sub(&along(&earlier)?)?.f_div(&length(&earlier, &later)?)?;
        v.f_add(&slope.f_mul(&length(from, to)?)?)?
    };
    Ok(velocity.f_sub(&target)?.f_square()?.f_mean(None::<Kind>)?)
}

#[test]
fn a_users_mean_flow_is_the_shipped_one() -> Result<()> {
    let weight = Tensor::from(0.8).set_requires_grad(true);
    let map = FlowMap::new(|x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| {
        (x * &weight + t.view([-1, 1, 1])).sin() + r.view([-1, 1, 1])
    });
    let forwards = Cell::new(0);
    let (x, noise) = (wave(&SHAPE, 0.4, Kind::Double), wave(&SHAPE, 3.0, Kind::Double));
    let cond = Condition::from(wave(&SHAPE, 1.0, Kind::Double));
    let batch = Batch::new(&x, &cond)?;
    let from = PostShift::new(Tensor::from_slice(&[0.1, 0.4, 0.5, 0.8]))?;
    let to = PostShift::new(Tensor::from_slice(&[0.6, 0.9, 0.7, 0.95]))?;
    let shipped = MeanFlow::new(map.clone(), teacher(&RectifiedFlow, &forwards))?;
    let expected = shipped.evaluate_at(&batch, &noise, &from, &to)?.loss;
    let teacher = teacher(&RectifiedFlow, &forwards);
    let found = own_mean_flow(&map, &teacher, &batch, &noise, (&from, &to))?;
    let slope = |loss: &Tensor| Tensor::run_backward(&[loss], &[&weight], false, false).remove(0);
    // The mean of samples' means is summed in another order.
    let error = (values(&found)[0] - values(&expected)[0]).abs();
    assert!(error <= 1e-15 * values(&expected)[0], "{error:e}");
    let (one, two) = (values(&slope(&found))[0], values(&slope(&expected))[0]);
    assert!((one - two).abs() <= 1e-14 * two.abs() && two.abs() > 1e-3, "{one} {two}");
    assert_eq!(forwards.get(), 2);
    Ok(())
}

#[test]
fn times_and_angles_that_do_not_fit_are_refused() -> Result<()> {
    let two = PostShift::new(Tensor::from_slice(&[0.2, 0.6]))?;
    let three = PostShift::new(Tensor::from_slice(&[0.1, 0.5, 0.9]))?;
    assert_eq!((two.range(), three.range()), ((0.2, 0.6), (0.1, 0.9)));
    for made in [two.between(&three, 0.5), two.at_most(&three), two.at_least(&three)] {
        assert!(matches!(made, Err(Error::Shape { what: "other times", .. })));
    }
    for share in [-0.1, 1.1, f64::NAN] {
        let made = two.between(&two, share);
        assert!(matches!(made, Err(Error::OutOfRange { what: "share of the way", .. })));
    }
    for std in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        let made = NoiseAngle::at(&RectifiedFlow, &two, std);
        assert!(matches!(made, Err(Error::OutOfRange { .. })), "{std}");
    }
    for step in [0.0, -0.1, 1.1, f64::NAN] {
        let refused = NoiseAngle::check_changes(&RectifiedFlow, step);
        assert!(matches!(refused, Err(Error::OutOfRange { .. })), "{step}");
    }
    let clean = PostShift::new(Tensor::from_slice(&[0.5, 1.0]))?;
    let refused = NoiseAngle::check_clean_end(&RectifiedFlow, &clean);
    assert!(matches!(refused, Err(Error::OutOfRange { .. })));
    let refused = Prediction::Sample.check_velocity(&RectifiedFlow, &clean);
    assert!(matches!(refused, Err(Error::OutOfRange { .. })));
    Prediction::FlowVelocity.check_velocity(&RectifiedFlow, &clean)
}
