"""Noise paths and prediction types on the crate's clock (0 noise, 1 data), from the papers' formulas.

Each path has its coefficients (a, s), each prediction is a row (p, q) of `output = p x0 + q eps`, and
the clean sample comes from solving

    a x0 + s eps = x_t
    p x0 + q eps = output

so no formula of the crate's conversion table is repeated here.
"""

import math

import torch


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


PREDICTIONS = ["sample", "noise", "flow_velocity", "velocity", "score"]


def clean_terms(prediction, a, s, x_t, output):
    """The two terms whose sum is x0, by Cramer's rule."""
    if prediction == "sample":
        # The answer itself, also at s = 0, where both equations are the same.
        return output, torch.zeros_like(output)
    p, q = prediction_rows(a, s)[prediction]
    if prediction == "score":
        # The score's row is infinite at s = 0: the same equation times s is finite there.
        p, q, output = 0 * a, 0 * a - 1, s * output
    det = a * q - s * p
    return q / det * x_t, -(s / det * output)


def clean(prediction, a, s, x_t, output):
    first, second = clean_terms(prediction, a, s, x_t, output)
    return first + second


def target(prediction, a, s, x0, eps):
    """What a network of this prediction is trained to output."""
    if prediction in ("sample", "noise"):
        return x0 if prediction == "sample" else eps
    p, q = prediction_rows(a, s)[prediction]
    return p * x0 + q * eps
