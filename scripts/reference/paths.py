#!/usr/bin/env python3
"""Reference values for the noise paths and prediction types, in float64 PyTorch.

Writes tests/reference/paths.safetensors, which tests/reference_paths.rs compares the crate with. Only
formulas of the papers are used: each path has its coefficients (a, s), each prediction is a row (p, q)
of `output = p x0 + q eps`, and the clean sample comes from solving

    a x0 + s eps = x_t
    p x0 + q eps = output

so no formula of the crate's conversion table is repeated here.

Run: python3 scripts/reference/paths.py      (torch 2.13, safetensors; takes a second)
"""

import math
from pathlib import Path

import torch
from safetensors.torch import save_file

OUT = Path(__file__).resolve().parents[2] / "tests/reference/paths.safetensors"
KINDS = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16}

# Both ends of the crate's clock (0 noise, 1 data), next to the ends, and between.
TIMES = [0.0, 0.001, 0.02, 0.25, 0.5, 0.75, 0.98, 1.0]


def rectified_flow(t):
    return t, 1 - t


def vp_linear(t, beta_min=0.1, beta_max=20.0):
    """score_sde's VPSDE.marginal_prob, at its time r = 1 - t."""
    r = 1 - t
    log_mean = -0.25 * r**2 * (beta_max - beta_min) - 0.5 * r * beta_min
    return torch.exp(log_mean), torch.sqrt(-torch.expm1(2 * log_mean))


def sdxl_table():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0)


def sdxl_timestep(t):
    """Trailing spacing: t = 0 is n = 999, and n grows with the noise by one per 1/1000."""
    return (torch.round(1000 * (1 - t)) - 1).clamp(0, 999).long()


def vp_sdxl(t):
    abar = sdxl_table()[sdxl_timestep(t)]
    return abar.sqrt(), (1 - abar).sqrt()


def edm_sigma(t, low=0.002, high=80.0, rho=7.0):
    return (high ** (1 / rho) + t * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def edm(t):
    return torch.ones_like(t), edm_sigma(t)


def trig_flow(t):
    angle = math.pi / 2 * (1 - t)
    # cos(pi/2) is 6e-17 in float64 instead of 0.
    return torch.where(t == 0, torch.zeros_like(t), torch.cos(angle)), torch.sin(angle)


PATHS = {f.__name__: f for f in (rectified_flow, vp_linear, vp_sdxl, edm, trig_flow)}


def prediction_rows(a, s):
    """(p, q) with output = p x0 + q eps."""
    one, zero = torch.ones_like(a), torch.zeros_like(a)
    return {
        "sample": (one, zero),
        "noise": (zero, one),
        "flow_velocity": (-one, one),
        "velocity": (-s, a),
        "score": (zero, -1 / s),
    }


def solve(a, s, p, q, x_t, output):
    """x0 by Cramer's rule, and the size of the largest term, to which rounding errors are relative."""
    # The score's row is infinite at s = 0: multiply it by s first, where it is finite.
    det = a * q - s * p
    first, second = q / det, s / det
    x0 = first * x_t - second * output
    size = ((first * x_t).abs() + (second * output).abs()).amax(1)
    return x0, size


def main():
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
                if prediction == "sample":
                    # The answer itself, also at s = 0, where both equations are the same.
                    x0_hat, size = out, out.abs().amax(1)
                elif prediction == "score":
                    # s * (row) = (0, -1), the same equation times s.
                    x0_hat, size = solve(a, s, 0 * a, 0 * a - 1, noised.double(), s * out)
                else:
                    x0_hat, size = solve(a, s, p, q, noised.double(), out)
                tensors[f"{name}.x0"], tensors[f"{name}.size"] = x0_hat, size

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
