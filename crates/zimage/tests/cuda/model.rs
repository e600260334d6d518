//! The transformer.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use zimage::Role;

use crate::common::wave;
use crate::device::{compare, float32, waits};
use crate::teacher;

/// Features of captions `[L_i, F]` on the CPU.
fn captions(lengths: &[i64]) -> Vec<Tensor> {
    lengths.iter().map(|length| wave(&[*length, 64], *length as f64, Kind::Float)).collect()
}

#[test]
fn a_forward_and_a_backward_pass() {
    // Half a unit of bfloat16's last bit, some layers deep.
    for (kind, tolerance) in [(Kind::Float, float32()), (Kind::BFloat16, 5e-2)] {
        compare(&format!("the transformer in {kind:?}"), tolerance, |device| -> Result<_> {
            let model = teacher(device, kind)?;
            model.set_requires_grad(true)?;
            // 16 image tokens: half of those that attention sees are padding.
            let latents = wave(&[2, 3, 16, 16], 0.4, Kind::Float).to_device(device);
            let t = Tensor::from_slice(&[0.25f32, 0.75]).to_device(device);
            let encoded = model.encode_captions(&captions(&[5, 9]), Role::BASE)?;
            // The first pass makes the rotary table.
            let _table = model.forward_encoded(&latents, &t, &encoded, Role::BASE)?;
            let output = waits(device, "a forward pass", 0, || {
                model.forward_encoded(&latents, &t, &encoded, Role::BASE)
            })?;
            let loss = output.square().mean(Kind::Float);
            waits(device, "a backward pass", 0, || loss.backward());
            let gradients = model.named_parameters().into_iter().map(|(_, tensor)| tensor.grad());
            let mut results = vec![output.detach(), loss.detach()];
            results.extend(gradients.filter(Tensor::defined));
            Ok(results)
        });
    }
}

#[test]
fn items_may_be_anywhere() {
    compare("items of several sizes", float32(), |device| -> Result<_> {
        let model = teacher(device, Kind::Float)?;
        let latents = [[3, 1, 16, 16], [3, 1, 24, 16]].map(|size| wave(&size, 0.4, Kind::Float));
        let t = Tensor::from_slice(&[0.25f32, 0.75]);
        let outputs = model.forward_items(&latents, &t, &captions(&[5, 40]), Role::BASE)?;
        assert!(outputs.iter().all(|output| output.device() == Device::Cpu));
        let moved = latents.map(|tensor| tensor.to_device(device));
        model.forward_items(&moved, &t, &captions(&[5, 40]), Role::BASE)
    });
}
