//! The transformer.

use anyhow::Result;
use tch::{Device, Kind, Tensor};
use tch_training::lora::{Lora, LoraSettings};
use zimage::Role;
use zimage::model::{BLOCK_LINEARS, Storage};

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

/// A base in 8 bits with an adapter of its own, which was read on the CPU, below an adapter that is trained.
#[test]
fn a_finetuned_base_in_8_bits() {
    // In bfloat16 the gradients of the pairs, which are small sums of large terms, are 0.1 apart.
    for (kind, tolerance) in [(Kind::Float, float32()), (Kind::BFloat16, 0.3)] {
        compare(&format!("a base in 8 bits in {kind:?}"), tolerance, |device| -> Result<_> {
            let model = teacher(device, kind)?;
            let layers = model.config().linears();
            // On the CPU, as it is read from a file; filled, so that it acts.
            let adapter = |device| -> Result<Lora> {
                let settings = LoraSettings { rank: 2, ..LoraSettings::on(BLOCK_LINEARS) };
                let lora = Lora::new(&layers, &settings, device)?;
                let _guard = tch::no_grad_guard();
                for (phase, (_, tensor)) in (0..).zip(lora.parameters()) {
                    let values = wave(&tensor.size(), f64::from(phase), Kind::Float) * 0.1;
                    tensor.shallow_clone().copy_(&values);
                }
                Ok(lora)
            };
            let own = adapter(Device::Cpu)?.frozen(0.5, Kind::Float, Device::Cpu)?;
            let base = model.with_adapter(&own)?.stored(Storage::Int8)?;
            let student = adapter(device)?;
            let latents = wave(&[2, 3, 16, 16], 0.4, Kind::Float).to_device(device);
            let t = Tensor::from_slice(&[0.25f32, 0.75]).to_device(device);
            let encoded = base.encode_captions(&captions(&[5, 9]), Role::BASE)?;
            let role = Role::adapted(&student);
            let _table = base.forward_encoded(&latents, &t, &encoded, role)?;
            let output = waits(device, "a forward pass", 0, || {
                base.forward_encoded(&latents, &t, &encoded, role)
            })?;
            let loss = output.square().mean(Kind::Float);
            waits(device, "a backward pass", 0, || loss.backward());
            let gradients = student.parameters().into_iter().map(|(_, leaf)| leaf.grad());
            let mut results = vec![output.detach(), loss.detach()];
            results.extend(gradients.filter(Tensor::defined));
            Ok(results)
        });
    }
}
