//! The shape of the models that tests run.

use zimage::Config;

/// Width 24, one block of each kind, latents of 4 channels.
pub fn narrow() -> Config {
    Config {
        in_channels: 4,
        dim: 24,
        n_layers: 1,
        n_refiner_layers: 1,
        n_heads: 2,
        n_kv_heads: 2,
        cap_feat_dim: 8,
        axes_dims: vec![4, 4, 4],
        axes_lens: vec![96, 16, 16],
        ..Config::default()
    }
}
