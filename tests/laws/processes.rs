//! N processes with batch B equal one process with batch N B, in value and gradient: for every schedule and every
//! term, those that look at the whole batch and those that do not. Processes are threads here.

mod cases;
mod meeting;

use cases::{alone, critic, gathering, loss_of};
use decoupled_dmd::{
    Adversarial, Batch, Collective, Condition, CriticPenalty, Denoiser, DistributionMatching, Draw,
    Error, FlowMap, Kernel, MaximumMeanDiscrepancy, MeanFlow, MeanVariance, PostShift, PreShift,
    Prediction, RectifiedFlow, Result, Statistics,
};
use meeting::on_each;
use tch::{Device, Kind, Tensor};

use super::common::{
    DOUBLE, assert_float64, gaussian_denoiser, gaussian_teacher, gradient, max_difference, value,
    wave,
};

/// Of the whole batch; two, three and four divide its rows.
const SHAPE: [i64; 4] = [12, 2, 4, 4];

/// A part of the whole batch, with its draws.
struct Part {
    x: Tensor,
    cond: Condition,
    null: Condition,
    real: Tensor,
    target: Tensor,
    input: Tensor,
    time: PostShift,
    student_time: PreShift,
    mask: Tensor,
    u: Tensor,
    noise: Tensor,
}

impl Part {
    /// Part `rank` of `processes` equal ones.
    fn new(rank: usize, processes: usize) -> Result<Self> {
        let rows = SHAPE[0] / processes as i64;
        let part = |whole: Tensor| whole.narrow(0, rank as i64 * rows, rows).contiguous();
        let of = |phase| part(wave(&SHAPE, phase, Kind::Double));
        let times = part(wave(&SHAPE[..1], 0.4, Kind::Double) * 0.4 + 0.45);
        Ok(Self {
            x: of(0.3).set_requires_grad(true),
            cond: of(1.1).into(),
            null: of(2.9).into(),
            real: of(4.2) * 1.3 + 0.2,
            target: of(0.9),
            input: of(3.3),
            time: PostShift::new(times.shallow_clone())?,
            student_time: PreShift::new(times)?,
            // Unequal shares of the parts.
            mask: part(wave(&SHAPE, 0.1, Kind::Double).cumsum(0, Kind::Double).gt(0.2)),
            u: part(wave(&SHAPE[..1], 1.7, Kind::Double) * 0.4 + 0.5),
            noise: of(5.0),
        })
    }

    fn batch(&self) -> Result<Batch<'_>> {
        Batch::new(&self.x, &self.cond)?
            .with_null(&self.null)
            .with_real(&self.real)?
            .with_target(&self.target)?
            .with_student_input(&self.input, &self.time)?
            .with_student_time(&self.student_time)
    }

    fn draw(&self) -> Draw {
        Draw { u: self.u.shallow_clone(), noise: self.noise.shallow_clone() }
    }
}

type Processes<'a> = Option<&'a Collective<'a>>;
type Loss = dyn Fn(&Part, Processes<'_>) -> Result<Tensor> + Sync;

/// A loss, and how often it gathers.
struct Case {
    name: String,
    gathers: usize,
    loss: Box<Loss>,
}

impl Case {
    fn new(
        name: impl Into<String>,
        gathers: usize,
        loss: impl Fn(&Part, Processes<'_>) -> Result<Tensor> + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), gathers, loss: Box::new(loss) }
    }

    /// Value and gradient in x of the loss of a part.
    fn evaluate(&self, part: &Part, processes: Processes<'_>) -> Result<(Tensor, Tensor)> {
        let loss = (self.loss)(part, processes)?;
        let gradient = gradient(&loss, &part.x);
        Ok((loss.detach(), gradient))
    }

    /// Compares so many processes with one, by the mean of their values and gradients.
    fn check(&self, processes: usize) -> Result<()> {
        let what = format!("{} on {processes}", self.name);
        let (value, slope) = self.evaluate(&Part::new(0, 1)?, None)?;
        let parts = on_each(processes, |collective| {
            let part = Part::new(collective.rank(), processes)?;
            self.evaluate(&part, Some(collective))
        });
        for (rank, (_, calls)) in parts.iter().enumerate() {
            assert_eq!(*calls, self.gathers, "{what}: gathered by rank {rank}");
        }
        let values: Vec<_> = parts.iter().map(|((value, _), _)| value.shallow_clone()).collect();
        let slopes: Vec<_> = parts.iter().map(|((_, slope), _)| slope.shallow_clone()).collect();
        assert!(value.abs().double_value(&[]) > 1e-6 && slope.abs().max().double_value(&[]) > 1e-9);
        assert_float64(&format!("{what}, value"), &Tensor::stack(&values, 0).mean(None), &value);
        // A process has its rows alone, in a mean over the processes.
        let slopes = Tensor::cat(&slopes, 0) / processes as f64;
        assert_float64(&format!("{what}, gradient"), &slopes, &slope);
        Ok(())
    }

    /// How far processes that do not gather are from one.
    fn error_alone(&self, processes: usize) -> Result<f64> {
        let (_, slope) = self.evaluate(&Part::new(0, 1)?, None)?;
        let alone = |rank| Ok(self.evaluate(&Part::new(rank, processes)?, None)?.1);
        let slopes: Vec<Tensor> = (0..processes).map(alone).collect::<Result<_>>()?;
        let slopes = Tensor::cat(&slopes, 0) / processes as f64;
        Ok(max_difference(&slopes, &slope) / slope.abs().max().double_value(&[]))
    }
}

#[test]
fn every_schedule_and_term_sees_the_batch_of_all_processes() -> Result<()> {
    for case in gathering().iter().chain(&alone()) {
        for processes in [1, 2, 3, 4] {
            case.check(processes)?;
        }
    }
    Ok(())
}

#[test]
fn what_gathers_would_be_wrong_without() -> Result<()> {
    for case in gathering() {
        let error = case.error_alone(2)?;
        println!("{}: {error:.1e}", case.name);
        assert!(error > 1e-3, "{}: {error:e}", case.name);
    }
    Ok(())
}

/// The losses of the networks that terms own have no processes to ask: their means add up.
#[test]
fn own_losses_are_means_over_samples() -> Result<()> {
    type OwnLoss = fn(&Part, &Tensor) -> Result<Tensor>;
    // The weight of each network is the one number of a tensor.
    let fake_score: OwnLoss = |part, weight| {
        let network =
            |x: &Tensor, t: &Tensor, c: &Condition| gaussian_denoiser(x, t, &c[0], 0.8) * weight;
        let fake = Denoiser::new(RectifiedFlow, Prediction::Sample, network);
        let dm = DistributionMatching::new(fake);
        dm.denoising_loss_at(&part.batch()?, &part.time, &part.noise)
    };
    let critic: OwnLoss = |part, weight| {
        let network = |x: &Tensor, t: &Tensor, c: &Condition| critic(&(x * weight), t, c);
        let penalty = CriticPenalty::R1 { gamma: 0.3 };
        let gan = Adversarial::new(RectifiedFlow, network).penalty(penalty)?;
        gan.critic_loss_at(&part.batch()?, &part.time, &part.noise, &part.target)
    };
    let mean_flow: OwnLoss = |part, weight| {
        let network = |x: &Tensor, t: &Tensor, r: &Tensor, c: &Condition| {
            (x * weight + &c[0]) * (t + r).view([-1, 1, 1, 1])
        };
        let flow =
            MeanFlow::new(FlowMap::new(network), gaussian_teacher(0.5))?.adaptive(1.0, 0.1)?;
        let to = PostShift::new(part.time.tensor() * 0.5 + 0.5)?;
        Ok(flow.evaluate_at(&part.batch()?, &part.noise, &part.time, &to)?.loss)
    };
    for (name, loss) in [("fake score", fake_score), ("critic", critic), ("MeanFlow", mean_flow)] {
        let evaluate = |rank, processes| -> Result<Tensor> {
            let weight = Tensor::full([], 0.9, DOUBLE).set_requires_grad(true);
            let loss = loss(&Part::new(rank, processes)?, &weight)?;
            Ok(Tensor::stack(&[loss.detach(), gradient(&loss, &weight)], 0))
        };
        let whole = evaluate(0, 1)?;
        for processes in [2, 3, 4] {
            let parts = (0..processes).map(|rank| evaluate(rank, processes));
            let parts: Vec<Tensor> = parts.collect::<Result<_>>()?;
            let mean = Tensor::stack(&parts, 0).mean_dim(&[0i64][..], false, Kind::Double);
            assert_float64(&format!("{name} on {processes}"), &mean, &whole);
        }
    }
    Ok(())
}

#[test]
fn running_targets_follow_all_processes() -> Result<()> {
    let whole = [4.2, 0.6].map(|phase| wave(&SHAPE, phase, Kind::Double) * 1.3 + 0.2);
    let term = |statistics| MeanVariance::measured(&wave(&SHAPE, 9.0, Kind::Double), statistics);
    for statistics in [Statistics::PerSample, Statistics::PerChannel] {
        let one = term(statistics)?.running(0.9, 1)?;
        for real in &whole {
            one.update(real)?;
        }
        // Parts of five and of seven rows.
        let parts = on_each(2, |processes| {
            let many = term(statistics)?.running(0.9, 1)?;
            for phase in [4.2, 0.6] {
                let real = wave(&SHAPE, phase, Kind::Double) * 1.3 + 0.2;
                let (first, rows) = if processes.rank() == 0 { (0, 5) } else { (5, 7) };
                many.update_among(&real.narrow(0, first, rows), processes)?;
            }
            assert_eq!(many.updates(), 3);
            Ok(many.target())
        });
        for ((mean, variance), calls) in parts {
            assert_eq!(calls, 2);
            assert_float64("mean", &mean, &one.target().0);
            assert_float64("variance", &variance, &one.target().1);
        }
    }
    Ok(())
}

/// The orders of the columns are drawn by each process for its own rows, and are one for all.
#[test]
fn independence_compares_with_one_order_on_all_processes() -> Result<()> {
    let _guard = super::common::seeded(4);
    let parts = on_each(3, |processes| {
        let part = Part::new(processes.rank(), 3)?;
        let term = MaximumMeanDiscrepancy::new(Kernel::Energy)?.independence();
        Ok(value(&loss_of(term, &part, Some(processes))?))
    });
    assert!(parts.iter().all(|(value, calls)| *value == parts[0].0 && *calls == 2), "{parts:?}");
    Ok(())
}

#[test]
fn bad_exchanges_are_refused_by_name() -> Result<()> {
    let part = Tensor::zeros([2, 3], (Kind::Float, Device::Cpu));
    let make = |rank| Collective::new(2, rank, |part: &Tensor| part.unsqueeze(0));
    assert!(matches!(make(2), Err(Error::OutOfRange { what: "rank", value: 2.0, .. })));
    let found = make(1)?.gather(&part);
    assert!(
        matches!(&found, Err(Error::Shape { what: "gathered parts", expected, found })
            if expected == "[2, 2, 3]" && found == &[1, 2, 3]),
        "{found:?}"
    );
    let other = |part: &Tensor| Tensor::stack(&[part, part], 0).to_kind(Kind::Double);
    let found = Collective::new(2, 0, other)?.gather(&part);
    assert!(matches!(found, Err(Error::Kind { what: "gathered parts", .. })), "{found:?}");
    let found = make(0)?.gather(&Tensor::from(1.0));
    assert!(matches!(found, Err(Error::Shape { what: "part to gather", .. })), "{found:?}");
    let lost = |_: &Tensor| Err::<Tensor, _>("the peer is gone");
    let lost = Collective::new(2, 0, lost)?;
    let found = lost.gather(&part);
    assert!(
        matches!(&found, Err(Error::Collective(source)) if source.to_string() == "the peer is gone"),
        "{found:?}"
    );
    let whole = Part::new(0, 1)?;
    let term = MaximumMeanDiscrepancy::new(Kernel::Energy)?;
    let found = loss_of(term, &whole, Some(&lost));
    let Err(Error::Term { name, source }) = found else { panic!("{found:?}") };
    assert!(name == "term" && matches!(*source, Error::Collective(_)), "{source:?}");
    Ok(())
}
