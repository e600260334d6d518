//! A prior for the pixels of small pictures, from two moments of the real ones.

use anyhow::Result;
use decoupled_dmd::arithmetic::Arithmetic as _;
use tch::{Kind, TchError, Tensor};

/// Side of the pictures that the maximum mean discrepancy compares.
const SIDE: i64 = 8;

/// Small pictures `[B, C, 8, 8]`.
pub fn small(images: &Tensor) -> Result<Tensor, TchError> {
    images.f_adaptive_avg_pool2d([SIDE, SIDE])
}

/// A normal distribution with the mean and covariance of small real pictures: all that a regularizer is told of them.
#[derive(Debug)]
pub struct GaussianPrior {
    /// `[D]`
    mean: Tensor,
    /// A root of the covariance, `[D, D]`.
    root: Tensor,
}

impl GaussianPrior {
    /// From pictures `[N, C, H, W]`.
    ///
    /// # Errors
    /// If libtorch fails, as for want of pictures.
    pub fn of(images: &Tensor) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let rows = small(images)?.f_flatten(1, -1)?.f_to_kind(Kind::Double)?;
        let mean = rows.f_mean_dim(&[0i64][..], false, None::<Kind>)?;
        let centred = rows.f_sub(&mean)?;
        let covariance = centred.f_tr()?.f_matmul(&centred)?.over((rows.size()[0] - 1) as f64)?;
        let (values, vectors) = covariance.f_linalg_eigh("L")?;
        // Of fewer pictures than pixels, rounding puts zeros on both sides of zero.
        Ok(Self { mean, root: vectors.f_mul(&values.at_least(0.0)?.f_sqrt()?)? })
    }

    /// As many samples as `like` `[M, D]`, in its type and on its device, drawn from libtorch's generator.
    ///
    /// # Errors
    /// If libtorch fails.
    pub fn sample(&self, like: &Tensor) -> Result<Tensor, TchError> {
        let [mean, root] = [&self.mean, &self.root]
            .map(|tensor| tensor.f_to_device(like.device())?.f_to_kind(like.f_kind()?));
        like.f_randn_like()?.f_matmul(&root?.f_tr()?)?.f_add(&mean?)
    }
}
