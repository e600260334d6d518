#!/usr/bin/env python3
"""Reference values for the autoencoder, from diffusers' own AutoencoderKL.

Writes two small random models as diffusers folders under crates/zimage/tests/reference/autoencoder/, each with a file
of inputs, outputs and gradients, which autoencoder.rs beside it compares the crate with. Results
are computed in float64, with the distance of diffusers' float32 from them, and the weights are stored in
bfloat16 to keep the files small: the values used are the rounded ones.

Run: python3 scripts/reference/autoencoder.py      (torch 2.13, diffusers 0.42; takes a few seconds)
"""

import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from precision import distances
from safetensors.torch import load_file, save_file

OUT = Path(__file__).resolve().parents[2] / "crates/zimage/tests/reference/autoencoder"

# Every path of the code: channels that change and that stay, one and more layers, image sizes that are
# no multiple of the spatial factor.
MODELS = {
    "two_levels": dict(
        config=dict(
            block_out_channels=[8, 12],
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        images=[(2, 8, 12), (1, 9, 7)],
        latents=[(2, 4, 6), (1, 5, 3)],
    ),
    "four_levels": dict(
        config=dict(
            block_out_channels=[8, 8, 16, 16],
            layers_per_block=2,
            latent_channels=3,
            norm_num_groups=8,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
        images=[(1, 24, 16), (1, 35, 18)],
        latents=[(1, 4, 3), (2, 3, 2)],
    ),
}


def build(config, seed):
    torch.manual_seed(seed)
    model = AutoencoderKL(
        **config,
        down_block_types=["DownEncoderBlock2D"] * len(config["block_out_channels"]),
        up_block_types=["UpDecoderBlock2D"] * len(config["block_out_channels"]),
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms start at one and biases near zero, which would hide a swap.
            spread = 0.3 if parameter.dim() == 1 else 0.05
            parameter.add_(spread * torch.randn_like(parameter))
        # The last channel's log-variance lies beyond the limit of 20.
        model.encoder.conv_out.bias[-1] += 40
    return model.to(torch.bfloat16)


def draw(model, images, latents):
    """Inputs, by the names that they have in the tests: `encode.{i}.image` and so on."""
    channels, factor = model.config.latent_channels, 2 ** (len(model.config.block_out_channels) - 1)
    tensors = {}
    for i, (batch, height, width) in enumerate(images):
        image = torch.rand(batch, 3, height, width, dtype=torch.float64) * 2 - 1
        noise = torch.randn(batch, channels, height // factor, width // factor)
        tensors |= {f"encode.{i}.image": image.float(), f"encode.{i}.noise": noise}
    for i, (batch, height, width) in enumerate(latents):
        z = torch.randn(batch, channels, height, width)
        cotangent = torch.randn(batch, 3, height * factor, width * factor)
        tensors |= {f"decode.{i}.latents": z, f"decode.{i}.cotangent": cotangent}
    return tensors


def answers(model, inputs):
    """What the model makes of the inputs, in its own type."""
    scaling, shift = model.config.scaling_factor, model.config.shift_factor
    of = {name: tensor.to(model.dtype) for name, tensor in inputs.items()}
    tensors = {}
    for i in range(2):
        posterior = model.encode(of[f"encode.{i}.image"]).latent_dist
        sample = posterior.mean + posterior.std * of[f"encode.{i}.noise"]
        tensors[f"encode.{i}.mean"] = (posterior.mean - shift) * scaling
        tensors[f"encode.{i}.sample"] = (sample - shift) * scaling
        z = of[f"decode.{i}.latents"].requires_grad_()
        image = model.decode(z / scaling + shift).sample
        (gradient,) = torch.autograd.grad(image, z, of[f"decode.{i}.cotangent"])
        tensors |= {f"decode.{i}.image": image, f"decode.{i}.gradient": gradient}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def main():
    for seed, (name, case) in enumerate(MODELS.items()):
        folder = OUT / name
        shutil.rmtree(folder, ignore_errors=True)
        build(case["config"], seed).save_pretrained(folder / "vae")
        # As any user would read it, then in float64.
        model = AutoencoderKL.from_pretrained(folder / "vae")
        inputs = draw(model, case["images"], case["latents"])
        rough = answers(model.float(), inputs)
        exact = answers(model.double(), inputs)
        tensors = inputs | exact | distances(rough, exact)
        tensors = {name: tensor.detach().float().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, folder / "values.safetensors")
        weights = load_file(folder / "vae/diffusion_pytorch_model.safetensors")
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"{name}: {len(weights)} tensors, {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
