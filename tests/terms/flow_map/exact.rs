//! Rules with an exact derivative.

use super::super::differences::check_orders;
use super::*;

/// The output of a network and its derivative while x moves by `along` and t by 1, by two reversed passes.
fn reversed_twice(
    network: impl Fn(&Tensor, &Tensor) -> Tensor,
    (x, t): (&Tensor, &Tensor),
    along: &Tensor,
) -> (Tensor, Tensor) {
    tch::with_grad(|| {
        let (x, t) = (x.detach().set_requires_grad(true), t.detach().set_requires_grad(true));
        let output = network(&x, &t);
        let seed = output.zeros_like().set_requires_grad(true);
        let dot = (&output * &seed).sum(None);
        let slopes = Tensor::run_backward(&[&dot], &[&x, &t], true, true);
        let moved = (&slopes[0] * along).sum(None) + slopes[1].sum(None);
        let tangent = Tensor::run_backward(&[&moved], &[&seed], false, false).remove(0);
        (output.detach(), tangent)
    })
}

/// A flow map with its derivative.
fn differentiable<'a>(
    network: impl Fn(&Tensor, &Tensor, &Tensor) -> Tensor + Copy + 'a,
) -> FlowMap<'a> {
    FlowMap::new(move |x: &Tensor, t: &Tensor, r: &Tensor, _: &Condition| network(x, t, r)).tangent(
        move |x: &Tensor, (t, r): (&Tensor, &Tensor), _: &Condition, along: &Tensor| {
            reversed_twice(|x, t| network(x, t, r), (x, t), along)
        },
    )
}

const EXACT: FlowRule = FlowRule::Eulerian(Tangent::Exact);

#[test]
fn the_exact_map_has_no_residual() -> Result<()> {
    let map = differentiable(|x, t, r| exact_velocity(x, t, r, MEAN));
    let (from, to) = (times(&[0.0, 0.1, 0.4, 0.6]), times(&[0.5, 0.9, 0.7, 1.0]));
    let found = residual(&map, &teacher(), EXACT, &from, &to)?;
    assert!(found < 1e-13, "{found}");
    Ok(())
}

#[test]
fn central_differences_converge_to_the_exact_rule() -> Result<()> {
    let network = |x: &Tensor, t: &Tensor, r: &Tensor| {
        (x * 0.6 + t.view([-1, 1]) * 0.4).sin() + x * r.view([-1, 1]) * 0.2
    };
    let map = differentiable(network);
    let (from, to, cond) = (times(&[0.2, 0.3, 0.5]), times(&[0.6, 0.9, 1.0]), mean_condition());
    let (x, noise) = (wave(&[3, 2], 0.4, Kind::Double), wave(&[3, 2], 2.0, Kind::Double));
    let batch = Batch::new(&x, &cond)?;
    let of = |tangent| -> Result<Tensor> {
        let mean_flow = MeanFlow::new(map.clone(), teacher())?.rule(FlowRule::Eulerian(tangent))?;
        Ok(mean_flow.evaluate_at(&batch, &noise, &from, &to)?.squares)
    };
    let exact = of(Tangent::Exact)?;
    let error = |tangent| -> Result<f64> { Ok(max_difference(&of(tangent)?, &exact)) };
    check_orders(error)
}

#[test]
fn at_the_clean_end_the_exact_rule_is_the_exact_tangent_of_consistency() -> Result<()> {
    let cond = mean_condition();
    let (x0, noise) = (wave(&[3, 2], 0.4, Kind::Double), wave(&[3, 2], 2.0, Kind::Double));
    let (from, to) = (times(&[0.15, 0.4, 0.8]), times(&[1.0, 1.0, 1.0]));
    let network = |x: &Tensor, t: &Tensor, r: &Tensor| {
        (x * 0.6 + t.view([-1, 1]) * 0.4).sin() + x * r.view([-1, 1]) * 0.2
    };
    let bias = Tensor::zeros([3, 2], DOUBLE).set_requires_grad(true);
    let map = differentiable(|x, t, r| network(x, t, r) + &bias);
    let mean_flow = MeanFlow::new(map, teacher())?.rule(EXACT)?;
    let loss = mean_flow.evaluate_at(&Batch::new(&x0, &cond)?, &noise, &from, &to)?.loss;
    // The gradient in u of the mean square is -2 (target - u) / numel.
    let change = Tensor::run_backward(&[&loss], &[&bias], false, false).remove(0) * -3.0;

    // The same network at r = 1, with the derivative that a flow map's denoiser does not have.
    let one = Tensor::ones([3], DOUBLE);
    let whole = differentiable(network);
    let student = whole.denoiser().tangent(
        |x: &Tensor, t: &Tensor, _: &Condition, dx: &Tensor, _: &Tensor| {
            reversed_twice(|x, t| network(x, t, &one), (x, t), dx)
        },
    );
    let input = RectifiedFlow.renoise(&x0, &from, &noise)?;
    let x = student.denoise(&input, &from, &cond)?;
    let engine = Consistency::continuous(student, Tangent::Exact)?.unnormalized();
    let batch = Batch::new(&x, &cond)?.with_student_input(&input, &from)?;
    let tau = PostShift::all(0.5, 3, DOUBLE)?;
    let teacher = teacher();
    let direction = engine.direction(&Probe::at(&teacher, &batch, tau, x.zeros_like())?)?;
    // df/dt = D (1 - t) / (t n^2), and the target changes u by -df/dt.
    let t = from.tensor().view([-1, 1]);
    let level = t.neg().f_add_scalar(1.0)?;
    let slope = direction * &level / (&t * (t.square() + level.square()));
    assert!(max_difference(&change, &slope.neg()) < 1e-13 * largest(&change).max(1.0));
    Ok(())
}
