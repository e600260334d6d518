#!/usr/bin/env python3
"""Reference values for the noise paths and prediction types, in float64 PyTorch.

Writes tests/reference/paths.safetensors, which tests/reference/paths.rs compares the crate with, and how
far PyTorch's float32 is off. The formulas are in noise_paths.py.

Run: python3 scripts/reference/paths.py      (torch 2.13, safetensors; takes a second)
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from noise_paths import PATHS, clean_terms, edm_sigma, prediction_rows, sdxl_table, sdxl_timestep

OUT = Path(__file__).resolve().parents[2] / "tests/reference/paths.safetensors"
KINDS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}

# Both ends of the crate's clock (0 noise, 1 data), next to the ends, and between.
TIMES = [0.0, 0.001, 0.02, 0.25, 0.5, 0.75, 0.98, 1.0]


def distance(tensors, key, a, s, inputs):
    """The largest error of the same in float32, relative to the largest term."""
    x0, eps, out, noised = (inputs[name] for name in ("x0", "eps", "out", "noised"))
    samples = torch.maximum(x0.double().abs(), eps.double().abs())
    terms = (a * x0.double()).abs() + (s * eps.double()).abs()
    # Coefficients are rounded once.
    a, s = a.float(), s.float()
    pairs = [(a * x0 + s * eps, tensors[f"{key}.noised"], terms)]
    for prediction, (p, q) in prediction_rows(a, s).items():
        target = tensors[f"{key}.{prediction}.target"]
        pairs.append((p * x0 + q * eps, target, torch.maximum(samples, target.abs())))
        first, second = clean_terms(prediction, a, s, noised, out)
        exact, size = (tensors[f"{key}.{prediction}.{what}"] for what in ("x0", "size"))
        pairs.append((first + second, exact, size[:, None]))
    errors = []
    for found, exact, terms in pairs:
        error = (found.double() - exact).abs().amax(1) / terms.amax(1)
        # Singular rows are refused.
        errors.append(error[exact.isfinite().all(1)].max())
    return torch.stack(errors).max()


def main():
    distances = []
    torch.manual_seed(0)
    base = {name: torch.randn(len(TIMES), 3, dtype=torch.float64) for name in ("x0", "eps", "out")}
    tensors = {}
    for kind, dtype in KINDS.items():
        # Inputs as the type rounds them; all that follows is float64.
        time_type = torch.float64 if kind == "f64" else torch.float32
        t_in = torch.tensor(TIMES, dtype=torch.float64).to(time_type)
        inputs = {name: tensor.to(dtype) for name, tensor in base.items()}
        tensors[f"{kind}.t"] = t_in
        tensors |= {f"{kind}.{name}": tensor for name, tensor in inputs.items()}
        t = t_in.double()
        x0, eps, out = (inputs[name].double() for name in ("x0", "eps", "out"))
        for path, coefficients in PATHS.items():
            a, s = coefficients(t)
            key = f"{kind}.{path}"
            tensors[f"{key}.a"], tensors[f"{key}.s"] = a, s
            a, s = a[:, None], s[:, None]
            tensors[f"{key}.noised"] = a * x0 + s * eps
            noised = (a * x0 + s * eps).to(dtype)
            tensors[f"{key}.noised_in"] = noised
            for prediction, (p, q) in prediction_rows(a, s).items():
                name = f"{key}.{prediction}"
                tensors[f"{name}.target"] = p * x0 + q * eps
                first, second = clean_terms(prediction, a, s, noised.double(), out)
                # The largest term is what rounding errors are relative to.
                x0_hat, size = first + second, (first.abs() + second.abs()).amax(1)
                tensors[f"{name}.x0"], tensors[f"{name}.size"] = x0_hat, size
            if kind != "f64":
                found = {what: tensor.float() for what, tensor in [*inputs.items(), ("noised", noised)]}
                distances.append(distance(tensors, key, a, s, found))
    tensors["f32:distance"] = torch.stack(distances).max().float().reshape(1)

    t = tensors["f64.t"]
    tensors["sdxl.timestep"] = sdxl_timestep(t)
    tensors["sdxl.alphas_cumprod"] = sdxl_table()[[20, 399, 499, 749, 979, 999]]

    sigma, data, x, f = edm_sigma(t), 0.5, base["x0"], base["out"]
    tensors["edm.c_skip"] = data**2 / (sigma**2 + data**2)
    tensors["edm.c_out"] = sigma * data / (sigma**2 + data**2) ** 0.5
    tensors["edm.c_in"] = 1 / (data**2 + sigma**2) ** 0.5
    tensors["edm.c_noise"] = sigma.log() / 4
    # A network F(x, c) = out + c x, so that both of its inputs matter.
    column = {name: tensors[f"edm.c_{name}"][:, None] for name in ("skip", "out", "in", "noise")}
    network = f + column["noise"] * (column["in"] * x)
    tensors["edm.denoised"] = column["skip"] * x + column["out"] * network

    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    u = torch.tensor([1e-6, 0.01, 0.25, 0.5, 0.75, 0.99, 1 - 1e-6], dtype=torch.float64)
    z = normal.icdf(u)
    tensors["sampler.u"] = u
    tensors["sampler.logit_normal"] = torch.sigmoid(0.5 + 1.5 * z)
    sigma = torch.exp(-1.2 + 1.2 * -z).clamp(0.002, 80)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    tensors["sampler.log_normal"] = (high - sigma ** (1 / 7)) / (high - low)

    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, OUT)
    print(f"{OUT}: {len(tensors)} tensors, {OUT.stat().st_size / 1000:.0f} kB")


main()
