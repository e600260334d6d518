//! The exact derivative of a student along the teacher's ODE, in three ways, against differences.
//! `./with-libtorch cargo run --example exact_tangent`
//!
//! `Consistency::continuous` needs df/dphi at the student's input. `Tangent::Central` and `Tangent::Ahead`
//! take differences of the student. `Tangent::Exact` asks `Denoiser::tangent`, a closure that returns the
//! network's output and its Jacobian-vector product. Three closures for one network:
//!
//! | way | what it needs | cost of the derivative |
//! |---|---|---|
//! | forward mode | a dual level ([`forward_mode`]), kernels with a forward derivative | about 3 forwards, twice the memory of one |
//! | the network's own product | a derivative written beside each layer | about 2 forwards |
//! | reverse mode twice | kernels with a second derivative | a forward and 2 backwards, and the graph of the first |
//!
//! Fused attention has neither derivative: use libtorch's math kernel
//! (`internal_scaled_dot_product_attention_math`), or differences. Expected: the three ways agree to rounding,
//! in float32 a step of 1e-2 to 1e-3 is best, and in bfloat16 short steps are noise while the exact
//! derivative keeps its two digits.

#[path = "exact_tangent/forward_mode.rs"]
mod forward_mode;
#[path = "exact_tangent/ways.rs"]
mod ways;

use std::cell::Cell;
use std::time::Instant;

use anyhow::Result;
use decoupled_dmd::{
    Batch, Condition, Consistency, Denoiser, Engine, NoisePath, PostShift, Prediction, Probe,
    RectifiedFlow, Tangent,
};
use tch::{Device, Kind, Tensor, nn};
use ways::Mlp;

const BATCH: i64 = 512;
const DIMENSIONS: i64 = 16;
const REPEATS: u32 = 20;

#[derive(Clone, Copy)]
enum Way {
    Forward,
    OwnProduct,
    TwiceReversed,
}

/// The network as a flow-velocity student that computes in `kind`, with a derivative taken in one `way`.
fn student<'a>(mlp: &'a Mlp, kind: Kind, way: Way, calls: &'a Cell<u32>) -> Denoiser<'a> {
    let network = move |x: &Tensor, t: &Tensor| -> Result<Tensor> {
        calls.set(calls.get() + 1);
        let output = mlp.forward(&x.f_to_kind(kind)?, &t.f_to_kind(kind)?)?;
        Ok(output.f_to_kind(x.f_kind()?)?)
    };
    Denoiser::new(RectifiedFlow, Prediction::FlowVelocity, move |x, t, _: &Condition| network(x, t))
        .tangent(move |x, t, _: &Condition, dx, dt| match way {
            Way::Forward => forward_mode::along([(x, dx), (t, dt)], |[x, t]| network(x, t)),
            Way::TwiceReversed => ways::twice_reversed([(x, dx), (t, dt)], |[x, t]| network(x, t)),
            Way::OwnProduct => {
                calls.set(calls.get() + 1);
                let wide = x.f_kind()?;
                let to = |tensor: &Tensor| tensor.f_to_kind(kind);
                let (output, tangent) = mlp.forward_along(&to(x)?, &to(t)?, &to(dx)?, &to(dt)?)?;
                Ok((output.f_to_kind(wide)?, tangent.f_to_kind(wide)?))
            }
        })
}

/// The samples of a step: data N(0, 0.5^2), whose denoiser is the teacher.
struct Setting {
    input: Tensor,
    time: PostShift,
    cond: Condition,
}

impl Setting {
    fn new(kind: Kind) -> Result<Self> {
        tch::manual_seed(1);
        let draw = || Tensor::f_randn([BATCH, DIMENSIONS], (Kind::Double, Device::Cpu));
        let (data, noise) = (draw()?.f_mul_scalar(0.5)?, draw()?);
        // The same numbers in either type.
        let time = Tensor::f_linspace(0.05, 0.95, BATCH, (Kind::Float, Device::Cpu))?;
        let time = PostShift::new(time.f_to_kind(kind)?)?;
        let input = RectifiedFlow.renoise(&data, &time, &noise)?;
        let input = input.f_to_kind(Kind::Float)?.f_to_kind(kind)?;
        Ok(Self { input, time, cond: Condition::none() })
    }

    /// The direction of the engine, as long as the tangent is.
    fn direction(&self, student: &Denoiser<'_>, tangent: Tangent) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let teacher = Denoiser::new(RectifiedFlow, Prediction::Sample, |x, t, _: &Condition| {
            let a: Tensor = t.f_unsqueeze(1)?;
            let variance = a.f_square()?.f_mul_scalar(0.25)?;
            let noise = a.f_neg()?.f_add_scalar(1.0)?.f_square()?;
            x.f_mul(&a.f_mul_scalar(0.25)?.f_div(&variance.f_add(&noise)?)?)
        });
        let x = student.denoise(&self.input, &self.time, &self.cond)?;
        let batch = Batch::new(&x, &self.cond)?.with_student_input(&self.input, &self.time)?;
        let engine = Consistency::continuous(student.clone(), tangent)?.unnormalized();
        let tau = PostShift::all(0.5, BATCH, (self.input.f_kind()?, Device::Cpu))?;
        Ok(engine.direction(&Probe::at(&teacher, &batch, tau, x.f_zeros_like()?)?)?)
    }
}

fn rms(tensor: &Tensor) -> Result<f64> {
    let square = tensor.f_to_kind(Kind::Double)?.f_square()?.f_mean(None::<Kind>)?;
    Ok(square.f_sqrt()?.f_double_value(&[])?)
}

fn main() -> Result<()> {
    tch::manual_seed(0);
    let store = nn::VarStore::new(Device::Cpu);
    let mlp = Mlp::new(&store.root(), DIMENSIONS, 256);
    let calls = Cell::new(0);
    let exact = {
        let student = student(&mlp, Kind::Double, Way::OwnProduct, &calls);
        Setting::new(Kind::Double)?.direction(&student, Tangent::Exact)?
    };

    let mut rows = vec![
        ("exact, forward mode".to_owned(), Way::Forward, Tangent::Exact),
        ("exact, own product".to_owned(), Way::OwnProduct, Tangent::Exact),
        ("exact, reversed twice".to_owned(), Way::TwiceReversed, Tangent::Exact),
    ];
    for step in [1e-1, 2e-2, 1e-2, 1e-3, 1e-4, 1e-5] {
        let central = Tangent::Central { step };
        rows.push((format!("central, step {step:.0e}"), Way::Forward, central));
        rows.push((format!("ahead, step {step:.0e}"), Way::Forward, Tangent::Ahead { step }));
    }
    println!("{:<24}{:>12}{:>12}{:>10}{:>10}", "", "float32", "bfloat16", "forwards", "ms");
    let setting = Setting::new(Kind::Float)?;
    for (name, way, tangent) in rows {
        let error = |kind| -> Result<f64> {
            let found = setting.direction(&student(&mlp, kind, way, &calls), tangent)?;
            Ok(rms(&found.f_to_kind(Kind::Double)?.f_sub(&exact)?)? / rms(&exact)?)
        };
        calls.set(0);
        let float = error(Kind::Float)?;
        // One of them made x.
        let forwards = calls.get() - 1;
        let bfloat = error(Kind::BFloat16)?;
        let student = student(&mlp, Kind::Float, way, &calls);
        // The fastest of several: the others waited for something.
        let mut time = f64::INFINITY;
        for _ in 0..REPEATS {
            let start = Instant::now();
            let _direction = setting.direction(&student, tangent)?;
            time = time.min(start.elapsed().as_secs_f64() * 1e3);
        }
        println!("{name:<24}{float:>12.1e}{bfloat:>12.1e}{forwards:>10}{time:>10.2}");
    }
    println!(
        "Errors of the tangent, in proportion to float64's; ms for x, the teacher and the tangent."
    );
    Ok(())
}
