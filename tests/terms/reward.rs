//! Rewards: their gradient, and their fixed points beside Distribution Matching, on Gaussians.

use decoupled_dmd::{
    Batch, Condition, Denoiser, DistributionMatching, Error, Normalizer, PostShift, Prediction,
    Probe, RectifiedFlow, Regularizer, Result, Reward, testing,
};
use tch::{Kind, Tensor};

use super::common::{DOUBLE, gaussian_teacher, loss_of, max_difference, value, wave};

#[test]
fn a_reward_is_climbed_by_its_own_gradient() -> Result<()> {
    // The recogniser of a Gaussian control: log q(c | x) = -(c - h x)^2 / (2 R) up to a constant.
    let (h, r) = (0.7, 0.3);
    let gain = Tensor::from(h).set_requires_grad(true);
    let reward = Reward::new(|x: &Tensor, c: &Condition| {
        let error = &c[0] - x * &gain;
        error.square().sum_dim_intlist([1i64].as_slice(), false, None) * (-0.5 / r)
    });
    let x = wave(&[4, 1], 0.3, Kind::Double).set_requires_grad(true);
    let control = wave(&[4, 1], 1.1, Kind::Double);
    let cond = Condition::from(control.shallow_clone());
    let batch = Batch::new(&x, &cond)?;
    loss_of(&reward, &batch)?.backward();
    let expected = (&control - x.detach() * h) * (-h / (r * 4.0));
    assert!(max_difference(&x.grad(), &expected) < 1e-14);
    assert!(!gain.grad().defined());
    testing::check_regularizer(&reward, &gaussian_teacher(1.0), &batch).expect("the contract");
    testing::check_gradient(&reward, &gaussian_teacher(1.0), &batch).expect("its gradient");
    testing::check_independence(&reward, &gaussian_teacher(1.0), &batch).expect("alone");
    Ok(())
}

/// E[x0] given x_t of data N(mean, variance) on rectified flow.
fn gaussian(mean: &Tensor, variance: f64, x: &Tensor, t: &Tensor) -> Tensor {
    let a = t.view([-1, 1]);
    let s = a.neg() + 1.0;
    mean + &a * variance / (a.square() * variance + s.square()) * (x - &a * mean)
}

/// The mean and the variance of the fake score's law for a control, slope and std.
type Fake<'a> = &'a dyn Fn(&Tensor, f64, f64) -> (Tensor, f64);

/// Distribution Matching and a reward of weight lambda at one tau = a, for the student x = slope c + std z:
/// the gradient of the loss in (slope, std), by quadrature over the control c, z and the noise, all N(0, 1), and
/// the size of its parts. The teacher is the denoiser of N(0, 1), the fake score that of N(mean(c), variance).
struct World<'a> {
    a: f64,
    lambda: f64,
    reward: &'a dyn Fn(&Tensor, &Tensor) -> Tensor,
    fake: Fake<'a>,
}

impl World<'_> {
    fn gradient(&self, points: i64, slope: f64, std: f64, offset: f64) -> Result<[f64; 4]> {
        let line = Tensor::linspace(-6.0, 6.0, points, DOUBLE);
        let cell = 12.0 / (points - 1) as f64 / (2.0 * std::f64::consts::PI).sqrt();
        let density = (line.square() * -0.5).exp() * cell;
        let grid = Tensor::meshgrid_indexing(&[&line, &line, &line], "ij");
        let [c, z, noise] = [0, 1, 2].map(|axis| grid[axis].reshape([-1, 1]));
        let weights = Tensor::meshgrid_indexing(&[&density, &density, &density], "ij");
        let weight = weights[0].shallow_clone() * &weights[1] * &weights[2];
        let weight = weight.reshape([-1, 1]);
        let x = (&c * slope + &z * std + offset).set_requires_grad(true);
        let cond = Condition::from(c.shallow_clone());
        let batch = Batch::new(&x, &cond)?;
        // The teacher has never seen the control.
        let blind = |x: &Tensor, t: &Tensor, _: &Condition| gaussian(&Tensor::from(0.0), 1.0, x, t);
        let teacher = Denoiser::new(RectifiedFlow, Prediction::Sample, blind);
        let of_student = |x: &Tensor, t: &Tensor, c: &Condition| {
            let (mean, variance) = (self.fake)(&c[0], slope, std);
            gaussian(&(mean + offset), variance, x, t)
        };
        let dm =
            DistributionMatching::new(Denoiser::new(RectifiedFlow, Prediction::Sample, of_student));
        let reward = Reward::new(|x: &Tensor, c: &Condition| (self.reward)(x, &c[0]).view([-1]));
        let tau = PostShift::all(self.a, x.size()[0], DOUBLE)?;
        let probe = Probe::at(&teacher, &batch, tau, noise)?.normalizer(Normalizer::OFF);
        // One element a sample: both losses are means over the same number.
        (dm.loss(&probe)? + reward.loss(&probe)? * self.lambda).backward();
        let each = x.grad() * x.numel() as f64 * weight;
        let size = value(&(each.abs() * c.abs()).sum(None));
        let sum = |t: Tensor| value(&t.sum(None));
        Ok([sum(&each * &c), sum(&each * &z), sum(each), size])
    }
}

/// JDM in one dimension: q(x) = N(0, 1), q(c | x) = N(h x, R). With a fake score that sees the control,
/// the student x = slope c + std z has its fixed point at slope (lambda h / R) / (s^2 / V + mu) and
/// variance s^2 (a^2 - mu V) / (a^2 (s^2 + mu V)), mu = lambda h^2 / R, V = a^2 + s^2.
#[test]
fn a_new_control_has_its_fixed_point_with_a_fake_score_that_sees_it() -> Result<()> {
    let (h, r): (f64, f64) = (0.7, 0.3);
    for (a, lambda, expected) in
        [(0.6, 0.05, (0.299_638, 0.834_885)), (0.8, 0.02, (0.510_073, 0.787_803))]
    {
        let s = 1.0 - a;
        let v = a * a + s * s;
        let mu = lambda * h * h / r;
        let slope = lambda * h / r / (s * s / v + mu);
        let std = (s * s * (a * a - mu * v) / (a * a * (s * s + mu * v))).sqrt();
        approx::assert_abs_diff_eq!(slope, expected.0, epsilon = 1e-6);
        approx::assert_abs_diff_eq!(std, expected.1, epsilon = 1e-6);
        let reward = |x: &Tensor, c: &Tensor| (c - x * h).square() * (-0.5 / r);
        let fake = |c: &Tensor, slope: f64, std: f64| (c * slope, std * std);
        let world = World { a, lambda, reward: &reward, fake: &fake };
        let [in_slope, in_std, _, size] = world.gradient(41, slope, std, 0.0)?;
        assert!(
            in_slope.abs() < 1e-6 * size && in_std.abs() < 1e-6 * size,
            "{in_slope} {in_std} {size}"
        );
    }
    Ok(())
}

/// A fake score that is blind to the control knows the mixture over all controls. From the fixed point above
/// the samples of one control lose their spread, and follow the control too far.
#[test]
fn a_fake_score_that_is_blind_to_the_control_collapses_each_control() -> Result<()> {
    let (h, r) = (0.7, 0.3);
    let reward = |x: &Tensor, c: &Tensor| (c - x * h).square() * (-0.5 / r);
    let blind = |_: &Tensor, slope: f64, std: f64| (Tensor::from(0.0), slope * slope + std * std);
    let sees = |c: &Tensor, slope: f64, std: f64| (c * slope, std * std);
    let fakes: [Fake<'_>; 2] = [&sees, &blind];
    let ends = fakes.map(|fake| {
        let world = World { a: 0.6, lambda: 0.05, reward: &reward, fake };
        let (mut slope, mut std) = (0.299_638, 0.834_885);
        for _ in 0..80 {
            let [in_slope, in_std, ..] = world.gradient(13, slope, std, 0.0).unwrap();
            slope -= 1.5 * in_slope;
            std -= 1.5 * in_std;
        }
        (slope, std)
    });
    let (seen, blind) = (ends[0], ends[1]);
    assert!((seen.0 - 0.2996).abs() < 0.01 && (seen.1 - 0.8349).abs() < 0.01, "{seen:?}");
    assert!(blind.1.abs() < 0.05 && blind.0 > 0.8, "{blind:?}");
    Ok(())
}

/// DMDR's arrangement in one dimension: Distribution Matching and the reward -(x - r)^2 / (2 R) have their
/// fixed point at mean (lambda r / R) / (s^2 / V + lambda / R), with the variance above for mu = lambda / R.
#[test]
fn a_reward_moves_the_mean_and_takes_spread() -> Result<()> {
    let (a, lambda, best, r): (f64, f64, f64, f64) = (0.6, 0.05, 1.5, 0.5);
    let s = 1.0 - a;
    let (v, mu) = (a * a + s * s, lambda / r);
    let mean = mu * best / (s * s / v + mu);
    let std = (s * s * (a * a - mu * v) / (a * a * (s * s + mu * v))).sqrt();
    approx::assert_abs_diff_eq!(mean, 0.367_925, epsilon = 1e-6);
    approx::assert_abs_diff_eq!(std, 0.803_556, epsilon = 1e-6);
    let reward = |x: &Tensor, _: &Tensor| (x - best).square() * (-0.5 / r);
    let fake = |_: &Tensor, _: f64, std: f64| (Tensor::from(0.0), std * std);
    let world = World { a, lambda, reward: &reward, fake: &fake };
    let [_, in_std, in_mean, size] = world.gradient(41, 0.0, std, mean)?;
    assert!(in_mean.abs() < 1e-6 * size && in_std.abs() < 1e-6 * size, "{in_mean} {in_std} {size}");
    Ok(())
}

#[test]
fn bad_scores_are_named() -> Result<()> {
    let (x, cond) = (wave(&[2, 3, 4, 4], 0.3, Kind::Double), Condition::none());
    let leaf = x.copy().set_requires_grad(true);
    let reward = Reward::new(|x: &Tensor, _: &Condition| x.sum(None));
    assert!(matches!(
        loss_of(&reward, &Batch::new(&x, &cond)?),
        Err(Error::Shape { what: "score", .. })
    ));
    let blind =
        Reward::new(|x: &Tensor, _: &Condition| x.detach().flatten(1, -1).mean_dim(1, false, None));
    let refused = loss_of(&blind, &Batch::new(&leaf, &cond)?).unwrap_err();
    assert!(matches!(refused, Error::NoGradient { what: "score" }));
    Ok(())
}
