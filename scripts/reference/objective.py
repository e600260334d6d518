"""Reference values of the objective, in stock PyTorch float64, written from the formulas.

Nothing here is shared with the crate: losses are the literal `0.5 mean (x - sg(x + d))^2`, their
gradients come from autograd, weightings are applied to errors of the clean sample. Needs torch and
safetensors; from the root of the repository:

    python3 scripts/reference/objective.py

writes tests/reference/objective.safetensors, which tests/reference_objective.rs compares with.
"""

import math
import pathlib

import torch
from safetensors.torch import save_file

torch.set_default_dtype(torch.float64)
SHAPE = (3, 2, 4, 4)
ALPHA = 4.0
TEACHER_GAIN, FAKE_GAIN = 0.8, 0.6
OUT = {}

TIMES = {
    "middle": [0.2, 0.5, 0.7],
    "dm": [0.6, 0.35, 0.15],
    "bounds": [0.02, 0.98, 0.5],
    "near": [1e-6, 1.0 - 1e-6, 0.5],
    "ends": [0.0, 1.0, 0.5],
}
PREDICTIONS = ["sample", "noise", "flow_velocity", "velocity", "score"]


def rounded(tensor):
    """Inputs are float32 numbers, so that a run in float32 starts from the very same ones: 1 - t
    near the clean end would otherwise carry their rounding, magnified."""
    return tensor.float().double()


def wave(phase, rate):
    index = torch.arange(math.prod(SHAPE), dtype=torch.float64)
    values = torch.sin(rate * index + phase) + 0.3 * torch.cos(1.9 * index * rate)
    return rounded(values).reshape(SHAPE)


def column(values):
    return rounded(torch.tensor(values)).reshape(-1, 1, 1, 1)


def network(x, t, c, gain):
    """A network of anything: no part of it is special."""
    return gain * torch.sin(x + c) * (0.5 + t) + 0.1 * x


def clean(prediction, out, x_t, t):
    """x0 from a network's output on rectified flow, x_t = t x0 + (1 - t) eps."""
    a, s = t, 1 - t
    if prediction == "sample":
        return out
    if prediction == "noise":
        return (x_t - s * out) / a
    if prediction == "flow_velocity":
        return x_t - s * out
    if prediction == "velocity":
        return (a * x_t - s * out) / (a * a + s * s)
    return (x_t + s * s * out) / a


def target(prediction, x0, eps, t):
    a, s = t, 1 - t
    return {
        "sample": lambda: x0,
        "noise": lambda: eps,
        "flow_velocity": lambda: eps - x0,
        "velocity": lambda: a * eps - s * x0,
        "score": lambda: -eps / s,
    }[prediction]()


def kept_mean(values, mask):
    """Mean of each sample over the elements kept, as a column."""
    means = [v[m].mean() if m.any() else torch.zeros(()) for v, m in zip(values, mask)]
    return torch.stack(means).reshape(-1, 1, 1, 1)


def normaliser(name, x, cond, guided, mask):
    def mean(reference):
        return kept_mean((x - reference).abs(), mask)

    def over_batch(reference):
        return (x - reference).abs()[mask].mean()

    return {
        "off": lambda: torch.ones(1),
        "dmd2": lambda: mean(guided),
        "fastgen": lambda: mean(guided) + 1e-6,
        "fastvideo": lambda: over_batch(guided),
        "simple_tuner": lambda: mean(guided).clamp(min=1e-6),
        "rcm": lambda: mean(guided).clamp(min=1e-5),
        "guided": lambda: mean(guided).clamp(min=0.1),
        "cdm": lambda: mean(cond).clamp(min=0.1),
        "conditional_floor_2": lambda: mean(cond).clamp(min=2.0),
        "port": lambda: mean(cond) + 1e-8,
        "conditional_batch": lambda: over_batch(cond).clamp(min=0.1),
    }[name]()


NORMALISERS = ["off", "dmd2", "fastgen", "fastvideo", "simple_tuner", "rcm", "guided", "cdm",
               "conditional_floor_2", "port", "conditional_batch"]


def look(x, eps, times, prediction):
    t = column(TIMES[times])
    x_t = t * x + (1 - t) * eps
    cond = clean(prediction, network(x_t, t, COND, TEACHER_GAIN), x_t, t)
    null = clean(prediction, network(x_t, t, NULL, TEACHER_GAIN), x_t, t)
    fake = clean(prediction, network(x_t, t, COND, FAKE_GAIN), x_t, t)
    return x_t, cond, null, fake


def surrogate(x, direction):
    return 0.5 * ((x - (x + direction).detach()) ** 2).mean()


def student(name, terms, norm, times, prediction="flow_velocity", x=None, eps=None, mask=None):
    """Loss and gradient of a sum of terms, each (which, times, noise)."""
    x = (X if x is None else x).clone().requires_grad_()
    mask = torch.ones(SHAPE, dtype=torch.bool) if mask is None else mask
    loss = torch.zeros(())
    for which, at, noise in terms:
        with torch.no_grad():
            _, cond, null, fake = look(x, noise if eps is None else eps, at or times, prediction)
            guided = null + ALPHA * (cond - null)
            n = normaliser(norm, x, cond, guided, mask)
            d = (ALPHA - 1) * (cond - null) if which == "ca" else cond - fake
            direction = torch.where(mask, d / n, torch.zeros(()))
        loss = loss + surrogate(x, direction)
    (gradient,) = torch.autograd.grad(loss, x)
    OUT[name + ":loss"], OUT[name + ":gradient"] = loss.detach(), gradient


def dmd2(name, times):
    """The fused loss of DMD2: guided teacher against fake, one normaliser."""
    x = X.clone().requires_grad_()
    with torch.no_grad():
        _, cond, null, fake = look(x, EPS, times, "flow_velocity")
        guided = null + ALPHA * (cond - null)
        grad = (fake - guided) / (x - guided).abs().mean(dim=(1, 2, 3), keepdim=True)
    loss = 0.5 * torch.nn.functional.mse_loss(x, (x - grad).detach())
    OUT[name + ":gradient"] = torch.autograd.grad(loss, x)[0]


def weight(weighting, t):
    """W of the error of the clean sample."""
    a, s = t, 1 - t
    if weighting == "min_snr":
        return (a * a / (s * s)).clamp(max=5.0)
    if weighting == "edm":
        sigma, d = s / a, 0.5
        return (sigma**2 + d**2) / (sigma * d) ** 2
    return {
        "as_sample": lambda: torch.ones_like(t),
        "as_noise": lambda: (a / s) ** 2,
        "as_flow_velocity": lambda: 1 / s**2,
        "as_velocity": lambda: ((a * a + s * s) / s) ** 2,
        "as_score": lambda: (a / s**2) ** 2,
    }[weighting]()


WEIGHTINGS = ["uniform", "min_snr", "edm"] + ["as_" + p for p in PREDICTIONS]


def fake_loss(name, prediction, weighting, times, mask=None):
    gain = torch.tensor(FAKE_GAIN, requires_grad=True)
    t = column(TIMES[times])
    x_t = t * X + (1 - t) * EPS
    out = network(x_t, t, COND, gain)
    if weighting == "uniform":
        error = (target(prediction, X, EPS, t) - out) ** 2
    else:
        error = weight(weighting, t) * (X - clean(prediction, out, x_t, t)) ** 2
    loss = (error if mask is None else error * mask).mean()
    (slope,) = torch.autograd.grad(loss, gain)
    OUT[name + ":loss"], OUT[name + ":gradient"] = loss.detach(), slope


def diagnostics():
    def rms(v):
        return v.flatten(1).square().mean(1).sqrt()

    def cos(v, w):
        return torch.nn.functional.cosine_similarity(v.flatten(1), w.flatten(1))

    x_t, cond, null, _ = look(X, EPS, "middle", "flow_velocity")
    n_ca = (X - cond).abs().flatten(1).mean(1).clamp(min=0.1)
    ca = (ALPHA - 1) * (cond - null) / n_ca.reshape(-1, 1, 1, 1)
    t = column(TIMES["dm"])
    x_t, cond, _, fake = look(X, EPS_DM, "dm", "flow_velocity")
    n_dm = (X - cond).abs().flatten(1).mean(1).clamp(min=0.1)
    dm = (cond - fake) / n_dm.reshape(-1, 1, 1, 1)
    real_u, fake_u = (x_t - cond) / (1 - t), (x_t - fake) / (1 - t)
    values = {
        "x_mean": X.flatten(1).mean(1),
        "x_std": X.flatten(1).var(1, unbiased=False).sqrt(),
        "x_rms": rms(X),
        "ca_n": n_ca,
        "dm_n": n_dm,
        "ca_update_rms": rms(ca),
        "dm_update_rms": rms(dm),
        "dm_rel_gap": rms(real_u - fake_u) / rms(real_u),
        "dm_cos": cos(real_u, fake_u),
        "dm_mag_ratio": rms(fake_u) / rms(real_u),
        "ca_dm_cos": cos(ca, dm),
        "dm_to_ca": (rms(dm).mean() / rms(ca).mean()).reshape(1),
        "variance_drift": (X.flatten(1).var(1, unbiased=False).mean() / 0.4).log().reshape(1),
    }
    OUT.update({"diagnostics:" + name: value.clone() for name, value in values.items()})


X, EPS, EPS_DM = wave(0.3, 0.7), wave(5.0, 1.3), wave(9.0, 1.1)
COND, NULL = wave(1.1, 0.5), wave(2.9, 0.9)
MASKS = {
    "samples": torch.tensor([True, False, True]).reshape(-1, 1, 1, 1).expand(SHAPE).contiguous(),
    "elements": wave(0.0, 2.1) > -0.2,
}
OUT.update({"x": X, "noise": EPS, "noise_dm": EPS_DM, "cond": COND, "null": NULL})
OUT.update({"times_" + name: rounded(torch.tensor(values)) for name, values in TIMES.items()})
OUT.update({"mask_" + name: mask for name, mask in MASKS.items()})

CA, DM = ("ca", None, EPS), ("dm", None, EPS)
COUPLED, DECOUPLED = [CA, DM], [CA, ("dm", "dm", EPS_DM)]
for norm in NORMALISERS:
    student(f"ca/{norm}", [CA], norm, "middle")
    student(f"dm/{norm}", [DM], norm, "middle")
    student(f"coupled/{norm}", COUPLED, norm, "middle")
for norm in ["off", "cdm", "port"]:
    student(f"decoupled/{norm}", DECOUPLED, norm, "middle")
dmd2("dmd2", "middle")
for prediction in PREDICTIONS:
    student(f"prediction/{prediction}", COUPLED, "guided", "middle", prediction)
    student(f"bounds/{prediction}", COUPLED, "guided", "bounds", prediction)
for prediction in ["sample", "flow_velocity", "velocity"]:
    student(f"near/{prediction}", COUPLED, "guided", "near", prediction)
    student(f"ends/{prediction}", COUPLED, "guided", "ends", prediction)
for which, mask in MASKS.items():
    for norm in ["cdm", "fastvideo"]:
        student(f"mask_{which}/{norm}", COUPLED, norm, "middle", mask=mask)
    fake_loss(f"mask_{which}/fake", "flow_velocity", "min_snr", "middle", mask)
narrow = [v.to(torch.bfloat16).double() for v in (X, EPS)]
for norm in ["cdm", "guided"]:
    student(f"bf16/{norm}", COUPLED, norm, "middle", x=narrow[0], eps=narrow[1])
for prediction in PREDICTIONS:
    for weighting in WEIGHTINGS:
        fake_loss(f"fake/{prediction}/{weighting}", prediction, weighting, "middle")
        fake_loss(f"fake_bounds/{prediction}/{weighting}", prediction, weighting, "bounds")
for weighting in ["uniform", "min_snr", "as_sample"]:
    fake_loss(f"fake_ends/{weighting}", "flow_velocity", weighting, "ends")
diagnostics()

for name, value in OUT.items():
    assert torch.isfinite(value.double()).all(), name
path = pathlib.Path("tests/reference/objective.safetensors")
path.parent.mkdir(parents=True, exist_ok=True)
save_file({name: value.contiguous() for name, value in OUT.items()}, path)
print(f"{len(OUT)} tensors, {path.stat().st_size} bytes")
