//! Gradient checkpointing: the gradients of the plain backward pass, with less kept.

use tch::{Device, Kind, Tensor};
use tch_training::{Error, Tape};

use super::common::{Result, chain, max_difference, seeded, wave};

/// Blocks `tanh(x W) + c * x`, each with a weight of its own and one number for all.
struct Model {
    weights: Vec<Tensor>,
    /// `[1]`, what every block is given.
    shared: Tensor,
}

impl Model {
    fn new(blocks: usize, kind: Kind) -> Self {
        let weight = |index| (wave(&[4, 4], index as f64, kind) * 0.5).set_requires_grad(true);
        let shared = Tensor::from_slice(&[0.3f64]).to_kind(kind).set_requires_grad(true);
        Self { weights: (0..blocks).map(weight).collect(), shared }
    }

    fn run(&self, x: &Tensor, tape: Option<&Tape>) -> Result<Tensor> {
        // A graph of its own, through which the gradients of all blocks go.
        let shared = self.shared.f_square()?;
        let Some(tape) = tape else {
            return Ok(self
                .weights
                .iter()
                .try_fold(x.shallow_clone(), |x, weight| block(&x, weight, &shared))?);
        };
        let shared = tape.gather(&shared)?;
        let mut x = x.shallow_clone();
        for weight in &self.weights {
            let weight = weight.shallow_clone();
            let inputs = [x, shared.shallow_clone()];
            x = tape.run(&inputs, move |inputs| block(&inputs[0], &weight, &inputs[1]))?;
        }
        Ok(x)
    }

    /// The gradients, which then are forgotten.
    fn take_gradients(&self, x: &Tensor) -> Vec<Tensor> {
        let leaves = self.weights.iter().chain([&self.shared, x]);
        leaves
            .map(|leaf| {
                let gradient = leaf.grad().copy();
                leaf.shallow_clone().zero_grad();
                gradient
            })
            .collect()
    }
}

fn block(x: &Tensor, weight: &Tensor, shared: &Tensor) -> Result<Tensor, tch::TchError> {
    x.f_matmul(weight)?.f_tanh()?.f_add(&x.f_mul(shared)?)
}

fn loss_of(output: &Tensor) -> Tensor {
    (output * wave(&output.size(), 0.4, output.kind())).sum(None::<Kind>)
}

fn input(kind: Kind) -> Tensor {
    wave(&[3, 4], 0.1, kind).set_requires_grad(true)
}

#[test]
fn gradients_are_those_of_the_plain_pass_bit_for_bit() -> Result<()> {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        let (model, x) = (Model::new(5, kind), input(kind));
        let plain = loss_of(&model.run(&x, None)?);
        plain.backward();
        let expected = model.take_gradients(&x);
        let tape = Tape::default();
        let checkpointed = loss_of(&model.run(&x, Some(&tape))?);
        assert_eq!(checkpointed, plain);
        tape.backward(&checkpointed)?;
        assert!(tape.is_empty());
        for (found, expected) in model.take_gradients(&x).iter().zip(&expected) {
            assert_eq!(found, expected, "{kind:?}");
            assert!(expected.abs().max().double_value(&[]) > 0.0);
        }
    }
    Ok(())
}

/// Two models, the second on the output of the first, operations between them, and a loss of both.
#[test]
fn several_passes_share_a_loss() -> Result<()> {
    let (one, two, x) =
        (Model::new(2, Kind::Double), Model::new(3, Kind::Double), input(Kind::Double));
    let loss = |tape: Option<&Tape>| -> Result<Tensor> {
        let first = one.run(&x, tape)?;
        let second = two.run(&(&first * 0.7 + 0.1), tape)?;
        let again = one.run(&(&second - &x), tape)?;
        Ok(loss_of(&first) + loss_of(&second) + loss_of(&again))
    };
    loss(None)?.backward();
    let gradients = || {
        let mut gradients = one.take_gradients(&x);
        gradients.extend(two.weights.iter().map(|weight| weight.grad().copy()));
        two.weights.iter().for_each(|weight| weight.shallow_clone().zero_grad());
        gradients
    };
    let expected = gradients();
    let tape = Tape::default();
    tape.backward(&loss(Some(&tape))?)?;
    for (found, expected) in gradients().iter().zip(&expected) {
        assert!(max_difference(found, expected) < 1e-13);
    }
    Ok(())
}

/// The directional derivative with fixed masks, against central differences.
#[test]
fn a_seeded_computation_draws_the_same_again() -> Result<()> {
    let _guard = seeded(1);
    let weight = wave(&[4, 4], 0.2, Kind::Double).set_requires_grad(true);
    let x = wave(&[64, 4], 0.1, Kind::Double);
    let loss = |tape: &Tape, seed: i64| -> Result<Tensor> {
        let weight = weight.shallow_clone();
        let output = tape.run_seeded(seed, &[x.shallow_clone()], move |inputs| {
            inputs[0].f_dropout(0.5, true)?.f_matmul(&weight)?.f_tanh()
        })?;
        // Draws in between must not matter.
        let _ = Tensor::f_rand([3], (Kind::Float, Device::Cpu))?;
        Ok(loss_of(&output))
    };
    let tape = Tape::default();
    let first = loss(&tape, 3)?;
    tape.backward(&first)?;
    let direction = wave(&[4, 4], 0.9, Kind::Double);
    let expected = (weight.grad() * &direction).sum(Kind::Double).double_value(&[]);
    let _no_grad = tch::no_grad_guard();
    let value = |seed: i64, step: f64| -> Result<f64> {
        let mut leaf = weight.shallow_clone();
        leaf += &direction * step;
        let value = loss(&Tape::default(), seed)?.double_value(&[]);
        leaf -= &direction * step;
        Ok(value)
    };
    let step = 1e-6;
    let found = (value(3, step)? - value(3, -step)?) / (2.0 * step);
    assert!((found - expected).abs() < 1e-7 * expected.abs().max(1.0), "{found} and {expected}");
    assert!((value(3, 0.0)? - value(4, 0.0)?).abs() > 1e-3, "the masks must matter");
    Ok(())
}

#[test]
fn nothing_is_kept_where_gradients_are_off() -> Result<()> {
    let (model, x, tape) = (Model::new(2, Kind::Float), input(Kind::Float), Tape::default());
    let expected = model.run(&x, None)?.detach();
    {
        let _no_grad = tch::no_grad_guard();
        let output = model.run(&x, Some(&tape))?;
        assert_eq!(output, expected);
        assert!(!output.requires_grad() && tape.is_empty());
    }
    let loss = loss_of(&model.run(&x, Some(&tape))?);
    assert!(!tape.is_empty());
    let _no_grad = tch::no_grad_guard();
    assert!(matches!(tape.backward(&loss), Err(Error::GradientsOff)));
    Ok(())
}

#[test]
fn errors_name_what_failed() -> Result<()> {
    let tape = Tape::default();
    assert!(matches!(tape.backward(&Tensor::from(1.0)), Err(Error::NoGraph)));
    let failing = |_: &[Tensor]| Err::<Tensor, _>(std::io::Error::other("no luck"));
    let error = tape.run(&[], failing).unwrap_err();
    assert!(matches!(error, Error::Computation(_)), "{error}");
    assert!(chain(&error).ends_with("no luck"), "{}", chain(&error));
    assert!(tape.is_empty());
    // A loss that is no scalar.
    let x = input(Kind::Float);
    let error = tape.backward(&(&x * 2.0)).unwrap_err();
    assert!(matches!(error, Error::Shape { what: "output", .. }), "{error}");
    Ok(())
}
